"""csrc/cuda/vq*.cu run on the host, under sanitizers: bit for bit what vq.h and docs/vq.md say.

Codes, counts, candidates and their scores are those of backend `cpu`; the order of sums is in vq_order.py.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.reference import vq as reference
from tests.cuda.host_build import CSRC, HERE, build, check
from tests.cuda.vq_order import check_order, in_order, lanes_summed
from tests.ladder import assert_same_bits
from tests.ops.vq_case import DTYPES, Case, make

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# (rows, groups, codewords, depth, slots): why.
SHAPES = {
    (1, 1, 2, 1, 1): "the smallest",
    (3, 3, 5, 2, 3): "vectors of two columns; codes of three bits over groups, the stream ends within a byte",
    (513, 1, 255, 4, 16): "one row past a run; one word short of a byte",
    (700, 3, 37, 8, 7): "groups side by side, a tile of words that is not whole fours",
    (300, 1, 16, 16, 511): "as many slots as a run has rows, but one",
    (540, 1, 300, 3, 512): "columns that are no vector; a slot for every row of a run",
    (33, 2, 9, 7, 0): "one row past a warp, no candidates, one column short",
    (70, 1, 257, 12, 2): "words that pass through shared memory in two tiles; codes of nine bits",
    (40, 1, 2600, 3, 1): "more words than shared memory holds sums of",
    (130, 2, 65, 17, 5): "deep vectors that are no whole slices; a second tile of rows and of words",
    (600, 1, 70, 32, 16): "deep vectors in whole slices",
    (20, 1, 80, 136, 1): "deep vectors whose sums shared memory does not hold",
    (2 * 4096 + 700, 1, 13, 4, 600): "three chunks, the last of two runs; slots that few runs have",
    (4096 + 513, 2, 2, 2, 4096): "codes of one bit; as many slots as there may be",
    (2 * 4096, 1, 3, 20, 1): "whole chunks of deep vectors",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernels = sorted((CSRC / "cuda").glob("vq*.cu"))
    return build(tmp_path_factory.mktemp("host"), HERE / "vq_host.cpp", *kernels)


def raw(*tensors: Tensor) -> bytes:
    return b"".join(bytes(x.contiguous().view(torch.uint8).flatten().tolist()) for x in tensors)


def run(program: Path, what: str, data: bytes, *words: object) -> Tensor:
    source, target = program.with_name("in"), program.with_name("out")
    source.write_bytes(data)
    check(program, what, source, target, *words)
    return torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.uint8)


def cut(stream: Tensor, *like: Tensor) -> list[Tensor]:
    """Tensors one behind the other, of the dtypes and shapes of `like`."""
    found = []
    for each in like:
        size = each.numel() * each.element_size()
        found.append(stream[:size].clone().view(each.dtype).view(each.shape))
        stream = stream[size:]
    assert len(stream) == 0
    return found


def encode(program: Path, case: Case, offset: int = 0) -> ops.VQEncoding:
    with ops.use_backend("cpu"):
        expected = case.run()
    expected = expected._replace(flag=expected.flag.byte())
    words = (len(case.x), *case.codebook.shape, case.candidates, NUMBERS[case.x.dtype], offset)
    return ops.VQEncoding(*cut(run(program, "encode", raw(case.x, case.codebook), *words), *expected))


def compare(program: Path, case: Case, offset: int = 0) -> None:
    with ops.use_backend("cpu"):
        expected = case.run()
    got = encode(program, case, offset)
    for name in ("codes", "counts", "candidates", "candidate_scores"):
        assert_same_bits(name, getattr(got, name), getattr(expected, name))
    assert int(got.flag) == int(expected.flag)
    check_order(case, got)
    torch.testing.assert_close(got.sums, expected.sums, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got.squared_error, expected.squared_error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode(program: Path, shape: tuple[int, int, int, int, int]) -> None:
    *sizes, slots = shape
    # Few rows in every dtype, many in one of them.
    turn = list(SHAPES).index(shape)
    dtypes = DTYPES.values() if shape[0] < 1000 else list(DTYPES.values())[turn % 3 :][:1]
    for dtype in dtypes:
        compare(program, make(*sizes, dtype, candidates=slots))


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("depth", [2, 4, 8, 16, 24])
def test_encode_from_the_middle_of_a_vector(program: Path, depth: int, offset: int) -> None:
    for dtype in DTYPES.values():
        compare(program, make(35, 2, 11, depth, dtype, candidates=2), offset)


@pytest.mark.parametrize("depth", [2, 3, 4, 8, 9, 16, 40])
def test_values_that_are_not_finite(program: Path, depth: int) -> None:
    case = make(600, 2, 10, depth, candidates=3)
    x, codebook = case.x.clone(), case.codebook.clone()
    for row, value in ((0, torch.nan), (37, torch.inf), (511, -torch.inf), (599, 3e38), (40, 1e20)):
        x[row, row % x.shape[1]] = value
    codebook[0, 2, -1], codebook[1, 0, 0], codebook[1, 9] = torch.nan, torch.inf, -torch.inf
    compare(program, Case(x, codebook, 3))
    compare(program, Case(x, torch.full_like(codebook, torch.nan), 3))


def test_values_that_are_not_finite_in_an_earlier_chunk(program: Path) -> None:
    case = make(4096 + 30, 1, 3, 4)
    case.x[5, 1] = torch.nan
    compare(program, case)


@pytest.mark.parametrize("depth", [2, 4, 7, 16, 20])
def test_scores_are_rounded_as_on_the_cpu(program: Path, depth: int) -> None:
    """Rows and words close together and far from zero: which word is chosen is a matter of rounding."""
    case = make(600, 1, 70, depth)
    compare(program, Case(case.x * 0.01 + 1000, case.codebook * 0.01 + 1000, 1))


@pytest.mark.parametrize("codewords", [2, 5, 70, 300])
@pytest.mark.parametrize("depth", [2, 3, 8, 16, 20])
def test_ties_go_to_the_lowest_index(program: Path, depth: int, codewords: int) -> None:
    """Every word twice and more often, and rows on words: arithmetic is exact, so nothing else may be chosen."""
    half = -(-codewords // 2)
    words = torch.arange(half, dtype=torch.float32).repeat(2)[:codewords]
    codebook = torch.stack([words, -2 * words, *([words] * depth)], 1)[None, :, :depth]
    row = torch.arange(200) % half
    got = encode(program, Case(codebook[0, row], codebook, 2))
    assert torch.equal(Case(codebook[0, row], codebook).numbers(got.codes)[:, 0], row)
    assert not got.counts[0, half:].any() and got.squared_error == 0
    assert bool(got.candidates.isnan().all()) and not got.candidate_scores.any()


def candidates_of(program: Path, x: Tensor) -> float:
    codebook = torch.tensor([[[0.0], [1e6]]])
    return float(encode(program, Case(x[:, None], codebook, 1)).candidates)


def test_equal_scores_go_to_the_lowest_row(program: Path) -> None:
    """In one run: two errors whose ratio is that of the numbers they are divided by."""
    values = torch.linspace(1, 1.9, 4000)
    place = torch.arange(40)
    scores = reference.candidate_scores(values.square().expand(40, -1).T, place).T.flatten()
    ordered, index = scores.sort(stable=True)
    other_row = index[1:] // 4000 != index[:-1] // 4000
    at = int(((ordered[1:] == ordered[:-1]) & other_row).nonzero()[0])
    (a, i), (b, j) = sorted(divmod(int(k), 4000) for k in index[at : at + 2])
    x = torch.zeros(40)
    x[a], x[b] = values[i], -values[j]
    assert candidates_of(program, x) == float(values[i])
    # The same from chunk to chunk, and from run to run by way of them.
    x = torch.zeros(3 * 4096)
    x[4096 + 600], x[2 * 4096 + 600] = -1.5, 1.5
    assert candidates_of(program, x) == -1.5


@pytest.mark.parametrize("depth", [1, 8, 33])
def test_all_rows_on_one_word(program: Path, depth: int) -> None:
    case = make(1100, 1, 9, depth)
    codebook = case.codebook + torch.tensor([0.0] + [1e3] * 8)[None, :, None]
    compare(program, Case(case.x, codebook, 4))


@pytest.mark.parametrize("shape", list(SHAPES)[:10], ids=str)
def test_decode(program: Path, shape: tuple[int, int, int, int, int]) -> None:
    rows, groups, codewords, depth, _ = shape
    case = make(rows, groups, codewords, depth)
    size, bits = reference.bytes_of(rows, groups, codewords), reference.bits_of(codewords)
    draw = torch.Generator().manual_seed(rows)
    whole = reference.pack(torch.randint(0, codewords, (rows * groups,), generator=draw), bits)
    # The other stream has codes beyond the last word wherever there can be such.
    for codes in (whole, torch.randint(0, 256, (size,), generator=draw).to(torch.uint8)):
        for dtype in DTYPES.values():
            x, flag = reference.vq_decode(codes, case.codebook, rows, dtype)
            for offset in (0, 1, 2, 3):
                words = (rows, groups, codewords, depth, 0, NUMBERS[dtype], offset)
                got, clamped = cut(run(program, "decode", raw(codes, case.codebook), *words), x, flag.byte())
                assert_same_bits("x", got, x)
                assert int(clamped) == int(flag)


@pytest.mark.parametrize("depth", [4096, 40000])
def test_decode_more_than_a_block_of_columns(program: Path, depth: int) -> None:
    case = make(3, 2, 3, depth)
    codes = reference.pack(torch.tensor([2, 0, 1, 1, 0, 2]), 2)
    x, flag = reference.vq_decode(codes, case.codebook, 3, torch.bfloat16)
    got, _ = cut(run(program, "decode", raw(codes, case.codebook), 3, 2, 3, depth, 0, 2, 0), x, flag.byte())
    assert_same_bits("x", got, x)


def updated(tensors: list[Tensor], decay: float, eps: float, revive_below: float) -> list[Tensor]:
    """The reference's formulas in fp32, a group's counts added up as the kernel does."""
    codebook, n, m, counts, sums, candidates = (x.clone() for x in tensors)
    codewords = codebook.shape[1]
    decay_, rest, eps_, least = torch.tensor([decay, 1 - decay, eps, revive_below]).unbind()
    n = decay_ * n + rest * counts.float()
    m = decay_ * m + rest * sums
    by_thread = in_order(torch.nn.functional.pad(n, (0, -codewords % 256)).view(len(n), -1, 8, 32), 1)
    total = in_order(lanes_summed(by_thread), 1)[:, None]
    factor = total / (total + codewords * eps_)
    smoothed = ((n + eps_) * factor)[..., None]
    codebook = torch.where(smoothed > 0, m / smoothed, codebook)
    fresh = torch.maximum(total / codewords, least)[:, 0]
    for group in range(len(n)):
        finite = [x for x in candidates[group] if bool(x.isfinite().all())]
        dead = (n[group] < least).nonzero()[:, 0]
        for k, candidate in zip(dead.tolist(), finite, strict=False):
            codebook[group, k], n[group, k], m[group, k] = candidate, fresh[group], fresh[group] * candidate
    return [codebook, n, m]


@pytest.mark.parametrize("revive_below", [0.0, 4.0, 1e6])
@pytest.mark.parametrize(
    ("groups", "codewords", "depth", "slots"),
    [(1, 2, 1, 0), (3, 5, 7, 16), (2, 700, 3, 300), (1, 257, 40, 9), (1, 2, 5000, 1)],
    ids=str,
)
def test_update(
    program: Path, groups: int, codewords: int, depth: int, slots: int, revive_below: float
) -> None:
    draw = torch.Generator().manual_seed(codewords)
    codebook, m, sums = torch.randn(3, groups, codewords, depth, generator=draw).unbind()
    n = torch.rand(groups, codewords, generator=draw) * 10
    counts = torch.randint(0, 20, (groups, codewords), generator=draw)
    candidates = torch.randn(groups, slots, depth, generator=draw)
    candidates[:, 1::3, -1] = torch.nan
    candidates[:, 2::5, 0] = torch.inf
    # A group that nobody chose keeps its words.
    n[0], counts[0] = n[0] * (groups < 3), counts[0] * (groups < 3)
    tensors = [codebook, n, m, counts, sums, candidates]
    words = (groups, codewords, depth, slots, 0.9, 1e-5, revive_below)
    got = cut(run(program, "update", raw(*tensors), *words), codebook, n, m)
    expected = updated(tensors, 0.9, 1e-5, revive_below)
    plain = [codebook.clone(), n.clone(), m.clone()]
    reference.vq_update(*plain, counts, sums, candidates, 0.9, 1e-5, revive_below)
    for name, a, b, c in zip(("codebook", "counts", "sums"), got, expected, plain, strict=True):
        assert_same_bits(name, a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_launch(program: Path) -> None:
    check(program, "launch")
