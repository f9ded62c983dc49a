"""Codecs chosen by measurement: the rule on made-up costs, and what measuring leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lct_fast as lct
from lct_fast.engine import auto_codec
from lct_fast.engine.auto_codec import Costs, candidates, choose
from tests.engine import nets
from tests.engine.pipelined_cases import run_processes

BYTES = {"none": 32_000_000, "bf16": 16_000_000, "int4": 4_250_000, "vq:256,8": 1_000_000}
ENCODE = {"none": 0.0, "bf16": 0.001, "int4": 0.003, "vq:256,8": 0.008}


def _pipeline(bandwidth: float, *steps: float, latency: float = 0.0) -> list[Costs]:
    costs = [Costs(s, dict(ENCODE), dict(ENCODE), dict(BYTES), latency, bandwidth) for s in steps]
    costs[0].decode, costs[-1].encode, costs[-1].sizes = {}, {}, {}
    return costs


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [(float("inf"), "none"), (1e9, "none"), (400e6, "bf16"), (100e6, "int4"), (10e6, "vq:256,8")],
)
def test_the_slower_the_link_the_fewer_the_bytes(bandwidth: float, expected: str) -> None:
    (choice,) = choose(_pipeline(bandwidth, 0.05, 0.05))
    assert choice.codec == expected
    for spec, seconds in choice.predicted.items():
        assert seconds == pytest.approx(max(0.05 + ENCODE[spec], BYTES[spec] / bandwidth))
    assert expected in choice.reason or "one device" in choice.reason


def test_what_hides_behind_a_slower_group_is_not_coded() -> None:
    """The link takes 80 ms without a codec, another group 90: nothing is gained."""
    assert [c.codec for c in choose(_pipeline(400e6, 0.05, 0.05, 0.09))] == ["none", "none"]
    assert [c.codec for c in choose(_pipeline(400e6, 0.05, 0.05, 0.05))] == ["bf16", "bf16"]


def test_a_group_between_two_cuts_pays_for_both() -> None:
    """int4 costs the middle group 3 ms a cut; its first cut's choice counts when the second is made."""
    costs = _pipeline(100e6, 0.01, 0.039, 0.01)
    first, second = choose(costs)
    assert (first.codec, second.codec) == ("int4", "int4")
    assert second.predicted["int4"] == pytest.approx(0.039 + 2 * 0.003)
    assert first.predicted["int4"] == pytest.approx(0.0425)


def test_of_equal_steps_the_most_exact_is_taken() -> None:
    costs = _pipeline(32e6 / 0.0505, 0.05, 0.05)
    # 50.5 ms of link against 50 ms of work: within 2 %.
    assert choose(costs)[0].codec == "none"
    costs[0].bandwidth = 32e6 / 0.0530
    assert choose(costs)[0].codec == "bf16"


def test_latency_is_paid_whatever_is_sent() -> None:
    (choice,) = choose(_pipeline(1e9, 0.01, 0.01, latency=0.05))
    assert choice.predicted["vq:256,8"] == pytest.approx(0.051)


@pytest.mark.parametrize(
    ("shape", "last"),
    [((16, 4, 4), "vq:256,8"), ((12, 4, 4), "vq:256,6"), ((7, 3, 3), "int4"), ((5, 10), "vq:256,5")],
)
def test_candidates_fit(shape: tuple[int, ...], last: str) -> None:
    specs = candidates(shape)
    assert specs[0] == "none" and specs[-1] == last
    for spec in specs:
        lct.codecs.build(spec).check(shape)


@pytest.mark.parametrize("method", [lct.Greedy, lct.LocalCritic])
def test_in_one_process_nothing_is_coded_and_nothing_is_changed(method: Any) -> None:
    trainers = {}
    for codec in ("none", "auto"):
        torch.manual_seed(3)
        trainers[codec] = lct.Trainer(nets.groups(method()), method(), codec=codec)
    auto = trainers["auto"]
    assert auto.wires == ["none"] * 3 and not auto.lossy
    assert all(c is not None and "one device" in c.reason for c in auto.choices)
    assert trainers["none"].choices == [None] * 3
    for x, y in nets.batches(2):
        for trainer in trainers.values():
            trainer.step(x, y)
    assert nets.same(nets.state(trainers["none"]), nets.state(auto))
    assert all(not w.meter.seconds or w.meter.samples == 32 for w in auto.workers)


def test_only_the_cuts_that_say_auto_are_chosen() -> None:
    trainer = lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), codec=["int4", "auto", "vq:4,2"])
    assert trainer.wires == ["int4", "none", "vq:4,2"]
    assert [c is not None for c in trainer.choices] == [False, True, False]


def _over_processes() -> dict[str, Any]:
    trainer = lct.Trainer(nets.groups(lct.Greedy(), 2), lct.Greedy(), schedule="pipelined", codec="auto")
    (choice,) = trainer.choices
    assert choice is not None
    costs = auto_codec.measure(
        trainer.workers, ["auto"], [trainer.groups[0].shape], torch.zeros(16, 1, 8, 8), trainer.ranks
    )
    if trainer.first:
        for x, y in nets.batches(2):
            trainer.step(x, y)
        trainer.stop()
    else:
        assert len(list(trainer.events())) == 2
    return {"wires": trainer.wires, "choice": choice, "costs": costs}


def test_processes_measure_the_link_between_them_and_agree() -> None:
    first, second = run_processes(_over_processes, 2)
    assert first == second
    cost, behind = first["costs"]
    assert 1e6 < cost.bandwidth < 1e12 and 1e-6 < cost.latency < 1
    specs = candidates((8, 8, 8))
    assert list(first["choice"].predicted) == list(cost.encode) == list(cost.sizes) == list(behind.decode)
    assert len(cost.sizes) == len(specs) and not behind.sizes and not cost.decode
    assert cost.sizes["none"] == 2 * cost.sizes["bf16"] > 30 * cost.sizes[list(cost.sizes)[-1]]
    assert first["wires"] == [first["choice"].codec]
