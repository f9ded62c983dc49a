"""Every csrc/cuda/*.cu compiled by nvcc: registers, spills and shared memory within a budget, no fp64, no tf32."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))

# Registers a thread, by file and kernel, that still let as many threads stay on a multiprocessor as the kernel
# was written for: 65536 registers / (256 threads * 2 blocks) = 128; for fold_kernel 2048 threads. Those of vq's
# search: 128 threads and, by the width that stays in registers, 9, 6, 5 and 3 blocks; deep_kernel 3.
REGISTERS = {
    "block_quantize": {"15quantize_kernel": 32, "dequantize_kernel": 32},
    "consensus": {"adjoint_kernel": 32, "update_kernel": 32},
    "critic_head": {"head_kernel": 128, "wgrad_kernel": 128, "fold_kernel": 32},
    "perturb": {"noise_kernel": 40},
    "vq": {"fold_kernel": 48},
    "vq_decode": {"decode_kernel": 32},
    "vq_deep": {"deep_kernel": 168, "half_norm_kernel": 32},
    "vq_search": {
        "search_kernelILi2E": 56,
        "search_kernelILi4E": 80,
        "search_kernelILi8E": 96,
        "search_kernelILi16E": 168,
    },
    "vq_update": {"count_kernel": 32, "move_kernel": 32},
}
# Kernels take shared memory dynamically, where the launcher checks it.
STATIC_SHARED_BYTES = 0


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    spilled: int
    stack: int
    shared: int


def compile_with(source: str, folder: Path, *flags: str) -> tuple[str, Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    output = folder / f"{source}.out"
    command = [nvcc, "-std=c++17", "-O3", "-DLCT_WITH_CUDA", f"-I{CSRC}", f"-I{CSRC / 'include'}", *flags]
    command += ["--Werror", "all-warnings", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"nvcc cannot compile {source}.cu:\n{done.stderr}")
    return done.stderr, output


def usage(said: str) -> list[Usage]:
    """What ptxas -v says, a block of lines for each kernel."""
    found = []
    for block in said.split("Compiling entry function '")[1:]:

        def number(pattern: str, block: str = block, default: int | None = None) -> int:
            match = re.search(pattern, block)
            if match is None and default is None:
                raise AssertionError(f"ptxas does not say {pattern}:\n{block}")
            return int(match[1]) if match else int(default or 0)

        found.append(
            Usage(
                kernel=block.split("'")[0],
                registers=number(r"Used (\d+) registers"),
                spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                stack=number(r"(\d+) bytes stack frame"),
                shared=number(r"(\d+) bytes smem", default=0),
            )
        )
    return found


def test_every_file_has_a_budget() -> None:
    assert sorted(REGISTERS) == SOURCES


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES)
def test_resources(source: str, arch: str, tmp_path: Path) -> None:
    said, _ = compile_with(
        source, tmp_path, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"
    )
    kernels = usage(said)
    for name, most in REGISTERS[source].items():
        mine = [k for k in kernels if name in k.kernel]
        assert mine, f"no {name} in what ptxas says:\n{said}"
        for k in mine:
            assert k.registers <= most, k
            assert k.spilled == 0 and k.stack == 0, k
            assert k.shared == STATIC_SHARED_BYTES, k
    assert all(any(name in k.kernel for name in REGISTERS[source]) for k in kernels)


@pytest.fixture(scope="module", params=SOURCES)
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a file and its code for compute capability 8.0, the one that newer devices translate."""
    _, output = compile_with(request.param, tmp_path_factory.mktemp("ptx"), "-ptx", "-arch=compute_80")
    return request.param, output.read_text()


def test_instructions(ptx: tuple[str, str]) -> None:
    source, code = ptx
    assert ".entry" in code
    assert not re.search(r"\.f64|\.tf32", code)
    # Float atomics would make sums depend on the order of arrival; a maximum of whole numbers does not.
    atomics = re.findall(r"\b(?:atom|red)\.[\w.:]+", code)
    assert all(re.search(r"\.shared\.(max|min)\.u32$", each) for each in atomics), atomics
    assert not atomics or source in ("vq_search", "vq_deep")
    # What -use_fast_math would leave: division and roots that are not rounded, denormals flushed.
    assert not re.search(r"\bdiv\.(approx|full)|sqrt\.approx|\.(add|mul|fma)(\.\w+)*\.ftz", code)


def test_critic_head_moves_quads(ptx: tuple[str, str]) -> None:
    source, code = ptx
    if source != "critic_head":
        return
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", code, re.DOTALL | re.MULTILINE))
    for dtype, read, written in (
        ("f", r"v4\.f32", r"v4\.f32"),
        ("6__half", r"v4\.u16", r"v2\.u32"),
        ("13__nv_bfloat16", r"v4\.u16", r"v2\.u32"),
    ):
        # Lb1: a template argument that is true; the first after the type is kAligned, the second kResident.
        head = [body for name, body in bodies.items() if f"head_kernelI{dtype}Lb1" in name]
        wgrad = [body for name, body in bodies.items() if f"wgrad_kernelI{dtype}Lb1" in name]
        assert len(head) == 2 and len(wgrad) == 1
        assert all(re.search(rf"ld\.global(\.nc)?\.{read}", body) for body in head + wgrad)
        assert all(re.search(rf"st\.global(\.wb)?\.{written}", body) for body in head)
        # Where weights stay in shared memory, the compiler knows each address to be shared or global.
        resident = [body for name, body in bodies.items() if re.search(rf"head_kernelI{dtype}Lb.ELb1E", name)]
        assert len(resident) == 2
        assert not any(re.search(r"\b(ld|st)\.(v\d\.)?[fub]\d+", body) for body in resident + wgrad)


def test_block_quantize_moves_16_bytes(ptx: tuple[str, str]) -> None:
    source, code = ptx
    if source != "block_quantize":
        return
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", code, re.DOTALL | re.MULTILINE))
    for dtype in ("f", "6__half", "13__nv_bfloat16"):
        # Lb1: kAligned. The name's length tells quantize_kernel from the end of the other's.
        (there,) = [body for name, body in bodies.items() if f"15quantize_kernelI{dtype}Lb1" in name]
        (back,) = [body for name, body in bodies.items() if f"17dequantize_kernelI{dtype}Lb1" in name]
        assert re.search(r"ld\.global(\.nc)?\.v(4\.[fub]32|8\.[ub]16|2\.[ub]64)", there), dtype
        assert re.search(r"st\.global(\.wb)?\.v4\.[ub]32", back), dtype
        # A fused product and sum would round once instead of twice. Divisions are rounded: see above.
        for body in (there, back):
            assert not re.search(r"\bfma\.", body)


def test_perturb_never_fuses_and_moves_vectors(ptx: tuple[str, str]) -> None:
    source, code = ptx
    if source != "perturb":
        return
    # A fused product and sum would round once instead of twice. Quotients and roots are rounded: see above.
    assert not re.search(r"\bfma\.", code)
    assert re.search(r"\bdiv\.rn\.f32", code) and re.search(r"\bsqrt\.rn\.f32", code)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", code, re.DOTALL | re.MULTILINE))
    for dtype, written in (
        ("f", r"v4\.[fub]32"),
        ("6__half", r"(v4\.[ub]16|v2\.[ub]32)"),
        ("13__nv_bfloat16", r"(v4\.[ub]16|v2\.[ub]32)"),
    ):
        # Lb1: kAligned.
        whole = [body for name, body in bodies.items() if f"noise_kernelI{dtype}Lb1" in name]
        assert len(whole) == 2
        assert all(re.search(rf"st\.global(\.wb)?\.{written}", body) for body in whole), dtype


def test_vq_moves_vectors(ptx: tuple[str, str]) -> None:
    source, code = ptx
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", code, re.DOTALL | re.MULTILINE))
    halves = r"ld\.global(\.nc)?\.v(4\.[fub]32|8\.[ub]16|2\.[ub]64)"
    if source == "vq_search":
        for width in (4, 8, 16):
            # Lb1: kExact.
            (body,) = [body for name, body in bodies.items() if f"search_kernelILi{width}ELb1E" in name]
            # Four rows of x and their words, and a word for shared memory.
            assert len(re.findall(r"ld\.global(\.nc)?\.v4\.f32", body)) >= 9 * width // 4
            assert len(re.findall(r"ld\.shared\.v4\.f32", body)) >= width + 1
            assert len(re.findall(r"fma\.rn\.f32", body)) >= 4 * 4 * width
            assert width == 4 or len(re.findall(halves, body)) >= width // 2
            # An index for each score, chosen without a branch.
            assert len(re.findall(r"selp\.", body)) >= 16
    if source == "vq_deep":
        (body,) = [body for name, body in bodies.items() if "deep_kernelILb1E" in name]
        assert re.search(halves, body) and re.search(r"ld\.global(\.nc)?\.v4\.f32", body)
        assert len(re.findall(r"ld\.shared\.v4\.f32", body)) >= 4
    if source == "vq_decode":
        for dtype in ("f", "6__half", "13__nv_bfloat16"):
            (body,) = [body for name, body in bodies.items() if f"decode_kernelI{dtype}Lb1" in name]
            assert re.search(r"st\.global(\.wb)?\.v4\.[ub]32", body), dtype
            assert re.search(r"ld\.global(\.nc)?\.v4\.[fu]32", body), dtype
