"""The benchmarks themselves: they cover every op, their contenders are right, and their checks can fail."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.bench import cases
from lct_fast.bench.case import OURS, Bench, Place
from lct_fast.bench.rule import WrongOutput

BENCHES = {bench.name: bench for bench in cases.find([])}
everywhere = pytest.mark.parametrize("bench", BENCHES.values(), ids=BENCHES.keys())


def test_every_op_has_a_benchmark() -> None:
    assert {name for bench in BENCHES.values() for name in bench.covers} == set(ops.names())


@everywhere
def test_every_shape_is_of_its_form(bench: Bench) -> None:
    for shape in (bench.tiny, *bench.shapes["cpu"], *bench.shapes["cuda"]):
        assert list(bench.parse(shape)) == list(bench.form)
    assert bench.shapes["cpu"] and bench.shapes["cuda"]
    assert len(set(bench.shapes["cuda"])) == len(bench.shapes["cuda"])


@everywhere
def test_every_contender_is_right_on_a_tiny_shape(bench: Bench) -> None:
    case = bench.case(bench.tiny, Place(backends=("cpu", "reference")))
    assert [each.label for each in case.contenders[:3]] == [
        f"{OURS} cpu",
        f"{OURS} reference",
        "torch eager",
    ]
    for each in case.contenders:
        if each.reset:
            each.reset()
        found = case.check(each.outputs(each.run()), each.slack)
        assert 0 <= found.of_rule <= 1, each.label
    assert case.traffic > 0 and case.flops >= 0


def spoiled(outputs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Another value in the last place of one output."""
    x = outputs[name].clone(memory_format=torch.contiguous_format)
    flat = x.view(-1)
    if x.dtype == torch.bool:
        flat[-1] = ~flat[-1]
    elif x.is_floating_point():
        flat[-1] += 0.5 * float(x.abs().max()) + 0.5
    else:
        flat[-1] = flat[-1] ^ 1
    return {**outputs, name: x}


@everywhere
@pytest.mark.parametrize("kind", [OURS, "torch eager"])
def test_every_output_of_a_contender_is_checked(bench: Bench, kind: str) -> None:
    case = bench.case(bench.tiny, Place())
    (each,) = (c for c in case.contenders if c.name == kind)
    if each.reset:
        each.reset()
    outputs = each.outputs(each.run())
    assert outputs
    # A rival's codes may be a little off; what they decode to has to be near.
    loose = ("payload",) if kind != OURS else ()
    for name in outputs.keys() - set(loose):
        with pytest.raises(WrongOutput):
            case.check(spoiled(outputs, name), each.slack)


@pytest.mark.parametrize(
    ("name", "output"), [("block_quantize", "payload"), ("block_dequantize", "x"), ("vq_decode", "x")]
)
def test_what_is_exact_is_held_to_its_last_bit(name: str, output: str) -> None:
    bench = BENCHES[name]
    case = bench.case(bench.tiny, Place())
    mine = case.contenders[0]
    outputs = dict(mine.outputs(mine.run()))
    bits = outputs[output].contiguous().view(-1).view(torch.uint8).clone()
    bits[0] ^= 1
    outputs[output] = bits.view(outputs[output].dtype).view(outputs[output].shape)
    with pytest.raises(WrongOutput):
        case.check(outputs, mine.slack)


def test_names_and_stems() -> None:
    assert [bench.name for bench in cases.find(["vq"])] == ["vq_encode", "vq_decode", "vq_update"]
    # An op before a stem of the same name, and nothing twice.
    assert [bench.name for bench in cases.find(["critic_head", "critic_head"])] == ["critic_head"]
    with pytest.raises(ValueError, match=r"no benchmark named 'vqq'; there are .*vq_encode"):
        cases.find(["vqq"])


@pytest.mark.parametrize("shape", ["32,8,10", "32,8,10,f64", "32,8,0,f32", "32,8,ten,f32", "32,8,10,f32,1"])
def test_a_shape_that_does_not_fit_is_told_the_form(shape: str) -> None:
    with pytest.raises(ValueError, match=r"critic_head is rows,depth,classes,f32\|bf16\|f16, got '32,8"):
        BENCHES["critic_head"].parse(shape)


def test_a_backend_that_cannot_run_is_told() -> None:
    with pytest.raises(ValueError, match="triton: it is not measured on cpu"):
        BENCHES["critic_head"].case("32,8,10,f32", Place(backends=("triton",)))


def test_only_the_rivals_that_are_named_take_part() -> None:
    bench = BENCHES["critic_head"]
    case = bench.case(bench.tiny, Place(against=("eager",)))
    assert {each.name for each in case.contenders} == {OURS, "torch eager"}
    with pytest.raises(
        ValueError, match="no rival of critic_head is called abacus; there are torch compile|torch eager"
    ):
        bench.case(bench.tiny, Place(against=("abacus",)))
