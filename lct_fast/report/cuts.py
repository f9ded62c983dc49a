"""What crossed each cut of a run: bytes raw and sent, and how codebooks were used, as HTML."""

from dataclasses import dataclass
from typing import Any

from lct_fast.report.run import Run, number, numbers
from lct_fast.report.svg import escape
from lct_fast.report.table import NOTHING, bytes_count, cells, count, figure, table

# Width of a bar, in pixels: the bytes of the cut with the most.
BAR = 120
LEGEND = {
    "sent": "codes, sent forward",
    "codebook": "codebooks",
    "serial": "serial steps, both ways",
    "feedback": "feedback",
    "raw": "the same forward in fp32",
}


@dataclass(frozen=True)
class Bytes:
    """Bytes a sample over one cut, or over all of them; None where not recorded.

    ``wire`` is all that went forward in coded form, ``codebook`` the part of it that was codebooks.
    """

    name: str
    codec: str
    raw: float | None
    wire: float | None
    codebook: float | None
    serial: float | None
    feedback: float | None

    @property
    def sent(self) -> float | None:
        """All but the feedback."""
        return None if self.wire is None else self.wire + (self.serial or 0.0)

    @property
    def ratio(self) -> float | None:
        """How many times fewer bytes than fp32."""
        return self.raw / self.sent if self.raw is not None and self.sent else None


def legend() -> str:
    """What the parts of a bar are, as HTML."""
    swatch = '<svg viewBox="0 0 24 12" aria-hidden="true"><rect class="{}" width="24" height="12"/></svg>'
    body = "".join(f"<li>{swatch.format(kind)}<span>{told}</span></li>" for kind, told in LEGEND.items())
    return f'<ul class="legend">{body}</ul>'


def bytes_of(run: Run) -> list[Bytes]:
    """Those of each cut, then those of all as the summary has them; empty where nothing crossed."""
    cuts = run.summary.get("cuts")
    found = (
        [_cut(k, cut) for k, cut in enumerate(cuts, 1) if isinstance(cut, dict)]
        if isinstance(cuts, list)
        else []
    )
    summary = run.summary
    wire, raw = (number(summary.get(f"{key}_bytes_per_sample")) for key in ("wire", "raw"))
    if not wire or not raw:
        return []
    steps = summary.get("serial")
    serial = number(steps.get("bytes_per_sample")) if isinstance(steps, dict) else None
    codebooks = [cut.codebook for cut in found if cut.codebook is not None]
    feedback = number(summary.get("feedback_bytes_per_sample"))
    # The summary counts serial steps as sent.
    whole = Bytes(
        name="all cuts",
        codec="" if found else str(summary.get("codec", "")),
        raw=raw,
        wire=wire - (serial or 0.0),
        codebook=sum(codebooks) if codebooks else None,
        serial=serial,
        feedback=feedback,
    )
    return [*found, whole]


def _cut(k: int, cut: dict[str, Any]) -> Bytes:
    keys = ("raw", "wire", "codebook", "serial", "feedback")
    return Bytes(
        f"cut {k}", str(cut.get("codec", "")), *(number(cut.get(f"{k}_bytes_per_sample")) for k in keys)
    )


def bytes_table(run: Run, name: str) -> str:
    """A row a cut and one for all, with a bar each; empty where nothing crossed."""
    lines = bytes_of(run)
    if not lines:
        return ""
    scaled = lines[:-1] or lines
    largest = max(max(line.raw or 0.0, (line.sent or 0.0) + (line.feedback or 0.0)) for line in scaled)
    columns = [
        # The sum of the cuts would not fit the scale of one.
        ("of fp32", [_bar(line, largest) if line in scaled else "" for line in lines]),
        ("codec", [escape(line.codec) or NOTHING for line in lines]),
        ("fp32", [bytes_count(line.raw) for line in lines]),
        ("sent", [bytes_count(line.sent) for line in lines]),
    ]
    if any(line.codebook for line in lines):
        columns.append(("of it codebooks", [bytes_count(line.codebook) for line in lines]))
    if any(line.serial for line in lines):
        columns.append(("of it serial steps", [bytes_count(line.serial) for line in lines]))
    columns.append(("fp32 / sent", [figure(line.ratio, places=1) for line in lines]))
    columns.append(("feedback", [bytes_count(line.feedback) for line in lines]))
    heads = ["cut", *(head for head, _ in columns)]
    body = [(line.name, cells(of_row)) for line, *of_row in zip(lines, *(c for _, c in columns), strict=True)]
    made = table("Bytes a sample", f"<tr>{cells(heads, head=True)}</tr>", body)
    return f'<div class="scroll fit" role="region" tabindex="0" aria-label="Bytes of {escape(name)}">{made}</div>'


def _bar(line: Bytes, largest: float) -> str:
    """What was sent over what fp32 would have been, to the scale of ``largest``."""
    codebook = line.codebook or 0.0
    parts = [("sent", (line.wire or 0.0) - codebook), ("codebook", codebook), ("serial", line.serial or 0.0)]
    parts.append(("feedback", line.feedback or 0.0))
    scale = BAR / largest
    drawn = f'<rect class="raw" width="{(line.raw or 0.0) * scale:.1f}" height="16"/>'
    at = 0.0
    for kind, size in parts:
        if size > 0:
            drawn += (
                f'<rect class="{kind}" x="{at:.1f}" y="3" width="{max(0.5, size * scale):.1f}" height="10"/>'
            )
            at += size * scale
    label = escape(f"{line.name}: {bytes_count(line.sent)} of {bytes_count(line.raw)} bytes a sample")
    return f'<svg class="bar" viewBox="0 0 {BAR} 16" role="img" aria-label="{label}">{drawn}</svg>'


def codebook_table(run: Run, name: str) -> str:
    """The last reading of each cut's codebook; empty where there is none."""
    if not run.codebooks:
        return ""
    cuts = max(len(numbers(record.get("used"))) for record in run.codebooks)
    body = []
    for k in range(cuts):
        last = next((r for r in reversed(run.codebooks) if _value(r, "used", k) is not None), None)
        if last is None:
            continue
        words, perplexity = _value(last, "codewords", k), _value(last, "perplexity", k)
        share = perplexity / words if perplexity is not None and words else None
        shown = [
            count(words),
            figure(_value(last, "used", k), 100, 1),
            figure(perplexity, places=1),
            figure(share, 100, 1),
            figure(_value(last, "drift", k), 100, 2),
            count(_value(last, "codebooks", k)),
            count(_value(last, "batches", k)),
            count(number(last.get("step"))),
        ]
        body.append((f"cut {k + 1}", cells(shown)))
    heads = ["cut", "codewords", "in use, %", "perplexity", "of the codewords, %", "drift, % of the error"]
    heads += ["codebooks sent", "over batches", "up to batch"]
    made = table("At the last reading", f"<tr>{cells(heads, head=True)}</tr>", body)
    label = escape(f"Codebooks of {name}")
    return (
        f'<div class="scroll fit" role="region" tabindex="0" aria-label="{label}">{made}</div>'
        if body
        else ""
    )


def _value(record: dict[str, Any], key: str, k: int) -> float | None:
    values = numbers(record.get(key))
    return values[k] if k < len(values) else None
