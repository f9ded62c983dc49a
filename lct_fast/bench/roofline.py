"""What this machine reaches, measured in the same run: bytes a second and operations a second."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lct_fast.bench.case import Contender
from lct_fast.bench.sampling import Sampler, percentiles

# Bytes copied, and rows of the square matrices of a product.
SIZES = {"cpu": (1 << 28, 2048), "cuda": (1 << 30, 8192)}
# For a trial of the code.
TRIAL = (1 << 20, 64)
SAMPLES = 10


@dataclass(frozen=True)
class Roofline:
    """Bytes a second, read and written, and operations a second by dtype."""

    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def least_us(self, traffic: float, flops: float, dtype: torch.dtype) -> float:
        """The time that neither memory nor arithmetic allows to undercut."""
        return max(traffic / self.bytes_per_s, flops / self.flops_per_s[dtype]) * 1e6

    def as_json(self) -> dict[str, float]:
        """For a report: copy_bytes_per_s and flops_per_s_<dtype>."""
        rates = {f"flops_per_s_{str(dtype)[6:]}": rate for dtype, rate in self.flops_per_s.items()}
        return {"copy_bytes_per_s": self.bytes_per_s, **rates}


def measure(device: str, sampler: Sampler, trial: bool = False) -> Roofline:
    """A copy, and a matrix product in float32 and bfloat16; in a trial too small to mean anything."""
    copied, size = TRIAL if trial else SIZES[device]
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    jobs = [Contender("copy", lambda: target.copy_(source), lambda out: {})]
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        jobs.append(Contender(str(dtype), lambda a=a: a @ a, lambda out: {}))  # type: ignore[misc]
    rates = []
    for job in jobs:
        job.run()
        taken = sampler.take([job], [job.run], SAMPLES, "roofline")[0]
        rates.append(1e6 / percentiles(taken).p50)
    return Roofline(
        2 * copied * rates[0],
        {torch.float32: 2 * size**3 * rates[1], torch.bfloat16: 2 * size**3 * rates[2]},
    )
