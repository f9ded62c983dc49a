"""Builds a kernel file with its driver for the host: host_cuda.h in place of the CUDA toolkit, sanitizers on."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

_FLAGS = [
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DLCT_WITH_CUDA",
    *(f"-I{folder}" for folder in (HERE, HERE / "include", CSRC, CSRC / "include")),
]
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder: Path, driver: Path, *kernels: Path) -> Path:
    """The program that runs `driver`, with `kernels` compiled as plain C++."""
    cxx = os.environ.get("CXX", "g++")
    # Kernels have many instances and little to do: quick to compile matters more than quick to run.
    units = [(driver, ["-O1", *_SANITIZE]), (HERE / "host_cuda.cpp", ["-O2", "-fsanitize=address"])]
    units = [*((each, ["-O0", *_SANITIZE]) for each in kernels), *units]
    running, objects = [], []
    for source, flags in units:
        objects.append(str(folder / f"{source.stem}-{len(objects)}.o"))
        command = [cxx, *_FLAGS, *flags, "-c", "-x", "c++", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    for (source, _), process, text in zip(units, running, said, strict=True):
        if process.returncode:
            raise AssertionError(f"g++ cannot compile {source.name} for the host:\n{text}")
    program = folder / driver.stem
    subprocess.run([cxx, *_SANITIZE, *objects, "-o", str(program)], check=True)
    return program


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    # The fake stack of detect_stack_use_after_return slows fibers down and sees nothing here.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:abort_on_error=0"}
    command = [str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def check(program: Path, *words: object) -> None:
    done = run(program, *words)
    if done.returncode:
        raise AssertionError(
            f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
