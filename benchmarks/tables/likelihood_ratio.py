"""Likelihood-ratio training: estimates, digits, units without a derivative."""

from __future__ import annotations

from benchmarks.tables.markdown import table
from benchmarks.tables.results import Results

FILE = "likelihood_ratio"


def cosines(results: Results) -> str:
    """With autograd's gradient, over copies."""
    found = results(FILE)["convergence"]
    copies = [f"{count:,}" for count in next(iter(found.values()))["copies"]]
    rows = [[kind, *(f"{c:.3f}" for c in f["cosine"]), f"{f['slope']:.2f}"] for kind, f in found.items()]
    return table(["layer", f"{copies[0]} copies", *copies[1:], "slope"], rows)


def variance(results: Results) -> str:
    """Over that of pairs."""
    found = {kind: f["over_antithetic"] for kind, f in results(FILE)["variance"].items()}
    rows = [
        [kind, *(f"{r:.3g}" if r < 1000 else f"{r:,.0f}" for r in ratios.values())]
        for kind, ratios in found.items()
    ]
    return table(["layer", *next(iter(found.values()))], rows)


def digits(results: Results) -> str:
    """One run of each."""
    rows = [
        [run["name"], f"{100 * run['test_accuracy']:.1f}", f"{run['wire_bytes_per_sample']:,.0f}"]
        for run in results(FILE)["runs"]
        if run["part"] == "digits"
    ]
    return table(["run", "test accuracy, %", "bytes a sample across cuts"], rows)


def thresholds(results: Results) -> str:
    """Through units that are 0 or 1."""
    rows = [
        [run["name"], f"{100 * run['test_accuracy']:.1f}"]
        for run in results(FILE)["runs"]
        if run["part"] == "thresholds"
    ]
    return table(["loss", "test accuracy, %"], rows)


TABLES = {
    "likelihood-ratio-cosines": cosines,
    "likelihood-ratio-variance": variance,
    "likelihood-ratio-digits": digits,
    "likelihood-ratio-thresholds": thresholds,
}
