"""The Triton kernels of bn_relu_pool in Triton's interpreter, or on the device where there is one.

The tests of the op reach the kernels as one backend of several. These aim at what is peculiar to them: every
tile of both tables, windows of several steps, folds of several steps.
"""

from collections.abc import Iterator

import pytest
import torch

from lct_fast import ops
from lct_fast.kernels import bn_relu_pool as kernels
from tests.ladder import assert_same_bits
from tests.ops.bn_relu_pool_case import check, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (N, C, H, W, pool), format: why.
SHAPES = {
    ((3, 5, 4, 4, 4), "first"): "windows of one element",
    ((3, 5, 4, 4, 2), "first"): "windows of 4",
    ((2, 3, 6, 8, 2), "first"): "windows of 3 x 4: masked elements",
    ((2, 3, 16, 14, 2), "first"): "windows of 8 x 7, narrower than a power of two",
    ((2, 3, 30, 32, 2), "first"): "windows of 240",
    ((1, 3, 30, 31, 1), "first"): "windows of 930",
    ((1, 2, 50, 51, 1), "first"): "windows of two steps, the second partial",
    ((2, 3, 12, 13, 1), "last"): "three channels of 16, two steps of a window",
    ((2, 20, 10, 9, 1), "last"): "20 channels of 32, two steps",
    ((1, 70, 9, 8, 1), "last"): "two blocks of channels, three steps",
}


@pytest.fixture(autouse=True)
def surroundings(threads: None, poisoned: None) -> Iterator[None]:
    """On the Triton kernels, one thread, every output and workspace full of NaN beforehand."""
    with ops.use_backend("triton"):
        yield


def test_the_shapes_meet_every_tile() -> None:
    met = set()
    for (_, channels, height, width, pool), layout in SHAPES:
        area = (height // pool) * (width // pool)
        tile = kernels.tile_of(area, channels, layout == "last")
        met.add((tile.pairs, layout))
    assert met == {(tile.pairs, "first") for tile in kernels.FIRST} | {
        (tile.pairs, "last") for tile in kernels.LAST
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=str)
def test_every_tile_keeps_to_the_error_rule(
    shape: tuple[int, int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    with_dy = sum(shape) % 2 == 0
    case = make(*shape, dtype, layout, DEVICE, with_dy=with_dy)
    check(case, case.run())


@pytest.mark.parametrize("with_dy", [True, False])
def test_folds_of_several_steps(monkeypatch: pytest.MonkeyPatch, with_dy: bool) -> None:
    # Real folds have several from 1024 windows a channel on.
    monkeypatch.setattr(kernels, "FOLD", (8, 4))
    case = make(7, 3, 4, 6, 2, device=DEVICE, with_dy=with_dy)
    check(case, case.run())


def test_one_big_program_and_many_small_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair's sums don't depend on which pairs share its program."""
    case = make(4, 3, 8, 8, 2, device=DEVICE, with_dy=True)
    expected = case.run()
    monkeypatch.setattr(kernels, "FIRST", (kernels.Tile(2, 16, 4),))
    for name, value in case.run().items():
        assert_same_bits(name, value, expected[name])


def test_a_sample_beyond_32_bits_is_refused() -> None:
    x = torch.empty(1, 2**16, 2**10, 2**5, device="meta")
    few = [torch.empty(1)] * 5
    with pytest.raises(ValueError, match=r"up to 2147483647 elements, got \[1, 65536, 1024, 32\]; choose"):
        kernels.bn_relu_pool(x, *few[:2], False, 1e-5, x, x[:, :, :1, :1], *few[:3], channels_last=False)
