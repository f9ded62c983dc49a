"""csrc/cuda/perturb.cu run on the host, under sanitizers: the reference's bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lct_fast.reference import perturb as reference
from tests.cuda.host_build import CSRC, HERE, build, check
from tests.ladder import assert_same_bits
from tests.ops.perturb_case import DTYPES, OFFSETS, SEED, SHAPES, make

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The largest takes several blocks of threads; one of two tasks of the CPU kernels would be slow here.
HERE_TOO = [key for key in SHAPES if torch.Size(key[0]).numel() < 10_000]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("host"), HERE / "perturb_host.cpp", CSRC / "cuda" / "perturb.cu")


def raw(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(-1).view(torch.uint8).tolist()) if x.numel() else b""


def run(program: Path, what: str, data: bytes, words: tuple[int, ...], like: Tensor) -> Tensor:
    source, target = program.with_name("in"), program.with_name("out")
    source.write_bytes(data)
    check(program, what, source, target, *words)
    got = torch.frombuffer(bytearray(target.read_bytes() or b"\0" * 4), dtype=like.dtype)
    return got[: like.numel()].view(like.shape)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("shape", "copies"), HERE_TOO)
def test_same_bits(program: Path, shape: tuple[int, ...], copies: int, offset: int) -> None:
    for turn, dtype in enumerate(DTYPES.values()):
        antithetic = (turn + offset) % 2 == 0 and copies * shape[0] % 2 == 0
        given = make(shape, copies, dtype, offset=offset, antithetic=antithetic)
        sizes = (given.shape[0], shape[1] if len(shape) > 1 else 1, torch.Size(shape[2:]).numel())
        # Aligned for packs of four, and one element past that.
        for skip in (0, 1):
            rest = (given.sigma.numel(), SEED, offset, int(antithetic), NUMBERS[dtype], skip)
            expected = reference.perturb(given.z, given.sigma, SEED, offset, antithetic, copies)
            data = raw(given.z) + raw(given.sigma)
            got = run(program, "perturb", data, (*sizes, copies, *rest), expected)
            assert_same_bits("perturb", got, expected)
            expected = reference.score(
                given.loss, given.sigma, SEED, offset, given.shape, antithetic, 1000, dtype
            )
            data = raw(given.loss) + raw(given.sigma)
            got = run(program, "score", data, (*sizes, 1000, *rest), expected)
            assert_same_bits("score", got, expected)


def test_launch(program: Path) -> None:
    check(program, "launch")
