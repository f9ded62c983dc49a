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


def test_the_roofline_is_that_of_the_files() -> None:
    rows = _rows("kernels", "| op | shape | ms | MB |")
    assert len(rows) == 17
    for op, shape, ms, traffic, flops, share, file, gpu in rows:
        report = _results(file.split("]")[0].strip("["))
        assert gpu == "not yet measured" and report["threads"] == 2 and not report["failed_checks"]
        assert report["quiet"] == ("vq_decode_cpu" in file), "the text says which runs were disturbed"
        ours = [row for row in report["rows"] if row["contender"] == "lct_fast"]
        if op == "`critic_head`":
            (row,) = (r for r in ours if shape == "{rows} x {depth} x {classes}, {dtype}".format(**r))
            assert (traffic, flops, share) == ("", "", "") and "share_of_roofline" not in row
        else:
            (row,) = (r for r in ours if (f"`{r['op']}`", r["shape"]) == (op, shape.replace(", ", ",")))
            expected = (row["bytes"] / 1e6, row["flops"] / 1e9, row["share_of_roofline"])
            assert (traffic, flops, share) == tuple(
                f"{v:.{n}f}" for v, n in zip(expected, (1, 2, 2), strict=True)
            )
        assert ms == f"{row['us_p50'] / 1e3:.2f}", shape
