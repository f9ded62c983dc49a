"""What is installed, what an import does, and what the native sources may lean on."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPENMP = re.compile(r"lib(gomp|iomp5|omp)[.-]")


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter prints, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light() -> None:
    """No binary of ours, no Triton, no compiler, none of the heavy packages that some functions use."""
    loaded = set(python("import sys, torch; torch_alone = set(sys.modules); import lct_fast; "
                        "print(*(set(sys.modules) - torch_alone))").split())  # fmt: skip
    assert "lct_fast.ops" in loaded
    heavy = ("lct_fast._C", "lct_fast.kernels", "triton", "torch._inductor", "torch._dynamo", "sklearn")
    heavy += ("PIL", "matplotlib", "tensorboard", "torch.utils.tensorboard")
    found = {name for name in loaded for h in heavy if name == h or name.startswith(f"{h}.")}
    assert not found


def test_import_touches_no_gpu() -> None:
    code = (
        "import torch\n"
        "def touched(*_, **__): raise RuntimeError('the import initialised CUDA')\n"
        "torch.cuda._lazy_init = touched\n"
        "torch.cuda.is_available = touched\n"
        "torch.cuda.device_count = touched\n"
        "import lct_fast\n"
        "print(torch.cuda.is_initialized())"
    )
    assert python(code) == "False\n"


def test_everything_but_the_native_backend_works_without_the_native_module() -> None:
    code = (
        "import sys; sys.modules['lct_fast._C'] = None\n"
        "import torch, lct_fast as lct\n"
        "h, w, t = torch.ones(4, 3), torch.zeros(2, 3), torch.tensor([0, 1, 0, 1])\n"
        "out = lct.ops.critic_head(h, w, None, t, torch.tensor(0.25))\n"
        "print(round(float(out.loss.mean()), 4))\n"
        "print(lct.ops.backends('critic_head')['cpu'])\n"
    )
    loss, reason = python(code).splitlines()
    assert loss == "0.6931"
    assert "lct_fast._C" in reason and "make build" in reason


def test_a_broken_native_module_is_named() -> None:
    """An import error of the loader is shown, not swallowed."""
    code = (
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        return ModuleSpec(name, self) if name == 'lct_fast._C' else None\n"
        "    def create_module(self, spec): raise ImportError('libfoo.so.7: cannot open')\n"
        "    def exec_module(self, module): pass\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from lct_fast import _native\n"
        "print(_native.load(), _native.why_absent())\n"
    )
    assert python(code).startswith(
        "None lct_fast._C does not load here: libfoo.so.7: cannot open; run `make build`"
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps on this system")
@pytest.mark.parametrize("first", ["torch, lct_fast._C", "lct_fast._C, torch"])
def test_one_openmp_runtime_in_the_process(first: str) -> None:
    """torch's and ours are the same, also after both have run in parallel."""
    code = (
        f"import {first}\n"
        "torch.set_num_threads(2)\n"
        "import lct_fast as lct\n"
        "(torch.randn(512, 512) @ torch.randn(512, 512)).exp().sum()\n"
        "h, w, t = torch.randn(999, 64), torch.randn(10, 64), torch.zeros(999, dtype=torch.int64)\n"
        "with lct.use_backend('cpu'): lct.ops.critic_head(h, w, None, t, torch.tensor(1.0))\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if '/' in line}), sep='\\n')"
    )
    mapped = [path for path in python(code).splitlines() if OPENMP.search(Path(path).name)]
    assert len(mapped) == 1, mapped


def test_native_sources_include_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) >= 8
    for path in sources:
        included = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
        bad = [name for name in included if re.match(r"(torch|ATen|c10)\b", name)]
        assert not bad, f"{path}: {bad}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")
@pytest.mark.slow
def test_source_and_wheel_hold_what_they_should(tmp_path: Path) -> None:
    """The sdist is built, and the wheel out of it alone, so nothing the build needs is missing from it."""
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        wanted = name.startswith(("lct_fast/", "kernels/", "csrc/")) or "/" not in name
        if wanted and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    # What is built is tested elsewhere; here it only has to be built fast.
    environment = {**os.environ, "LCT_CUDA": "0", "CXXFLAGS": "-O0"}

    def run(*command: str, cwd: Path) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run("-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    for needed in (
        "csrc/bindings.cpp",
        "csrc/include/lct/types.h",
        "csrc/cpu/simd.h",
        "kernels/critic_head.py",
    ):
        assert (source / needed).is_file(), needed
    run("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), ".", cwd=source)

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    suffixes = {Path(n).suffix for n in names if n.startswith("lct_fast/") and not n.endswith("/")}
    assert suffixes == {".py", ".so", ".typed"}
    assert {"lct_fast/py.typed", "lct_fast/kernels/critic_head.py"} <= names
    assert sum(n.startswith("lct_fast/_C.") for n in names) == 1
    folders = ("tests/", "benchmarks/", "csrc/", "kernels/")
    assert not [n for n in names if n.startswith(folders)]
    ours = {str(p.relative_to(tree)) for p in (tree / "lct_fast").rglob("*.py")}
    assert ours <= names
    # Installed into an empty folder and run from another, it finds its kernels and its native module.
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    where = python(
        "import lct_fast._C, lct_fast.kernels; print(lct_fast._C.__file__, lct_fast.kernels.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert where.count(str(site)) == 2
