"""Training in groups, one in each process: without any link, and on the pipelined engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lct_fast as lct
from benchmarks.pipeline.model import Task, in_format
from benchmarks.pipeline.rivals import Contender, Outputs, Setting, gradients
from lct_fast.codecs import Codec, Encoded
from lct_fast.engine.meter import Tick
from lct_fast.methods import Objective


def fused_adam(params: Any) -> torch.optim.Optimizer:
    """The paper's optimiser of critics, in one kernel as everybody's SGD here."""
    return torch.optim.Adam(params, lr=1e-4, fused=True)


# Of ``Tick``: waits for the group before, for room in the link, for the group behind; and of the first of them the
# part in which the input was on its way.
SHARES = ("busy", "critic", "input", "room", "feedback", "exposed")

METHODS: dict[str, Callable[[], lct.Method]] = {
    "greedy": lct.Greedy,
    "local-critic": lambda: lct.LocalCritic(critic_optimizer=fused_adam),
}


class LocalGroup:
    """One group with its optimisers; knows no process and no link."""

    def __init__(self, task: Task, setting: Setting, k: int) -> None:
        self.method = METHODS[setting.method]()
        self.group = in_format(task.groups(setting.critic)[k], setting.format).train()
        self.objective = Objective()
        joint = self.method.joint_optimizer or self.group.last
        self.optimizer = task.optimizer((self.group if joint else self.group.layers).parameters())
        make = None if joint else self.method.critic_optimizer
        self.critic_optimizer = make(self.group.critic.parameters()) if make else None
        # The next group's losses, from nowhere: any vector costs the same.
        self.feedback = torch.linspace(1.0, 3.0, task.batch)

    def backward(self, x: Tensor, y: Tensor) -> Any:
        scale = self.objective.scale(y)
        keep = self.critic_optimizer is not None
        return self.method.local_step(self.group, x, y, self.objective, scale, keep_slot=keep)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward, local backward, update, and the critic's; the mean loss."""
        result = self.backward(x, y)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.method.critic_step(self.group.critic, result.slot, self.feedback, self.objective)
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad()
        return result.loss.mean()


class Ceiling(Contender):
    """Each process trains its own group on data of its own: what no link can be faster than."""

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        self.local = LocalGroup(task, setting, rank)
        if rank:
            states = task.states(setting.format)
            self.data = [(states[i % len(states)], y) for i, (_, y) in enumerate(self.data)]

    def first(self) -> Outputs:
        loss = self.local.backward(*self.data[0]).loss.mean()
        named = {"loss": loss, **gradients(self.local.group)}
        return {f"group{self.rank + 1}.{name}": value for name, value in named.items()}

    def step(self) -> None:
        self.loss = self.local.step(*self.next())


class Decoupled(Contender):
    """The pipelined engine: group ``rank`` in process ``rank``, linked. Process 0 drives, process 1 follows.

    ``run`` leaves the first step of a visit out of the time, in which the pipeline fills, as it does for all.
    """

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        self.trainer = lct.Trainer(
            task.groups(setting.critic),
            METHODS[setting.method](),
            schedule="pipelined",
            optimizer=task.optimizer,
            channels_last=setting.format == "channels_last",
            codec=setting.codec or "none",
            # Between its turns a contender rests for as long as all others take.
            step_timeout=3600.0,
        )
        self.events = None if self.trainer.first else self.trainer.events()
        self.ticks: list[Tick] = []

    def first(self) -> Outputs:
        (worker,) = self.trainer.workers
        inputs: list[Tensor] = []
        decode = worker.decode

        def kept(coded: Encoded, decoder: Codec | None = None) -> Tensor:
            inputs.append(decode(coded, decoder))
            return inputs[0]

        worker.decode = kept  # type: ignore[method-assign]
        self.step()
        worker.decode = decode  # type: ignore[method-assign]
        assert worker.optimizer is not None and self.loss is not None
        # After one step the momentum of SGD is the gradient.
        momentum = {id(p): state["momentum_buffer"] for p, state in worker.optimizer.state.items()}
        named = {name: momentum.get(id(p)) for name, p in worker.group.named_parameters()}
        out = {name: value.clone() for name, value in named.items() if value is not None}
        out["loss"] = self.loss
        if self.setting.codec and inputs:
            out["input"] = inputs[0].clone()
        return {f"group{self.rank + 1}.{name}": value for name, value in out.items()}

    def step(self) -> None:
        x, y = self.next()
        stats = self.trainer.step(x, y) if self.events is None else next(self.events)
        assert isinstance(stats, lct.Stats)
        self.loss = stats.losses[self.rank]

    def run(self, steps: int) -> float:
        seconds = super().run(steps)
        self.ticks += list(self.trainer.meter.groups[0].ticks)[-steps:]
        return seconds

    def close(self) -> None:
        if self.events is None:
            self.trainer.flush()
            self.trainer.stop()
        else:
            list(self.events)

    def shares(self) -> dict[str, float]:
        """How this process's group spent its timed ticks, as shares of their time."""
        total = sum(tick.seconds for tick in self.ticks)
        return {name: sum(getattr(tick, name) for tick in self.ticks) / total for name in SHARES}
