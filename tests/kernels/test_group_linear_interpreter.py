"""The Triton kernels of group_linear in Triton's interpreter, or on the device where there is one.

The tests of the op reach the kernels as one backend of several. These aim at what is peculiar to them: every
tile, runs of several tiles, shares of the logits, chunks of several blocks, the order of the fold.
"""

from collections.abc import Iterator

import pytest
import torch

from lct_fast import ops
from lct_fast.kernels import group_linear as kernels
from tests.ladder import assert_rule
from tests.ops.group_linear_case import ACTIVATIONS, DTYPES, check, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (rows, inputs, outputs, classes): why. The interpreted kernels take sm_80's tiles.
SHAPES = {
    (1, 1, 1, 1): "the smallest, uneven",
    (130, 33, 130, 10): "uneven: three blocks of rows, outputs past two tiles, inputs past one block",
    (130, 48, 144, 10): "even: two blocks of rows, outputs past two tiles, inputs past one block",
    (35, 64, 208, 17): "several shares of the logits, the second class block",
    (66, 16, 80, 63): "the widest class block",
    (40, 32, 144, 0): "no critic: a run is one tile",
}


@pytest.fixture(autouse=True)
def surroundings(threads: None, poisoned: None) -> Iterator[None]:
    """On the Triton kernels, one thread, every output and workspace full of NaN beforehand."""
    with ops.use_backend("triton"):
        yield


# How many programs fill the device. 1: large tiles, one run. 2: runs of several tiles. 128: small tiles, runs of one.
PROGRAMS = (1, 2, 128)


def activation_of(shape: tuple[int, int, int, int], programs: int) -> str:
    return ACTIVATIONS[(sum(shape) + programs) % 3]


def test_the_shapes_meet_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    met = set()
    for programs in PROGRAMS:
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        for shape in SHAPES:
            heavy = shape[3] > 0 or activation_of(shape, programs) == "gelu"
            met |= {kernels.forward_tile(*shape[:3], heavy, size, 8) for size in (2, 4)}
    assert met == {tile for size in (2, 4) for tile in (*kernels.FORWARD[8][size], kernels.UNEVEN[size])}


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("dtypes", ["f32", "f16", "f16-f32-f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_keeps_to_the_error_rule(
    shape: tuple[int, int, int, int], dtypes: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    activation = activation_of(shape, programs)
    case = make(*shape, DTYPES[dtypes], activation, device=DEVICE, bias=sum(shape) % 2 == 0)
    check(case, case.run())


def test_every_generation_has_its_tiles() -> None:
    """A device newer than the tables takes sm_80's, which fit the smallest chips."""
    assert set(kernels.FORWARD) == {8, 9, 10}
    for size in (2, 4):
        assert kernels.forward_tile(4096, 4096, 4096, True, size, 9) == kernels.FORWARD[9][size].heavy
        assert kernels.forward_tile(4096, 4096, 4096, False, size, 10) == kernels.FORWARD[10][size].light
        assert kernels.forward_tile(64, 64, 256, False, size, 9) == kernels.FORWARD[9][size].small
        assert kernels.forward_tile(4096, 4096, 4096, True, size, 12) == kernels.FORWARD[8][size].heavy
        for inputs, outputs in ((4096, 4095), (784 + 8, 4096)):
            assert kernels.forward_tile(4096, inputs, outputs, True, size, 9) == kernels.UNEVEN[size]


def test_chunks_of_several_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Real launches have such chunks from 65536 rows on.
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 3)
    for gradients, outputs in (("h", 70), ("logits", 80), ("both", 80)):
        case = make(32 * 7 + 5, 9, outputs, 10, activation="gelu", gradients=gradients, device=DEVICE)
        check(case, case.run())


def fold(shares: torch.Tensor, bias: torch.Tensor | None, period: int) -> torch.Tensor:
    out = torch.empty(shares.shape[1], device=DEVICE)
    kernels._fold(shares.to(DEVICE), None if bias is None else bias.to(DEVICE), out, period)
    return out


def test_the_fold_adds_every_share_and_the_bias_of_each_column() -> None:
    draw = torch.Generator().manual_seed(0)
    # Three steps of the fold, the last of them partial; 31 rows of 3 columns.
    shares = torch.randn(2 * kernels.FOLD[0] + 3, 93, generator=draw)
    bias = torch.randn(3, generator=draw)
    exact = shares.double().sum(0) + bias.double().repeat(31)
    eps = torch.finfo(torch.float32).eps
    assert_rule("fold", fold(shares, bias, 3), shares.sum(0) + bias.repeat(31), exact, eps)
    assert_rule("fold", fold(shares, None, 3), shares.sum(0), shares.double().sum(0), eps)


def test_the_fold_keeps_the_order() -> None:
    """A big number, its opposite and 1, in two orders that only adding from the front tells apart."""
    step = kernels.FOLD[0]
    shares = torch.zeros(3 * step, 4)
    shares[0], shares[step], shares[2 * step] = 2.0**25, -(2.0**25), 1.0
    assert fold(shares, None, 4).tolist() == [1.0] * 4
    shares[step], shares[2 * step] = 1.0, -(2.0**25)
    assert fold(shares, None, 4).tolist() == [0.0] * 4


def test_shapes_beyond_the_kernels_are_refused() -> None:
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    assert kernels.why_not(x, weight, 64) == ""
    assert "up to 64 classes; critic_weight has 65" in kernels.why_not(x, weight, 65)
    assert "weight is torch.float64" in kernels.why_not(x, weight.double())
    assert "1048576 inputs and outputs" in kernels.why_not(x, torch.empty(1, 2**20 + 1, device="meta"))
    with pytest.raises(ValueError, match="x is torch.float64; choose another backend"):
        kernels.group_linear(x.double(), weight, None, "none", None, None, x, None, None)
    with pytest.raises(ValueError, match="x is torch.float64; choose another backend"):
        kernels.group_linear_backward(x.double(), None, None, None, "none", x.double(), x[0])
