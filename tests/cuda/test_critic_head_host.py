"""csrc/cuda/critic_head.cu run on the host, under sanitizers, against the formula in double."""

from pathlib import Path

import pytest

from tests.cuda.host_build import CSRC, HERE, build, check

# (rows, depth, classes): pairs of types tried, why.
CASES = {
    (0, 7, 3): (6, "no rows: zeros in dweight and dbias"),
    (1, 1, 1): (6, "the smallest; one class has softmax 1"),
    (1, 3, 2): (6, "fewer columns than a quad"),
    (5, 31, 10): (6, "one column short of a quad; 8 classes and 2"),
    (67, 128, 10): (6, "columns of exactly one step; two tiles of rows, the last row group with 3"),
    (67, 513, 12): (2, "one column past a step; the last 4 classes"),
    (65, 130, 100): (1, "many classes in shared memory; a last tile of one row"),
    (3, 1300, 10): (2, "weights fit shared memory, sums for dweight do not"),
    (3, 2100, 13): (2, "weights pass through in tiles of columns; dlogits of 5 classes in the last step"),
    (65, 132, 129): (1, "the first class count whose scratch lies in the workspace"),
    (9, 260, 300): (1, "several tiles of classes"),
    (20, 1030, 3): (3, "two blocks of columns in the weight gradient alone"),
    (512, 3, 2): (3, "one chunk for each warp that folds, few enough rows that a lost one shows"),
    (16950, 1, 2): (1, "two tiles of rows in a chunk, and a chunk of one"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("host"), HERE / "critic_head_host.cpp", CSRC / "cuda" / "critic_head.cu"
    )


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: "x".join(map(str, shape)))
def test_formula_and_bits(program: Path, shape: tuple[int, int, int]) -> None:
    check(program, "case", *shape, CASES[shape][0])


def test_special_values(program: Path) -> None:
    check(program, "special")


def test_launch(program: Path) -> None:
    check(program, "launch")
