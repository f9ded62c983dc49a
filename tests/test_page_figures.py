"""Figures of pages that no benchmark's test looks after: they are those of the committed result files."""

import json
from pathlib import Path
from typing import Any

import pytest

from lct_fast.methods.local_critic import own_share

ROOT = Path(__file__).parents[1]


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}"


def _digits(method: str) -> list[str]:
    """Exit 1, last exit, back-propagation, in percent."""
    stored = _results("digits")["over_seeds"]
    wanted = ((method, "first_exit"), (method, "last_exit"), ("backprop", "last_exit"))
    return [_spread(100 * stored[m][e]["mean"], 100 * stored[m][e]["sd"]) for m, e in wanted]


def _cifar10(name: str, epochs: int) -> list[str]:
    length = {8: "1x", 24: "3x"}[epochs]
    runs = {run["name"]: run for run in _results("cifar10")["runs"]}
    ours, plain = runs[f"{name}-{length}"], runs[f"backprop-{length}"]
    assert (ours["epochs"], ours["seed"], ours["groups"]) == (epochs, 0, 4)
    exits = ours["exit_test_accuracy"]
    return [f"{100 * a:.2f}" for a in (exits[0], exits[-1], plain["test_accuracy"])]


def _critics(contender: str) -> list[str]:
    stored = _results("critics")
    (row,) = (r for r in stored["seeds"]["rows"] if r["contender"] == contender)
    (plain,) = (r for r in stored["screen"]["rows"] if r["contender"] == "backprop")
    assert len(row["seeds"]) == 3
    ends = [_spread(row["exit_accuracy"][k], row["exit_accuracy_sd"][k]) for k in (0, -1)]
    return [*ends, f"{plain['exit_accuracy'][-1]:.2f}"]


TABLES = {
    "local_critic": [
        ("digits", _digits("local-critic")),
        ("8 epochs, pooled", _cifar10("local-critic-pooled-lr1e-4", 8)),
        ("24 epochs, pooled", _cifar10("local-critic-pooled-lr1e-4", 24)),
        ("8 epochs, conv_fc", _cifar10("local-critic-conv", 8)),
        ("24 epochs, conv_fc", _cifar10("local-critic-conv", 24)),
        ("5,000 images, 5 epochs, pooled critic, l1", _critics("local-critic-pooled_linear_pool_4-l1-1e-3")),
        ("half_sided", _critics("local-critic-pooled_linear_pool_4-half_sided-1e-3")),
    ],
    "greedy": [
        ("digits", _digits("greedy")),
        ("8 epochs, pooled", _cifar10("greedy-pooled", 8)),
        ("24 epochs, pooled", _cifar10("greedy-pooled", 24)),
        ("8 epochs, conv_fc", _cifar10("greedy-conv", 8)),
        ("24 epochs, conv_fc", _cifar10("greedy-conv", 24)),
        ("pooled head", _critics("greedy-pooled_linear_pool_4")),
        ("8x8", _critics("greedy-pooled_linear_pool_8")),
    ],
}


def _rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under ``heading``."""
    table = (ROOT / f"docs/{page}.md").read_text().split(heading)[1].split("\n|---", 1)[1].split("\n\n")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[1:]]


@pytest.mark.parametrize("page", TABLES)
def test_the_table_is_that_of_the_files(page: str) -> None:
    rows = _rows(page, "| run | exit 1 |")
    assert len(rows) == len(TABLES[page])
    for (run, *cells, _), (words, expected) in zip(rows, TABLES[page], strict=True):
        assert words in run and cells == expected, run


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (
            "local_critic",
            "a step takes {ratio_to_best_pipeline:.2f} of the time of the best pipeline schedule's with",
        ),
        ("local_critic", "and {conv_critic_ratio_to_best_pipeline:.2f} with the paper's convolutional one"),
        (
            "greedy",
            "a step takes {greedy_ratio_to_best_pipeline:.2f} of the time of the best pipeline schedule's",
        ),
    ],
)
def test_times_are_those_of_the_file(page: str, sentence: str) -> None:
    text = " ".join((ROOT / f"docs/{page}.md").read_text().split())
    assert sentence.format(**_results("pipeline")).replace("%", " %") in text


def test_the_contenders_beside_each_other_are_those_of_the_file() -> None:
    stored = {row["contender"]: row["us_p50"] / 1e3 for row in _results("pipeline")["rows"]}
    rows = _rows("from_pipelining", "| | ms |")
    assert len(rows) == 6
    assert all(shown == f"{stored[name]:.1f}" for name, shown in rows)


def test_weights_of_samples_are_those_of_the_code() -> None:
    for losses, share, weights in _rows("local_critic", "| `loss=`, `--critic-loss` |"):
        name = losses.strip("`")
        if name != "mixed:W":
            w = own_share(name)
            above, below = (float(v) for v in weights.split(","))
            assert (float(share), above, below) == (w, 1.0, 2 * w - 1), name


def test_the_roofline_is_that_of_the_files() -> None:
    rows = _rows("kernels", "| op | shape | ms | MB |")
    assert len(rows) == 17
    for op, shape, ms, traffic, flops, share, file, gpu in rows:
        report = _results(file.split("]")[0].strip("["))
        assert gpu == "not yet measured" and report["threads"] == 2 and not report["failed_checks"]
        assert report["quiet"] == ("vq_decode_cpu" in file), "the text says which runs were disturbed"
        ours = [row for row in report["rows"] if row["contender"] == "lct_fast"]
        if op == "`critic_head`":
            (row,) = (r for r in ours if shape == "{rows} x {depth} x {classes}, {dtype}".format(**r))
            assert (traffic, flops, share) == ("", "", "") and "share_of_roofline" not in row
        else:
            (row,) = (r for r in ours if (f"`{r['op']}`", r["shape"]) == (op, shape.replace(", ", ",")))
            expected = (row["bytes"] / 1e6, row["flops"] / 1e9, row["share_of_roofline"])
            assert (traffic, flops, share) == tuple(
                f"{v:.{n}f}" for v, n in zip(expected, (1, 2, 2), strict=True)
            )
        assert ms == f"{row['us_p50'] / 1e3:.2f}", shape
