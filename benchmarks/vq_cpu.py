"""vq_encode on the CPU, search, packing and statistics in one call, against the search alone in faiss.

    python -m benchmarks.vq_cpu --out FILE [--rivals] [--threads 2] [--samples 15] [--shape N,D,K,DTYPE[,skewed] ...]

Rivals, with --rivals (`pip install -e '.[rivals]'`): faiss-cpu, IndexFlatL2, one nearest neighbour, nothing else;
vector-quantize-pytorch, a forward pass in training, which also updates its codebook. Without it, plain torch.
Contenders take turns (A B C, B C A, ...) over the same rows, caches flushed before each. The codes of each are
compared with the nearest words in float64 first, and one that fails gets no time and makes the exit status 1. A
sample during which the system took a core away from this process is measured again; where that does not help,
`quiet` is false and the numbers mean little.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--small-pages" not in sys.argv:
    # Read by torch at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import critic_head_cpu
from benchmarks.critic_head_cpu import busy_seconds, sample
from benchmarks.measure import percentiles
from lct_fast import ops
from lct_fast.reference import vq as reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = (
    "131072,4,256,f32",
    "131072,4,256,f32,skewed",
    "131072,8,256,f32",
    "131072,32,256,f32",
    "65536,64,1024,f32",
    "65536,64,1024,f32,skewed",
    "131072,8,256,bf16",
)
OURS = "lct_fast"
CANDIDATES = 16

Run = Callable[[], Any]
Codes = Callable[[Any], Tensor]


def inputs(rows: int, depth: int, codewords: int, dtype: torch.dtype, skewed: bool) -> tuple[Tensor, Tensor]:
    """x [N, D] and codebook [1, K, D]; skewed: nine rows in ten around one word."""
    draw = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, codewords, depth, generator=draw)
    x = torch.randn(rows, depth, generator=draw)
    if skewed:
        on_one = torch.rand(rows, generator=draw) < 0.9
        x = torch.where(on_one[:, None], codebook[0, codewords // 2] + 0.01 * x, x)
    return x.to(dtype), codebook


def contenders(x: Tensor, codebook: Tensor, rivals: bool) -> dict[str, tuple[Run, Codes]]:
    """For each, what is timed and how the codes [N] are had from its result."""
    codewords, bits = codebook.shape[1], reference.bits_of(codebook.shape[1])

    def ours() -> ops.VQEncoding:
        with ops.use_backend("cpu"):
            return ops.vq_encode(x, codebook, CANDIDATES)

    found: dict[str, tuple[Run, Codes]] = {
        OURS: (ours, lambda out: reference.unpack(out.codes, bits, len(x)))
    }

    def plain() -> Tensor:
        # Without |x|^2, in blocks that fit a cache: as good as torch is at it.
        half = codebook[0].square().sum(1) / 2
        return torch.cat(
            [torch.addmm(half, p.float(), codebook[0].T, alpha=-1).argmin(1) for p in x.split(1024)]
        )

    found["torch, search alone"] = (plain, lambda out: out)
    if not rivals:
        return found

    import faiss
    from vector_quantize_pytorch import VectorQuantize

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[2])
    index.add(codebook[0].numpy())
    rows = x.float().numpy()
    found["faiss, search alone"] = (lambda: index.search(rows, 1), lambda out: torch.from_numpy(out[1][:, 0]))
    wide = x.float()[None]
    layer = VectorQuantize(dim=codebook.shape[2], codebook_size=codewords).train()
    start = codebook.clone()

    def step() -> Any:
        # Every step from the same codebook: it moves in training.
        layer._codebook.embed.data.copy_(start)
        with torch.no_grad():
            return layer(wide)

    found["vector-quantize-pytorch, train step"] = (step, lambda out: out[1][0])
    return found


def check(x: Tensor, codebook: Tensor, codes: Tensor) -> None:
    """No word farther than the nearest by more than fp32 rounding of the scores, in float64."""
    words = codebook[0].double()
    half = words.square().sum(1) / 2
    if codes.shape != (len(x),):
        raise AssertionError(f"codes {list(codes.shape)}, expected {len(x)}")
    for first in range(0, len(x), 8192):
        part = x[first : first + 8192].double()
        score = half - part @ words.T
        chosen = score.gather(1, codes[first : first + 8192, None].long())[:, 0]
        excess = 2 * (chosen - score.amin(1))
        size = 2 * (half.max() + part.norm(dim=1) * words.norm(dim=1).max())
        allowed = 8 * torch.finfo(torch.float32).eps * size
        if bool((excess > allowed).any()):
            row = first + int((excess - allowed).argmax())
            raise AssertionError(
                f"row {row} has a word farther than the nearest by {float(excess.max()):.2e}"
            )


def check_statistics(x: Tensor, codebook: Tensor, out: ops.VQEncoding) -> None:
    """Counts, sums and error of our own result, given its codes, in float64."""
    codewords = codebook.shape[1]
    codes = reference.unpack(out.codes, reference.bits_of(codewords), len(x))
    if not torch.equal(out.counts[0], torch.bincount(codes, minlength=codewords)):
        raise AssertionError("counts differ")
    exact = torch.zeros_like(codebook[0].double()).index_add(0, codes, x.double())
    size = torch.zeros_like(exact).index_add(0, codes, x.double().abs())
    if bool(((out.sums[0].double() - exact).abs() > 1e-5 * size).any()):
        raise AssertionError("sums differ")
    error = float((x.double() - codebook[0].double()[codes]).square().sum())
    if abs(float(out.squared_error) / error - 1) > 1e-5:
        raise AssertionError(f"squared_error {float(out.squared_error)}, expected {error}")


def measure(shape: str, samples: int, rivals: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each contender of one shape, and what failed its check."""
    rows, depth, codewords, name, *rest = shape.split(",")
    if rest not in ([], ["skewed"]) or name not in DTYPES:
        raise SystemExit(f"--shape takes N,D,K,DTYPE[,skewed] with DTYPE f32 or bf16, got {shape}")
    x, codebook = inputs(int(rows), int(depth), int(codewords), DTYPES[name], bool(rest))
    running: dict[str, Run] = {}
    failed = []
    for contender, (run, codes_of) in contenders(x, codebook, rivals).items():
        out = run()
        try:
            check(x, codebook, codes_of(out))
            if contender == OURS:
                check_statistics(x, codebook, out)
            running[contender] = run
        except AssertionError as error:
            failed.append(f"{shape} {contender}: {error}")
    flush = torch.empty(1 << 26, dtype=torch.int8)
    names = list(running)
    taken: dict[str, list[tuple[float, bool]]] = {contender: [] for contender in names}
    for turn in tqdm(range(samples), desc=shape, leave=False, disable=None):
        for k in range(len(names)):
            contender = names[(turn + k) % len(names)]
            taken[contender].append(sample(running[contender], flush))
    ours = percentiles([us for us, _ in taken[OURS]]).p50 if OURS in taken else float("nan")
    table: list[dict[str, Any]] = []
    for contender, times in taken.items():
        p = percentiles([us for us, _ in times])
        table.append(
            {
                "rows": int(rows),
                "depth": int(depth),
                "codewords": int(codewords),
                "dtype": name,
                "skewed": bool(rest),
                "contender": contender,
                "us_p20": p.p20,
                "us_p50": p.p50,
                "us_p80": p.p80,
                "samples": p.samples,
                "undisturbed": sum(clean for _, clean in times),
                "lct_fast_times_as_fast": p.p50 / ours,
            }
        )
    return table, failed


def header(threads: int, rivals: bool) -> dict[str, Any]:
    report = critic_head_cpu.header(threads)
    report["benchmark"] = "vq_cpu"
    report["what"] = (
        "vq_encode: codes, packed, counts, sums, error and candidates, one group, microseconds; "
        "a rival's search alone, or its training step"
    )
    report["command"] = f"python -m benchmarks.vq_cpu {' '.join(sys.argv[1:])}"
    if rivals:
        from importlib.metadata import version

        for package in ("faiss-cpu", "vector-quantize-pytorch"):
            report["versions"][package] = version(package)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rivals", action="store_true", help="also faiss-cpu and vector-quantize-pytorch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=15, help="of each contender and shape (default: 15)")
    parser.add_argument("--shape", action="append", metavar="N,D,K,DTYPE[,skewed]", help="default: the table")
    parser.add_argument("--small-pages", action="store_true", help="leave THP_MEM_ALLOC_ENABLE unset")
    args = parser.parse_args()
    if args.samples < 7:
        parser.error(f"--samples must be at least 7 to say anything, got {args.samples}")
    torch.set_num_threads(args.threads)
    report = header(args.threads, args.rivals)
    busy, own, begun = busy_seconds(), sum(os.times()[:4]), time.perf_counter()
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    for shape in args.shape or SHAPES:
        rows, wrong = measure(shape, args.samples, args.rivals)
        failed += wrong
        table += rows
        for row in rows:
            print(
                f"{shape:>26}  {row['contender']:<36} {row['us_p50']:>10.0f} us "
                f"[{row['us_p20']:.0f}, {row['us_p80']:.0f}]  {row['lct_fast_times_as_fast']:.2f}x",
                flush=True,
            )
    elapsed = time.perf_counter() - begun
    foreign = busy_seconds() - busy - (sum(os.times()[:4]) - own)
    report["foreign_cpu_share"] = round(max(foreign, 0.0) / elapsed / (os.cpu_count() or 1), 4)
    report["quiet"] = report["foreign_cpu_share"] <= 0.05 and all(
        row["undisturbed"] >= 0.8 * row["samples"] for row in table
    )
    report["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report["failed_checks"] = failed
    report["rows"] = table
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    if not report["quiet"]:
        print(f"not quiet: other programs used {report['foreign_cpu_share']:.0%} of the machine")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
