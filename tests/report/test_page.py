"""The report: one valid file, complete, escaped, that asks for nothing else."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lct_fast.report import write
from tests.report.conftest import MakeRun

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}


class Page(HTMLParser):
    """Refuses tags that don't balance; collects elements, text, and the text of every row of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    def attributes(self, name: str) -> Iterator[str]:
        return (attrs[name] or "" for _, attrs in self.elements if name in attrs)

    def count(self, tag: str) -> int:
        return sum(tag == name for name, _ in self.elements)


def report(out: Path, *runs: Path) -> Page:
    text = write(list(runs), out / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    made = Page(text)
    ids = list(made.attributes("id"))
    assert len(ids) == len(set(ids))
    assert {label.removeprefix("#") for label in made.attributes("href") if label != "data:,"} <= set(ids)
    assert set(made.attributes("aria-labelledby")) <= set(ids)
    return made


def lines(made: Page) -> list[str]:
    """The style of every line that is drawn in a chart."""
    drawn = [
        attrs for _, attrs in made.elements if attrs.get("class") == "line" and attrs.get("d") != "M2 6H22"
    ]
    return [str(attrs["style"]) for attrs in drawn]


def test_comparison(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a"), make_run("b", exits=1, method="backprop", summary=False))
    top, exits, a, b = made.rows[:4]
    assert top[:6] == ["run", "method", "groups", "codec", "seed", "accuracy of the network, %"]
    assert exits == ["1", "2", "3", "4"]
    assert a[:10] == ["#1 a", "local-critic", "4", "none", "7", "43.00", "13.00", "23.00", "33.00", "43.00"]
    assert dict(zip(top[7:], a[10:], strict=True)) == {
        "step, ms": "42.15",
        "whole run, s": "1,234.5",
        "wire, B/sample": "8,192",
        "uncoded, B/sample": "32,768",
        "feedback, B/sample": "12",
        "critic tax, %": "12.3",
        "bubble, %": "\u2013",
        "exposed transfer, %": "\u2013",
    }
    # Its only exit is the network.
    assert b == ["#2 b in progress", "backprop", "1", "\u2013", "7", "13.00", *["\u2013"] * 12]


def test_charts(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a"), make_run("b", exits=1))
    text = " ".join(made.words)
    assert "Networks compared" in text and "Learning curves per exit" in text and "Timeline" in text
    styles = lines(made)
    # Accuracy and loss: two last exits compared, then four exits of a and one of b.
    assert len(styles) == 2 * 2 + 2 * 4 + 2 * 1
    assert len(set(styles[:4])) == 2 and len(set(styles[4:])) == 5
    # One colour an exit, whichever the run, and one for a network without exits.
    assert styles[4:8] == styles[8:12]
    assert styles[-1] == styles[-2] == "--h:0;--c:0"
    labels = list(made.attributes("aria-label"))
    assert (
        "test accuracy, % of a against epoch; at the end: exit 1 13, exit 2 23, exit 3 33, exit 4 43"
        in labels
    )
    assert "test loss of b against epoch; at the end: network 1.33333" in labels
    assert "Timeline of b; bubble: group 1 13.0 %" in labels
    kinds = [attrs["class"] for tag, attrs in made.elements if tag == "rect" and "x" in attrs]
    # One step of four groups, three of one.
    assert [kinds.count(kind) for kind in ("forward", "critic", "backward", "optimiser", "transfer")] == [
        7
    ] * 5


def test_gradients_of_groups_that_were_diagnosed(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a", diagnoses=True), make_run("b", diagnoses=True), make_run("c"))
    labels = list(made.attributes("aria-label"))
    for run in ("a", "b"):
        assert (
            f"gradient norm of {run} against step; at the end: "
            "group 1 0.333333, group 2 0.666667, group 3 1, group 4 1.33333"
        ) in labels
        assert (
            f"cosine to the true gradient of {run} against step; at the end: "
            "group 1 0.25, group 2 0.5, group 3 0.75, group 4 1"
        ) in labels
    # Neither a run without them nor the comparison of last exits has such a chart.
    assert sum("gradient" in label for label in labels) == 4
    text = " ".join(made.words)
    assert text.count("gradient norm") == 2 and text.count("No gradient norm recorded") == 0


def test_only_norms_were_read(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", diagnoses=True)
    text = re.sub(
        r'"gradient_cosine": \[[^]]*\]',
        '"gradient_cosine": [null, null, null, null]',
        (run / "metrics.jsonl").read_text(),
    )
    (run / "metrics.jsonl").write_text(text)
    made = report(tmp_path, run)
    labels = list(made.attributes("aria-label"))
    assert "cosine" not in " ".join(made.words)
    assert sum(label.startswith("gradient norm of a") for label in labels) == 1
    assert not any(label.startswith("cosine") for label in labels)


def test_a_run_without_exits_has_a_network(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a", exits=1, method="penalty", groups=3))
    text = " ".join(made.words)
    assert "exit 1" not in text and "accuracy 1" not in text and "of exit" not in text
    assert ["3", "13.00", "1.3333"] in made.rows and ["epoch", "accuracy, %", "test loss"] in made.rows
    assert "test accuracy, % of a against epoch; at the end: network 13" in made.attributes("aria-label")


def test_bytes_of_cuts_are_those_of_the_summary(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", exits=3, cuts=True, codec="vq:16,2")
    summary = json.loads((run / "summary.json").read_text())
    # What the summary calls sent has the serial steps in it.
    summary |= {"wire_bytes_per_sample": 8192.0 + 1000, "serial": {"bytes_per_sample": 1000.0}}
    summary["cuts"][0]["serial_bytes_per_sample"] = 1000.0
    (run / "summary.json").write_text(json.dumps(summary))
    made = report(tmp_path, run, make_run("old", exits=3), make_run("whole", exits=1))
    start = made.rows.index(
        [
            "cut",
            "of fp32",
            "codec",
            "fp32",
            "sent",
            "of it codebooks",
            "of it serial steps",
            "fp32 / sent",
            "feedback",
        ]
    )
    assert made.rows[start + 1 : start + 4] == [
        ["cut 1", "", "vq:16,2", "16,384", "5,096", "256", "1,000", "3.2", "6"],
        ["cut 2", "", "vq:16,2", "16,384", "4,096", "256", "0", "4.0", "6"],
        ["all cuts", "", "\u2013", "32,768", "9,192", "512", "1,000", "3.6", "12"],
    ]
    # A run from before cuts were told apart has their sum.
    start = made.rows.index(["cut", "of fp32", "codec", "fp32", "sent", "fp32 / sent", "feedback"])
    assert made.rows[start + 1] == ["all cuts", "", "none", "32,768", "8,192", "4.0", "12"]
    bars = [attrs for tag, attrs in made.elements if tag == "svg" and attrs.get("class") == "bar"]
    assert bars[0]["aria-label"] == "cut 1: 5,096 of 16,384 bytes a sample" and len(bars) == 2 + 1 + 1
    parts = {
        attrs["class"]: float(attrs["width"] or 0)
        for tag, attrs in made.elements[made.elements.index(("svg", bars[0])) :][:6]
        if tag == "rect"
    }
    # 120 wide for 16,384 bytes.
    expected = {"raw": 16384, "sent": 4096 - 256, "codebook": 256, "serial": 1000}
    assert parts == pytest.approx(
        {k: v * 120 / 16384 for k, v in expected.items()} | {"feedback": 0.5}, abs=0.06
    )


def test_codebook_use(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a", exits=3, cuts=True), make_run("b"))
    labels = list(made.attributes("aria-label"))
    assert "codewords in use, % of a against step; at the end: cut 1 33.3333, cut 2 66.6667" in labels
    assert "perplexity of the codes of a against step; at the end: cut 1 7, cut 2 11" in labels
    heads = next(i for i, row in enumerate(made.rows) if row[:2] == ["cut", "codewords"])
    assert made.rows[heads][2:5] == ["in use, %", "perplexity", "of the codewords, %"]
    assert made.rows[heads + 1 : heads + 3] == [
        ["cut 1", "16", "33.3", "7.0", "43.8", "1.00", "4", "10", "30"],
        ["cut 2", "16", "66.7", "11.0", "68.8", "2.00", "5", "10", "30"],
    ]
    assert sum("codewords" in label for label in labels) == 1, "b has no codebooks"


def test_a_cut_without_a_codebook_has_no_line(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", exits=3, cuts=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "codebook":
            line |= {key: [None, line[key][1]] for key in line if isinstance(line[key], list)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = report(tmp_path, run)
    assert any(label.endswith("at the end: cut 2 11") for label in made.attributes("aria-label"))
    heads = next(i for i, row in enumerate(made.rows) if row[:2] == ["cut", "codewords"])
    assert made.rows[heads + 1][0] == "cut 2"


def test_last_exits_have_a_scale_of_their_own(make_run: MakeRun, tmp_path: Path) -> None:
    words = report(tmp_path, make_run("a"), make_run("b")).words
    # The first one is the link at the top.
    border = [i for i, word in enumerate(words) if word == "Learning curves per exit"][1]
    # Their accuracies run from 41 % to 43 %, those of all exits from 11 %.
    assert "41.5" in words[:border] and "10" not in words[:border]
    assert "41.5" not in words[border:] and "10" in words[border:]


def test_one_run_is_compared_with_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a", exits=1, trace=False))
    assert "Networks compared" not in made.words and "Timeline" not in made.words
    assert len(lines(made)) == 2


def test_everything_read_is_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    bad = "</script></pre><img src=x onerror='alert(1)'>\"&"
    keys = ("method", "model", "data", "groups", "critic", "codec", "schedule", "seed")
    path = make_run('<b>"&', **dict.fromkeys(keys, bad))
    summary = json.loads((path / "summary.json").read_text())
    hostile = dict.fromkeys([*keys, "device", "versions", "commit", "parameters"], bad)
    (path / "summary.json").write_text(json.dumps({**summary, **hostile, "critic_tax": bad}))
    event = {"ph": "X", "name": bad, "ts": 1, "dur": 1, "args": {"group": bad}}
    (path / "trace.json").write_text(json.dumps([event]))
    made = report(tmp_path, path, make_run("other"))
    assert made.count("img") == made.count("b") == made.count("script") == 0
    assert not any(name.startswith("on") for _, attrs in made.elements for name in attrs)
    text = "".join(made.words)
    # Table, facts, configuration, what ran where, the span.
    assert text.count(bad) >= 4 + len(keys) + 4 + 1


def test_it_loads_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a"), make_run("b"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    # A pattern of the page itself.
    assert "url(" not in text.replace("url(#hatch)", "") and "@import" not in text
    assert text.count('id="hatch"') == 1
    assert made.count("script") == made.count("img") == made.count("iframe") == 0
    used = {value for name in LOADING for value in made.attributes(name)}
    assert all(value.startswith("#") or value == "data:," for value in used) and used
    assert any("default-src 'none'" in value for value in made.attributes("content"))


def test_runs_in_progress(make_run: MakeRun, tmp_path: Path) -> None:
    begun = make_run("begun", epochs=1, summary=False, trace=False)
    first = (begun / "metrics.jsonl").read_text().splitlines()[0]
    (begun / "metrics.jsonl").write_text(f'{first}\n{{"kind": "epo')
    (begun / "trace.json").write_text("[{")
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_text("method: greedy")
    made = report(tmp_path, begun, new)
    text = " ".join(made.words)
    assert "in progress, step 10 \u00b7 5,000 samples/s" in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert "trace.json could not be read" in text
    assert "No test accuracy recorded yet." in text
    assert made.rows[1] == ["#1 begun in progress", "local-critic", "4", "\u2013", "7", *["\u2013"] * 9]
    assert made.rows[2][:2] == ["#2 new in progress", "greedy"]
    assert len(lines(made)) == 4


def test_values_that_cannot_be_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("a", exits=1)
    record: dict[str, Any] = {
        "kind": "epoch",
        "epoch": 4,
        "test_loss": [float("nan")],
        "exit_test_accuracy": [None],
    }
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text() + json.dumps(record))
    (path / "summary.json").write_text(
        '{"exit_test_accuracy": [NaN], "seconds": Infinity, "critic_tax": null}'
    )
    made = report(tmp_path, path)
    assert made.rows[1] == ["#1 a", "local-critic", "1", "\u2013", "7", "13.00", *["\u2013"] * 8]
    assert ["4", "\u2013", "\u2013"] in made.rows
    drawn = "".join(made.attributes("d")).lower()
    assert "nan" not in drawn and "inf" not in drawn


@pytest.mark.slow
def test_many_runs_stay_under_two_megabytes(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(f"run-{i}", exits=8, epochs=200, diagnoses=True, cuts=True) for i in range(40)]
    made = report(tmp_path, *runs)
    assert len(made.rows[2]) == len(made.rows[41]) == 6 + 8 + 8
    assert sum("Configuration" in word for word in made.words) == 40


def test_long_config_is_cut_and_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("a")
    (path / "config.yaml").write_text("a: 1\n" + "# \u20ac\n" * 400_000)
    made = report(tmp_path, path)
    assert re.search(r"\.\.\. [0-9]+ more characters", " ".join(made.words))


def test_names_and_options_of_any_kind(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(
        tmp_path,
        make_run("\u5b9f\u9a13 \u00fc \U0001f600", model="r\u00e9seau"),
        make_run("b", critic=["x", "y"]),
    )
    assert made.rows[2][0] == "#1 \u5b9f\u9a13 \u00fc \U0001f600"
    assert any("r\u00e9seau" in word for word in made.words)
    assert any("critic x, y" in word for word in made.words)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<meta charset="utf-8">' in text[:200]


def test_text_that_is_no_unicode(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("a")
    (path / "summary.json").write_text('{"method": "\\ud800"}')
    assert report(tmp_path, path).rows[2][1] == "?"


def test_runs_of_one_name_show_their_paths(make_run: MakeRun, tmp_path: Path) -> None:
    one, two = make_run("x/run"), make_run("y/run")
    made = report(tmp_path, one, two)
    assert [row[0] for row in made.rows[2:4]] == [f"#1 {one}", f"#2 {two}"]


def test_same_runs_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b")]
    first = write(runs, tmp_path / "1.html").read_bytes()
    assert write(runs, tmp_path / "2.html").read_bytes() == first


def test_refusals(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run folder"):
        write([], tmp_path / "x.html")
    with pytest.raises(ValueError, match="expected a file to write the report to, found a folder"):
        write([make_run("a")], tmp_path)
    with pytest.raises(ValueError, match="expected a run folder"):
        write([tmp_path / "a", tmp_path], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_accessible(make_run: MakeRun, tmp_path: Path) -> None:
    made = report(tmp_path, make_run("a"), make_run("b"))
    assert ("html", {"lang": "en"}) in made.elements
    assert made.count("caption") == made.count("table") == 7
    for tag, attrs in made.elements:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (
                attrs.get("role") == "img" and attrs.get("aria-label")
            )
        if tag == "th":
            assert attrs.get("scope") in ("row", "col", "colgroup")
        if tag == "div" and "scroll" in str(attrs.get("class")):
            assert attrs.get("tabindex") == "0" and attrs.get("role") == "region" and attrs.get("aria-label")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
