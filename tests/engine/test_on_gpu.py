"""The one-process schedule on real devices: the bits of lockstep, no wait of the host, a NaN that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lct_fast as lct
from lct_fast.engine.cuda import streams
from lct_fast.engine.random_stream import RandomStream
from lct_fast.engine.schedules.graphs import WARM_UP
from lct_fast.engine.schedules.ticks import Ticks
from tests.conftest import needs_gpus
from tests.engine import nets
from tests.engine.test_gate import Deep, all_of, equal
from tests.engine.test_streams import _asking

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
BATCHES = 20
METHODS: dict[str, Callable[[], lct.Method]] = {"greedy": lct.Greedy, "local-critic": lct.LocalCritic}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Apart(streams.CudaDevice):
    """Reaches no other device, so that copies go through the host."""

    def reaches(self, other: streams.Device) -> bool:
        return False


def _trainer(name: str, devices: list[str], schedule: str, **options: Any) -> lct.Trainer:
    method = METHODS[name]()
    groups = nets.groups(method)
    torch.manual_seed(11)
    # A rate that fp32 holds exactly: a graph reads it from an fp32 tensor.
    return lct.Trainer(
        groups,
        method,
        devices=devices,
        schedule=schedule,
        feedback_delay=2,
        optimizer=lambda p: torch.optim.SGD(p, 0.125, momentum=0.5, fused=True),
        **options,
    )


def _batches(count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in nets.batches(count)]


def _run(trainer: lct.Trainer, device: str) -> dict[str, Tensor]:
    for x, y in _batches(BATCHES, device):
        trainer.step(x, y)
    trainer.flush()
    return {n: t.cpu() for n, t in nets.state(trainer).items()}


@needs_gpus(1)
@pytest.mark.parametrize("codec", ["none", "int4:32", "vq:16,2"])
@pytest.mark.parametrize("name", list(METHODS))
def test_pipelined_on_one_gpu_is_lockstep(name: str, codec: str) -> None:
    expected = _run(_trainer(name, ["cuda:0"], "lockstep", codec=codec), "cuda:0")
    eager = _trainer(name, ["cuda:0"], "pipelined", codec=codec, graphs=False)
    assert nets.same(_run(eager, "cuda:0"), expected)
    graphs = _trainer(name, ["cuda:0"], "pipelined", codec=codec, graphs=True)
    found = _run(graphs, "cuda:0")
    assert [w.eager_because for w in graphs.workers] == [None] * 4
    for n, t in expected.items():
        # Libraries may choose other kernels while they are recorded.
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5, msg=n)


@needs_gpus(2)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("drive", [streams.CudaDevice, Apart])
def test_pipelined_on_two_gpus_is_lockstep(drive: type[streams.CudaDevice], graphs: bool) -> None:
    devices = ["cuda:0", "cuda:1"]
    expected = _run(_trainer("local-critic", devices, "lockstep"), "cuda:0")
    trainer = _trainer("local-critic", devices, "pipelined", graphs=graphs)
    trainer._run = Ticks(trainer.workers, graphs, drive)
    found = _run(trainer, "cuda:0")
    for n, t in expected.items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5, msg=n)


@needs_gpus(1)
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_does_not_wait_for_the_device(graphs: bool) -> None:
    trainer = _trainer("local-critic", ["cuda:0"], "pipelined", graphs=graphs)
    batches = _batches(BATCHES + 10, "cuda:0")
    for x, y in batches[:BATCHES]:
        trainer.step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[BATCHES:]:
            trainer.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.flush()


@needs_gpus(1)
@pytest.mark.parametrize("graphs", [False, True])
def test_a_bad_batch_leaves_no_trace(graphs: bool) -> None:
    torch.manual_seed(3)
    groups = lct.split(
        Deep(False),
        example_input=torch.zeros(4, 1, 8, 8),
        split_points=["1", "2"],
        critic="pooled_linear:pool=2",
    )
    trainer = lct.Trainer(
        groups, lct.LocalCritic(), devices=["cuda:0"], schedule="pipelined", feedback_delay=1, graphs=graphs
    )
    bad = WARM_UP + 5
    before: dict[str, Any] = {}
    with pytest.raises(lct.NonFiniteError, match=f"group 2 at batch {bad} "):
        for t, (x, y) in enumerate(_batches(30, "cuda:0")):
            if t == bad:
                trainer.settle()
                before = all_of(trainer, 1)
                x = x * 100
            trainer.step(x, y)
    torch.cuda.synchronize()
    assert equal(before, all_of(trainer, 1))


@needs_gpus(1)
def test_what_cannot_be_recorded_runs_eagerly_and_says_why() -> None:
    trainer = _asking(lct.Greedy(), devices=["cuda:0"])
    for x, y in _batches(BATCHES, "cuda:0"):
        trainer.step(x, y)
    trainer.flush()
    assert trainer.workers[0].eager_because is None
    assert (trainer.workers[1].eager_because or "").startswith("recording it failed")


class Fails(torch.nn.Module):
    """Draws random numbers, then waits for the device."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(x, 0.1)
        return x if float(x.detach().sum()) > -1e9 else -x


@needs_gpus(1)
def test_a_recording_that_failed_leaves_random_numbers_and_memory_as_they_should_be() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 8), torch.nn.Linear(8, 8), Fails(), torch.nn.Linear(8, 5)]
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    groups = lct.split(net, example_input=torch.zeros(4, 1, 8, 8), split_points=["2"], critic="linear")
    trainer = lct.Trainer(groups, lct.Greedy(), devices=["cuda:0"], schedule="pipelined")
    used = []
    for x, y in _batches(60, "cuda:0"):
        trainer.step(x, y)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_stats()["active_bytes.all.current"])
    trainer.flush()
    assert (trainer.workers[1].eager_because or "").startswith("recording it failed")
    # Memory that a copy stream has used is taken back as before.
    assert max(used[40:]) <= max(used[20:40])


@needs_gpus(1)
@pytest.mark.parametrize("name", list(METHODS))
def test_results_of_a_slot_outlive_the_graphs_of_others(name: str) -> None:
    """Deep groups, whose graphs write much by the way, under a delay that keeps slots for long."""
    found = []
    for graphs in (False, True):
        torch.manual_seed(3)
        groups = lct.split(
            Deep(False),
            example_input=torch.zeros(4, 1, 8, 8),
            critic="conv_fc:convs=1,filters=16",
            split_points=["1", "2"],
        )
        trainer = lct.Trainer(
            groups,
            METHODS[name](),
            devices=["cuda:0"],
            schedule="pipelined",
            feedback_delay=4,
            optimizer=lambda p: torch.optim.SGD(p, 2**-7, fused=True),
            graphs=graphs,
        )
        found.append(_run(trainer, "cuda:0"))
    for n, t in found[0].items():
        torch.testing.assert_close(found[1][n], t, rtol=1e-3, atol=1e-5, msg=n)


@needs_gpus(1)
def test_random_numbers_of_a_group_go_on_under_graphs() -> None:
    device = streams.device(torch.device("cuda:0"))
    eager, recorded = (RandomStream(7, 0, torch.device("cuda:0")) for _ in range(2))
    outside = torch.cuda.get_rng_state()
    graph, stream = device.graph(device.pool()), device.stream("compute")
    with recorded.active():
        drawn = graph.capture(lambda: torch.rand(100, device="cuda:0"), stream)
    for _ in range(3):
        with recorded.active(), device.on(stream):
            graph.replay()
        torch.cuda.synchronize()
        with eager.active():
            assert torch.equal(torch.rand(100, device="cuda:0"), drawn)
    assert torch.equal(torch.cuda.get_rng_state(), outside)
    assert torch.equal(eager.state["cuda"], recorded.state["cuda"])
