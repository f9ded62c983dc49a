"""Every exit of a trained network: accuracy, progressive inference, ensemble (arXiv 2102.01963)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lct_fast.engine.network import carried
from lct_fast.engine.network.group import Group
from lct_fast.methods import Objective
from lct_fast.methods.objective import flat


@dataclass(slots=True)
class Evaluation:
    """Per exit: mean loss and accuracy (fractions), over ``samples`` samples; of tokens, over all of these.

    Both leave out rows with the ignored label.
    """

    samples: int
    loss: list[float]
    accuracy: list[float]


@dataclass(slots=True)
class Progressive:
    """Accuracy when each sample leaves at the first exit whose top probability passes the threshold."""

    threshold: float
    accuracy: float
    leaving: list[float]


def exit_logits(groups: Sequence[Group], x: Tensor) -> list[Tensor]:
    """Logits [N, V] of every exit there is, fp32, on the last group's device; groups should be in evaluation mode."""
    logits = []
    h = x
    for group in groups:
        h = group.layers(h.to(_device(group, h)))
        if group.has_exit:
            logits.append(group.critic(h).float())
    return [z.to(logits[-1].device) for z in logits]


def _device(group: Group, h: Tensor) -> torch.device:
    return next((p.device for p in group.parameters()), h.device)


@torch.no_grad()
def collect(groups: Sequence[Group], batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Logits of every exit and the labels over all batches, on the CPU. Modes of the groups are kept.

    Of tokens all are rows. Layers that carry state go on from batch to batch, the first one afresh.
    """
    modes = [g.training for g in groups]
    for g in groups:
        g.eval()
    carried.go_on(groups, True)
    try:
        parts: list[list[Tensor]] = [[] for g in groups if g.has_exit]
        labels = []
        for x, y in batches:
            for part, z in zip(parts, exit_logits(groups, x), strict=True):
                rows, label = flat(z.cpu(), y.cpu())
                part.append(rows)
            labels.append(label)
    finally:
        carried.go_on(groups, False)
        for g, mode in zip(groups, modes, strict=True):
            g.train(mode)
    if not labels:
        raise ValueError("evaluation: expected at least one batch, got none")
    return [torch.cat(p) for p in parts], torch.cat(labels)


def score(logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """(sum of losses, correct predictions, rows that carry a loss, rows): a float64 tensor [4]; sums over batches.

    Logits [N, V] and labels [N]; of tokens, which all are rows, [N, T, V] and [N, T].
    """
    logits, labels = flat(logits, labels)
    loss = objective.per_sample(logits, labels).double().sum()
    correct = (logits.argmax(1) == _hard(labels)).sum()
    rows = torch.full_like(correct, len(labels))
    return torch.stack([loss, correct, objective.counted(labels), rows])


def summed(scores: Tensor) -> Evaluation:
    """The evaluation of exits whose scores [K, 4] were summed over batches; a group without an exit scored no rows."""
    scores = scores[scores[:, 3] > 0]
    if not len(scores):
        raise ValueError("evaluation: expected at least one batch, got none")
    loss, correct, counted, rows = scores.cpu().unbind(1)
    counted = counted.clamp(min=1)
    return Evaluation(int(rows[0]), (loss / counted).tolist(), (correct / counted).tolist())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of rows whose largest logit is the label's (soft labels: their largest)."""
    return float((logits.argmax(1) == _hard(labels)).double().mean())


def _hard(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.is_floating_point() else labels


def progressive(logits: Sequence[Tensor], labels: Tensor, threshold: float) -> Progressive:
    """Progressive inference: leave at the first exit whose top softmax reaches ``threshold`` in (0, 1]."""
    if not 0 < threshold <= 1:
        raise ValueError(f"progressive threshold: expected a value in (0, 1], got {threshold}")
    sure = torch.stack([z.softmax(1).amax(1) >= threshold for z in logits])
    sure[-1] = True
    leave = sure.int().argmax(0)
    prediction = torch.stack([z.argmax(1) for z in logits]).gather(0, leave[None])[0]
    shares = [float((leave == k).double().mean()) for k in range(len(logits))]
    return Progressive(threshold, float((prediction == labels).double().mean()), shares)


def ensemble(logits: Sequence[Tensor], labels: Tensor) -> float:
    """Accuracy of the sum of all exits' logits."""
    return accuracy(torch.stack(list(logits)).sum(0), labels)
