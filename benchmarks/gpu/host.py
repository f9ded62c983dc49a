"""What the sections of `benchmarks.gpu` know of the machine: its tools, the environment of commands, the sources."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.gpu.sections import Context

ROOT = Path(__file__).resolve().parents[2]
CUDA_BIN = Path("/usr/local/cuda/bin")
# What a result depends on; folders of ROOT.
SOURCES = ("lct_fast", "kernels", "csrc", "benchmarks", "tests")
SUFFIXES = (".py", ".cpp", ".cu", ".h")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, beside nvcc, or where CUDA is installed; else None."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    found = shutil.which(name)
    for folder in (*folders, CUDA_BIN):
        found = found or shutil.which(name, path=str(folder))
    return found


def environ(context: Context, **extra: str) -> dict[str, str]:
    """For a command of a section: the caller's, less what chooses a backend; a fake device sees no real one."""
    chosen = ("LCT_BACKEND", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in chosen}
    # A command's tracebacks and last words must be in its log when it is cut.
    env["PYTHONUNBUFFERED"] = "1"
    env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), str(CUDA_BIN)])
    if context.fake:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return {**env, **extra}


def say(*command: str) -> str | None:
    """The last line that a command prints, None where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return last_line(done.stdout) if done.returncode == 0 else None


def last_line(text: str) -> str:
    """The last line with anything in it."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def sources(root: Path = ROOT) -> str:
    """A digest of the sources, which says what ran where there is no git: the first 16 digits of a SHA-256."""
    digest = hashlib.sha256()
    files = [path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
