"""Progressive inference and ensemble on logits made by hand."""

import pytest
import torch

from lct_fast.engine.network.exits import accuracy, ensemble, progressive, score, summed
from lct_fast.methods import Objective

# Two exits, four samples, two classes; probabilities of class 1 given as logits.
FIRST = torch.tensor([[0.0, 5.0], [0.0, 0.1], [5.0, 0.0], [0.2, 0.0]])
LAST = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 1.0]])
LABELS = torch.tensor([1, 1, 0, 1])


def test_sure_samples_leave_early() -> None:
    result = progressive([FIRST, LAST], LABELS, 0.9)
    # Samples 0 and 2 leave at exit 1 (right there, wrong at exit 2); 1 and 3 go on and are right.
    assert result.leaving == [0.5, 0.5]
    assert result.accuracy == 1.0
    assert progressive([FIRST, LAST], LABELS, 1.0).accuracy == accuracy(LAST, LABELS) == 0.5
    assert progressive([FIRST, LAST], LABELS, 1e-6).leaving == [1.0, 0.0]


def test_ensemble_sums_logits() -> None:
    # Sums: [9, 5], [0, 9.1], [5, 9], [.2, 1] -> 0 1 1 1.
    assert ensemble([FIRST, LAST], LABELS) == 0.5


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_threshold_must_be_a_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"expected a value in \(0, 1\]"):
        progressive([FIRST], LABELS, threshold)


def test_rows_with_the_ignored_label_count_in_neither_mean() -> None:
    labels = torch.tensor([1, -100, 0, -100])
    objective = Objective()
    found = summed(torch.stack([score(FIRST, labels, objective), score(LAST, labels, objective)]))
    assert found.samples == 4 and found.accuracy == [1.0, 0.0]
    few = torch.tensor([0, 2])
    alone = summed(score(FIRST[few], labels[few], objective)[None])
    assert found.loss[0] == alone.loss[0] and alone.samples == 2
    nothing = summed(score(FIRST, torch.full((4,), -100), objective)[None])
    assert nothing.accuracy == [0.0] and nothing.loss == [0.0]
