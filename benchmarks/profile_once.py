"""One run of an op on a device between the marks that a profiler starts and stops at.

ncu --profile-from-start off python -m benchmarks.profile_once critic_head 65536,128,10,bf16 triton
"""

import sys

import torch

from lct_fast.bench import cases
from lct_fast.bench.case import OURS, Place


def main(name: str, shape: str, backend: str) -> None:
    (bench,) = cases.find([name])
    contenders = bench.case(shape, Place("cuda", (backend,))).contenders
    ours = next(each for each in contenders if each.name == OURS)
    for _ in range(3):
        ours.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    ours.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
