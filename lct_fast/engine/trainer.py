"""The trainer: groups, what trains each of them, and the schedule they run by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lct_fast import codecs
from lct_fast.engine import auto_codec
from lct_fast.engine.arguments import (
    check_groups,
    check_integer,
    check_method,
    check_positive,
    check_seconds,
    specs_of_cuts,
)
from lct_fast.engine.auto_codec import Choice
from lct_fast.engine.batch_check import BatchCheck
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.meter import Meter
from lct_fast.engine.network import carried
from lct_fast.engine.network.exits import Evaluation, summed
from lct_fast.engine.network.group import Group, exit_module, join
from lct_fast.engine.schedules.async_stage import AsyncStage
from lct_fast.engine.schedules.asynchronous import Asynchronous
from lct_fast.engine.schedules.lockstep import Lockstep
from lct_fast.engine.schedules.schedule import Async, Plan, check_carried, plan
from lct_fast.engine.schedules.stage import Stage
from lct_fast.engine.schedules.ticks import Ticks
from lct_fast.engine.settings import SchedulerFactory, Settings
from lct_fast.engine.stats import Event, Stats
from lct_fast.engine.storage.sample_store import Samples
from lct_fast.engine.storage.writer import Writer
from lct_fast.engine.transport.ranks import Ranks
from lct_fast.engine.worker import Worker, check_flags
from lct_fast.methods import Method, Objective
from lct_fast.methods.method import OptimizerFactory
from lct_fast.methods.objective import LossFunction


def _sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    params = list(params)
    fused = all(p.is_cuda for p in params)
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)


class Trainer:
    """Trains the groups of ``lct.split`` on batches, one call of ``step`` a batch.

    In one process, with either schedule::

        for x, y in loader:
            stats = trainer.step(x, y)
        trainer.flush()

    Pipelined over processes (one a group; torch.distributed initialised), the first group's process drives and the
    others follow::

        if trainer.first:
            for x, y in loader:
                trainer.step(x, y)
            trainer.flush()
            trainer.stop()
        else:
            for event in trainer.events():   # Stats, with all losses in the last group's process
                ...
        net = trainer.gather()               # the whole network, in every process

    Args:
        groups: what ``lct.split`` returned.
        method: ``LocalCritic()``, ``Greedy()``, ``LayerParallel()``, ``LikelihoodRatio()`` or ``Backprop()``; the last
            joins all groups into one.
        codec: what crosses the cuts in training: a spec of ``lct.codecs.build``, or a list of one for each cut. "auto"
            measures work, codecs and links at the batch size of ``split``'s example input, and chooses; see
            ``choices``.
        devices: group k runs on ``devices[k * len(devices) // K]``; default: where the model is. Over processes: the
            one device of this process.
        num_classes: checked against the model's output when given.
        optimizer: factory ``params -> torch.optim.Optimizer`` for each group; default SGD 0.1, Nesterov 0.9,
            weight decay 5e-4 (arXiv 2102.01963).
        scheduler: factory ``optimizer -> LR scheduler`` for each group's optimiser, stepped once an update.
        schedule: "lockstep", one batch through all groups; or "pipelined", group k on batch t - k at tick t, over
            processes if torch.distributed is initialised with more than one, else in this one. ``Hybrid(...)`` mixes
            blocks of ordinary back-propagation into either. ``Async(...)`` lets every group go at its own pace.
        feedback_delay: critic k learns from batch t after group k's update on batch t + d. Default 0 in lockstep and 3
            pipelined; pipelined it is at least 1, and below 3 groups may wait for it. With the same delay, pipelined
            and lockstep give the same bits.
        accumulate: batches to an update.
        clip_norm: largest gradient norm of a group, clipped group by group.
        loss: a loss of one's own, ``loss(logits, target) -> [N]``; default cross-entropy with integer labels or
            soft labels [N, V]. Of tokens N counts all.
        ignore_index: integer label that carries no loss.
        autocast: ``torch.bfloat16`` to run layers and critics under autocast.
        compile: run each group's layers through ``torch.compile``.
        channels_last: keep 4-d tensors in channels-last memory.
        checksum: over processes, whether the contents of packets carry a sum that the consumer checks (headers always
            do); default: on the CPU.
        replicas: pipelined over processes, R copies of the pipeline, each on its part of every batch: R x K processes
            (docs/replicas.md). The first group's process of each is given its own part, all of one size.
        start_timeout: over processes, seconds that a process's training loop may stand still until its first batch is
            done (compilation, loading, warm-up). Beyond that all processes end with an error that names it.
        step_timeout: the same from the first batch on: more than the longest step, and than the longest pause between
            two calls of ``step`` (``beat`` in longer ones).
        graphs: pipelined in one process, run each group as CUDA graphs: True, False, or None for where they can be;
            ``workers[k].eager_because`` says why not.
        diagnose: every so many batches note the norm of each group's gradient, and in lockstep its cosine to the true
            one (docs/diagnostics.md): ``meter.groups[k].readings``. Changes no bit. 0: never.
        samples: how many training samples there are, for a method that keeps something for each (``LayerParallel``);
            ``step`` is then told which ones a batch holds.
        sample_codec: how that is kept: a spec of ``lct.codecs.build`` whose codec has no state and codes each sample by
            itself.
        sample_folder: folder of files that it is kept in, mapped into memory; None keeps it in the memory of each
            group's device. Files of that folder are written over.

    Attributes:
        wires: the codec's spec for each cut.
        choices: for each cut what "auto" chose there and why, or None.
        groups: all groups; over processes, only this process's is trained here.
        workers: the groups trained in this process.
        carries: whether a layer carries state from batch to batch; see ``begin_sequence``.
        first, last: whether this process trains the first, the last group.
        replica, replicas: number of the replica this process belongs to, from 0, and how many there are.
        reports: whether this process gets all results: it trains the last group of replica 0.

    Raises:
        ValueError: an argument that does not fit, in one line.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        method: Method,
        *,
        codec: str | Sequence[str] = "none",
        devices: Sequence[str | torch.device] | None = None,
        num_classes: int | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        schedule: str | Hybrid | Async = "lockstep",
        feedback_delay: int | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        loss: LossFunction | None = None,
        ignore_index: int = -100,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        channels_last: bool = False,
        checksum: bool | None = None,
        replicas: int = 1,
        start_timeout: float = 600.0,
        step_timeout: float = 300.0,
        graphs: bool | None = None,
        samples: int | None = None,
        sample_codec: str = "none",
        sample_folder: Path | None = None,
        diagnose: int = 0,
    ) -> None:
        check_groups(groups)
        check_method(method)
        self.num_classes = groups[0].cut.num_classes
        if num_classes is not None and num_classes != self.num_classes:
            raise ValueError(
                f"num_classes={num_classes}, but the model's output has {self.num_classes} classes"
            )
        planned = plan(schedule, method, len(groups), feedback_delay, replicas)
        self.carries = bool(carried.layers(groups[0].cut.model))
        if self.carries:
            check_carried(planned)
        check_integer("accumulate", accumulate, 1)
        check_integer("diagnose", diagnose, 0)
        if clip_norm is not None:
            check_positive("clip_norm", clip_norm)
        if isinstance(devices, str):
            raise ValueError(f"devices: expected a list, such as [{devices!r}], got {devices!r}")
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast: expected torch.bfloat16 or None, got {autocast}")
        check_seconds("start_timeout", start_timeout)
        check_seconds("step_timeout", step_timeout)
        if method.sample_state and "auto" in ([codec] if isinstance(codec, str) else codec):
            raise ValueError(f"codec auto measures steps that {method.name} does not make: name a codec")
        self.method = method
        self.groups = [join(list(groups))] if method.joins_groups else list(groups)
        if not method.uses_critics:
            self.groups = [g.without_critic() for g in self.groups]
        method.check([g.critic for g in self.groups[:-1]])
        self.schedule, self.hybrid = planned.name, planned.hybrid
        self.wires = specs_of_cuts(codec, self.groups[:-1])
        if method.asks_behind and any(spec != "none" for spec in self.wires):
            raise ValueError(
                f"codec: {method.name} sends what crosses as it is, expected none, got {', '.join(self.wires)}"
            )
        self.objective = Objective(loss, ignore_index)
        self.settings = Settings(
            method=method,
            objective=self.objective,
            optimizer=optimizer or _sgd,
            scheduler=scheduler,
            feedback_delay=planned.feedback_delay,
            accumulate=accumulate,
            clip_norm=clip_norm,
            autocast=autocast,
            compile=compile,
            memory_format=torch.channels_last if channels_last else torch.preserve_format,
            checksum=checksum,
            hybrid=self.hybrid,
            diagnose=diagnose,
        )
        self._check = BatchCheck(self.num_classes, self.objective, target_dims=self.groups[0].cut.target_dims)
        count = len(self.groups)
        places = [torch.device(d) for d in devices] if devices else [_device_of(self.groups[0])]
        seed = torch.initial_seed()
        self.ranks: Ranks | None = None
        if planned.over_processes:
            units = [g.units for g in self.groups]
            terms = {
                "method": method.name,
                "schedule": repr(schedule),
                "feedback_delay": str(planned.feedback_delay),
                "accumulate": str(accumulate),
                "codec": ", ".join(self.wires),
            }
            self.ranks = Ranks.join(units, terms, places[0], replicas, start_timeout, step_timeout)
        mine = range(count) if self.ranks is None else (self.ranks.rank,)
        self.workers = [
            Worker(
                k,
                self.groups[k],
                places[k * len(places) // count],
                self.settings,
                seed,
                None if self.ranks is None else self.ranks.replicas,
            )
            for k in mine
        ]
        self.choices: list[Choice | None] = [None] * len(self.wires)
        if "auto" in self.wires:
            shapes = [g.shape for g in self.groups[:-1]]
            found = auto_codec.decide(
                self.workers, self.wires, shapes, self.groups[0].cut.example, self.ranks
            )
            self.choices = [c if spec == "auto" else None for spec, c in zip(self.wires, found, strict=True)]
            self.wires = [c.codec if c else spec for spec, c in zip(self.wires, self.choices, strict=True)]
        # An end of a cut has a codec of its own.
        self._samples = Samples(method, samples)
        ends = [None, *self.wires, None]
        for worker in self.workers:
            worker.set_codecs(ends[worker.index], ends[worker.index + 1])
            if method.auxiliary:
                worker.set_predictor(seed)
            elif samples is not None:
                worker.set_store(samples, sample_codec, sample_folder)
        self._run = self._runner(planned, graphs, seed)
        if graphs and not isinstance(self._run, Ticks):
            raise ValueError("graphs=True: CUDA graphs are for the pipelined schedule in one process")
        self.first, self.last = mine[0] == 0, mine[-1] == count - 1
        self.replica = self.workers[0].replicas.index
        self.replicas = replicas
        self.reports = self.last and self.replica == 0
        self.meter = Meter([w.meter for w in self.workers])
        # Of checkpoints: who writes them, how many were begun, and how long one waits for the other processes' part.
        self.writer, self.saves, self.patience = Writer(self._wait_for_writer), 0, start_timeout

    def _runner(
        self, planned: Plan, graphs: bool | None, seed: int
    ) -> Lockstep | Ticks | Stage | Asynchronous:
        if self.ranks is not None:
            if planned.pace is not None:
                return AsyncStage(self.workers[0], self.ranks, planned.pace)
            return Stage(self.workers[0], self.ranks)
        if planned.pace is not None:
            return Asynchronous(self.workers, planned.pace, seed)
        return Ticks(self.workers, graphs) if planned.name == "pipelined" else Lockstep(self.workers)

    @property
    def batch(self) -> int:
        """Number of the next batch that group 1, or this process's group, takes."""
        return self._run.batch

    @batch.setter
    def batch(self, value: int) -> None:
        self._run.batch = value

    @property
    def finished(self) -> bool:
        """Async: whether every group has made its updates. Elsewhere a batch that was given is all there is to do."""
        return self._run.finished if isinstance(self._run, Asynchronous | AsyncStage) else True

    def step(self, x: Tensor, y: Tensor, samples: Tensor | None = None) -> Stats:
        """Train on one batch. Over processes, called in the first group's.

        Async it returns when group 1 has taken the batch; the others are where they are.

        Args:
            x: the model's input, [N, ...], floating point or token ids.
            y: int64 labels [N]; [N, T] for a network whose output is [N, T, V], each token with a loss of its own; or
                soft labels [N, V] in floating point.
            samples: int64 [N], each sample's number in the training set, from 0 and none twice; for a method that
                keeps something for each.

        Raises:
            ValueError: shapes, labels or samples that do not fit.
            NonFiniteError: NaN or Inf in the input, in a group's loss or in its gradients; that group is not updated.
                On a CUDA device it comes two batches later, and tells which batch it was.
            OutOfMemoryError: names the group.
            PeerError: another group's process has gone.
            CheckpointError: one begun earlier could not be written.

        After an error lockstep may go on: groups before the one that failed have been updated. Pipelined in one
        process, batches between the groups are lost, and ``step`` refuses to go on until a checkpoint is loaded.
        """
        if not self.first:
            raise RuntimeError(
                "step belongs to the first group's process: follow it with `for event in events()`"
            )
        if isinstance(self._run, Stage):
            self._stage("step")
        self.writer.check()
        if isinstance(self._run, Lockstep | Ticks):
            y, refused = self._check(x, y, self.batch)
        else:
            y, refused = self._check(x, y, self.batch, at_once=True)
        samples = self._samples.check(samples, x)
        if self.hybrid is not None:
            self.hybrid.check_rows(len(x))
        start = time.perf_counter()
        if isinstance(self._run, Lockstep | Ticks):
            stats = self._run.step(x, y, refused, samples)
        elif isinstance(self._run, Asynchronous):
            stats = self._run.step(x, y)
        else:
            stats = self._run.step(x, y, samples)
        self.meter.step_seconds.append(time.perf_counter() - start)
        return stats

    def events(self) -> Iterator[Event]:
        """Follows the first group's process to its ``stop``: yields a ``Stats`` a batch, ``Mark``s, and in the last
        group's process ``Evaluation``s.

        Raises:
            NonFiniteError, OutOfMemoryError, PeerError: as ``step``.
        """
        stage = self._stage("events")
        if stage.first:
            raise RuntimeError(
                "the first group's process drives: call step, evaluate, mark, flush and stop there"
            )
        before = time.perf_counter()
        for event in stage.events():
            self.writer.check()
            yield event
            if isinstance(event, Stats):
                now = time.perf_counter()
                self.meter.step_seconds.append(now - before)
                before = now
        self.finish_saving()

    def finish_saving(self) -> None:
        """Waits until a checkpoint that was begun is written. Over processes ``stop`` and the end of ``events`` do.

        Raises:
            CheckpointError: it could not be written.
        """
        self.writer.finish()

    def _wait_for_writer(self) -> None:
        if self.ranks is not None:
            self.ranks.heart.wait("its checkpoint to be written")

    def beat(self) -> None:
        """Over processes: says that this process's training loop is alive, in a pause longer than ``step_timeout``.

        Raises:
            PeerError: another group's process has gone.
        """
        if self.ranks is not None:
            self.ranks.heart.beat()

    def drain(self) -> list[Stats]:
        """Pipelined in one process: lets every group catch up with the first; what that finished. Changes no result."""
        done = [] if isinstance(self._run, Stage) else self._run.drain()
        self._read_flags()
        return done

    def gather_meter(self) -> tuple[Meter, list[float]]:
        """The meter of all groups, and the seconds each one's clock is ahead of the first's.

        Over processes every process calls it, after ``stop``. Of replicas, samples and bytes are those of all, times
        those of replica 0.
        """
        if self.ranks is None:
            return self.meter, [0.0] * len(self.groups)
        mine = (self.workers[0].meter, self.meter.step_seconds, self.ranks.ahead)
        everyone: list[Any] = [None] * len(self.ranks.everywhere)
        with self.ranks.heart.together():
            dist.all_gather_object(everyone, mine, group=self.ranks.world)
        count = self.ranks.size
        pipeline = everyone[:count]
        for rank, (other, *_) in enumerate(everyone[count:]):
            pipeline[rank % count][0].add_counts(other)
        meter = Meter([one[0] for one in pipeline])
        meter.step_seconds = pipeline[-1][1]
        return meter, [one[2] for one in pipeline]

    def settle(self) -> None:
        """As ``drain``, and what it finished is told by the next steps or ``drain``."""
        if isinstance(self._run, Ticks):
            self._run.finished = self._run.drain()
        self._read_flags()

    def check_whole(self) -> None:
        """Refuses to go on, or to be saved, where a failed step has lost batches between the groups.

        Raises:
            RuntimeError: load a checkpoint first.
        """
        if isinstance(self._run, Ticks):
            self._run.check_whole()

    def give_up(self) -> None:
        """Forgets the batches on their way: the state of a checkpoint takes their place."""
        if isinstance(self._run, Ticks):
            self._run.give_up()
        # A batch that was flagged is no matter any more.
        with suppress(ValueError):
            self._read_flags()

    def _read_flags(self) -> None:
        """Raises what a device has flagged and nobody has read yet."""
        self._check.check(late=1)
        check_flags(self.workers, late=1)

    def flush(self) -> None:
        """Applies the feedback still in flight. For the end of a run, not between epochs."""
        if isinstance(self._run, Stage):
            self._stage("flush")
        self._run.flush()
        self._read_flags()

    def mark(self, code: int) -> None:
        """Over processes: every other process gets ``Mark(batch, code)`` behind the batches so far."""
        self._stage("mark").mark(code)

    def stop(self) -> None:
        """Over processes: the end of the stream; ``events`` ends everywhere. A second time it does nothing."""
        if isinstance(self._run, Stage) and self._run.ended:
            return
        stage = self._stage("stop")
        self.finish_saving()
        stage.stop()

    def close(self) -> None:
        """Over processes: ends this trainer's threads and process groups; its connections go with the object.

        For a program that builds several trainers; at a program's end nothing is needed. Every process calls it, after
        ``stop`` and what follows it (``gather``, ``gather_meter``). In one process there is nothing to give back.

        Raises:
            RuntimeError: before ``stop``. PeerError: another process has gone.
        """
        if not isinstance(self._run, Stage) or self.ranks is None:
            return
        if not self._run.ended:
            raise RuntimeError("close comes after stop(), or the end of events()")
        if self.ranks.made:
            self.ranks.close()

    def set_learning_rate(self, rate: float) -> None:
        """The learning rate of every group's optimiser from the next batch on; critics keep theirs.

        Raises:
            ValueError: less than 0, NaN or Inf.
        """
        if not 0 <= rate < float("inf"):
            raise ValueError(f"learning rate: expected a number >= 0, got {rate}")
        if isinstance(self._run, Stage):
            self._stage("set_learning_rate")
        if isinstance(self._run, Stage | Asynchronous):
            self._run.set_learning_rate(rate)
            return
        self.settle()
        for worker in self.workers:
            worker.set_learning_rate(rate)

    def begin_sequence(self) -> None:
        """Layers that carry state from batch to batch (``engine.network.carried``) begin afresh with the next one.

        For the start of an epoch whose batches follow on each other. Nothing happens where no layer carries state.
        """
        if not self.carries:
            return
        if isinstance(self._run, Stage):
            self._stage("begin_sequence").begin_sequence()
            return
        self.settle()
        for worker in self.workers:
            worker.begin_sequence()

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], coded: bool = False) -> Evaluation | None:
        """Loss and accuracy of every exit over ``batches`` of (x, y), in evaluation mode.

        Layers that carry state begin afresh with the first batch and go on to the last; what they carry in training
        stays as it is.

        What crosses the cuts is sent as it is, or ``coded`` as in training, with codecs that learn nothing meanwhile.
        Over processes, called in the first group's, the result is an event of the last group's; here it is None.
        Of replicas only replica 0 evaluates, as its network is the one that is exported; the first group's process of
        every other one calls this too, and waits.

        Raises:
            ValueError: shapes or labels that do not fit; no batch.
        """
        batches = (self._check.evaluated(x, y, number) for number, (x, y) in enumerate(batches))
        if self.ranks is not None:
            stage = self._stage("evaluate")
            result = stage.evaluate(batches, coded) if self.replica == 0 else None
            self.ranks.replicas.meet(self.ranks.heart.wait)
            return result
        self.settle()
        scores = torch.zeros(len(self.workers), 4, dtype=torch.float64)
        try:
            for x, y in batches:
                h = x
                for k, worker in enumerate(self.workers):
                    h, score = worker.evaluate(worker.place(h), y.to(worker.device))
                    scores[k] += score.cpu()
                    if coded and worker.encoder is not None:
                        h = self.workers[k + 1].decode(worker.encoder.encode(h, learn=False))
        finally:
            for worker in self.workers:
                worker.end_evaluation()
        for worker in self.workers:
            worker.group.train()
            worker.read_codebook(self.batch)
        return summed(scores)

    @property
    def lossy(self) -> bool:
        """Whether a codec on some cut changes what crosses it."""
        return any(not codecs.build(spec).exact for spec in self.wires)

    def module(self, exit: int | None = None) -> nn.Module:
        """The network, or its exit ``exit`` (1-based), as a plain module that shares the trained parameters.

        None gives the user's own model. Exit k < K is groups 1..k and critic k. Over processes: see ``gather``.
        """
        if self.ranks is not None:
            raise RuntimeError(
                "this process trains one group only: call gather() in all of them for the network"
            )
        self.settle()
        return exit_module(self.groups, len(self.groups) if exit is None else exit)

    def gather(self, exit: int | None = None) -> nn.Module:
        """As ``module``, over processes: every process calls it after ``stop`` and gets replica 0's whole network."""
        if self.ranks is not None:
            for owner, group in enumerate(self.groups):
                mine = owner == self.ranks.base + self.ranks.rank
                for tensor in group.state_dict().values():
                    values = tensor.detach().cpu().contiguous()
                    with self.ranks.heart.together():
                        dist.broadcast(values, owner, group=self.ranks.world)
                    if not mine:
                        tensor.copy_(values)
                group.to(self.workers[0].device)
        return exit_module(self.groups, len(self.groups) if exit is None else exit)

    def _stage(self, name: str) -> Stage:
        if not isinstance(self._run, Stage):
            raise RuntimeError(f"{name} is for a pipelined run over processes; this one runs in one process")
        if self._run.ended:
            raise RuntimeError(f"{name}: the stream has ended with stop(); build the trainer anew to go on")
        return self._run


def _device_of(group: Group) -> torch.device:
    return next((p.device for p in group.parameters()), torch.device("cpu"))
