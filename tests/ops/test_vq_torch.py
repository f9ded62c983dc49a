"""vq as torch operators: opcheck, compilation, shapes without data."""

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from tests.ladder import Place, assert_same_bits
from tests.ops.vq_case import assert_equal_encodings, encoders, everywhere, fit, make

CHECKED = dict.fromkeys(
    ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
)


@encoders
def test_opcheck_of_encode(place: Place) -> None:
    case = fit(place, make(67, 2, 13, 4, device=place.device))
    encode = torch.library.opcheck(torch.ops.lct.vq_encode.default, (case.x, case.codebook, 3))
    assert encode == CHECKED


@everywhere
def test_opcheck(place: Place) -> None:
    case = make(67, 2, 13, 4, device=place.device)
    out = case.run()
    decode = torch.library.opcheck(
        torch.ops.lct.vq_decode.default, (out.codes, case.codebook, 67, torch.bfloat16)
    )
    assert decode == CHECKED
    state = ops.vq_state(case.codebook)
    update = torch.library.opcheck(
        torch.ops.lct.vq_update.default,
        (case.codebook, *state, out.counts, out.sums, out.candidates, 0.9, 1e-5, 1.0),
    )
    assert update == CHECKED


def step(x: Tensor, codebook: Tensor, state: ops.VQState) -> tuple[Tensor, ops.VQEncoding]:
    out = ops.vq_encode(x * 2, codebook, 5)
    y = ops.vq_decode(out.codes, codebook, x.shape[0], torch.float16)
    ops.vq_update(codebook, state, out.counts, out.sums, out.candidates, revive_below=1.0)
    return y * 2, out


@everywhere
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(place: Place, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (70, 130):
        case = make(rows, 2, 13, 4, device=place.device)
        found = []
        for run in (step, compiled):
            codebook = case.codebook.clone()
            state = ops.vq_state(codebook)
            y, out = run(case.x, codebook, state)
            found.append((y, out, codebook, state))
        (y, out, codebook, state), (y2, out2, codebook2, state2) = found
        assert_same_bits("decoded", y, y2)
        assert_equal_encodings(out, out2)
        assert_same_bits("codebook", codebook, codebook2)
        for a, b in zip(state, state2, strict=True):
            assert_same_bits("state", a, b)
        assert not torch.equal(codebook, case.codebook)


@encoders
def test_encode_compiles_into_one_graph(place: Place) -> None:
    torch.compiler.reset()
    case = fit(place, make(70, 2, 13, 4, device=place.device))
    compiled = torch.compile(
        lambda x: ops.vq_encode(x * 2, case.codebook, 5), fullgraph=True, backend="aot_eager"
    )
    assert_equal_encodings(ops.vq_encode(case.x * 2, case.codebook, 5), compiled(case.x))


# torch's own: inductor imports modules that use what torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_keeps_the_ops() -> None:
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    case = make(70, 2, 13, 4)
    states = [ops.vq_state(case.codebook) for _ in range(2)]
    books = [case.codebook.clone() for _ in range(2)]
    y, out = step(case.x, books[0], states[0])
    y2, out2 = torch.compile(step, fullgraph=True)(case.x, books[1], states[1])
    assert_same_bits("decoded", y, y2)
    assert_equal_encodings(out, out2)
    assert_same_bits("codebook", *books)


@everywhere
def test_nothing_is_differentiable(place: Place) -> None:
    case = make(70, 2, 13, 4, device=place.device)
    codebook = case.codebook.requires_grad_()
    out = ops.vq_encode(case.x.requires_grad_(), codebook)
    assert not any(each.requires_grad for each in out)
    assert not ops.vq_decode(out.codes, codebook, 70).requires_grad


def test_meta_tensors_give_shapes() -> None:
    out = ops.vq_encode(torch.empty(70, 6, device="meta"), torch.empty(2, 5, 3, device="meta"), 4)
    assert [list(x.shape) for x in out] == [[53], [2, 5], [2, 5, 3], [], [2, 4, 3], [2, 4], []]
    x = ops.vq_decode(out.codes, torch.empty(2, 5, 3, device="meta"), 70, torch.float16)
    assert x.shape == (70, 6) and x.dtype == torch.float16 and x.is_meta
