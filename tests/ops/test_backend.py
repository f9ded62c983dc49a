"""Choice of backend: the registry, use_backend, LCT_BACKEND, and what the errors say."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lct_fast import _native, ops
from lct_fast.ops import available, backend
from lct_fast.ops.backend import Backend, BackendError, Op
from lct_fast.ops.critic_head import _HEAD
from lct_fast.ops.vq import _ENCODE
from tests.ops.critic_head_case import make

ROOT = Path(__file__).parents[2]


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    """An op with three backends: `fast` cannot run yet, `quick` takes ints only, `reference` does all."""
    monkeypatch.setattr(backend, "_OPS", {})
    monkeypatch.setattr(backend, "NAMES", ("reference", "fast", "quick"))
    yield Op(
        "double",
        {
            "reference": Backend(lambda: "reference", lambda device: ""),
            "fast": Backend(lambda: "fast", lambda device: "no engine; buy one"),
            "quick": Backend(lambda: "quick", lambda device: "", frozenset([int])),
        },
        {"cpu": ("fast", "quick", "reference")},
    )


def test_the_first_preferred_backend_that_can_run_is_used(op: Op) -> None:
    assert op.resolve("cpu", int)() == "quick"
    assert op.resolve("cpu", float)() == "reference"
    assert op.resolve("a device nobody thought of", int)() == "reference"


def test_a_size_beyond_a_backend_goes_to_the_next(op: Op) -> None:
    small = Backend(lambda: "small", lambda device: "", None, largest=8)
    op = Op("sized", {**op.backends, "small": small}, {"cpu": ("small", "quick")})
    assert [op.resolve("cpu", int, size)() for size in (8, 9)] == ["small", "quick"]


def test_a_depth_chooses_among_backends(op: Op) -> None:
    deep = Backend(lambda: "deep", lambda device: "", depths=range(16, 257), best=range(32, 257))
    any_depth = Backend(lambda: "any", lambda device: "")
    op = Op("deep", {**op.backends, "deep": deep, "any": any_depth}, {"cpu": ("deep", "any")})
    found = [op.resolve("cpu", int, 0, depth)() for depth in (15, 16, 31, 32, 256, 257)]
    assert found == ["any", "any", "any", "deep", "deep", "any"]
    # Outside its best depths it is still ahead of the reference, and can be asked for by name.
    op = Op("deep", {**op.backends, "deep": deep}, {"cpu": ("deep",)})
    assert [op.resolve("cpu", int, 0, depth)() for depth in (15, 16)] == ["reference", "deep"]


def test_a_depth_beyond_a_backend_is_an_error_that_says_why(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "NAMES", ("deep",))
    deep = Backend(lambda: "deep", lambda device: "", depths=range(16, 257), best=range(32, 257))
    op = Op("deep", {**op.backends, "deep": deep}, {})
    with ops.use_backend("deep"):
        assert op.resolve("cpu", int, 0, 16)() == "deep"
        with pytest.raises(BackendError, match="it takes a depth of 16 to 256 and got 257; use another"):
            op.resolve("cpu", int, 0, 257)


def test_vectors_of_32_columns_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from lct_fast.kernels import vq as kernels

    triton = _ENCODE.backends["triton"]
    assert triton.largest == kernels.MAX_CODEWORDS
    assert triton.depths == range(kernels.MIN_DEPTH, kernels.MAX_DEPTH + 1)
    monkeypatch.setattr(available, "_no_device", lambda: "")
    _ENCODE.forget()
    try:
        assert _ENCODE.resolve("cuda", torch.bfloat16, 256, 32) is triton.run
        assert _ENCODE.resolve("cuda", torch.bfloat16, 4097, 32) is not triton.run
        assert _ENCODE.resolve("cuda", torch.bfloat16, 256, 8) is not triton.run
    finally:
        _ENCODE.forget()
    with ops.use_backend("triton"), pytest.raises(BackendError, match="depth of 16 to 256 and got 8"):
        ops.vq_encode(torch.zeros(3, 8), torch.zeros(1, 4, 8))


def test_triton_takes_as_many_classes_as_its_kernels() -> None:
    from lct_fast.kernels import critic_head as kernels

    assert _HEAD.backends["triton"].largest == kernels.MAX_CLASSES
    with ops.use_backend("triton"), pytest.raises(BackendError, match="up to 1024 and got 1025"):
        make(2, 3, 1025).run()


def test_backends_lists_what_can_run_and_why_not_the_rest(op: Op) -> None:
    assert ops.backends("double") == {
        "reference": "available",
        "fast": "no engine; buy one",
        "quick": "available",
    }
    with pytest.raises(ValueError, match="no op named 'triple'; there are double"):
        ops.backends("triple")


def test_a_choice_nests_and_ends_with_its_context(op: Op) -> None:
    with ops.use_backend("reference"):
        assert op.resolve("cpu", int)() == "reference"
        with ops.use_backend("quick"):
            assert op.resolve("cpu", int)() == "quick"
        assert op.resolve("cpu", int)() == "reference"
        with pytest.raises(KeyError), ops.use_backend("quick"):
            raise KeyError
        assert op.resolve("cpu", int)() == "reference"
    assert op.resolve("cpu", int)() == "quick"


def test_a_choice_holds_in_every_thread(op: Op) -> None:
    seen: list[str] = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(op.resolve("cpu", int)()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_a_choice_that_cannot_run_is_an_error_that_says_why(op: Op) -> None:
    with (
        ops.use_backend("fast"),
        pytest.raises(BackendError, match="^double cannot run on backend 'fast': no engine; buy one$"),
    ):
        op.resolve("cpu", int)
    with (
        ops.use_backend("quick"),
        pytest.raises(BackendError, match="takes <class 'int'> and got <class 'float'>"),
    ):
        op.resolve("cpu", float)
    with (
        pytest.raises(ValueError, match="one of reference, fast, quick, got 'slow'"),
        ops.use_backend("slow"),
    ):
        pass


def test_an_op_without_the_chosen_backend_names_those_it_has(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "NAMES", ("reference", "fast", "quick", "other"))
    with ops.use_backend("other"), pytest.raises(BackendError, match="which has reference, fast, quick"):
        op.resolve("cpu", int)


@contextmanager
def _fresh() -> Iterator[None]:
    """Nothing resolved earlier counts inside, and nothing resolved inside counts later."""
    _HEAD.forget()
    try:
        yield
    finally:
        _HEAD.forget()


@pytest.mark.parametrize("name", ["critic_head", "critic_head_wgrad"])
def test_every_op_has_every_backend_here(name: str) -> None:
    found = ops.backends(name)
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] == found["cpu"] == found["triton"] == "available"


def test_cpu_tensors_use_the_native_module_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    native = _HEAD.backends["cpu"].run
    reference = _HEAD.backends["reference"].run
    with _fresh():
        assert _HEAD.resolve("cpu", torch.float32) is native
        assert _HEAD.resolve("cpu", torch.float64) is reference
    monkeypatch.setattr(_native, "why_absent", lambda: "not built; run `make build`")
    with _fresh():
        assert _HEAD.resolve("cpu", torch.float32) is reference
        with ops.use_backend("cpu"), pytest.raises(BackendError, match="'cpu': not built; run `make build`"):
            make(3, 2, 2).run()


def test_cuda_tensors_use_triton_then_cuda_then_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_no_device", lambda: "")
    monkeypatch.setattr(_native, "load", lambda: SimpleNamespace(build_info=lambda: {"cuda": True}))
    with _fresh():
        assert _HEAD.resolve("cuda", torch.float32) is _HEAD.backends["triton"].run
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    with _fresh():
        assert _HEAD.resolve("cuda", torch.float32) is _HEAD.backends["cuda"].run
    monkeypatch.setattr(_native, "load", lambda: SimpleNamespace(build_info=lambda: {"cuda": False}))
    with _fresh():
        assert _HEAD.resolve("cuda", torch.float32) is _HEAD.backends["reference"].run


def test_reasons_say_what_would_make_a_backend_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_native, "load", lambda: SimpleNamespace(build_info=lambda: {"cuda": False}))
    assert "nvcc on the PATH and run `make build`" in available.cuda(None)
    monkeypatch.setattr(_native, "load", lambda: SimpleNamespace(build_info=lambda: {"cuda": True}))
    assert available.cuda("cuda").startswith("no CUDA device")
    assert "move them with .cuda()" in available.cuda("cpu")
    assert "move them with .cpu()" in available.cpu("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "set TRITON_INTERPRET=1 before" in available.triton("cpu")
    assert available.triton(None).startswith("no CUDA device")
    monkeypatch.setattr(available, "find_spec", lambda name: None if name == "triton" else object())
    assert "pip install triton" in available.triton(None)
    monkeypatch.setattr(available, "find_spec", lambda name: None if "kernels" in name else object())
    assert "run `make build`" in available.triton(None)


def test_float64_on_a_kernel_is_an_error() -> None:
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="got torch.float64.*backend 'reference'"):
        make(3, 2, 2, torch.float64).run()


def test_cpu_tensors_on_cuda_are_not_moved_silently() -> None:
    with (
        ops.use_backend("cuda"),
        pytest.raises(BackendError, match=r"these are on 'cpu'; move them with .cuda\(\)"),
    ):
        make(3, 2, 2).run()


RUN = """
import torch
from lct_fast import ops
one = torch.ones
try:
    ops.critic_head(one(2, 3), one(4, 3), None, one(2).long(), torch.tensor(1.0))
    print("ran")
except ops.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "ran"),
        ("reference", "ran"),
        ("cuda", "critic_head cannot run on backend 'cuda': it takes CUDA tensors and these are on 'cpu'"),
        ("fastest", "'fastest': no such backend for this op, which has reference, cpu, triton, cuda"),
    ],
)
def test_the_variable_lct_backend(value: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, "LCT_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert says in done.stdout, done.stderr
