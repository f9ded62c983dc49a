"""One group as CUDA graphs, two a slot: its training on a batch, and its critic's late update.

A batch is in slot t modulo the number of slots. The graph of a slot reads its input where the link puts it and leaves
its results where it was recorded to, so a slot's results live until the slot comes round again: as long as feedback
needs. Transfers are not part of a graph, nor is what the host counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lct_fast.codecs import Encoded, Layout
from lct_fast.engine.cuda.streams import Device, Graph, Stream
from lct_fast.engine.errors import first_line
from lct_fast.engine.network import carried
from lct_fast.engine.worker import Worker
from lct_fast.methods import LocalStep

# Steps that run eagerly first. They are steps like any other: kernels get chosen and compiled, and optimisers make
# their state, which a recording could not.
WARM_UP = 3


@dataclass(slots=True)
class Inputs:
    """A batch as it arrives at a group, on the group's device.

    Attributes:
        losses: mean losses of the groups before, [k]; None before the first.
        samples: as in ``Worker.train``, where they lie.
        refused: 0-dim, 1 where the batch must leave no trace; None if that is known to be not so.
        coded: h as the codec sent it; with ``layout`` None, h itself.
    """

    target: Tensor
    losses: Tensor | None
    refused: Tensor | None
    coded: tuple[Tensor, ...]
    layout: Layout | None
    version: int = 0
    samples: Tensor | None = None

    def tensors(self, decoded: bool = False) -> list[Tensor]:
        """What a graph reads; ``decoded``: all but h, which is decoded before it."""
        optional = (self.losses, self.refused)
        return [self.target, *(t for t in optional if t is not None), *(() if decoded else self.coded)]


@dataclass(slots=True)
class Work:
    """What a group makes of a batch. ``losses`` are those of the groups so far; ``coded`` may be still to come."""

    result: LocalStep
    target: Tensor
    losses: Tensor
    refused: Tensor | None
    coded: Encoded | None = None


def train_work(worker: Worker, batch: int, inputs: Inputs, keep_slot: bool | None = None) -> Work:
    """Decodes and trains; the optimiser's step is left to be done. Work for the device, nothing for the host."""
    # What goes on from here to other groups, or stays for the critic, must not lie in the slot it came in.
    target = inputs.target.clone()
    refused = None if inputs.refused is None else inputs.refused.clone()
    h = worker.place(_decoded(worker, inputs))
    if not any(True for _ in worker.group.layers.parameters()):
        # Its output may be a view of its input.
        h = h.clone()
    result = worker.compute(batch, h, target, refused, keep_slot, inputs.samples)
    mean = worker.mean(result.loss, target)[None]
    losses = mean if inputs.losses is None else torch.cat((inputs.losses, mean))
    return Work(result, target, losses, refused)


def _decoded(worker: Worker, inputs: Inputs) -> Tensor:
    if inputs.layout is None:
        return inputs.coded[0]
    return worker.decode(Encoded(inputs.coded, inputs.layout, inputs.version))


def why_eager(worker: Worker, device: Device) -> str | None:
    """Why the group cannot run as CUDA graphs, as far as that shows before it runs; None if it does not."""
    if not device.overlaps:
        return f"it runs on the {worker.device.type}"
    if worker.settings.method.sample_state:
        return f"{worker.settings.method.name} keeps something for each sample, and the host says for which"
    if worker.settings.accumulate > 1:
        return f"accumulate={worker.settings.accumulate}: not every batch ends in the same work"
    if any(isinstance(m, DistributedDataParallel) for m in (worker.layers, *worker.group.modules())):
        return "it is wrapped in DistributedDataParallel, which communicates inside the backward pass"
    if worker.diagnosis is not None:
        return f"its gradients are looked at every {worker.settings.diagnose} batches (diagnose)"
    if carried.layers(worker.group):
        return "it carries state from batch to batch"
    hooked = _hooked(worker)
    if hooked:
        return f"{hooked} has hooks, which a graph would not call"
    for optimizer in _optimizers(worker):
        if not all(g.get("fused") or g.get("capturable") for g in optimizer.param_groups):
            return f"its optimiser {type(optimizer).__name__} is neither fused nor capturable: make it with fused=True"
    return None


def _hooked(worker: Worker) -> str | None:
    """Something of the user's that waits to be called in each step."""
    for name, p in worker.group.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return f"parameter {name}"
    for name, module in worker.group.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(module, h) for h in hooks):
            return f"module {name}"
    for optimizer in _optimizers(worker):
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"optimiser {type(optimizer).__name__}"
    return None


def _optimizers(worker: Worker) -> list[torch.optim.Optimizer]:
    return [o for o in (worker.optimizer, worker.critic_optimizer) if o is not None]


class _Rates:
    """Learning rates on the device, where a graph reads them. Optimisers and schedulers keep plain numbers."""

    def __init__(self, worker: Worker) -> None:
        # Torch records Adam only where this is set, and warns of it elsewhere; fused ones do not look at it.
        self._flagged = [
            g for o in _optimizers(worker) for g in o.param_groups if g.get("fused") and "capturable" in g
        ]
        groups = [g for o in _optimizers(worker) for g in o.param_groups if not isinstance(g["lr"], Tensor)]
        self._held = [(g, torch.zeros((), device=worker.device)) for g in groups]
        self._known: list[float | None] = [None] * len(groups)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Optimisers read the device's inside, and let themselves be recorded."""
        changed = [(g, "lr", rate) for g, rate in self._held] + [
            (g, "capturable", True) for g in self._flagged
        ]
        before = [g[name] for g, name, _ in changed]
        for g, name, value in changed:
            g[name] = value
        try:
            yield
        finally:
            for (g, name, _), value in zip(changed, before, strict=True):
                g[name] = value

    def update(self) -> None:
        """Brings the device's up to date, behind what the current stream has been given."""
        for i, (g, rate) in enumerate(self._held):
            if g["lr"] != self._known[i]:
                rate.fill_(g["lr"])
                self._known[i] = g["lr"]


@dataclass(slots=True)
class _Slot:
    """The graphs of a slot, and the tensors that they read and write."""

    inputs: Inputs
    h: Tensor | None
    train: Graph
    work: Work
    pool: Any
    critic: Graph | None = None
    next_loss: Tensor | None = None


class GroupGraphs:
    """Records and replays the graphs of one group.

    Args:
        device, stream: where the group runs.
        required: a recording that fails is an error; otherwise the group goes on eagerly and ``worker.eager_because``
            says why.

    Attributes:
        depth: number of slots.
    """

    def __init__(self, worker: Worker, device: Device, stream: Stream, *, required: bool) -> None:
        self.worker, self.device, self.stream, self.required = worker, device, stream, required
        self.depth = 1
        self._forget()
        for optimizer in _optimizers(worker):
            # Loading gives an optimiser other tensors, and other groups of them, than those recorded.
            optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def _forget(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._rates = _Rates(self.worker)
        self._steps = self._critic_steps = 0

    def ready(self, batch: int, inputs: Inputs) -> bool:
        """Whether ``train`` can take this batch; records its slot, where that is still to be done."""
        if self.worker.eager_because is not None:
            return False
        if self._steps < WARM_UP:
            self._steps += 1
            return False
        slot = self._slots.get(batch % self.depth)
        if slot is None:
            return self._record(batch, inputs)
        # A batch of another size lies elsewhere.
        decoded = slot.h is not None
        found, recorded = inputs.tensors(decoded), slot.inputs.tensors(decoded)
        same = all(a is b for a, b in zip(found, recorded, strict=False))
        return same and len(found) == len(recorded) and inputs.layout == slot.inputs.layout

    def train(self, batch: int, inputs: Inputs) -> Work:
        """Starts the slot's training: forward, critic, backward, the optimiser's step, encoding if it can be there."""
        worker, slot = self.worker, self._slots[batch % self.depth]
        if slot.h is not None:
            slot.h.copy_(_decoded(worker, inputs))
        self._rates.update()
        with worker.meter.span("graph"), worker.random.active():
            slot.train.replay()
        worker.took(batch, inputs.target, slot.work.result)
        worker.advance_schedulers()
        # The caller reads the last group's losses when it likes.
        losses = slot.work.losses.clone() if worker.last else slot.work.losses
        return replace(slot.work, losses=losses)

    def critic_ready(self, due: list[int]) -> bool:
        """Whether ``critic`` can take the batches whose feedback is due."""
        worker = self.worker
        if worker.eager_because is not None or len(due) != 1:
            return False
        if self._critic_steps < WARM_UP:
            self._critic_steps += 1
            return False
        slot, pending = self._slots.get(due[0] % self.depth), worker.feedback.pending[0]
        if slot is None or slot.work.result.slot is not pending.slot:
            return False
        if slot.critic is None:
            return self._record_critic(slot, pending.next_loss)
        return slot.next_loss is pending.next_loss

    def critic(self) -> None:
        """Starts the critic's update from the oldest batch that waits for it."""
        pending = self.worker.feedback.pending.popleft()
        slot = self._slots[pending.batch % self.depth]
        assert slot.critic is not None and pending.next_loss is not None, "critic_ready has said so"
        self.worker.meter.feedback_bytes += pending.next_loss.nbytes
        self._rates.update()
        with self.worker.meter.span("critic update"):
            slot.critic.replay()

    def _record(self, batch: int, inputs: Inputs) -> bool:
        worker, h = self.worker, None
        if inputs.layout is not None and worker.decoder is not None and not worker.decoder.recordable:
            # The decoder decides on the host; the graph begins behind it. Only memory is wanted here.
            layout = inputs.layout
            h = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=worker.device)
        read = inputs if h is None else replace(inputs, coded=(h,), layout=None)

        def work() -> Work:
            made = train_work(worker, batch, read, worker.settings.method.uses_feedback and not worker.last)
            if worker.encoder is not None and worker.encoder.recordable:
                made.coded = worker.encoder.encode(made.result.h)
            worker.apply_gradients()
            return made

        # Slots share no memory: what a slot's graph writes by the way may lie where a graph that was recorded after it
        # has its results, and those are needed until their own slot comes round.
        pool = self.device.pool()
        graph = self.device.graph(pool)
        try:
            # Outside the recording: graphs remember the random generator they begin with.
            with worker.random.active(), self._rates.recorded():
                made = graph.capture(work, self.stream)
        except Exception as error:
            self._give_up(error)
            return False
        self._slots[batch % self.depth] = _Slot(inputs, h, graph, made, pool)
        return True

    def _record_critic(self, slot: _Slot, next_loss: Tensor | None) -> bool:
        worker, kept = self.worker, slot.work.result.slot
        assert kept is not None and next_loss is not None, (
            "a critic learns from a slot and the next group's loss"
        )

        def work() -> None:
            worker.hear(kept, next_loss)
            worker.update_critic()

        graph = self.device.graph(slot.pool)
        try:
            with self._rates.recorded():
                graph.capture(work, self.stream)
        except Exception as error:
            self._give_up(error)
            return False
        slot.critic, slot.next_loss = graph, next_loss
        return True

    def _give_up(self, error: BaseException) -> None:
        """Goes on eagerly. A recording has run nothing, so only gradients that it left behind have to go."""
        for p in self.worker.group.parameters():
            p.grad = None
        self.worker.random.renew()
        # The end of a recording that has failed raises on its own account.
        while error.__context__ is not None:
            error = error.__context__
        self.worker.eager_because = f"recording it failed: {first_line(error)}"
        if self.required:
            raise RuntimeError(
                f"graphs=True, but group {self.worker.index + 1} cannot run as CUDA graphs: "
                f"{self.worker.eager_because}"
            ) from error


def eager_lines(workers: list[Worker]) -> list[str]:
    """Why groups run eagerly, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for worker in workers:
        if worker.eager_because is not None:
            reasons.setdefault(worker.eager_because, []).append(str(worker.index + 1))
    return [f"no CUDA graphs for group {', '.join(groups)}: {why}" for why, groups in reasons.items()]
