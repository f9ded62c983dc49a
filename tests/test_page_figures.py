"""Figures of pages that come from the code and not from a result file."""

from pathlib import Path

from lct_fast.methods.local_critic import own_share

ROOT = Path(__file__).parents[1]


def _rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under ``heading``."""
    table = (ROOT / f"docs/{page}.md").read_text().split(heading)[1].split("\n|---", 1)[1].split("\n\n")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def test_weights_of_samples_are_those_of_the_code() -> None:
    for losses, share, weights in _rows("local_critic", "| `loss=`, `--critic-loss` |"):
        name = losses.strip("`")
        if name != "mixed:W":
            w = own_share(name)
            above, below = (float(v) for v in weights.split(","))
            assert (float(share), above, below) == (w, 1.0, 2 * w - 1), name
