"""Whether a backend can run here: "" if so, else the reason and what would change it."""

import os
from importlib.util import find_spec

import torch

from lct_fast import _native

_KERNELS = "lct_fast.kernels"


def always(device: str | None) -> str:
    """For `reference`: any device torch has."""
    return ""


def cpu(device: str | None) -> str:
    """For `cpu`: the native module, and tensors in host memory."""
    if device not in (None, "cpu"):
        return f"it takes CPU tensors and these are on '{device}'; move them with .cpu()"
    return _native.why_absent()


def cuda(device: str | None) -> str:
    """For `cuda`: the native module built with CUDA, and a device."""
    if device not in (None, "cuda"):
        return f"it takes CUDA tensors and these are on '{device}'; move them with .cuda()"
    native = _native.load()
    if native is None:
        return _native.why_absent()
    if not native.build_info()["cuda"]:
        return "lct_fast._C was built without CUDA; put nvcc on the PATH and run `make build`"
    return _no_device()


def triton(device: str | None) -> str:
    """For `triton`: the package and a CUDA device, or its interpreter for CPU tensors."""
    if find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton`"
    if find_spec(_KERNELS) is None:
        return f"{_KERNELS} is not installed; run `make build` (an editable install) or install the wheel"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and device in (None, "cpu"):
        return ""
    if device == "cpu":
        return "it takes CUDA tensors; set TRITON_INTERPRET=1 before Python starts to interpret it on the CPU"
    missing = _no_device()
    if missing and device is None:
        return f"{missing}, or set TRITON_INTERPRET=1 before Python starts to interpret it on the CPU"
    return missing


def _no_device() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            "no CUDA device: this torch is a CPU build; install a CUDA build of torch on a machine with one"
        )
    return "no CUDA device: run on a machine with one, with CUDA_VISIBLE_DEVICES not hiding it"
