"""Codecs: accuracy against bytes, and time on two links."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import at_most, between, listed, paragraph, table, word
from benchmarks.tables.results import Results

Row = dict[str, Any]
POINTS, CODED = "points_from_none", "points_from_none_coded_evaluation"
METHODS = ("greedy", "local-critic")
# Bytes of one codec over another's that pass for equal.
_EQUAL = (0.97, 1.3)
_DATA = {"digits": "wire_digits", "CIFAR-10": "wire_cifar10"}


def _points(value: Row) -> str:
    half = value["half_width"]
    return f"{value['mean']:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def coded(results: Results, file: str) -> list[Row]:
    """The rows with a codec."""
    return [row for row in results(file)["rows"] if row["codec"] != "none"]


def _table(results: Results, file: str) -> str:
    rows = [
        [
            row["method"],
            f"`{row['codec']}`",
            f"{row['times_fewer_bytes']:.1f}",
            _points(row[POINTS]),
            _points(row[CODED]),
        ]
        for row in coded(results, file)
    ]
    return table(["method", "codec", "times fewer bytes", "points", "points, coded at evaluation"], rows)


def digits(results: Results) -> str:
    """Folds and seeds in pairs."""
    return _table(results, "wire_digits")


def cifar10(results: Results) -> str:
    """Seeds in pairs."""
    return _table(results, "wire_cifar10")


def _without(results: Results, file: str) -> dict[str, Row]:
    return {row["method"]: row for row in results(file)["rows"] if row["codec"] == "none"}


def _beside(results: Results, file: str) -> list[tuple[Row, Row, Row]]:
    """A vq row, that of a codec without a codebook that takes as many bytes, and how far vq is ahead."""
    by_codec = {(row["method"], row["codec"]): row for row in coded(results, file)}
    return [
        (row, other, found)
        for (method, _), row in by_codec.items()
        for rival, found in row["points_ahead_of"].items()
        if (other := by_codec[method, rival])
        and _EQUAL[0] < row["times_fewer_bytes"] / other["times_fewer_bytes"] < _EQUAL[1]
    ]


def ahead(results: Results) -> str:
    """vq beside each codec without a codebook that takes as many bytes, in pairs of the same seed and data."""
    rows = [
        [
            *(data, row["method"], f"`{row['codec']}`", f"{row['times_fewer_bytes']:.1f}"),
            *(f"`{other['codec']}`", f"{other['times_fewer_bytes']:.1f}", str(found["pairs"])),
            *(_points(found["plain"]), _points(found["coded_evaluation"])),
        ]
        for data, file in _DATA.items()
        for row, other, found in _beside(results, file)
    ]
    head = ["data", "method", "vq", "times fewer", "beside", "times fewer", "pairs", "points ahead"]
    return table([*head, "ahead, coded at evaluation"], rows)


def ahead_words(results: Results) -> str:
    """The same in a paragraph: by data, of each kind of rival."""
    said = []
    for data, file in _DATA.items():
        for kind in ("int2", "topk"):
            found = [f for _, other, f in _beside(results, file) if other["codec"].startswith(kind)]
            if found:
                means = [f["plain"]["mean"] for f in found]
                told = [f["plain"] for f in found if f["plain"]["half_width"] is not None]
                sure = sum(abs(p["mean"]) > p["half_width"] for p in told)
                certainty = f"{word(sure) if sure else 'none'} of {word(len(told))} told from 0 with 95 %"
                said.append(
                    f"On {data}, beside `{kind}`: {between(means, '+.2f')} points, "
                    f"{certainty if told else 'one seed each'}."
                )
    return paragraph(*said)


def _folds(results: Results) -> str:
    """What a row's interval on digits is over: ``five folds of three seeds``."""
    seeds = len({run["seed"] for run in results("wire_digits")["runs"]})
    folds = f"{word(_without(results, 'wire_digits')['greedy']['runs'] // seeds)} folds"
    return folds if seeds == 1 else f"{folds} of {word(seeds)} seeds"


def digits_intro(results: Results) -> str:
    """What the table of digits is."""
    plain = _without(results, "wire_digits")
    accuracies = ", ".join(f"{method} {plain[method]['accuracy']:.2f} %" for method in METHODS)
    return paragraph(
        f"Fewer bytes on the wire, and what they cost. Digits, all 1,797 as {_folds(results)}, 4 groups, the command "
        f"line's defaults: points of the last exit's accuracy from the same fold and seed without a codec "
        f"({accuracies}), mean and 95 % interval over them. Bytes count codebooks. "
        "[benchmarks/results/wire_digits.json](benchmarks/results/wire_digits.json)",
    )


def cifar10_intro(results: Results) -> str:
    """What the table of CIFAR-10 is, and over how many seeds."""
    plain = _without(results, "wire_cifar10")
    seeds = ", ".join(
        f"{method} {plain[method]['accuracy']:.2f} % ({word(plain[method]['runs'])} "
        f"seed{'s' if plain[method]['runs'] > 1 else ''})"
        for method in METHODS
        if method in plain
    )
    single = any(row[POINTS]["half_width"] is None for row in coded(results, "wire_cifar10"))
    return paragraph(
        "The same on CIFAR-10: 12,500 training images, 8 epochs, the network of the table below with critics on 4x4 "
        "pooling, `local-critic` with the default loss for images.",
        f"Without a codec, mean: {seeds}.",
        "Where an interval stands it is over a row's seeds, in pairs; the other rows are one seed."
        if single
        else "The intervals are over a row's seeds, in pairs.",
        "A codec may be named for each cut. "
        "[benchmarks/results/wire_cifar10.json](benchmarks/results/wire_cifar10.json)",
    )


def _pair(row: Row) -> str:
    """Points, and in parentheses when codes are used at evaluation too."""
    return f"{row[POINTS]['mean']:+.1f} ({row[CODED]['mean']:+.1f})"


def ends(results: Results, method: str) -> str:
    """One sentence: the codec that costs a method least on CIFAR-10, and the one that costs it most."""
    rows = [row for row in coded(results, "wire_cifar10") if row["method"] == method]
    rows.sort(key=lambda row: -float(row[POINTS]["mean"]))
    best, worst = rows[0], rows[-1]
    said = (
        f"`{method}` does best with `{best['codec']}`, {_pair(best)} at {best['times_fewer_bytes']:.1f} times "
        "fewer bytes, "
        f"about {32 / best['times_fewer_bytes']:.1f} bits a value"
    )
    if worst is best:
        return f"{said}."
    return f"{said}; worst with `{worst['codec']}`, {_pair(worst)} at {worst['times_fewer_bytes']:.1f} times."


def one_bit(results: Results) -> str:
    """What `vq:256,8` does to greedy on CIFAR-10, if that was run."""
    rows = {row["codec"]: row for row in coded(results, "wire_cifar10") if row["method"] == "greedy"}
    row = rows.get("vq:256,8")
    return (
        f"One bit a value (`vq:256,8`) with greedy: {_pair(row)} at {row['times_fewer_bytes']:.1f} times."
        if row
        else ""
    )


def _certain(rows: list[Row]) -> list[Row]:
    """Those whose 95 % interval lies below 0."""
    return [
        r
        for r in rows
        if r[POINTS]["half_width"] is not None and r[POINTS]["mean"] + r[POINTS]["half_width"] < 0
    ]


def _names(rows: list[Row]) -> str:
    return listed([f"`{row['codec']}` with {row['method']}" for row in rows])


def words(results: Results) -> str:
    """What both tables say."""
    small, large = coded(results, "wire_digits"), coded(results, "wire_cifar10")
    coarse = [row for row in small if row["codec"] == "vq:256,8"]
    most = at_most(max(row[POINTS]["half_width"] - row[POINTS]["mean"] for row in coarse), 0.1)
    fewer = min(row["times_fewer_bytes"] for row in coarse)
    folds = _folds(results)
    shown = _certain(coarse)
    digits = (
        f"On digits `vq:256,8` costs nothing that {folds} can show (at most {most} points, with 95 %)"
        if not shown
        else f"On digits `vq:256,8` costs accuracy that {folds} show (at most {most} points, with 95 %)"
    )
    certain = _certain(large)
    open_ = [r for r in large if r[POINTS]["half_width"] is not None and r not in certain]
    bytes_ = max(row["bytes_over_theory"] for row in small + large)
    return paragraph(
        f"{digits} at {fewer:.0f} times fewer bytes.",
        "On CIFAR-10, at this length, in points on average, coded at evaluation in parentheses:",
        *(ends(results, method) for method in METHODS if any(r["method"] == method for r in large)),
        one_bit(results),
        f"Below 0 with 95 %: {_names(certain)}." if certain else "",
        f"So few seeds do not tell from 0: {_names(open_)}." if open_ else "",
        f"Bytes are within {at_most(100 * bytes_)} % of log2 K / D bits a value; the rest is codebooks.",
    )


def codecs_words(results: Results) -> str:
    """The same, shorter, for the page of codecs."""
    certain = {row["codec"] for row in _certain(coded(results, "wire_digits"))}
    folds = _folds(results)
    names = listed([f"`{codec}`" for codec in sorted(certain)]) if certain else ""
    on_digits = (
        f"on digits no codec but {names} costs anything that {folds} can show"
        if certain
        else f"on digits no codec costs anything that {folds} can show"
    )
    # More than a point lost.
    heavy = [row for row in coded(results, "wire_cifar10") if row[POINTS]["mean"] < -1]
    helped = heavy and all(row[CODED]["mean"] > row[POINTS]["mean"] for row in heavy)
    return paragraph(
        "Accuracy and bytes on digits and CIFAR-10, `benchmarks/wire.py`: the tables are in the "
        f"[README](../README.md#measured). In short: {on_digits}. On CIFAR-10, at a short schedule, in points "
        "on average, coded at "
        "evaluation in parentheses:",
        ends(results, "greedy"),
        one_bit(results),
        "A codec is part of what the next group learns from"
        + (": evaluated with the codec on, a coarse one loses less." if helped else "."),
    )


def links(results: Results) -> str:
    """Milliseconds a step over loopback and over a slow link."""
    loopback, slow = (results(f"link_{name}")["codecs"] for name in ("loopback", "100mbit"))
    rows = [
        [f"`{codec}`", f"{row['bytes_a_step'] / 1e6:.3f}"]
        + [f"{1e3 * found[codec]['seconds_median']:.1f}" for found in (loopback, slow)]
        for codec, row in slow.items()
        if codec != "auto"
    ]
    return table(["codec", "MB a step", "loopback", "100 Mb/s"], rows)


def links_words(results: Results) -> str:
    """What was measured, and what `auto` chose."""
    loopback, slow = (results(f"link_{name}")["codecs"]["auto"]["chosen"] for name in ("loopback", "100mbit"))
    return paragraph(
        "On two processes of one machine (`python -m benchmarks.link`; the network of `benchmarks.pipeline`, greedy, "
        f"batch 64), ms a step. Over loopback `auto` chose `{loopback}`; with the link held at 100 Mb/s `{slow}`"
        + (
            ", the most exact one that the link can carry as fast as the groups compute."
            if loopback != slow
            else ", the same."
        ),
        "[link_loopback.json](../benchmarks/results/link_loopback.json), "
        "[link_100mbit.json](../benchmarks/results/link_100mbit.json)",
    )


TABLES = {
    "wire-digits-intro": digits_intro,
    "wire-digits": digits,
    "wire-cifar10-intro": cifar10_intro,
    "wire-cifar10": cifar10,
    "wire-words": words,
    "wire-ahead": ahead,
    "wire-ahead-words": ahead_words,
    "codecs-words": codecs_words,
    "links-words": links_words,
    "links": links,
}
