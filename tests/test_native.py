"""The native module and its kernels without Python: under the sanitizers, and bit by bit across builds."""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lct_fast import _native

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
DRIVERS = sorted(path.stem for path in (ROOT / "tests" / "native").glob("*.cpp"))

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")


def levels() -> dict[str, list[str]]:
    """The instruction sets that setup.py builds here, with its flags."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"scalar": []}
    text = (ROOT / "setup.py").read_text()
    table = re.search(r"^X86_LEVELS = \{.*?^X86_VNNI = [^\n]*", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    scope: dict[str, Any] = {}
    exec(table.group(), scope)
    found: dict[str, list[str]] = {**scope["X86_LEVELS"], "avx512vnni": scope["X86_VNNI"]}
    return found


def variants(source: Path) -> dict[str, list[str]]:
    """For which instruction sets setup.py compiles a file apart, with which flags; none where it does not."""
    vnni = {name: flags for name, flags in levels().items() if name == "avx512vnni"}
    if source.stem.endswith("_vnni"):
        return vnni
    return {name: f for name, f in levels().items() if name not in vnni and source.stem.endswith("_simd")}


def build(folder: Path, flags: list[str], driver: str) -> Path:
    """tests/native/<driver>.cpp with the CPU kernels, but for those that another driver is for, as one program."""
    common = ["-std=c++17", "-g1", "-w", f"-I{CSRC}", f"-I{CSRC / 'include'}", *flags]
    if len(levels()) > 1:
        common.append("-DLCT_X86")
    jobs = [(ROOT / "tests" / "native" / f"{driver}.cpp", "main", [])]
    others = tuple(name for name in DRIVERS if name != driver)
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem.startswith(others):
            continue
        if source.stem.endswith(("_simd", "_vnni")):
            jobs += [
                (source, f"{source.stem}.{n}", [*f, f"-DLCT_SIMD_LEVEL={n}"])
                for n, f in variants(source).items()
            ]
        else:
            jobs.append((source, source.stem, []))
    running = [
        subprocess.Popen(["g++", *common, *extra, "-c", str(source), "-o", str(folder / f"{name}.o")])
        for source, name, extra in jobs
    ]
    assert all(process.wait() == 0 for process in running)
    program = folder / driver
    objects = [str(folder / f"{name}.o") for _, name, _ in jobs]
    subprocess.run(["g++", *flags, *objects, "-o", str(program), "-pthread", "-ldl"], check=True)
    return program


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "flags",
    [["-O1", "-fsanitize=address"], ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"]],
    ids=["address", "undefined"],
)
def test_kernels_under_a_sanitizer(tmp_path: Path, flags: list[str], driver: str) -> None:
    """Odd shapes, bad input, guard pages, every instruction set, against plain loops."""
    done = subprocess.run([str(build(tmp_path, flags, driver))], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert re.fullmatch(r"ok \d{3,}\n", done.stdout), done.stdout


@needs_compiler
def test_no_inline_function_of_one_instruction_set_serves_another(tmp_path: Path) -> None:
    """A weak function in an AVX-512 object may be the copy that the linker keeps for every CPU."""
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for name, flags in variants(source).items():
            out = tmp_path / f"{source.stem}.{name}.o"
            subprocess.run(
                ["g++", "-std=c++17", "-O0", "-w", f"-I{CSRC}", f"-I{CSRC / 'include'}", *flags]
                + (["-DLCT_X86"] if len(levels()) > 1 else [])
                + [f"-DLCT_SIMD_LEVEL={name}", "-c", str(source), "-o", str(out)],
                check=True,
            )
            symbols = subprocess.run(["nm", str(out)], capture_output=True, text=True, check=True).stdout
            weak = [line for line in symbols.splitlines() if re.search(r" [Ww] ", line)]
            assert not weak, weak


def native() -> Any:
    module = _native.load()
    assert module is not None, _native.why_absent()
    return module


def test_simd_levels_end_with_the_best() -> None:
    module = native()
    assert module.simd_levels()[0] == "scalar"
    assert set(module.simd_levels()) <= {"scalar", "avx2", "avx512", "avx512vnni"}
    with pytest.raises(ValueError, match=r"this CPU runs scalar.*got 'mmx'"):
        module.set_simd("mmx")


def test_build_info_says_what_was_built() -> None:
    module = native()
    info = module.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_arch", "flags"}
    assert "-O3" in info["flags"] and "fast-math" not in info["flags"] and "-march" not in info["flags"]
    assert info["cuda"] == bool(info["cuda_arch"]) == hasattr(module, "critic_head_cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows >= 0.*got -1"),
        ({"depth": 0}, "depth >= 1"),
        ({"classes": 0}, "classes >= 1"),
        ({"h_dtype": 3}, "h_dtype must be 0"),
        ({"weight_dtype": -1}, "weight_dtype must be 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_numbers_that_fit_no_tensor_are_refused(change: dict[str, int], message: str) -> None:
    sizes = {"rows": 1, "depth": 1, "classes": 1, "h_dtype": 0, "weight_dtype": 0, "threads": 1}
    sizes |= change
    with pytest.raises(ValueError, match=message):
        native().critic_head_wgrad_cpu_workspace(**sizes)


def test_workspace_is_bounded_in_rows() -> None:
    """It stops growing with N, whatever the way weight gradients are summed."""
    size = native().critic_head_cpu_workspace
    for depth, classes in ((128, 10), (512, 100), (2048, 1000), (64, 5000)):
        packed = 4 * (classes + 16) * (depth + 64)
        block = 4 * 72 * (depth + classes + 80)
        for rows in (10**6, 10**9):
            bytes_ = size(rows, depth, classes, 0, 0, True, 2)
            assert bytes_ <= 3 * packed + 2 * block + 17 * 2**20, (depth, classes, rows)


def test_sizes_beyond_32_bits_are_counted_in_64() -> None:
    size = native().critic_head_cpu_workspace
    assert size(1, 2**17, 2**16, 0, 0, False, 1) > 2 * 4 * 2**33


def test_the_gil_is_released() -> None:
    """Another thread of Python advances while a kernel runs."""
    import threading
    import time

    rows, depth, classes = 4096, 512, 100
    floats = ctypes.c_float * (rows * depth)
    h, dh, weight = floats(), floats(), (ctypes.c_float * (classes * depth))()
    target, loss = (ctypes.c_int64 * rows)(), (ctypes.c_float * rows)()
    dlogits, scale = (ctypes.c_float * (rows * classes))(), ctypes.c_float(1.0)
    module = native()
    workspace = (ctypes.c_char * module.critic_head_cpu_workspace(rows, depth, classes, 0, 0, False, 1))()
    a = ctypes.addressof
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    other = threading.Thread(target=tick)
    other.start()
    spans = []
    for _ in range(5):
        start = time.perf_counter()
        module.critic_head_cpu(
            a(h), a(weight), 0, a(target), a(scale), 0, a(loss), a(dlogits), a(dh), 0, 0, a(workspace),
            rows, depth, classes, 0, 0, 0, -100, 1,
        )  # fmt: skip
        spans.append((start, time.perf_counter()))
    done.set()
    other.join()
    inside = sum(start < t < end for t in ticks for start, end in spans)
    assert inside > 20
