"""One group and what updates it. Every schedule calls the same methods in the same order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lct_fast import codecs
from lct_fast.codecs import Codec, Encoded
from lct_fast.engine.cuda.gate import LATE, Gate, restore
from lct_fast.engine.diagnosis import Diagnosis
from lct_fast.engine.errors import NonFiniteError, OutOfMemoryError, first_line
from lct_fast.engine.feedback import Feedback, Pending
from lct_fast.engine.finite import all_finite
from lct_fast.engine.meter import GroupMeter
from lct_fast.engine.network import carried
from lct_fast.engine.network.exits import score
from lct_fast.engine.network.group import Group
from lct_fast.engine.random_stream import RandomStream
from lct_fast.engine.settings import Settings
from lct_fast.engine.storage.predictor import Predictor
from lct_fast.engine.storage.sample_store import SampleStore
from lct_fast.engine.transport.replicas import Replicas
from lct_fast.methods import LocalStep, Slot


class Stateful(Protocol):
    """Something a checkpoint keeps: tensors and plain data out, the same in."""

    # What it holds, for an error that says that there is none.
    what: str

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Worker:
    """Trains one group: for batch t ``train``, ``update`` and ``learn``, in this order.

    Args:
        index: number of the group, from 0.
        group: its layers and head.
        device: where it runs.
        settings: of the run.
        seed: of the run, for the group's random numbers.
        replicas: the processes that train this group; by default this one alone.

    Attributes:
        decoder, encoder: of what comes and of what leaves, this end's own; None before the first and behind the last
            group.
        feedback: what is awaited of the next group, and owed to the one before.
        meter: the group's own.
        kept: what a schedule has beside it that a checkpoint keeps with the group.
        store: what the method keeps for every training sample, or what foretells that; None where there is nothing.
        gate: finds NaN and Inf on a device; None on the host, where it is seen at once.
        diagnosis: reads the gradients of some updates; None if nobody asked.
        eager_because: why the group does not run as CUDA graphs; None if it does, or nobody asked.
    """

    def __init__(
        self,
        index: int,
        group: Group,
        device: torch.device,
        settings: Settings,
        seed: int,
        replicas: Replicas | None = None,
    ) -> None:
        self.index, self.group, self.device, self.settings = index, group, device, settings
        self.decoder: Codec | None = None
        self.encoder: Codec | None = None
        self.replicas = replicas or Replicas()
        group.to(device=device, memory_format=settings.memory_format)  # type: ignore[call-overload]
        settings.method.prepare(group.layers, group.critic if group.last else None)
        self.replicas.align(group)
        joint = settings.method.joint_optimizer or group.last
        trained = (group if joint else group.layers).parameters()
        params = [p for p in trained if p.requires_grad]
        self.optimizer = _made("optimizer", settings.optimizer, params) if params else None
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if not joint and settings.method.critic_optimizer is not None:
            self.critic_optimizer = settings.method.critic_optimizer(group.critic.parameters())
        make = settings.scheduler
        self.schedulers = [_made("scheduler", make, self.optimizer)] if make and self.optimizer else []
        # As they run: compiled, or the group's own; under DistributedDataParallel where there are replicas.
        layers: Any = group.layers
        fused = group.fused
        if settings.compile:
            layers, fused = torch.compile(layers), None if fused is None else fused.compiled()
        self.layers, self._fused = self.replicas.wrap(layers, fused)
        averaged = {id(p) for p in group.layers.parameters()}
        self._by_hand = [p for p in self.parameters if id(p) not in averaged]
        self.random = RandomStream(seed, index, device, self.replicas.index)
        self.feedback = Feedback(index + 1, settings.feedback_delay)
        self.meter = GroupMeter(index, group.last)
        self.diagnosis: Diagnosis | None = None
        if settings.diagnose:
            # A critic is no part of the network; the last group's is its output.
            part = (group if group.last else group.layers).parameters()
            self.diagnosis = Diagnosis(
                list(part), settings.diagnose, settings.accumulate, settings.hybrid, self.meter
            )
        self.kept: Stateful | None = None
        self.store: SampleStore | Predictor | None = None
        self._behind: Callable[[Tensor, Tensor], Tensor] | None = None
        self.gate = Gate(index, device, self.replicas.any) if device.type == "cuda" else None
        self.eager_because: str | None = None
        self._evaluating = False

    def set_codecs(self, decoder: str | None, encoder: str | None) -> None:
        """The specs of what comes and of what leaves; None where nothing does."""
        self.decoder = None if decoder is None else codecs.build(decoder)
        self.encoder = None if encoder is None else codecs.build(encoder)
        if self.encoder is not None:
            self.encoder.join(self.replicas)

    def set_store(self, samples: int, codec: str, folder: Path | None) -> None:
        """Makes room for what the method keeps for each of so many training samples."""
        names = self.settings.method.sample_state
        if names and not self.last:
            file = None if folder is None else folder / f"group-{self.index + 1}"
            self.store = self.kept = SampleStore(names, samples, self.group.shape, codec, self.device, file)

    def set_predictor(self, seed: int) -> None:
        """Makes the net that foretells what the method would keep for each sample; ``seed`` is the run's."""
        if not self.last:
            source = tuple(self.group.cut.example.shape[1:])
            method, own = self.settings.method, seed % 2**31 + 7919 * (self.index + 1)
            self.store = self.kept = Predictor(method, source, self.group.shape, self.device, own)

    def forget_samples(self) -> None:
        """Gives up what is kept for samples: the weights have moved on without it."""
        if self.store is not None:
            self.store.forget()

    @property
    def fused(self) -> Any:
        """As the group's, as it runs."""
        return None if self.group.fused is None else self._fused

    @property
    def critic(self) -> Any:
        return self.group.critic

    @property
    def last(self) -> bool:
        return self.group.last

    def behind(self, h: Tensor, target: Tensor) -> Tensor:
        """As in ``GroupLike``, for methods that ask."""
        assert self._behind is not None, "only lockstep runs the groups behind"
        return self._behind(h, target)

    def set_behind(self, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        """What ``behind`` runs."""
        self._behind = behind

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for g in self.optimizer.param_groups for p in g["params"]] if self.optimizer else []

    def place(self, h: Tensor) -> Tensor:
        """``h`` on the group's device, in the run's memory format."""
        settings = self.settings
        return h.to(
            self.device, memory_format=settings.memory_format if h.dim() == 4 else torch.preserve_format
        )

    def train(
        self,
        batch: int,
        h: Tensor,
        target: Tensor,
        refused: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> LocalStep:
        """Forward, local loss and local backward on batch number ``batch``; gradients are left in ``.grad``.

        Args:
            h: h_{k-1} [N, ...], on the group's device.
            target: as in ``Trainer.step``, on the group's device.
            refused: 0-dim, 1 where the batch must leave no trace; on the group's device.
            samples: where the method keeps something for them, their numbers in the training set, int64 [N]; with
                auxiliary nets the network's input [N, ...].

        Raises:
            NonFiniteError, OutOfMemoryError: they name the group; nothing was updated.
        """
        self.check()
        result = self.compute(batch, h, target, refused, samples=samples)
        self.took(batch, target, result)
        return result

    def check(self, late: int = LATE) -> None:
        """Raises the NonFiniteError of a batch that a device has flagged; with ``late`` 1 of any up to now."""
        if self.gate is not None:
            self.gate.check(late)

    def took(self, batch: int, target: Tensor, result: LocalStep) -> None:
        """What the host keeps of a batch that ``compute`` has been through."""
        self.meter.samples += self.settings.objective.rows(target)
        if result.slot is not None and self.wants(batch):
            self.feedback.pending.append(Pending(batch, result.slot))
        if self.gate is not None:
            self.gate.report(batch)

    def wants(self, batch: int) -> bool:
        """Whether the critic learns from ``batch`` once the next group's loss is known."""
        method = self.settings.method
        return (
            not self.last
            and method.uses_feedback
            and method.wants_feedback(batch // self.settings.accumulate)
        )

    def compute(
        self,
        batch: int,
        h: Tensor,
        target: Tensor,
        refused: Tensor | None = None,
        keep_slot: bool | None = None,
        samples: Tensor | None = None,
    ) -> LocalStep:
        """The part of ``train`` that is work for the device; ``keep_slot``: whether the batch's slot is wanted."""
        settings = self.settings
        self.group.train()
        version = h._version
        buffers = [(b, b.clone()) for b in self.group.buffers()]
        try:
            averaging = self.replicas.averaging(self._ends_update(batch))
            with averaging, self.random.active(), self.autocast():
                scale = self._scale(target, settings.accumulate)
                if settings.method.sample_state:
                    result = self._sample_step(h, target, scale, samples)
                else:
                    result = settings.method.local_step(
                        self,
                        h,
                        target,
                        settings.objective,
                        scale,
                        keep_slot=self.wants(batch) if keep_slot is None else keep_slot,
                        span=self.meter.span,
                    )
        except Exception as error:
            # What a backward has left half way must not be added to the next batch's.
            self.group.zero_grad()
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise OutOfMemoryError(
                    f"group {self.index + 1} ran out of memory at batch {batch} of {len(h)} samples "
                    f"({first_line(error)}): use a smaller batch, accumulation, or more groups"
                ) from None
            error.add_note(f"in group {self.index + 1} at batch {batch}, input {_told(h)}")
            raise
        if h._version != version:
            raise RuntimeError(
                f"group {self.index + 1} changed its input in place ({self.group.units[0]}): what crosses a cut is "
                f"shared, use inplace=False in the first layer after it"
            )
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.gate is None:
            for what, values in (("the loss", [result.loss]), ("a gradient", gradients)):
                if not all_finite(values):
                    self._leave_out(batch, what, buffers)
            return result
        if refused is not None:
            # So that every group behind, and the critic before, leaves the batch out.
            result.loss = result.loss.masked_fill(refused > 0, float("nan"))
        bad = self.gate.look(result.loss, gradients, refused)
        for buffer, before in buffers:
            restore(buffer, before, bad)
        return result

    def _sample_step(self, h: Tensor, target: Tensor, scale: Tensor, samples: Tensor | None) -> LocalStep:
        """The step of a method that keeps something for each sample."""
        kept = None
        if self.store is not None:
            assert samples is not None, "the trainer has asked for them"
            with self.meter.span("sample state"):
                kept = self.store.read(samples)
        settings = self.settings
        result = settings.method.sample_step(
            self, h, target, settings.objective, scale, kept, answers=self.index > 0, span=self.meter.span
        )
        if result.slot is not None and self.store is not None:
            result.slot.samples, result.slot.era = samples, self.store.era
        return result

    def encode(self, h: Tensor) -> Encoded:
        """What travels of h_k, counted."""
        assert self.encoder is not None, "nothing crosses behind the last group"
        with self.meter.span("encode"):
            coded = self.encoder.encode(h)
        self.sent(coded, h)
        return coded

    def sent(self, coded: Encoded, h: Tensor) -> None:
        """Counts what travels of h_k."""
        self.meter.wire_bytes += coded.nbytes
        self.meter.raw_bytes += h.numel() * 4
        assert self.encoder is not None, "nothing crosses behind the last group"
        # The codec's own count goes on where a checkpoint left it.
        self.meter.codebook_bytes = self.encoder.codebook_bytes

    def decode(self, coded: Encoded, decoder: Codec | None = None) -> Tensor:
        """h_{k-1}, on the group's device; by the cut's own decoder if no other is named."""
        decoder = decoder or self.decoder
        assert decoder is not None, "nothing comes before the first group"
        with self.meter.span("decode"):
            return decoder.decode(coded.to(self.device))

    def mean(self, loss: Tensor, target: Tensor) -> Tensor:
        """Mean of a per-sample loss [N] over the rows that count, of all replicas, on the device."""
        objective = self.settings.objective
        here = loss.detach().sum() * objective.scale(target)
        if self.replicas.count == 1:
            return here
        return self.replicas.mean(here, objective.counted(target))

    def owes(self, batch: int) -> bool:
        """Whether the group before learns from this group's loss on ``batch``."""
        method = self.settings.method
        return (
            self.index > 0
            and method.uses_feedback
            and method.wants_feedback(batch // self.settings.accumulate)
        )

    def update(self, batch: int) -> None:
        """The optimiser's step, if ``batch`` ends an accumulation, and the schedulers'."""
        if self._ends_update(batch):
            self.apply_gradients(batch)
            self.advance_schedulers()

    def apply_gradients(self, batch: int | None = None) -> None:
        """The optimiser's step: work for the device. Gradients are diagnosed where the number of the batch is given."""
        if self.optimizer is None:
            return
        with self.meter.span("optimizer"):
            self.replicas.average(self._by_hand)
            if self.diagnosis is not None and batch is not None:
                self.diagnosis.read(batch)
            if self.settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            if self.gate is None:
                self.optimizer.step()
            else:
                self.gate.step(self.optimizer, self.gate.found)
            self.optimizer.zero_grad(set_to_none=True)

    def advance_schedulers(self) -> None:
        """The schedulers' step: work for the host."""
        for scheduler in self.schedulers:
            scheduler.step()

    def learn(self, batch: int) -> None:
        """After ``update`` on ``batch``: the critic learns from the batch ``feedback_delay`` before it."""
        self._apply(batch - self.settings.feedback_delay)
        if self._ends_update(batch):
            self.update_critic()

    def flush(self, batch: int) -> None:
        """Applies all feedback up to ``batch``, as one update of the critic."""
        if self.feedback.pending:
            self._apply(batch)
            self.update_critic()

    def forward(self, h: Tensor) -> Tensor:
        """h_k in evaluation mode, for groups behind that still learn when this one has finished."""
        self.group.eval()
        with torch.no_grad(), self.meter.span("forward"), self.autocast():
            return self.group.layers(h)

    def begin_sequence(self) -> None:
        """Layers that carry state from batch to batch begin afresh with the next one."""
        carried.begin_sequence([self.group])

    def evaluate(self, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """h_k and the exit's ``score`` on these samples, zeros without an exit; in evaluation mode.

        Layers that carry state begin afresh, and go on from batch to batch until ``end_evaluation``.
        """
        if not self._evaluating:
            carried.go_on([self.group], True)
            self._evaluating = True
        self.group.eval()
        with torch.no_grad():
            h = self.group.layers(h)
            if not self.group.has_exit:
                return h, torch.zeros(4, dtype=torch.float64, device=self.device)
            return h, score(self.group.critic(h).float(), target, self.settings.objective)

    def end_evaluation(self) -> None:
        """What follows is another evaluation, or training."""
        carried.go_on([self.group], False)
        self._evaluating = False

    def read_codebook(self, batch: int) -> None:
        """Notes how the codebook of what leaves was used since the last time, if there is one."""
        use = None if self.encoder is None else self.encoder.codebook_use()
        if use is not None:
            self.meter.codebook.append({"batch": batch, **use})

    def set_learning_rate(self, rate: float) -> None:
        """The learning rate of the group's optimiser from now on; critics keep theirs."""
        for part in self.optimizer.param_groups if self.optimizer else ():
            if isinstance(part["lr"], Tensor):
                part["lr"].fill_(rate)
            else:
                part["lr"] = rate

    def _scale(self, target: Tensor, divisor: int) -> Tensor:
        """The factor of the mean loss, such that gradients averaged over replicas are those of the whole batch."""
        objective = self.settings.objective
        scale = objective.scale(target, divisor)
        if self.replicas.count == 1:
            return scale
        return scale * self.replicas.weight(objective.counted(target))

    def compare_codebooks(self) -> None:
        """Checks that all replicas code alike.

        Raises:
            ReplicaError: names the ranks that do not.
        """
        if self.encoder is not None:
            self.replicas.compare(f"the codebook of group {self.index + 1}", self.encoder.shared())

    def compare_weights(self) -> None:
        """Waits for all replicas and checks that they hold the same weights.

        Raises:
            ReplicaError: names the ranks that do not.
        """
        self.replicas.compare(f"the weights of group {self.index + 1}", self.group.parameters())

    def _ends_update(self, batch: int) -> bool:
        return (batch + 1) % self.settings.accumulate == 0

    def _apply(self, through: int) -> None:
        for slot, next_loss, batch in self.feedback.take(through):
            self.meter.feedback_bytes += next_loss.nbytes
            if self.store is None:
                self.hear(slot, next_loss)
            else:
                self._keep(slot, next_loss, batch, self.store)

    def _keep(self, slot: Slot, next_loss: Tensor, batch: int, store: SampleStore | Predictor) -> None:
        """What is kept for the samples of a batch, now that the next group has answered."""
        assert slot.samples is not None
        if slot.era != store.era:
            return
        with self.meter.span("sample state"):
            found = self.settings.method.late_state(slot, next_loss)
            if self.gate is None and not all_finite(found.values()):
                raise NonFiniteError(
                    f"what group {self.index + 1} keeps for the samples of batch {batch} is NaN or Inf: lower "
                    f"the learning rate, beta or eta, and go on from the last checkpoint"
                )
            store.write(slot.samples, found)

    def hear(self, slot: Slot, next_loss: Tensor) -> None:
        """The critic's gradients from one batch: work for the device."""
        if self.gate is not None:
            self.gate.hear((slot.loss, next_loss))
        with self.meter.span("critic update"):
            self.settings.method.critic_step(self.critic, slot, next_loss, self.settings.objective)

    def update_critic(self) -> None:
        """The step of the critic's own optimiser, if there are gradients: work for the device."""
        optimizer = self.critic_optimizer
        if optimizer is None or all(p.grad is None for p in self.critic.parameters()):
            return
        with self.meter.span("critic update"):
            self.replicas.average(self.critic.parameters())
            if self.gate is None:
                optimizer.step()
            else:
                self.gate.step(optimizer, self.gate.critic)
            optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision."""
        autocast = self.settings.autocast
        return torch.autocast(self.device.type, autocast) if autocast else nullcontext()

    def _leave_out(self, batch: int, what: str, buffers: Sequence[tuple[Tensor, Tensor]]) -> NoReturn:
        """Puts the group back to where it was before ``batch``, and says why."""
        self.group.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
        raise NonFiniteError(
            f"{what} of group {self.index + 1} at batch {batch} is NaN or Inf: the group was not updated; "
            f"lower its learning rate and go on from the last checkpoint"
        )


def _made(name: str, factory: Callable[[Any], Any], given: Any) -> Any:
    """What a user's ``factory`` makes; one that forgets to return it would leave the group untrained."""
    made = factory(given)
    if made is None:
        raise ValueError(f"{name}: expected a function that returns one, got None from {factory!r}")
    return made


def _told(h: Tensor) -> str:
    return f"{str(h.dtype).removeprefix('torch.')} {list(h.shape)}"


def check_flags(
    workers: Sequence[Worker],
    on: Callable[[int], AbstractContextManager[Any]] = lambda k: nullcontext(),
    late: int = LATE,
) -> None:
    """``check`` of every group, between steps; ``on(k)`` is where group k's device works.

    Raises:
        NonFiniteError: that of the first group; those behind it have had the same batch, and say no more of it.
    """
    try:
        for k, worker in enumerate(workers):
            with on(k):
                worker.check(late)
    except NonFiniteError:
        for k, worker in enumerate(workers):
            with on(k), suppress(NonFiniteError):
                worker.check(late=1)
        raise


def learning_rate(workers: Iterable[Worker]) -> float | None:
    """That of the first group that has an optimiser."""
    for worker in workers:
        if worker.optimizer is not None:
            return float(worker.optimizer.param_groups[0]["lr"])
    return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` is torch's way to say that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("can't allocate memory|not enough memory", str(error))
    )
