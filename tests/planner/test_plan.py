"""What is chosen, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lct_fast.cli import main
from lct_fast.planner.costs import GroupCost, Link, PlanError, merge, parse_costs
from lct_fast.planner.plan import ASYNC, DDP, DECOUPLED, plan

GROUP = {"forward_s": 1e-3, "backward_s": 2e-3, "critic_s": 3e-5, "encode_s": 1e-5, "decode_s": 1e-5}
GROUP |= {"activation_bytes": 1e6, "parameter_bytes": 1e7}


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def no_module() -> int:
    return 3


def _file(tmp_path: Path, groups: int) -> str:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"groups": [GROUP] * groups}))
    return str(path)


def _costs(groups: int, **more: float) -> list[GroupCost]:
    return [GroupCost(**{**GROUP, **more})] * groups


def test_groups_that_learn_alone_beat_every_pipeline_schedule() -> None:
    costs = {8: _costs(8, parameter_bytes=1e9)}
    made = plan(costs, 8, Link(12.5e9, 1e-5), {"none": 1.0, "vq:256,8": 32.0})
    steps = {(p.schedule, p.codec): p.seconds for p in made.predictions if not p.impossible}
    assert made.chosen.schedule == DECOUPLED and made.chosen.codec == "none"
    assert steps[DECOUPLED, "none"] < min(
        s for (name, _), s in steps.items() if name not in (DECOUPLED, ASYNC, DDP)
    )
    assert [p.schedule for p in made.predictions if p.impossible] == ["DualPipeV"]
    assert any("codec vq:256,8 would not shorten it" in r for r in made.reasons)


def test_a_slow_link_calls_for_the_codec() -> None:
    made = plan({8: _costs(8)}, 8, Link(12.5e6), {"none": 1.0, "vq:256,8": 32.0})
    assert (made.chosen.schedule, made.chosen.codec) == (DECOUPLED, "vq:256,8")


def test_small_networks_are_for_data_parallelism() -> None:
    made = plan({8: _costs(4, critic_s=1e-3, parameter_bytes=1e4)}, 4, Link(12.5e9), {"none": 1.0})
    assert made.chosen.schedule == DDP
    assert any("keeps the whole network" in r for r in made.reasons)
    # Unless a worker cannot hold it.
    big = plan({8: _costs(4, critic_s=1e-3, parameter_bytes=1e9)}, 4, Link(12.5e9), {"none": 1.0}, 5e9)
    assert big.chosen.schedule != DDP and big.chosen.memory_bytes <= 5e9


def test_the_best_number_of_microbatches() -> None:
    whole, parts = _costs(4), [GroupCost(0.3e-3, 0.6e-3)] * 4
    made = plan({1: whole, 4: parts}, 4, Link(math.inf), {"none": 1.0})
    by_name = {p.schedule: p.microbatches for p in made.predictions}
    assert by_name["1F1B"] == 4 and by_name[DECOUPLED] == 1


def test_data_parallel_step() -> None:
    costs = [GroupCost(1.0, 2.0, parameter_bytes=50.0, update_s=0.25)] * 2
    (ddp,) = (p for p in plan({4: costs}, 2, Link(10.0, 0.5), {"none": 1.0}).predictions if p.schedule == DDP)
    # Two microbatches of 6 s; 2 x (50 bytes at 10 a second + 0.5), of which the last backward pass hides 4; 2 x 0.25.
    assert ddp.seconds == 2 * 6 + (2 * 5.5 - 4) + 0.5
    assert ddp.memory_bytes == 300 and ddp.wire_bytes == 200

    def step(link: Link, jitter: float = 0.0) -> float:
        made = plan({4: costs}, 2, link, {"none": 1.0}, jitter=jitter)
        return next(p.seconds for p in made.predictions if p.schedule == DDP)

    # Two messages out and two in, of 50 bytes each, of which nothing is hidden.
    assert step(Link(math.inf, 0.0, 0.125, 0.01)) == 12 + 4 * (0.125 + 0.5) + 0.5
    # The slower of two workers: of two normal variables the greater lies 1 / sqrt(pi) deviations above the mean. Eight
    # passes, 1 and 2 s, vary by 10 % each.
    deviation = 0.1 * math.sqrt(4 * 1 + 4 * 4)
    assert abs(step(Link(math.inf), 0.1) - (12.5 + deviation / math.sqrt(math.pi))) < 0.05


def test_groups_are_shared_out_evenly() -> None:
    costs = [
        GroupCost(float(s), 0.0, parameter_bytes=1.0, critic_s=s, decode_s=s) for s in (5, 1, 1, 1, 4, 2)
    ]
    parts, starts = merge(costs, 3)
    assert max(p.work_s for p in parts) == 6 and starts[0] == 1 and len(starts) == 3
    assert sum(p.work_s for p in parts) == 14 and sum(p.parameter_bytes for p in parts) == 6
    assert (
        parts[0].critic_s == costs[starts[1] - 2].critic_s
        and parts[1].decode_s == costs[starts[1] - 1].decode_s
    )
    assert merge(costs, 6)[1] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(PlanError, match="7 workers need 7 groups or more to share, got 6"):
        merge(costs, 7)


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([], 'expected {"groups": '),
        ({"groups": []}, "at least one group"),
        ({"groups": [GROUP], "links": 3}, "unknown key 'links'"),
        (
            {"groups": [GROUP, {**GROUP, "forwards": 1}]},
            "group 2: unknown key 'forwards'; expected forward_s",
        ),
        ({"groups": [{**GROUP, "critic_s": -1.0}]}, "group 1: critic_s must be a number >= 0, got -1.0"),
        ({"groups": [{**GROUP, "critic_s": math.nan}]}, "must be a number >= 0, got nan"),
        ({"groups": [{**GROUP, "critic_s": True}]}, "must be a number >= 0, got True"),
        ({"groups": [{"forward_s": 1.0}]}, "backward_s is missing"),
        ({"groups": [{"forward_s": 0, "backward_s": 0}]}, "both 0"),
        ({"groups": [{**GROUP, "input_gradient_s": 1.0}]}, "cannot be more"),
        ({"groups": ["x"]}, "expected a mapping of costs, got str"),
    ],
)
def test_costs_that_are_none(loaded: Any, message: str) -> None:
    with pytest.raises(PlanError, match="f") as error:
        parse_costs(loaded, "f")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_plan_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "plan.json", tmp_path / "plan.svg"
    common = ["plan", "--costs", _file(tmp_path, 8), "--microbatches", "4", "8", "--link-gbps", "100"]
    assert main([*common, "--workers", "4", "--out", str(out), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "<- chosen" in said and "simulation" in said
    made = json.loads(out.read_text())
    assert made["workers"] == 4 and made["starts"] == [1, 3, 5, 7] and made["chosen"]["schedule"] in said
    assert plot.read_text().startswith("<svg") and made["chosen"]["schedule"] in plot.read_text()
    assert main([*common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workers"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "9"], "9 workers need 9 groups or more to share, got 8: use fewer workers"),
        (["--workers", "-1"], "--workers: expected a positive number, got -1"),
        (["--link-gbps", "0"], "--link-gbps: expected a positive number, got 0.0"),
        (["--link-us", "-1"], "--link-us: expected a number >= 0, got -1.0"),
        (["--microbatches", "0"], "--microbatches: expected 1 or more, got 0"),
        (["--codec", "vq:3"], "vq"),
        (["--memory-gb", "1e-6"], "nothing fits a worker's 1e-06 GB"),
        (["--plot", "plan.png"], "--plot: expected FILE.svg"),
    ],
)
def test_refusals_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--costs", _file(tmp_path, 8), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.slow
def test_a_plan_of_a_model(capsys: pytest.CaptureFixture[str], threads: None) -> None:
    here = f"{__name__}:tiny"
    options = [
        "plan",
        "--model",
        here,
        "--input",
        "3x4x4",
        "--batch",
        "8",
        "--workers",
        "2",
        "--codec",
        "int8",
    ]
    assert main([*options, "--critic", "linear", "mlp_sr_aux", "--json"]) == 2
    assert "mlp_sr_aux" in capsys.readouterr().err
    assert main([*options, "--critic", "linear", "--microbatches", "1", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["costs"]) == {"1", "2"} and len(made["costs"]["1"]) == 2
    first, second = made["costs"]["1"]
    # Where the cut falls is measured, and so may differ; at both places 16 values a sample cross.
    assert first["parameter_bytes"] in (4 * (48 * 16 + 16), 4 * (48 * 16 + 16 + 16 * 16 + 16))
    assert first["activation_bytes"] == 8 * 16 * 4
    assert first["forward_s"] > 0 and second["decode_s"] > 0 and second["activation_bytes"] == 0
    assert {p["codec"] for p in made["predictions"]} == {"none", "int8"}
    for spec, message in ((f"{__name__}:no_module", "torch.nn.Module"), ("no.such:model", "MODULE:FACTORY")):
        assert main(["plan", "--model", spec, "--input", "3x4x4"]) == 2
        assert message in capsys.readouterr().err
    assert main([*options, "--critic", "linear", "--microbatches", "3"]) == 2
    assert "3 equal parts of a batch of 8" in capsys.readouterr().err
