"""Trainings that must give the same bits whichever schedule runs them, and the processes that run them."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine import checkpoint
from tests.engine import nets

BATCHES = 9
# Where a case with a mark, an evaluation and a new learning rate has them.
MIDDLE = 5
MARK = 7


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-3)


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


@dataclass(frozen=True)
class Case:
    """A method, its critic, and options of the trainer; ``dropout`` puts it before every cut.

    ``hybrid`` takes the schedule that is asked for.
    """

    method: Callable[[], lct.Method]
    critic: str = "pooled_linear"
    options: dict[str, Any] = field(default_factory=dict)
    dropout: bool = False
    hybrid: lct.Hybrid | None = None

    def trainer(self, count: int, schedule: str | lct.Hybrid | lct.Async, seed: int = 0) -> lct.Trainer:
        """On ``count`` groups; lockstep with the delay that pipelined has."""
        torch.manual_seed(seed)
        options = {"feedback_delay": 3} | self.options
        model = nets.net(seed)
        if self.dropout:
            for name in lct.models.default_splits("digits_cnn", count) or []:
                setattr(model, name, nn.Sequential(nn.Dropout(0.3), model.get_submodule(name)))
        groups = lct.split(
            model,
            example_input=torch.zeros(4, 1, 8, 8),
            critic=self.critic,
            split_points=lct.models.default_splits("digits_cnn", count),
        )
        torch.manual_seed(17)
        how = replace(self.hybrid, schedule=schedule) if self.hybrid else schedule
        return lct.Trainer(groups, self.method(), schedule=how, **options)


CASES = {
    "local-critic": Case(lct.LocalCritic),
    "greedy": Case(lct.Greedy, "mlp_aux"),
    "shortest delay": Case(lct.LocalCritic, options={"feedback_delay": 1}),
    "everything": Case(
        lambda: lct.LocalCritic(critic_every=2, loss="one_sided"),
        "conv_fc:convs=2,filters=4",
        {
            "feedback_delay": 4,
            "accumulate": 2,
            "clip_norm": 1.0,
            "optimizer": _adam,
            "scheduler": _halving,
            "codec": "bf16",
        },
        dropout=True,
    ),
    "vector-quantised": Case(lct.LocalCritic, options={"codec": "vq:16,2"}),
    "int4": Case(lct.Greedy, options={"codec": "int4:32", "channels_last": True}),
    "channels last, bf16": Case(lct.LocalCritic, options={"channels_last": True, "autocast": torch.bfloat16}),
}


def weights(trainer: lct.Trainer) -> dict[str, Tensor]:
    """Every parameter and buffer of all groups."""
    return {f"{k}.{n}": t for k, g in enumerate(trainer.groups) for n, t in g.state_dict().items()}


def train_here(case: Case, count: int, schedule: str = "lockstep") -> dict[str, Any]:
    """All batches in this process, an evaluation and a new learning rate in the middle."""
    trainer = case.trainer(count, schedule)
    batches = nets.batches(BATCHES)
    stats = [trainer.step(x, y) for x, y in batches[:MIDDLE]] + trainer.drain()
    middle = [trainer.evaluate(batches[:2], coded) for coded in (False, True)]
    trainer.set_learning_rate(0.02)
    stats += [trainer.step(x, y) for x, y in batches[MIDDLE:]] + trainer.drain()
    trainer.flush()
    finished = [s for s in stats if s.batch >= 0]
    assert [s.batch for s in finished] == list(range(BATCHES))
    return {
        "weights": weights(trainer),
        "losses": torch.stack([s.losses for s in finished]),
        "middle": middle,
        "feedback": trainer.meter.feedback_bytes,
        "wire": trainer.meter.wire_bytes,
    }


def train_as_rank(case: Case, count: int, folder: Path) -> dict[str, Any]:
    """The same over processes, with a checkpoint in the middle from which a second training goes on."""
    trainer = case.trainer(count, "pipelined")
    batches = nets.batches(BATCHES)
    losses, middle = [], []
    if trainer.first:
        for x, y in batches[:MIDDLE]:
            trainer.step(x, y)
        checkpoint.save(trainer, folder, wait=False)
        trainer.mark(MARK)
        trainer.evaluate(batches[:2])
        trainer.evaluate(batches[:2], coded=True)
        trainer.set_learning_rate(0.02)
        for x, y in batches[MIDDLE:]:
            trainer.step(x, y)
        trainer.flush()
        trainer.stop()
    else:
        for event in trainer.events():
            if isinstance(event, lct.Mark):
                assert (event.code, event.batch) == (MARK, MIDDLE - 1)
                checkpoint.save(trainer, folder, {"epoch": 3}, wait=False)
            elif isinstance(event, lct.Stats):
                losses.append(event.losses)
            else:
                middle.append(event)
    trainer.gather()
    meter, _ = trainer.gather_meter()
    result = {
        "weights": weights(trainer),
        "losses": torch.stack(losses) if trainer.last else None,
        "middle": middle,
        "feedback": meter.feedback_bytes,
        "wire": meter.wire_bytes,
        "resumed": weights(_resume(case, count, folder)),
    }
    return result


def _resume(case: Case, count: int, folder: Path) -> lct.Trainer:
    trainer = case.trainer(count, "pipelined", seed=5)
    dist.barrier()
    found = checkpoint.latest(folder)
    assert found is not None
    assert checkpoint.load(trainer, found) == {"epoch": 3}
    assert trainer.batch == MIDDLE
    if trainer.first:
        trainer.set_learning_rate(0.02)
    train_to_the_end(trainer, nets.batches(BATCHES)[MIDDLE:])
    return trainer


def train_to_the_end(trainer: lct.Trainer, batches: list[tuple[Tensor, Tensor]]) -> None:
    """All that a rank does with its trainer: the first one steps, the others follow, all gather the network."""
    if trainer.first:
        for x, y in batches:
            trainer.step(x, y)
        trainer.flush()
        trainer.stop()
    else:
        list(trainer.events())
    trainer.gather()


def run_processes(work: Callable[..., Any], count: int, *args: Any, timeout: float = 150) -> list[Any]:
    """``work(*args)`` in ``count`` processes of one thread, joined by gloo; what each returned."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        context = mp.spawn(_process, (count, port, folder, work, args), count, join=False)
        assert context is not None
        deadline = time.monotonic() + timeout
        # join returns whenever one process has ended.
        while not context.join(deadline - time.monotonic()):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{count} processes were not done after {timeout} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, port: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    torch.save(work(*args), Path(folder) / f"{rank}.pt")
    # A test that loses a process leaves links that nothing closes.
    os._exit(0)
