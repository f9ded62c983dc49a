"""Layer-parallel training: states, digits, a short trial on CIFAR-10."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.tables.markdown import at_most, between, paragraph, table
from benchmarks.tables.results import Results

Row = dict[str, Any]
# Of those in the file.
BETAS = ("1", "4", "16")


def _scientific(value: float, digits: int) -> str:
    return "0" if value == 0 else f"{value:.{digits}e}"


def states(results: Results) -> str:
    """Where the states stand still."""
    stored = results("layer_parallel")["states"]
    rows = []
    for beta in BETAS:
        penalty, multipliers = stored["penalty"][beta], stored["augmented_lagrangian"][beta]
        rows.append(
            [
                beta,
                ", ".join(_scientific(cut["jump"], 2) for cut in penalty),
                ", ".join(_scientific(cut["jump"], 1) for cut in multipliers),
                ", ".join(_scientific(cut["kappa_error"], 1) for cut in multipliers),
            ]
        )
    return table(["beta", "penalty, jump", "augmented-lagrangian, jump", "kappa's error"], rows)


def _digits(results: Results) -> dict[tuple[str, str, str], Row]:
    """By method, K and q, both empty for back-propagation."""
    found = {}
    for name, row in results("layer_parallel")["table"].items():
        match = re.fullmatch(r"digits-(.+?)(?:-K(\d+)-q([\d.]+))?", name)
        if match:
            method = match[1].replace("-auxiliary", " --auxiliary")
            found[method, match[2] or "", match[3] or ""] = row
    return found


def digits(results: Results) -> str:
    """Every method, cut in 2 and 4 groups."""
    rows = [
        [
            f"`{method}`" + (f", K = {k}" if k else ""),
            q,
            f"{100 * row['test_accuracy']:.1f}",
            ", ".join(f"{100 * a:.1f}" for a in row["of_seeds"]),
            # Shares of time of a process that other programs disturb, so to one digit.
            "" if row["overall_gain"] is None else f"{row['overall_gain']:.1f}",
        ]
        for (method, k, q), row in _digits(results).items()
    ]
    return table(["method", "q", "test accuracy, %", "of each seed", "gain"], rows)


def digits_words(results: Results) -> str:
    """What serial epochs and multipliers are worth."""
    found = {key: 100 * row["test_accuracy"] for key, row in _digits(results).items()}
    plain = found["backprop", "", ""]
    serial = max(plain - accuracy for (_, _, q), accuracy in found.items() if q not in ("", "0"))
    worth = [found["augmented-lagrangian", k, "0"] - found["penalty", k, "0"] for k in ("2", "4")]
    costs = all(found[m, "4", "0"] < found[m, "2", "0"] for m in ("penalty", "augmented-lagrangian"))
    return paragraph(
        f"One serial epoch in five brings every one of them within {at_most(serial, 0.1)} points of "
        "back-propagation. Without, "
        f"multipliers are worth {between(worth)} points"
        + (", and every cut costs: a sample's loss reaches group 1 only after K visits." if costs else "."),
    )


def cifar10_words(results: Results) -> str:
    """The short trial."""
    found = results("layer_parallel")["table"]
    accuracies = {
        method: f"{100 * found[f'cifar10-{method}']['test_accuracy']:.1f}"
        for method in ("penalty", "augmented-lagrangian", "backprop")
    }
    return paragraph(
        "CIFAR-10, a short trial to see that a residual network trains: 2,000 images, `wide_resnet:depth=10,widen=1` "
        "(channels 16, 32, 64), two groups, 10 epochs of batches of 50, q = 0.2, one seed; test accuracy, %: `penalty` "
        f"{accuracies['penalty']}, `augmented-lagrangian` {accuracies['augmented-lagrangian']}, `backprop` "
        f"{accuracies['backprop']}, whose learning rate is the image default 0.1. Nothing was tuned. At this "
        "length the "
        "methods are far behind. The paper's own networks and lengths are **not yet run**."
    )


TABLES = {
    "layer-parallel-states": states,
    "layer-parallel-digits": digits,
    "layer-parallel-digits-words": digits_words,
    "layer-parallel-cifar10-words": cifar10_words,
}
