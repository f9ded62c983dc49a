"""README: its commands exist, and its figures are those of the committed result files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.pipeline_model import POOLED
from lct_fast.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^lct-fast (\w+)", README, re.M))
    assert commands == {"train", "eval", "export", "bench", "plan", "report", "info"}
    for command in sorted(commands):
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        assert command in capsys.readouterr().out


def _rows(heading: str) -> list[list[str]]:
    """Cells of the first table after ``heading``."""
    table = README[README.index(heading) :].split("\n|---", 1)[1].split("\n\n", 1)[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def test_digits_table_is_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/results/digits.json").read_text())["over_seeds"]
    for method, last, first in _rows("Digits ("):
        for key, cell in (("last_exit", last), ("first_exit", first)):
            if cell:
                stored = results[method][key]
                assert cell == f"{100 * stored['mean']:.2f} ± {100 * stored['sd']:.2f}", (method, key)


def test_cifar10_table_is_the_result_file() -> None:
    loaded = json.loads((ROOT / "benchmarks/results/cifar10.json").read_text())
    accuracy = {r["name"]: f"{100 * r['test_accuracy']:.2f}" for r in loaded["runs"]}
    kinds = {"": "", "pooled linear, 4x4": "-pooled", "conv_fc, 32 filters": "-conv",
             "conv_fc, 32 filters, Adam 1e-4": "-conv", "pooled linear, 4x4, Adam 1e-4": "-pooled-lr1e-4",
             "pooled linear, 4x4, Adam 1e-3": "-pooled"}  # fmt: skip
    rows = _rows("CIFAR-10, 12,500")
    for method, critic, short, short_gap, long, long_gap in rows:
        name = method + kinds[critic]
        assert (short, long) == (accuracy[f"{name}-1x"], accuracy[f"{name}-3x"]), name
        if method != "backprop":
            gaps = loaded["points_behind_backprop"][name]
            assert (short_gap, long_gap) == (f"{gaps['1x']:.2f}", f"{gaps['3x']:.2f}"), name
    assert len(rows) * 2 == len(accuracy)


def test_pipeline_table_is_the_result_file() -> None:
    loaded = json.loads((ROOT / "benchmarks/results/pipeline.json").read_text())
    found = {row["contender"]: row for row in loaded["rows"]}
    rows = _rows("Two CPU processes of one thread")
    for shown, *cells in rows:
        name = shown.replace("pooled critic", POOLED).replace("conv critic", "conv_fc")
        row = found[name]
        eta = loaded["t1_us"] / (2 * row["us_p50"])
        assert cells == [f"{row[f'us_{p}'] / 1e3:.1f}" for p in ("p50", "p20", "p80")] + [f"{eta:.3f}"], name
    names = [shown for shown, *_ in rows]
    assert loaded["best_pipeline"] in names and loaded["t1"] in names
    said = README[README.index("Two CPU processes of one thread") : README.index("CIFAR-10, 12,500")]
    for value in (
        f"eta {loaded['eta']:.3f}",
        f"{loaded['ratio_to_best_pipeline']:.2f} of the time",
        f"{100 * loaded['critic_tax']:.1f} %",
        f"{100 * loaded['imbalance']:.1f} %",
        f"eta {loaded['eta_ceiling']:.3f}",
        f"{100 * loaded['foreign_cpu_share']:.0f} %",
    ):
        assert value in said, value


def test_kernel_table_is_the_result_file() -> None:
    loaded = json.loads((ROOT / "benchmarks/results/critic_head_cpu.json").read_text())["rows"]
    contenders = ("lct_fast", "torch.compile", "torch.compile max-autotune-no-cudagraphs", "torch eager")
    rows = _rows("`critic_head` on the CPU: loss")
    for shape, *cells in rows:
        rows_, depth, classes, dtype = re.findall(r"\w+", shape.replace(" x ", " "))
        found = {
            r["contender"]: r
            for r in loaded
            if (r["rows"], r["depth"], r["classes"], r["dtype"])
            == (int(rows_), int(depth), int(classes), dtype)
        }
        times = [f"{found[c]['us_p50'] / 1e3:.2f}" for c in contenders]
        assert cells == [*times, f"{found['lct_fast']['times_as_fast_as_best_rival']:.2f}x"], shape
    assert len(rows) * len(contenders) == len(loaded)


# The rows of the table of the other ops, in order: file, op, shape.
OPS = (
    ("bn_relu_pool_cpu", "bn_relu_pool_critic_head", "128,64,32,32,2,f32,first"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,f32"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,bf16"),
    ("vq_cpu", "vq_encode", "131072,1,4,256,f32,uniform"),
    ("vq_cpu", "vq_encode", "131072,1,8,256,f32,uniform"),
    ("vq_cpu", "vq_encode", "131072,1,32,256,f32,uniform"),
    ("vq_cpu", "vq_encode", "65536,1,64,1024,f32,uniform"),
    ("block_quantize_cpu", "block_quantize", "16777216,int4,f32"),
)


def test_table_of_the_other_ops_is_the_result_files() -> None:
    rows = _rows("The other ops on the CPU")
    assert len(rows) == len(OPS)
    for (_, ours, rival, times, *_), (file, op, shape) in zip(rows, OPS, strict=True):
        report = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
        assert not report["failed_checks"] and not report["quiet"], (
            "the text says that the runs were disturbed"
        )
        found = {r["contender"]: r["us_p50"] for r in report["rows"] if (r["op"], r["shape"]) == (op, shape)}
        mine = found.pop("lct_fast")
        best = min(found.values())
        assert (ours, rival) == (f"{mine / 1e3:.2f}", f"{best / 1e3:.2f}"), shape
        assert times.split(",")[0] == f"{best / mine:.2f}x", shape


@pytest.mark.parametrize(
    ("heading", "file"),
    [("Fewer bytes on the wire", "wire_digits.json"), ("The same on CIFAR-10:", "wire_cifar10.json")],
)
def test_wire_tables_are_the_result_files(heading: str, file: str) -> None:
    stored = json.loads((ROOT / "benchmarks/results" / file).read_text())["rows"]

    def points(value: dict[str, float]) -> str:
        half = value["half_width"]
        return f"{value['mean']:+.2f}" + ("" if half is None else f" ± {half:.2f}")

    expected = [
        [
            row["method"],
            f"`{row['codec']}`",
            f"{row['times_fewer_bytes']:.1f}",
            points(row["points_from_none"]),
            points(row["points_from_none_coded_evaluation"]),
        ]
        for row in stored
        if row["codec"] != "none"
    ]
    assert _rows(heading) == expected
    # Within a tenth of what the codecs' bits come to.
    assert all(row["bytes_over_theory"] < 0.1 for row in stored)


def test_methods_table_is_the_result_file() -> None:
    stored = json.loads((ROOT / "benchmarks/results/methods.json").read_text())["rows"]
    expected = [
        [
            row["method"],
            str(row["groups"]),
            f"{row['accuracy']:.2f} ± {row['sd']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['wire_bytes_per_sample']:,.0f}",
            f"{row['feedback_bytes_per_sample']:,.0f}",
        ]
        for row in stored
    ]
    assert _rows("Every method on the digits") == expected
    assert all(row["seeds"] == len(row["values"]) for row in stored)


def test_predictions_are_those_of_the_result_file() -> None:
    stored = json.loads((ROOT / "benchmarks/results/pipeline.json").read_text())["rows"]
    expected = [
        f"| {row['us_p50'] / 1e3:.1f} | {row['predicted_us'] / 1e3:.1f} | {100 * row['prediction_error']:+.1f} % |"
        for row in stored
        if "predicted_us" in row
    ]
    lines = (ROOT / "docs/planner.md").read_text().split("Against measured steps")[1].splitlines()
    shown = [line for line in lines if line.startswith("| ") and line.endswith("% |")]
    assert expected and len(shown) == len(expected)
    assert all(line.endswith(end) for line, end in zip(shown, expected, strict=True))


def test_link_table_is_the_result_files() -> None:
    loopback, slow = (
        json.loads((ROOT / f"benchmarks/results/link_{name}.json").read_text())["codecs"]
        for name in ("loopback", "100mbit")
    )
    lines = (ROOT / "docs/codecs.md").read_text().split("| codec | MB a step |")[1].splitlines()
    shown = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert shown == [
        [f"`{codec}`", f"{row['bytes_a_step'] / 1e6:.3f}"]
        + [f"{1e3 * found[codec]['seconds_median']:.1f}" for found in (loopback, slow)]
        for codec, row in slow.items()
        if codec != "auto"
    ]


def test_scaling_table_is_the_result_file() -> None:
    stored = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["rows"]
    lines = (ROOT / "docs/scaling.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith(("| as measured", "| 200x"))]
    assert shown == [
        f"| {r['speed']} | {r['link']} | {r['workers']} | {r['decoupled_s']:.4g} | {r['decoupled_vq_s']:.4g} | "
        f"{r['best_pipeline_s']:.4g} | {r['best_pipeline']} | "
        f"{min(r['decoupled_s'], r['decoupled_vq_s']) / r['best_pipeline_s']:.2f} |"
        for r in stored
        if r["microbatches"] == 32
    ]
