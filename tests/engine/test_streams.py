"""The schedule of one process on devices that check its order: whatever may run at once, and the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lct_fast as lct
from lct_fast.codecs import vector_quantization
from lct_fast.engine import batch_check, checkpoint
from lct_fast.engine.cuda import gate, ring, streams
from lct_fast.engine.cuda.gate import Gate
from lct_fast.engine.schedules import ticks
from lct_fast.engine.schedules.graphs import WARM_UP, eager_lines, why_eager
from lct_fast.engine.schedules.ticks import Ticks
from tests.engine import nets
from tests.engine.fake_device import Disorder, FakeDevice, FakeGraph, FakeLate, Machine
from tests.engine.pipelined_cases import Case

BATCHES = 16
MIDDLE = 9


# Rates that fp32 holds exactly, as a graph's are fp32 tensors.
def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.125, momentum=0.5, fused=True)


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 2**-10, fused=True)


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def _local_critic(**options: Any) -> Callable[[], lct.Method]:
    return lambda: lct.LocalCritic(critic_optimizer=_adam, **options)


CASES = {
    "greedy": Case(lct.Greedy, "mlp_aux", {"scheduler": _halving}),
    **{f"delay {d}": Case(_local_critic(), options={"feedback_delay": d}) for d in (1, 2, 3, 4)},
    "every second, dropout, int4": Case(
        _local_critic(critic_every=2, loss="one_sided"),
        "conv_fc:convs=1,filters=4",
        {"codec": "int4:32", "clip_norm": 1.0},
        dropout=True,
    ),
    "vector-quantised": Case(_local_critic(), options={"codec": "vq:16,2"}),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, threads: None) -> Iterator[Callable[..., Machine]]:
    """Makes machines whose late numbers are read as on a device."""

    def make(count: int = 1, peers: bool = True) -> Machine:
        made = Machine(count, peers=peers)
        late = type("MachineLate", (FakeLate,), {"machine": made})
        for module in (batch_check, gate, vector_quantization):
            monkeypatch.setattr(module, "Late", late)
        return made

    yield make


def on_machine(case: Case, count: int, machine: Machine, graphs: bool | None = None) -> lct.Trainer:
    """The case's trainer, its groups spread over the machine's devices."""
    case = Case(case.method, case.critic, {"optimizer": _sgd} | case.options, case.dropout)
    trainer = case.trainer(count, "pipelined")
    place(trainer, machine, graphs)
    return trainer


def place(trainer: lct.Trainer, machine: Machine, graphs: bool | None = None) -> None:
    """Spreads the trainer's groups over the machine's devices."""
    trainer._check.late = True
    places, count = machine.devices, len(trainer.workers)
    for k, worker in enumerate(trainer.workers):
        worker.gate = Gate(k, worker.device)
        worker.device = places[k * len(places) // count].device
    trainer._run = Ticks(trainer.workers, graphs, lambda place: places[place.index or 0])


def train(
    trainer: lct.Trainer, machine: Machine, batches: list[tuple[Tensor, Tensor]] | None = None
) -> dict[str, Any]:
    """All batches under the machine's eyes, an evaluation and a new learning rate in the middle."""
    odd, batches = batches is not None, batches or nets.batches(BATCHES)
    stats = []
    with machine:
        for t, (x, y) in enumerate(batches):
            if t == MIDDLE:
                stats += trainer.drain()
                middle = trainer.evaluate(batches[:2])
                trainer.set_learning_rate(2**-6)
            # The caller's own work on the device; it is free to forget the batch.
            x, y = x + 0, y + 0
            with machine.step():
                stats.append(trainer.step(x, y))
            machine.warm = t >= len(trainer.workers) and not odd
        stats += trainer.drain()
        trainer.flush()
        finished = [s for s in stats if s.batch >= 0]
        losses = torch.stack([s.losses for s in finished])
    assert [s.batch for s in finished] == list(range(BATCHES))
    return {
        "weights": nets.state(trainer),
        "losses": losses,
        "middle": middle,
        "feedback": trainer.meter.feedback_bytes,
        "wire": trainer.meter.wire_bytes,
        "samples": trainer.meter.groups[-1].samples,
    }


def lockstep(case: Case, count: int, batches: list[tuple[Tensor, Tensor]] | None = None) -> dict[str, Any]:
    """The same by the schedule that all else is held against, on the plain CPU."""
    case = Case(case.method, case.critic, {"optimizer": _sgd} | case.options, case.dropout)
    trainer = case.trainer(count, "lockstep")
    batches = batches or nets.batches(BATCHES)
    stats = [trainer.step(x, y) for x, y in batches[:MIDDLE]]
    middle = trainer.evaluate(batches[:2])
    trainer.set_learning_rate(2**-6)
    stats += [trainer.step(x, y) for x, y in batches[MIDDLE:]]
    trainer.flush()
    return {
        "weights": nets.state(trainer),
        "losses": torch.stack([s.losses for s in stats]),
        "middle": middle,
        "feedback": trainer.meter.feedback_bytes,
        "wire": trainer.meter.wire_bytes,
        "samples": trainer.meter.groups[-1].samples,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert nets.same(a["weights"], b["weights"])
    assert torch.equal(a["losses"], b["losses"])
    for name in ("middle", "feedback", "wire", "samples"):
        assert a[name] == b[name], name


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_the_order_is_right_and_the_bits_are_lockstep_s(
    name: str, places: int, graphs: bool, machine: Callable[..., Machine]
) -> None:
    under = machine(places)
    trainer = on_machine(CASES[name], 4, under, graphs)
    result = train(trainer, under)
    same(result, lockstep(CASES[name], 4))
    assert all(w.eager_because is None for w in trainer.workers)
    # Training, and with feedback a critic's update, in most steps behind the warm-up.
    learners = 0 if name == "greedy" else 3
    most = (BATCHES - WARM_UP) * 4 + learners * (BATCHES - WARM_UP - 2 * WARM_UP)
    assert under.replays == 0 if not graphs else under.replays >= most * 0.5


@pytest.mark.parametrize("count", [2, 3])
def test_other_numbers_of_groups(count: int, machine: Callable[..., Machine]) -> None:
    under = machine(2)
    same(train(on_machine(CASES["delay 3"], count, under, True), under), lockstep(CASES["delay 3"], count))


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_devices_that_cannot_reach_each_other_copy_through_the_host(
    graphs: bool, machine: Callable[..., Machine]
) -> None:
    under = machine(2, peers=False)
    trainer = on_machine(CASES["delay 3"], 4, under, graphs)
    same(train(trainer, under), lockstep(CASES["delay 3"], 4))
    run = trainer._run
    assert isinstance(run, Ticks)
    assert [r.staged for r in run.forward[1:] if r] == [False, True, False]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_batch_of_another_size(graphs: bool, machine: Callable[..., Machine]) -> None:
    batches = [(x[:7], y[:7]) if t in (5, 11) else (x, y) for t, (x, y) in enumerate(nets.batches(BATCHES))]
    case, under = CASES["delay 2"], machine(2, peers=False)
    same(train(on_machine(case, 3, under, graphs), under, batches), lockstep(case, 3, batches))


def test_losses_may_be_read_at_any_time_and_are_waited_for_only_then(
    machine: Callable[..., Machine],
) -> None:
    under, expected = machine(2), lockstep(CASES["greedy"], 2)["losses"]
    trainer = on_machine(CASES["greedy"], 2, under, True)
    last = trainer._run.streams[-1]  # type: ignore[union-attr]
    x, y = (t.clone() for t in nets.batches(1)[0])
    with under:
        for t, batch in enumerate(nets.batches(MIDDLE)):
            # The caller may keep one batch and fill it anew.
            x.copy_(batch[0])
            y.copy_(batch[1])
            with under.step():
                stats = trainer.step(x, y)
            if t < 4:
                assert last not in under.clocks["default"], "a step makes its caller wait for the last group"
            else:
                # Group 1 has gone on since.
                assert torch.equal(stats.losses + 0, expected[stats.batch])


# What the order rests on, each taken away in turn.


class Never(dict[str, int]):
    """An event that is recorded and never is."""

    def __ior__(self, other: Any) -> Any:
        return self


@pytest.mark.parametrize(
    ("event", "graphs", "peers"),
    [
        ("made", False, True),
        ("arrived", False, True),
        ("read", False, True),
        ("read", True, True),
        ("sent", True, True),
        ("sent", False, False),
        ("arrived", False, False),
        ("read", False, False),
    ],
)
def test_without_an_event_the_order_is_lost(
    event: str, graphs: bool, peers: bool, machine: Callable[..., Machine]
) -> None:
    under = machine(2, peers=peers)
    # Feedback would order more than it has to: a group that has heard of a batch knows that it was read.
    trainer = on_machine(CASES["greedy" if graphs else "delay 2"], 2, under, graphs)
    for made in (*trainer._run.forward[1:], *trainer._run.backward):  # type: ignore[union-attr]
        for slot in made.slots:
            setattr(slot, event, Never())
    with pytest.raises(Disorder, match="may be still to"):
        train(trainer, under)


def _early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is given back as soon as its batch has come."""
    receive, release = ring.Ring.receive, ring.Ring.release

    def both(self: ring.Ring, batch: int, stream: Any) -> list[Tensor]:
        found = receive(self, batch, stream)
        release(self, batch, stream)
        return found

    monkeypatch.setattr(ring.Ring, "receive", both)
    monkeypatch.setattr(ring.Ring, "release", lambda *_: None)


def _nothing(*_: Any) -> None:
    return None


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a slot is given back early": (_early, "writes over"),
    "copies do not hold what they read": (
        lambda m: m.setattr(FakeDevice, "keep", _nothing),
        "may be freed meanwhile",
    ),
    "no stream waits at the ends": (lambda m: m.setattr(ticks, "_join", _nothing), "may be still to"),
    "buffers are made anew": (lambda m: m.setattr(ring, "_alike", lambda *_: False), "allocated once warm"),
}


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_what_the_machine_finds(
    name: str, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, message = MUTATIONS[name]
    under = machine(1)
    trainer = on_machine(CASES["delay 2"], 2, under, False)
    mutate(monkeypatch)
    with pytest.raises(Disorder, match=message):
        train(trainer, under)


def test_a_graph_is_recorded_before_it_is_replayed(machine: Callable[..., Machine]) -> None:
    with pytest.raises(Disorder, match="before it was recorded"):
        FakeGraph(machine(), []).replay()


@pytest.mark.parametrize("name", ["greedy", "delay 2"])
def test_slots_that_shared_memory_would_lose_their_results(
    name: str, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    under = machine(2)
    pools: dict[int, list[FakeGraph]] = {}
    monkeypatch.setattr(FakeDevice, "pool", lambda self: pools.setdefault(self.index, []))
    with pytest.raises(Disorder, match="where another graph of the pool has been since|may be still to read"):
        train(on_machine(CASES[name], 2, under, True), under)


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses to say whether one without a number can be reached."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for made in (streams.CudaDevice(torch.device("cuda")), streams.device(torch.device("cuda"))):
        assert made.device == torch.device("cuda", 3)
        assert made.reaches(streams.CudaDevice(torch.device("cuda", 3)))
    assert streams.CudaDevice(torch.device("cuda", 1)).device.index == 1


class Asking(nn.Module):
    """Asks the device for a number, and computes with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if float(x.detach().sum()) > 0 else x


def _asking(method: lct.Method, **options: Any) -> lct.Trainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 8), Asking(), nn.Linear(8, 5))
    groups = lct.split(net, example_input=torch.zeros(4, 1, 8, 8), split_points=["2"], critic="linear")
    return lct.Trainer(groups, method, optimizer=_sgd, schedule="pipelined", **options)


def test_a_host_that_waits_is_found(machine: Callable[..., Machine]) -> None:
    under, trainer = machine(), _asking(lct.Greedy())
    place(trainer, under, graphs=False)
    with pytest.raises(Disorder, match="the host waits for a device inside a step"):
        train(trainer, under)


def test_a_codebook_that_comes_along_does_not_end_a_graph(machine: Callable[..., Machine]) -> None:
    """What the decoder reads before the graph may be more in one batch than in another."""
    replays, books = [], []
    for codec in ("none", "vq:16,2"):
        under = machine()
        trainer = on_machine(Case(lct.Greedy, options={"codec": codec}), 2, under, graphs=True)
        train(trainer, under)
        replays.append(under.replays)
        books.append(getattr(trainer.workers[0].encoder, "version", 0))
    assert books[1] > 1 and replays[0] == replays[1] > BATCHES


def test_what_cannot_be_recorded_runs_eagerly_and_says_why(machine: Callable[..., Machine]) -> None:
    under, trainer = machine(), _asking(lct.Greedy())
    plain = _asking(lct.Greedy())
    place(trainer, under)
    # A generator that a recording was using when it failed is of no use to torch.
    renewed: list[int] = []
    for worker in trainer.workers:
        worker.random.renew = lambda k=worker.index: renewed.append(k)  # type: ignore[method-assign]
    with under:
        for x, y in nets.batches(BATCHES):
            trainer.step(x, y)
        trainer.flush()
    for x, y in nets.batches(BATCHES):
        plain.step(x, y)
    plain.flush()
    assert nets.same(nets.state(trainer), nets.state(plain))
    one, two = trainer.workers
    assert one.eager_because is None and under.replays
    assert two.eager_because is not None
    assert two.eager_because.startswith("recording it failed: operation not permitted")
    assert eager_lines(trainer.workers) == [f"no CUDA graphs for group 2: {two.eager_because}"]
    assert renewed == [1]


def test_graphs_that_were_asked_for_and_cannot_be_are_an_error(machine: Callable[..., Machine]) -> None:
    with pytest.raises(
        ValueError, match="graphs=True, but group 1 cannot run as CUDA graphs: it runs on the cpu"
    ):
        _asking(lct.Greedy(), graphs=True)
    with pytest.raises(ValueError, match="graphs=True: CUDA graphs are for the pipelined schedule"):
        lct.Trainer(nets.groups(lct.Greedy()), lct.Greedy(), graphs=True)
    under, trainer = machine(), _asking(lct.Greedy())
    place(trainer, under, graphs=True)
    with under, pytest.raises(RuntimeError, match="graphs=True, but group 2 .*recording it failed"):
        for x, y in nets.batches(BATCHES):
            trainer.step(x, y)


class Wrapped(DistributedDataParallel):
    """As a wrapped module looks, with no processes behind it."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def _plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)


def _wrap(trainer: lct.Trainer) -> None:
    trainer.workers[1].layers = Wrapped(trainer.groups[1].layers)


def _step_hook(trainer: lct.Trainer) -> None:
    trainer.workers[1].optimizer.register_step_post_hook(_nothing)  # type: ignore[union-attr]


def _gradient_hook(trainer: lct.Trainer) -> None:
    next(trainer.groups[1].parameters()).register_post_accumulate_grad_hook(_nothing)


def _module_hook(trainer: lct.Trainer) -> None:
    trainer.groups[1].layers.register_forward_hook(_nothing)


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        ({"accumulate": 2}, _nothing, "accumulate=2"),
        ({"diagnose": 50}, _nothing, "its gradients are looked at every 50 batches"),
        ({"optimizer": _plain_sgd}, _nothing, "SGD is neither fused nor capturable"),
        ({}, _wrap, "DistributedDataParallel"),
        ({}, _step_hook, "optimiser SGD has hooks"),
        ({}, _gradient_hook, "parameter .* has hooks"),
        ({}, _module_hook, "module layers has hooks"),
    ],
)
def test_why_a_group_runs_eagerly(
    options: dict[str, Any], change: Callable[[lct.Trainer], None], says: str, machine: Callable[..., Machine]
) -> None:
    trainer = on_machine(Case(lct.Greedy, options=options), 2, machine())
    assert options or trainer.workers[1].eager_because is None
    change(trainer)
    found = why_eager(trainer.workers[1], machine().devices[0])
    assert found is not None and re.search(says, found)


@pytest.mark.slow
def test_loading_a_checkpoint_records_anew(machine: Callable[..., Machine], tmp_path: Path) -> None:
    case, under, batches = CASES["delay 2"], machine(), nets.batches(2 * BATCHES)
    first, second = on_machine(case, 2, under, True), on_machine(case, 2, under, True)
    with under:
        for x, y in batches[:BATCHES]:
            first.step(x, y)
        # Another course, with graphs of its own.
        for x, y in reversed(batches[:BATCHES]):
            second.step(x, y)
        checkpoint.load(second, checkpoint.save(first, tmp_path))
        under.replays = 0
        for trainer in (first, second):
            for t, (x, y) in enumerate(batches[BATCHES:]):
                if t == MIDDLE:
                    trainer.set_learning_rate(2**-5)
                trainer.step(x, y)
            trainer.flush()
    assert nets.same(nets.state(first), nets.state(second)) and under.replays
