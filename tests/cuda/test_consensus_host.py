"""csrc/cuda/consensus.cu run on the host, under sanitizers, against float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lct_fast.reference import consensus as reference
from tests.cuda.host_build import CSRC, HERE, build, check
from tests.ladder import assert_rule
from tests.ops.consensus_case import BETA, DTYPES, EPS, ETA, make

# Shapes: why.
SHAPES = {
    (1, 1): "one value; most threads have none",
    (3, 37): "less than a turn of a block of threads",
    (2, 256): "exactly one turn",
    (2, 1027): "a last turn of 3 values; several blocks of the update",
}
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    return build(folder, HERE / "consensus_host.cpp", CSRC / "cuda" / "consensus.cu")


def run(
    program: Path, what: str, tensors: list[Tensor | None], like: Tensor, words: tuple[object, ...]
) -> bytes:
    source, target = program.with_name("in"), program.with_name("out")
    given = (t.contiguous().view(torch.uint8) for t in tensors if t is not None)
    source.write_bytes(b"".join(bytes(t.flatten().tolist()) for t in given))
    check(program, what, source, target, *like.shape, NUMBERS[like.dtype], *words)
    return target.read_bytes()


def floats(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("multipliers", [True, False], ids=["al", "penalty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_float64_as_plain_torch(
    program: Path, shape: tuple[int, int], dtype: str, multipliers: bool
) -> None:
    case = make(shape, DTYPES[dtype], multipliers=multipliers)
    words, eps = (int(multipliers), BETA, ETA), EPS[case.x.dtype]
    wide = None if case.kappa is None else case.kappa.double()

    found = run(program, "adjoint", [case.x, case.lambda_, case.kappa], case.x, words)
    exact = reference.consensus_adjoint(case.x.double(), case.lambda_.double(), wide, BETA)
    plain = reference.consensus_adjoint(case.x, case.lambda_, case.kappa, BETA)
    d = case.lambda_.double() - case.x.double()
    terms = (0.5 * BETA * d.square() + (0 if wide is None else (wide * d).abs())).sum(1)
    split = 4 * shape[0]
    loss = floats(found[:split], torch.float32, shape[:1])
    assert_rule("loss", loss, plain[0], exact[0], 2.0**-23, float(terms.amax()))
    assert_rule("p", floats(found[split:], case.x.dtype, shape), plain[1], exact[1], eps)

    found = run(program, "update", [case.p, case.x, case.lambda_, case.kappa], case.x, words)
    exact_update = reference.consensus_update(
        case.lambda_.double(), wide, case.p.double(), case.x.double(), BETA, ETA
    )
    plain_update = reference.consensus_update(case.lambda_, case.kappa, case.p, case.x, BETA, ETA)
    split = 4 * case.x.numel()
    lambda_, kappa = (floats(part, torch.float32, shape) for part in (found[:split], found[split:]))
    assert_rule("lambda", lambda_, plain_update[0], exact_update[0], 2.0**-23)
    if exact_update[1] is None or plain_update[1] is None:
        # Nothing was written there.
        assert bool(kappa.isnan().all())
    else:
        assert_rule("kappa", kappa, plain_update[1], exact_update[1], 2.0**-23, 1.0)


def test_launch(program: Path) -> None:
    check(program, "launch")
