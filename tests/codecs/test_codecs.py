"""Codecs: what comes back, what it costs, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lct_fast import codecs, ops
from lct_fast.codecs import CodecError, Encoded, Layout, vector_quantization

# Bits a value, scales included, and the largest relative error ||x' - x|| / ||x|| of normal values; vq apart.
COSTS = {
    "none": (32, 0.0),
    "bf16": (16, 2**-8),
    "int8": (8.25, 0.01),
    "fp8": (8.25, 0.04),
    "int4:32": (4.5, 0.15),
    "int2:128": (2.125, 0.9),
}
TENSORS = {
    "contiguous": torch.randn(4, 8, 6, 16),
    "channels last": torch.randn(4, 8, 6, 16).to(memory_format=torch.channels_last),
    "vectors": torch.randn(384, 8),
    "sequences": torch.randn(4, 96, 8),
    "bf16": torch.randn(4, 8, 6, 16).bfloat16(),
    "fp64": torch.randn(4, 8, 6, 16, dtype=torch.float64),
    "fp64 vectors": torch.randn(384, 8, dtype=torch.float64),
    "a transposed view": torch.randn(8, 384).t(),
}


def _clusters(rows: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    """[rows, 6, 4, 4]: three vectors of two channels at each position, near one of eight points each."""
    draw = torch.Generator().manual_seed(7)
    points = torch.randn(3, 8, 2, generator=draw) * 4 + shift
    draw.manual_seed(seed)
    which = torch.randint(8, (3, rows * 16), generator=draw)
    x = torch.stack([points[g][which[g]] for g in range(3)], 1)
    x = x + 0.05 * torch.randn(x.shape, generator=draw)
    return x.reshape(rows, 4, 4, 6).permute(0, 3, 1, 2)


def _error(codec: codecs.Codec, x: Tensor) -> float:
    y = codec.decode(codec.encode(x))
    return float((y - x).norm() / x.norm())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("spec", [*COSTS, "vq:16,4", "topk:2"])
def test_shape_strides_and_dtype_come_back(spec: str, name: str) -> None:
    codec, x = codecs.build(spec), TENSORS[name]
    assert codec.name == spec
    encoded = codec.encode(x)
    y = codec.decode(encoded)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    bits, error = COSTS.get(spec, (1.0, 0.8))
    assert float((y.double() - x.double()).norm() / x.double().norm()) <= error
    if spec == "none":
        assert torch.equal(x, y)
    elif spec in COSTS:
        assert encoded.nbytes * 8 == pytest.approx(bits * x.numel(), rel=0.01)


def test_a_tensor_with_gaps_is_packed() -> None:
    x = torch.randn(4, 16)[:, ::2]
    for spec in (*COSTS, "vq:4,2"):
        codec = codecs.build(spec)
        y = codec.decode(codec.encode(x))
        assert y.shape == x.shape and y.is_contiguous()


def test_top_k_keeps_the_largest_of_each_sample() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4) - 13
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        y = codecs.build("topk:6").decode(codecs.build("topk:6").encode(layout))
        assert y.stride() == layout.stride()
        expected = torch.zeros(2, 12)
        expected[0, :2], expected[1, -2:] = torch.tensor([-13.0, -12.0]), torch.tensor([9.0, 10.0])
        assert torch.equal(y.reshape(2, 12), expected)


@pytest.mark.parametrize(("size", "bits"), [(1 << 16, 32), ((1 << 16) + 16, 48)])
def test_top_k_costs_a_value_and_an_index(size: int, bits: int) -> None:
    x = torch.zeros(2, size)
    x[0, -1], x[1, 1 << 15] = 3.0, -5.0
    codec = codecs.build("topk:16")
    encoded = codec.encode(x)
    assert encoded.nbytes * 8 == bits * 2 * size / 16
    assert torch.equal(codec.decode(encoded), x)


def test_a_damaged_index_stays_in_its_sample() -> None:
    codec = codecs.build("topk:4")
    encoded = codec.encode(torch.ones(2, 8, 3, 3))
    values, index = encoded.tensors
    for wrong in (-1, 72, 1 << 14):
        y = codec.decode(replace(encoded, tensors=(values, torch.full_like(index, wrong))))
        assert torch.equal(y.flatten(1)[:, -1], torch.ones(2)) and float(y.sum()) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_downsampling_averages_and_interpolates(channels_last: bool) -> None:
    x = torch.randn(2, 8, 6, 7)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    codec = codecs.build("downsample:2")
    encoded = codec.encode(x)
    (small,) = encoded.tensors
    assert small.shape == (2, 8, 3, 4)
    torch.testing.assert_close(small[..., 0], x[..., :2].unflatten(2, (3, 2)).mean((3, 4)))
    torch.testing.assert_close(small[..., 3], x[..., 6].unflatten(2, (3, 2)).mean(3))
    y = codec.decode(encoded)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    torch.testing.assert_close(y[:, :, 0, 0], small[:, :, 0, 0])
    # Constant and linear maps survive away from the border.
    ramp = torch.arange(8.0).expand(1, 8, 8, 8)
    torch.testing.assert_close(codec.decode(codec.encode(ramp))[..., 1:-1], ramp[..., 1:-1])


@pytest.mark.parametrize("inner", ["bf16", "int4", "vq:16,4", "topk:4"])
def test_a_downsampled_map_is_coded_by_another_codec(inner: str) -> None:
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    both, alone = codecs.build(f"downsample:2+{inner}"), codecs.build(inner)
    assert both.name == f"downsample:2+{inner}"
    (small,) = codecs.build("downsample:2").encode(x).tensors
    encoded, expected = both.encode(x), alone.encode(small)
    assert encoded.version == expected.version and encoded.layout == Layout.of(x)
    assert all(torch.equal(a, b) for a, b in zip(encoded.tensors, expected.tensors, strict=True))
    wide = torch.nn.functional.interpolate(alone.decode(expected), (6, 6), mode="bilinear")
    assert torch.equal(both.decode(encoded), wide)
    other = codecs.build(f"downsample:2+{inner}")
    other.load_state(both.state(), torch.device("cpu"))
    assert torch.equal(other.decode(replace(encoded, tensors=both.encode(x, learn=False).tensors)), wide)


@pytest.mark.parametrize("spec", ["none", "bf16", "int4", "topk:4", "downsample:2+vq:8,2", "vq:8,2"])
def test_evaluation_changes_no_codec(spec: str) -> None:
    codec = codecs.build(spec)
    for step in range(5):
        codec.decode(codec.encode(_clusters(16, shift=step / 2, seed=step)))
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in codec.state().items()}
    x = _clusters(16, seed=9)
    encoded = codec.encode(x, learn=False)
    assert codec.decode(encoded).shape == x.shape
    after = codec.state()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value
    if "vq" in spec:
        with pytest.raises(CodecError, match="no codebook before the first batch"):
            codecs.build(spec).encode(x, learn=False)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "fp8"])
def test_block_codes_are_the_ops(kind: str) -> None:
    x = TENSORS["channels last"]
    encoded = codecs.build(kind).encode(x)
    expected = ops.block_quantize(x, kind, 64)
    assert all(torch.equal(a, b) for a, b in zip(encoded.tensors, expected, strict=True))


def test_the_first_codebook_fits_the_first_batch() -> None:
    """Eight clusters a group and twelve words: what is left is the clusters' own spread, 0.05 of about 4."""
    assert _error(codecs.build("vq:12,2"), _clusters(64)) < 0.02


def test_fewer_rows_than_words_are_exact() -> None:
    x = torch.randn(3, 4)
    # But for int8, as words travel: half a step of 127 for 64 values.
    codec = codecs.build("vq:16,2")
    assert (codec.decode(codec.encode(x)) - x).abs().max() <= 1.01 * x.abs().max() / 254


def test_bytes_are_codes_and_now_and_then_a_codebook() -> None:
    codec = codecs.build("vq:8,2")
    first, second = codec.encode(_clusters(64)), codec.encode(_clusters(64, seed=1))
    codes = 64 * 16 * 3 * 3 // 8
    # A byte a value of the codebook's 48, and one scale for all of them.
    assert (second.nbytes, first.nbytes - second.nbytes) == (codes, 3 * 8 * 2 + 2)
    assert (len(first.tensors), len(second.tensors)) == (3, 1)
    # Each of the 96 values of a sample is an fp32 on the way without a codec.
    assert 64 * 96 * 4 / second.nbytes == pytest.approx(32 * 2 / 3)


def test_the_codebook_follows_and_is_sent_when_it_has_moved() -> None:
    codec = codecs.build("vq:12,2")
    assert isinstance(codec, codecs.VectorQuantization)
    for step in range(40):
        _error(codec, _clusters(64, seed=step))
    settled = codec.version
    assert settled <= 3, "clusters that stay where they are need few codebooks"
    before = _error(codec, _clusters(64, shift=3.0))
    versions = []
    for step in range(300):
        encoded = codec.encode(_clusters(64, shift=3.0, seed=step))
        codec.decode(encoded)
        versions.append(encoded.version)
    assert codec.version > settled
    # A drift is read two batches late; one against a codebook that is gone counts for nothing.
    assert all(b - a <= 1 for a, b in zip(versions, versions[2:], strict=False))
    assert _error(codec, _clusters(64, shift=3.0, seed=999)) < before / 4
    assert codec.codebook_bytes <= 0.1 * (codec.code_bytes + codec.codebook_bytes)


@pytest.mark.parametrize(
    ("vectors", "decay"),
    [(8, 0.99), (128, 1 - 128 / 16 / 64), (512, 0.5), (4096, 0.5)],
    ids=["few vectors", "eight a word", "half of what a word needs", "many"],
)
def test_averages_are_as_long_as_words_need(
    monkeypatch: pytest.MonkeyPatch, vectors: int, decay: float
) -> None:
    decays: list[float] = []
    update = ops.vq_update

    def watched(*args: Any) -> None:
        decays.append(args[5])
        update(*args)

    codec = codecs.build("vq:16,2")
    x = torch.randn(vectors, 4)
    codec.encode(x)
    monkeypatch.setattr(vector_quantization.ops, "vq_update", watched)
    for _ in range(120):
        codec.encode(x)
    # Over few batches at first.
    assert decays[0] == pytest.approx(min(decay, 2 / 3)) and decays[-1] == pytest.approx(decay)


def test_rounding_is_no_drift() -> None:
    """Words as far apart as int8 can tell, and vectors closer to them: nothing new would be sent."""
    codec = codecs.build("vq:2,2")
    assert isinstance(codec, codecs.VectorQuantization)
    far = torch.tensor([[0.0, 0.3], [100.0, 100.3]])
    for step in range(30):
        noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(step)) / 100
        codec.encode(far[torch.arange(512) % 2] + noise)
    assert codec.rounding is not None and codec.rounding.max() > 0.05, "far more than the vectors' own spread"
    assert codec.version == 1
    codec._renew()
    assert codec.codebook is not None and codec.sent is not None
    assert torch.equal(codec.rounding, (codec.codebook - codec.sent).square().sum(2))


def test_rounding_leaves_the_sum_of_drifts() -> None:
    """Words that moved by chance against their rounding are not drift, though each of a half moved more."""
    codec = codecs.VectorQuantization(4, 2)
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    codec.encode(x)
    assert codec.sent is not None
    moved = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2**0.5, 0.0], [2**0.5, 0.0]])
    # So often chosen that they stay where they are.
    codec.codebook = codec.sent + moved
    codec.averages, codec.rounding = ops.vq_state(codec.codebook, 1e9), torch.ones(1, 4)
    codec.encode(x)
    # In units of the batch's error: each half alone would be 5e8 vectors that moved by 1.
    assert abs(codec.drifts[-1].value()) < 1e4


def test_a_channel_far_from_0_costs_the_others_nothing() -> None:
    codec = codecs.build("vq:64,4")
    x = torch.randn(2048, 4, generator=torch.Generator().manual_seed(0))
    alone = codec.decode(codec.encode(x)) - x
    far = codecs.build("vq:64,4")
    moved = x + torch.tensor([300.0, 0, 0, 0])
    beside = far.decode(far.encode(moved)) - moved
    assert beside[:, 1:].square().mean() < 1.2 * alone[:, 1:].square().mean()


def test_codebooks_stay_below_a_tenth_of_all_bytes() -> None:
    """Activations that jump at every batch, and few rows, so that a codebook is as large as the codes of a batch."""
    codec = codecs.build("vq:16,2")
    assert isinstance(codec, codecs.VectorQuantization)
    for step in range(400):
        codec.decode(codec.encode(_clusters(1, shift=float(step % 7), seed=step)))
    codes, books = codec.code_bytes, codec.codebook_bytes
    first = 3 * 16 * 2 + 2 * 2
    assert codec.version > 1 and books <= max(first, 0.1 * (codes + books))


def test_a_resumed_codec_goes_on_bit_for_bit() -> None:
    batches = [_clusters(16, shift=step / 10, seed=step) for step in range(30)]
    whole = codecs.build("vq:8,2")
    for x in batches[:17]:
        whole.decode(whole.encode(x))
    second = codecs.build("vq:8,2")
    second.load_state(whole.state(), torch.device("cpu"))
    saved = {n: v.clone() for n, v in whole.state().items() if isinstance(v, Tensor)}
    assert isinstance(whole, codecs.VectorQuantization) and isinstance(second, codecs.VectorQuantization)
    assert whole.rounding is not None and whole.rounding.max() > 0
    assert torch.equal(second.rounding, whole.rounding)
    for x in batches[17:]:
        a, b = whole.encode(x), second.encode(x)
        assert a.version == b.version and len(a.tensors) == len(b.tensors)
        assert all(torch.equal(s, t) for s, t in zip(a.tensors, b.tensors, strict=True))
        assert torch.equal(whole.decode(a), second.decode(b))
    assert any(not torch.equal(v, whole.state()[n]) for n, v in saved.items()), "nothing went on"


def test_the_two_ends_need_no_more_than_what_travels() -> None:
    here, there = codecs.VectorQuantization(8, 2), codecs.VectorQuantization(8, 2)
    both = codecs.build("vq:8,2")
    for step in range(60):
        x = _clusters(32, shift=step / 2, seed=step)
        encoded = here.encode(x)
        y = there.decode(encoded)
        assert torch.equal(y, both.decode(both.encode(x)))
        # The nearest words of those that the consumer has, though the producer's have moved on.
        assert here.codebook is not None
        payload, scales = there.known
        rows, known = (
            x.permute(0, 2, 3, 1).reshape(-1, 6),
            (payload.view(torch.int8) * scales.float()).view(3, 2, 8),
        )
        known = known.transpose(1, 2).contiguous()
        assert torch.equal(encoded.tensors[0], ops.vq_encode(rows, known).codes)
        assert not torch.equal(known, here.codebook)
    assert here.state()["version"] == there.state()["known_version"] > 1


def _vq() -> tuple[codecs.Codec, Encoded]:
    codec = codecs.build("vq:8,2")
    codec.decode(codec.encode(_clusters(4)))
    return codec, codec.encode(_clusters(4))


def _codebook(values: int, scales: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(values, dtype=torch.uint8), torch.zeros(scales, dtype=torch.bfloat16)


def test_what_cannot_be_decoded_is_refused() -> None:
    codec, good = _vq()
    codec.decode(good)
    (codes,) = good.tensors
    wide = replace(good.layout, shape=(4, 8, 4, 4), stride=(128, 1, 32, 8))
    for bad, message in [
        (replace(good, version=9), "expected codebook 1, got 9"),
        (replace(good, tensors=(codes[:-1],)), "codes must be"),
        (replace(good, tensors=(codes.int(),)), "codes must be uint8"),
        (replace(good, layout=wide), "does not belong to 8 channels"),
        (replace(good, tensors=(codes, torch.zeros(3, 8, 2))), "expected a codebook as int8 and its scales"),
        (replace(good, tensors=(codes, codes, codes)), "expected a codebook as int8 and its scales"),
    ]:
        with pytest.raises(CodecError, match=message):
            codec.decode(bad)
    seven = Layout((4, 7, 4, 4), (112, 1, 28, 7), torch.float32)
    none = Layout((4, 0, 4, 4), (0, 1, 0, 0), torch.float32)
    for layout, message in [
        (seven, "does not belong to 7 channels"),
        (none, "does not belong to 0 channels"),
        (Layout((6,), (1,), torch.float32), "expected rows of channels"),
        (Layout((), (), torch.float32), "expected rows of channels"),
    ]:
        with pytest.raises(CodecError, match=message):
            codec.decode(replace(good, layout=layout))
    with pytest.raises(CodecError, match="does not belong to 0 channels"):
        codec.decode(replace(good, tensors=(codes, *_codebook(0, 0)), layout=none))
    # A codebook that does not fit leaves the one there is.
    for values, scales in ((54, 1), (48, 2), (48, 0)):
        with pytest.raises(CodecError, match="does not belong"):
            codec.decode(replace(good, tensors=(codes, *_codebook(values, scales)), version=2))
    codec.decode(good)
    with pytest.raises(CodecError, match="expected codebook 0, got 1"):
        codecs.build("vq:8,2").decode(good)
    x = torch.randn(4, 8)
    for spec, message in [
        ("none", "expected one tensor"),
        ("bf16", "expected one tensor"),
        ("int4", "payload"),
        ("topk:4", "expected (40|4) x 2 values in bf16"),
    ]:
        codec = codecs.build(spec)
        encoded = codec.encode(x)
        for bad in (
            replace(encoded, layout=Layout((40, 8), (8, 1), torch.float32)),
            replace(encoded, tensors=tuple(t.double() for t in encoded.tensors)),
        ):
            with pytest.raises(CodecError, match=message):
                codec.decode(bad)
        with pytest.raises(CodecError, match="expected"):
            codec.decode(replace(encoded, tensors=encoded.tensors * 2))


def test_damaged_codes_decode_to_words() -> None:
    codec, good = _vq()
    damaged = replace(good, tensors=(torch.full_like(good.tensors[0], 255),))
    assert codec.decode(damaged).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zip", "unknown codec 'zip': choose one of none, bf16, fp8"),
        ("bf16:3", "unknown codec 'bf16:3'"),
        ("vq:256", "unknown codec 'vq:256'.*vq:K,D"),
        ("vq:256,x", "whole numbers after the colon"),
        ("vq:1,8", r"expected K in 2..65536 and D >= 1, got vq:1,8"),
        ("int4:7", "block must be one of"),
        ("int4:64,2", "unknown codec"),
        ("topk:1", "expected to keep one value in N >= 2"),
        ("topk", "unknown codec 'topk'"),
        ("downsample", "expected downsample:F or"),
        ("downsample:1", "expected F >= 2"),
        ("downsample:2+zip", "unknown codec 'zip'"),
        ("downsample:2+downsample:2", "expected downsample:F or"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codecs.build(spec)


def test_channels_that_the_depth_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"D has to divide the channels, got 6 .*; choose D among 2, 3, 6"):
        codecs.build("vq:8,4").check((6, 4, 4))
    codecs.build("vq:8,3").check((6, 4, 4))
    codecs.build("vq:8,4").check((6, 4))
    for shape in ((6, 4), (6, 4, 1), (12,)):
        with pytest.raises(ValueError, match="expected feature maps of at least 2 x 2"):
            codecs.build("downsample:2").check(shape)
    with pytest.raises(ValueError, match="D has to divide"):
        codecs.build("downsample:2+vq:8,4").check((6, 4, 4))
    codecs.build("downsample:2+vq:8,3").check((6, 2, 3))
    with pytest.raises(ValueError, match="got 4"):
        codecs.build("vq:8,5").check((6, 4))


@pytest.mark.parametrize("spec", ["vq:4,2", "downsample:2+vq:4,2"])
def test_what_is_kept_decodes_with_the_codebook_that_coded_it(spec: str) -> None:
    here, there = codecs.build(spec), codecs.build(spec)
    kept, expected = [], []
    for step in range(40):
        encoded = here.encode(_clusters(32, shift=step / 2, seed=step))
        kept.append(there.resolve(encoded))
        expected.append(there.decode(encoded))
    assert len({e.version for e in kept}) > 2
    for encoded, y in zip(reversed(kept), reversed(expected), strict=True):
        assert torch.equal(there.decode(encoded), y)
        assert encoded.layout == Layout.of(y)


def test_a_patch_is_neighbours_of_a_channel() -> None:
    """Maps that are constant on 2x2 patches, of four values a channel, come back exactly from words of neighbours."""
    draw = torch.Generator().manual_seed(3)
    # Exact as words travel: 16 of each channel are 64 values, whose largest is 127.
    levels = torch.randint(-127, 128, (6, 4), generator=draw).float()
    levels[:, 0] = 127
    which = torch.randint(4, (32, 6, 4, 8), generator=draw)
    coarse = levels[torch.arange(6)[:, None, None], which]
    x = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    codec = codecs.build("vq:16,4,2")
    codec.check((6, 8, 16))
    encoded = codec.encode(x)
    assert torch.equal(codec.decode(encoded), x)
    # One index for four values; a codebook for each channel.
    assert encoded.tensors[0].numel() == x.numel() // 4 // 2 and encoded.tensors[1].numel() == 6 * 16 * 4
    # Two channels a vector: half of the groups, words of twice the length.
    pairs = codecs.build("vq:16,8,2").encode(x)
    assert pairs.tensors[1].numel() == 3 * 16 * 8 and pairs.tensors[0].numel() == x.numel() // 8 // 2
    # Vectors of channels find no such order.
    assert _error(codecs.build("vq:16,3"), x) > 0.05


@pytest.mark.parametrize("name", ["contiguous", "channels last", "bf16", "fp64"])
def test_patches_keep_shape_strides_and_dtype(name: str) -> None:
    x = TENSORS[name]
    codec = codecs.build("vq:16,4,2")
    assert codec.name == "vq:16,4,2"
    encoded = codec.encode(x)
    y = codec.decode(encoded)
    assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
    # Each value went where it came from: nearer to it than to its neighbour.
    assert (y - x).norm() < 0.7 * (y - x.roll(1, 3)).norm()
    # The memory format does not change what is coded.
    other = codecs.build("vq:16,4,2").encode(x.contiguous())
    assert torch.equal(other.tensors[0], encoded.tensors[0])


def test_patches_that_do_not_fit() -> None:
    for spec, message in (
        ("vq:16,4,0", "expected S >= 1 whose square divides D, got vq:16,4,0"),
        ("vq:16,6,2", "expected S >= 1 whose square divides D, got vq:16,6,2"),
        ("vq:16,4,2,1", "unknown codec"),
    ):
        with pytest.raises(ValueError, match=message):
            codecs.build(spec)
    codec = codecs.build("vq:16,8,2")
    for shape in ((6, 8, 7), (6, 7, 8), (6,), (6, 4)):
        with pytest.raises(
            ValueError, match="patches need feature maps .* divisible by 2, got .*use vq:16,8"
        ):
            codec.check(shape)
    with pytest.raises(ValueError, match="D has to divide the channels times 4, got 20 of"):
        codec.check((5, 8, 8))
    for learn in (True, False):
        with pytest.raises(ValueError, match=r"patches need feature maps .*, got \(4, 7, 8\)"):
            codecs.build("vq:16,4,2").encode(torch.randn(4, 4, 7, 8), learn=learn)
    encoded = codecs.build("vq:16,4,2").encode(torch.randn(4, 4, 8, 8))
    layout = replace(encoded.layout, shape=(4, 4, 16, 4))
    for shape in ((4, 4, 64), (4, 4, 1, 64), (4, 4, 64, 1)):
        with pytest.raises(CodecError, match="expected .N, C, H, W. with H and W divisible by 2"):
            codecs.build("vq:16,4,2").decode(replace(encoded, layout=replace(layout, shape=shape)))
