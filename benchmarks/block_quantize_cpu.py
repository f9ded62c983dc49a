"""block_quantize and block_dequantize on the CPU against the same formula in torch, eager and compiled.

    python -m benchmarks.block_quantize_cpu --out FILE [--threads 2] [--samples 15] [--case SIZE,KIND,DTYPE ...]

Contenders take turns over the same tensors, caches flushed before each. Ours have to give the reference's bits first;
the compiler fuses products with sums and codes with a scale that it has not rounded yet, so what it encodes may have
twice the largest error. One that fails gets no time and makes the exit status 1. A sample during which the system
took a core away is measured again; where that does not help, `quiet` is false and the numbers mean little.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.critic_head_cpu import busy_seconds, header, sample
from benchmarks.measure import percentiles
from lct_fast import ops
from lct_fast.reference import block_quantize as reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CASES = (
    "16777216,int8,f32",
    "16777216,int4,f32",
    "16777216,int2,f32",
    "16777216,fp8,f32",
    "16777216,int4,bf16",
    "262144,int4,f32",
)
BLOCK = 64

Encoded = tuple[Tensor, Tensor]
Run = Callable[[], Any]


def encode(x: Tensor, kind: str) -> Encoded:
    return reference.block_quantize(x, kind, BLOCK)


def decode(payload: Tensor, scales: Tensor, size: int, kind: str, dtype: torch.dtype) -> Tensor:
    return reference.block_dequantize(payload, scales, size, kind, BLOCK, dtype)


def ours_encode(x: Tensor, kind: str) -> Encoded:
    with ops.use_backend("cpu"):
        return ops.block_quantize(x, kind, BLOCK)


def ours_decode(payload: Tensor, scales: Tensor, size: int, kind: str, dtype: torch.dtype) -> Tensor:
    with ops.use_backend("cpu"):
        return ops.block_dequantize(payload, scales, size, kind, BLOCK, dtype)


def check_codes(x: Tensor, kind: str, got: Encoded, exact: bool) -> None:
    """The reference's bits; of a rival codes about as near to x."""
    payload, scales = encode(x, kind)
    same = torch.equal(got[0], payload) and torch.equal(got[1].view(torch.int16), scales.view(torch.int16))
    if same:
        return
    if exact:
        raise AssertionError("its bits are not the reference's")
    error, wanted = (
        float((decode(*codes, x.numel(), kind, torch.float32).double() - x.double()).abs().max())
        for codes in (got, (payload, scales))
    )
    if not error <= 2 * wanted:
        raise AssertionError(f"its largest error is {error}, more than twice the reference's {wanted}")


def check_values(got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise AssertionError("its values are not the reference's")


def measure(case: str, samples: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each contender and direction of one case, and what failed its check."""
    words = case.split(",")
    size, kind, dtype = int(words[0]), words[1], DTYPES[words[2]]
    # Half zeros, as after ReLU.
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).relu_().to(dtype)
    codes = encode(x, kind)
    values = decode(*codes, size, kind, dtype)
    fast_encode = torch.compile(encode, dynamic=False)
    fast_decode = torch.compile(decode, dynamic=False)
    running: dict[tuple[str, str], Run] = {
        ("encode", "lct_fast"): lambda: ours_encode(x, kind),
        ("encode", "torch.compile"): lambda: fast_encode(x, kind),
        ("encode", "torch eager"): lambda: encode(x, kind),
        ("decode", "lct_fast"): lambda: ours_decode(*codes, size, kind, dtype),
        ("decode", "torch.compile"): lambda: fast_decode(*codes, size, kind, dtype),
        ("decode", "torch eager"): lambda: decode(*codes, size, kind, dtype),
    }
    failed = []
    for (direction, contender), run in list(running.items()):
        try:
            out = run()
            if direction == "encode":
                check_codes(x, kind, out, contender == "lct_fast")
            else:
                check_values(out, values)
        except AssertionError as error:
            failed.append(f"{case} {direction} {contender}: {error}")
            del running[direction, contender]
    flush = torch.empty(1 << 26, dtype=torch.int8)
    taken: dict[tuple[str, str], list[tuple[float, bool]]] = {name: [] for name in running}
    names = list(running)
    for turn in tqdm(range(samples), desc=case, leave=False, disable=None):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            taken[name].append(sample(running[name], flush))
    traffic = x.nbytes + codes[0].nbytes + codes[1].nbytes
    table: list[dict[str, Any]] = []
    for (direction, contender), times in taken.items():
        p = percentiles([us for us, _ in times])
        table.append(
            {
                "size": size,
                "kind": kind,
                "dtype": words[2],
                "block": BLOCK,
                "direction": direction,
                "contender": contender,
                "us_p20": p.p20,
                "us_p50": p.p50,
                "us_p80": p.p80,
                "gigabytes_per_s": traffic / p.p50 / 1e3,
                "samples": p.samples,
                "undisturbed": sum(clean for _, clean in times),
            }
        )
    for row in table:
        rivals = [
            other["us_p50"]
            for other in table
            if other["direction"] == row["direction"] and other["contender"] != "lct_fast"
        ]
        row["times_as_fast_as_best_rival"] = min(rivals, default=float("nan")) / row["us_p50"]
    return table, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=15, help="of each contender and case (default: 15)")
    parser.add_argument(
        "--case", action="append", metavar="SIZE,KIND,DTYPE", help="default: all of the table"
    )
    args = parser.parse_args()
    if args.samples < 7:
        parser.error(f"--samples must be at least 7 to say anything, got {args.samples}")
    torch.set_num_threads(args.threads)
    report = header(args.threads)
    report |= {
        "benchmark": "block_quantize_cpu",
        "what": "codes and scales of a tensor, and back, microseconds",
        "command": f"python -m benchmarks.block_quantize_cpu {' '.join(sys.argv[1:])}",
    }
    busy, own, begun = busy_seconds(), time.process_time(), time.perf_counter()
    table: list[dict[str, Any]] = []
    failed: list[str] = []
    for case in args.case or CASES:
        rows, wrong = measure(case, args.samples)
        failed += wrong
        for row in rows:
            table.append(row)
            print(
                f"{case:>20}  {row['direction']} {row['contender']:<14} {row['us_p50']:>10.0f} us "
                f"[{row['us_p20']:.0f}, {row['us_p80']:.0f}]  {row['times_as_fast_as_best_rival']:.2f}x",
                flush=True,
            )
        torch.compiler.reset()
    elapsed = time.perf_counter() - begun
    foreign = busy_seconds() - busy - (time.process_time() - own)
    report["foreign_cpu_share"] = round(max(foreign, 0.0) / elapsed / report["cores"], 4)
    report["quiet"] = report["foreign_cpu_share"] <= 0.05 and all(
        row["undisturbed"] >= 0.8 * row["samples"] for row in table
    )
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
