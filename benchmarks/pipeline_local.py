"""Training in groups, one in each process: without any link, and the pipelined engine's place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lct_fast as lct
from benchmarks.pipeline_model import Task, in_format
from benchmarks.pipeline_rivals import Contender, Outputs, Setting, gradients
from lct_fast.methods import Objective


def fused_adam(params: Any) -> torch.optim.Optimizer:
    """The paper's optimiser of critics, in one kernel as everybody's SGD here."""
    return torch.optim.Adam(params, lr=1e-4, fused=True)


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
            self.method.critic_step(self.group.critic, result.slot, self.feedback)
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
    """The pipelined engine: group ``rank`` in process ``rank``, linked.

    The plug point; fill in the four places and the rest of the benchmark follows.

    ``__init__``: this process's part of the engine, from ``task.groups(setting.critic)``, ``in_format``,
    ``METHODS[setting.method]()`` and ``task.optimizer``. Both processes hold the same batches in the same order,
    though only process 0 needs the images. Several of these contenders live in a process at once: each link
    needs tags or a process group of its own, and nothing may be under way when ``run`` returns.

    ``step``: train on ``self.next()``, and leave the group's mean loss in ``self.loss``. ``run`` calls it, and
    leaves out of the time the first step of a visit, in which the pipeline fills.

    ``first``: ``group<k>.loss`` and ``group<k>.<parameter>``, as in ``Ceiling.first``, with group 2 on group 1's
    output; no gradient of a critic that learns late. Where the engine shows no gradients: after one step,
    those of SGD with momentum are its momentum buffers.

    ``why_absent``: None.
    """

    @staticmethod
    def why_absent() -> str | None:
        """None if this can run here."""
        return "this version has no pipelined engine"
