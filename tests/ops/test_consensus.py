"""consensus_adjoint and consensus_update on every backend of this machine, against float64."""

import pytest
import torch

from lct_fast import _native, ops
from tests.ladder import Place, assert_same_bits
from tests.ops.consensus_case import BETA, DTYPES, ETA, PLACES, SHAPES, check, make


@pytest.fixture(params=PLACES, ids=str)
def where(request: pytest.FixtureRequest) -> Place:
    """A backend of these ops on a device."""
    place: Place = request.param
    return place


@pytest.mark.parametrize("multipliers", [True, False], ids=["al", "penalty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_float64_as_plain_torch(
    where: Place, shape: tuple[int, ...], dtype: str, multipliers: bool
) -> None:
    with ops.use_backend(where.backend):
        check(make(shape, DTYPES[dtype], multipliers=multipliers), where.device)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_instruction_sets_and_thread_counts(level: str) -> None:
    """Every instruction set is right, and no thread count changes a bit of it."""
    native = _native.load()
    assert native is not None, _native.why_absent()
    if level not in native.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    native.set_simd(level)
    try:
        with ops.use_backend("cpu"):
            for dtype in DTYPES.values():
                for shape in ((70, 1003), (2, 70_001)):
                    case = make(shape, dtype, multipliers=True)
                    check(case, "cpu")
                    found = []
                    for threads in (1, 3):
                        torch.set_num_threads(threads)
                        adjoint = ops.consensus_adjoint(case.x, case.lambda_, case.kappa, BETA)
                        after = ops.consensus_update(case.lambda_, case.kappa, case.p, case.x, BETA, ETA)
                        assert after.kappa is not None
                        found.append((*adjoint, after.lambda_, after.kappa))
                    for a, b in zip(*found, strict=True):
                        assert_same_bits("of another thread count", a, b)
    finally:
        native.set_simd(None)


def test_a_nan_stays_in_its_row(where: Place) -> None:
    case = make((4, 37), torch.float32, multipliers=True)
    case.x[2, 5] = float("nan")
    with ops.use_backend(where.backend):
        here = case.to(where.device)
        got = ops.consensus_adjoint(here.x, here.lambda_, here.kappa, BETA)
        assert got.loss.isnan().tolist() == [False, False, True, False]
        assert got.p.isnan().nonzero().tolist() == [[2, 5]]
        after = ops.consensus_update(here.lambda_, here.kappa, here.p, here.x, BETA, ETA)
        assert after.kappa is not None
        assert after.lambda_.isnan().nonzero().tolist() == after.kappa.isnan().nonzero().tolist() == [[2, 5]]


def test_tensors_that_are_not_row_major(where: Place) -> None:
    case = make((2, 6, 5, 7), torch.float32, multipliers=True)
    with ops.use_backend(where.backend):
        here = case.to(where.device)
        expected = ops.consensus_adjoint(here.x, here.lambda_, here.kappa, BETA)
        last = here.x.to(memory_format=torch.channels_last)
        got = ops.consensus_adjoint(last, here.lambda_, here.kappa, BETA)
        assert got.p.is_contiguous()
        for a, b in zip(got, expected, strict=True):
            assert_same_bits("of channels-last", a, b)
        wanted = ops.consensus_update(here.lambda_, here.kappa, here.p, here.x, BETA, ETA)
        after = ops.consensus_update(here.lambda_, here.kappa, here.p, last, BETA, ETA)
        assert_same_bits("lambda of channels-last", after.lambda_, wanted.lambda_)


def test_every_op_has_its_backends() -> None:
    for name in ("consensus_adjoint", "consensus_update"):
        found = ops.backends(name)
        assert list(found) == ["reference", "cpu", "cuda"]
        assert found["reference"] == found["cpu"] == "available"
