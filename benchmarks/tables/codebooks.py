"""How vq's codebooks follow, by the decay of their averages."""

from __future__ import annotations

from benchmarks.tables.markdown import listed, paragraph, table, word
from benchmarks.tables.results import Results


def intro(results: Results) -> str:
    """What was trained."""
    report = results("codebooks")
    specs = listed([f"`{cut['codec']}`" for cut in report["runs"][0]["cuts"]])
    return paragraph(
        "Error of what crosses three cuts of LCT's net (a) at a quarter of its width, relative to the activations' "
        f"variance, over the last of {word(report['epochs'])} epochs of {report['images']:,} CIFAR-10 images with "
        f"`greedy`, batches of {report['batch']}, {specs}; in parentheses the codebooks' share of the bytes. "
        "`python -m benchmarks.codebooks`, "
        "[codebooks.json](../benchmarks/results/codebooks.json)",
    )


def errors(results: Results) -> str:
    """A row for each decay."""
    runs = results("codebooks")["runs"]
    head = ["decay", *(f"cut {k + 1}" for k in range(len(runs[0]["cuts"])))]
    rows = [
        [
            "the rule" if run["decay"] is None else f"{run['decay']:g}",
            *(
                f"{100 * cut['error_of_epoch'][-1]:.1f} % ({100 * cut['codebook_share']:.1f} %)"
                for cut in run["cuts"]
            ),
        ]
        for run in runs
    ]
    return table(head, rows)


TABLES = {"codebooks-intro": intro, "codebooks": errors}
