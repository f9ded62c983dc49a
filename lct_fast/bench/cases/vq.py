"""vq_encode (search, packing and statistics in one call), vq_decode and vq_update.

Rivals of encode: faiss, its exact search of one neighbour and nothing else; vector-quantize-pytorch, a forward pass
in training, which also updates its codebook; flash-kmeans, one iteration from given words, on a device.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.bench.case import (
    DTYPES,
    Bench,
    Case,
    Contender,
    Outputs,
    Place,
    generator,
    normal,
    ours,
    plain_torch,
)
from lct_fast.bench.rivals import installed
from lct_fast.bench.rule import FINE, Accuracy, Expected, WrongOutput, against, judge, worst
from lct_fast.reference import vq as reference

CANDIDATES = 16
FORM = {
    "rows": None,
    "groups": None,
    "depth": None,
    "codewords": None,
    "dtype": DTYPES,
    # skewed: nine rows in ten around one word.
    "spread": ("uniform", "skewed"),
}
SHAPES = {
    "cpu": (
        "131072,1,4,256,f32,uniform",
        "131072,1,4,256,f32,skewed",
        "131072,1,8,256,f32,uniform",
        "131072,1,32,256,f32,uniform",
        "65536,1,64,1024,f32,uniform",
        "65536,1,64,1024,f32,skewed",
        "131072,1,8,256,bf16,uniform",
    ),
    "cuda": (
        "131072,32,128,128,f16,uniform",
        "131072,32,8,256,bf16,uniform",
        "131072,32,128,1024,f16,uniform",
        "131072,32,32,256,bf16,uniform",
        "131072,32,8,256,bf16,skewed",
        "131072,32,64,1024,bf16,uniform",
        "131072,32,128,1024,f16,skewed",
        "131072,1,8,256,f32,uniform",
        "131072,1,64,1024,f32,uniform",
    ),
}


class Inputs:
    """x [N, G * D], a codebook [G, K, D], and what the nearest words are in float64."""

    def __init__(
        self, place: Place, rows: int, groups: int, depth: int, codewords: int, dtype: str, spread: str
    ) -> None:
        draw, self.dtype = generator(place), DTYPES[dtype]
        self.rows, self.groups, self.depth, self.codewords = rows, groups, depth, codewords
        self.codebook = normal(draw, groups, codewords, depth)
        x = normal(draw, rows, groups, depth)
        if spread == "skewed":
            on_one = torch.rand(rows, groups, 1, generator=draw, device=draw.device) < 0.9
            x = torch.where(on_one, self.codebook[:, codewords // 2] + 0.01 * x, x)
        self.x = x.to(self.dtype).view(rows, groups * depth)
        self.bits = reference.bits_of(codewords)

    def numbers(self, packed: Tensor) -> Tensor:
        """[N, G] from packed codes."""
        return reference.unpack(packed, self.bits, self.rows * self.groups).view(self.rows, self.groups)

    def vectors(self) -> Tensor:
        """[G, N, D]."""
        return self.x.view(self.rows, self.groups, self.depth).transpose(0, 1)

    def index(self, code: Tensor) -> Tensor:
        """[G * N] from [N, G]: the words of all groups in one row."""
        first = torch.arange(self.groups, device=code.device) * self.codewords
        return (code.long() + first).T.flatten()


class EncodeCheck:
    """Codes by how much farther than the nearest word they are; the rest given the codes."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        words = inputs.codebook.double()
        half = words.square().sum(2)[:, None] / 2
        parts = inputs.vectors().split(8192, 1)
        self.nearest = torch.cat(
            [torch.baddbmm(half, p.double(), words.mT, alpha=-1).amin(2) for p in parts], 1
        )
        length = torch.cat([p.double().norm(dim=2) for p in parts], 1)
        self.size = half.amax() + length * words.norm(dim=2).amax()

    def __call__(self, outputs: Mapping[str, Tensor], slack: float) -> Accuracy:
        code = outputs["codes"]
        if code.shape != (self.inputs.rows, self.inputs.groups):
            raise WrongOutput(f"codes are {list(code.shape)}, expected [N, G]")
        index = self.inputs.index(code)
        found = [self._excess(index, slack)]
        if "flag" in outputs and bool(outputs["flag"]):
            raise WrongOutput("the flag is up, and every input is finite")
        if "candidates" in outputs:
            self._candidates(outputs["candidates"])
        known = self._statistics(index)
        if "counts" in outputs and not torch.equal(outputs["counts"].flatten(), known["counts"].exact):
            raise WrongOutput("counts are not those of the codes")
        found += [
            judge(name, outputs[name].reshape(known[name].exact.shape), known[name], slack)
            for name in ("sums", "squared_error", "means")
            if name in outputs
        ]
        return worst(found)

    def _excess(self, index: Tensor, slack: float) -> Accuracy:
        inputs = self.inputs
        words = inputs.codebook.double().view(-1, inputs.depth)
        # A rival may search in the rows' own format.
        eps = FINE if slack == 1.0 else torch.finfo(inputs.dtype).eps
        largest = Accuracy(0.0, 0.0)
        for group, code in enumerate(index.view(inputs.groups, -1)):
            chosen = words[code]
            score = chosen.square().sum(1) / 2 - (chosen * inputs.vectors()[group].double()).sum(1)
            share = (score - self.nearest[group]) / self.size[group]
            largest = worst([largest, Accuracy(float(share.max()), float(share.max()) / (8 * eps))])
        if not largest.of_rule <= 1:
            raise WrongOutput(
                f"a word is farther than the nearest by {largest.error:.2e} of the distances' size"
            )
        return largest

    def _statistics(self, index: Tensor) -> dict[str, Expected]:
        inputs = self.inputs
        words = inputs.groups * inputs.codewords
        x = inputs.vectors().reshape(-1, inputs.depth)

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(words, inputs.depth).index_add(0, index, values)

        def error(dtype: torch.dtype) -> Tensor:
            return (x.to(dtype) - inputs.codebook.to(dtype).view(words, -1)[index]).square().sum()

        counts = torch.bincount(index, minlength=words)
        exact, plain = summed(x.double()), summed(x.float())
        terms = float(summed(x.double().abs()).max())
        squared = error(torch.float64)
        some = counts[:, None].clamp(min=1)
        # Where no row chose a word, a mean stays what it was.
        means = torch.where(counts[:, None] > 0, exact / some, inputs.codebook.view(words, -1).double())
        return {
            "counts": Expected(counts, counts, 0.0),
            "sums": Expected(exact, plain, FINE, terms),
            "squared_error": Expected(squared, error(torch.float32), 8 * FINE, float(squared)),
            "means": Expected(means, means, torch.finfo(inputs.dtype).eps),
        }

    def _candidates(self, candidates: Tensor) -> None:
        vectors = self.inputs.vectors()
        for slot in range(min(CANDIDATES, self.inputs.rows)):
            rows = vectors[:, slot::CANDIDATES]
            found = (rows == candidates[:, slot, None].to(rows.dtype)).all(2).any(1)
            if not bool(found.all()):
                raise WrongOutput(f"candidate {slot} is none of its rows")


def _in_torch(x: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, G], counts, sums and error, the distances in blocks of rows and without |x|^2."""
    groups, codewords, depth = codebook.shape
    half = (codebook.square().sum(2) / 2)[:, None]
    vectors = x.float().view(-1, groups, depth).transpose(0, 1)
    parts = vectors.split(block, 1)
    code = torch.cat([torch.baddbmm(half, p, codebook.mT, alpha=-1).argmin(2) for p in parts], 1)
    index = (code + (torch.arange(groups, device=x.device) * codewords)[:, None]).flatten()
    flat = vectors.reshape(-1, depth)
    counts = index.new_zeros(groups * codewords).index_add(0, index, torch.ones_like(index))
    sums = flat.new_zeros(groups * codewords, depth).index_add(0, index, flat)
    error = (flat - codebook.view(-1, depth)[index]).square().sum()
    return code.T, counts, sums, error


def _blocked(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    # Distances of so many rows fit a cache of a CPU; a device has room for more.
    return _in_torch(x, codebook, 65536 if x.is_cuda else 1024)


def _whole(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    return _in_torch(x, codebook, len(x))


def _encode(place: Place, **fields: Any) -> Case:
    inputs = Inputs(place, **fields)
    x, codebook = inputs.x, inputs.codebook

    def outputs(out: ops.VQEncoding) -> Outputs:
        named = out._asdict()
        named.pop("candidate_scores")
        return named | {"codes": inputs.numbers(out.codes)}

    def step(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: function(x, codebook)

    def torch_outputs(out: tuple[Tensor, ...]) -> Outputs:
        return dict(zip(("codes", "counts", "sums", "squared_error"), out, strict=True))

    contenders = [
        *ours(place, ("vq_encode",), lambda: ops.vq_encode(x, codebook, CANDIDATES), outputs),
        *plain_torch(place, _blocked, step, torch_outputs, compiled=_whole),
        *_rivals(place, inputs),
    ]
    results = inputs.rows * inputs.groups * inputs.bits // 8 + (CANDIDATES * inputs.depth + 1) * 4
    # Codebook and sums, counts.
    traffic = x.nbytes + results + 2 * codebook.nbytes + 8 * inputs.groups * inputs.codewords
    return Case(contenders, EncodeCheck(inputs), traffic, 2 * x.numel() * inputs.codewords)


def _rivals(place: Place, inputs: Inputs) -> Iterator[Contender]:
    if not place.rivals:
        return
    if place.device == "cpu" and inputs.groups == 1 and installed("faiss"):
        yield _faiss(inputs)
    if inputs.groups == 1 and installed("vector_quantize_pytorch"):
        yield _vector_quantize(place, inputs)
    # Its float32 products are TF32 and would not pass the check.
    if place.device == "cuda" and inputs.dtype != torch.float32 and installed("flash_kmeans"):
        yield _flash_kmeans(inputs)


def _faiss(inputs: Inputs) -> Contender:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(inputs.depth)
    index.add(inputs.codebook[0].numpy())
    rows = inputs.x.float().numpy()
    return Contender(
        "faiss, search alone",
        lambda: index.search(rows, 1),
        lambda out: {"codes": torch.from_numpy(out[1])},
        in_torch=False,
        package="faiss-cpu",
    )


def _vector_quantize(place: Place, inputs: Inputs) -> Contender:
    from vector_quantize_pytorch import VectorQuantize

    rows, start = inputs.x.float()[None], inputs.codebook.clone()
    layer = VectorQuantize(dim=inputs.depth, codebook_size=inputs.codewords).to(place.device).train()

    def reset() -> None:
        # Every step from the same words: they move in training.
        layer._codebook.embed.data.copy_(start)

    def run() -> Any:
        with torch.no_grad():
            return layer(rows)

    return Contender(
        "vector-quantize-pytorch, train step",
        run,
        lambda out: {"codes": out[1][0][:, None]},
        reset=reset,
        graphs=False,
        package="vector-quantize-pytorch",
    )


def _flash_kmeans(inputs: Inputs) -> Contender:
    from flash_kmeans import batch_kmeans_Euclid

    rows, words = inputs.vectors().contiguous(), inputs.codebook.to(inputs.dtype)
    # It compares the words' shift on the host, which no graph can capture.
    return Contender(
        "flash-kmeans, one iteration",
        lambda: batch_kmeans_Euclid(rows, inputs.codewords, max_iters=1, init_centroids=words),
        lambda out: {"codes": out[0].T, "means": out[1]},
        graphs=False,
        package="flash-kmeans",
    )


def _decode(place: Place, **fields: Any) -> Case:
    inputs = Inputs(place, **fields)
    rows, groups, codebook = inputs.rows, inputs.groups, inputs.codebook
    shape = (rows, groups)
    code = torch.randint(0, inputs.codewords, shape, generator=generator(place), device=place.device)
    packed = reference.pack(code.flatten(), inputs.bits)
    group = torch.arange(groups, device=place.device)
    exact = codebook[group, code].to(inputs.dtype).view(rows, -1)

    def in_torch(packed: Tensor, codebook: Tensor) -> Tensor:
        code = packed.view(shape).long() if inputs.bits == 8 else inputs.numbers(packed)
        return codebook[group, code].to(inputs.dtype).view(rows, -1)

    def step(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(packed, codebook)

    def outputs(out: Any) -> Outputs:
        return {"x": out}

    contenders = [
        *ours(place, ("vq_decode",), lambda: ops.vq_decode(packed, codebook, rows, inputs.dtype), outputs),
        *plain_torch(place, in_torch, step, outputs),
    ]
    traffic = packed.nbytes + codebook.nbytes + exact.nbytes
    # No arithmetic: a word is copied, or it is wrong.
    return Case(contenders, against({"x": Expected(exact, exact, 0.0)}), traffic, 0)


def _update(place: Place, groups: int, depth: int, codewords: int) -> Case:
    draw = generator(place)
    start = normal(draw, groups, codewords, depth)
    counts = torch.randint(0, 16, (groups, codewords), generator=draw, device=place.device)
    sums = normal(draw, groups, codewords, depth) * counts[:, :, None]
    candidates = normal(draw, groups, CANDIDATES, depth)
    # A word that no row chose has n = 0.99 and is revived; one row more and it has 1.
    decay, eps, revive_below = 0.99, 1e-5, 0.995
    first = (start, *ops.vq_state(start))
    current = [x.clone() for x in first]

    def reset() -> None:
        for x, begin in zip(current, first, strict=True):
            x.copy_(begin)

    def ours_run() -> list[Tensor]:
        codebook, *state = current
        ops.vq_update(codebook, ops.VQState(*state), counts, sums, candidates, decay, eps, revive_below)
        return current

    def step(function: Callable[..., None]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            function(*current, counts, sums, candidates, decay, eps, revive_below)
            return current

        return run

    def outputs(out: list[Tensor]) -> Outputs:
        return dict(zip(("codebook", "state counts", "state sums"), out, strict=True))

    exact, plain = ([x.to(dtype, copy=True) for x in first] for dtype in (torch.float64, torch.float32))
    for (words, n, m), dtype in ((exact, torch.float64), (plain, torch.float32)):
        learned = sums.to(dtype), candidates.to(dtype)
        reference.vq_update(words, n, m, counts, *learned, decay, eps, revive_below)
    expected = {
        name: Expected(e, p, 4 * FINE) for (name, e), p in zip(outputs(exact).items(), plain, strict=True)
    }
    contenders = [
        *ours(place, ("vq_update",), ours_run, outputs, reset),
        *plain_torch(place, reference.vq_update, step, outputs, reset=reset),
    ]
    # Codebook written, sums read, averages read and written; counts and theirs.
    traffic = 4 * start.nbytes + (8 + 2 * 4) * counts.numel() + candidates.nbytes
    return Case(contenders, against(expected), traffic, 4 * start.numel())


BENCHES = (
    Bench(
        name="vq_encode",
        covers=("vq_encode",),
        form=FORM,
        shapes=SHAPES,
        tiny="70,2,4,16,f32,skewed",
        build=_encode,
        rivals={
            "cpu": ("faiss", "vector_quantize_pytorch"),
            "cuda": ("flash_kmeans", "vector_quantize_pytorch"),
        },
    ),
    Bench(
        name="vq_decode",
        covers=("vq_decode",),
        form=FORM,
        shapes={
            "cpu": tuple(shape for shape in SHAPES["cpu"] if "skewed" not in shape),
            "cuda": tuple(shape for shape in SHAPES["cuda"] if "skewed" not in shape),
        },
        tiny="70,2,4,16,bf16,uniform",
        build=_decode,
    ),
    Bench(
        name="vq_update",
        covers=("vq_update",),
        form={"groups": None, "depth": None, "codewords": None},
        shapes={"cpu": ("1,64,1024", "32,8,256"), "cuda": ("32,128,1024", "32,8,256")},
        tiny="2,4,16",
        build=_update,
    ),
)
