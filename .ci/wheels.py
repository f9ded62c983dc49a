"""Builds wheels, and runs the tests of the package as installed from one.

    python .ci/wheels.py build [--out dist]
    python .ci/wheels.py test WHEEL... [--torch 2.12.1 --torch 2.13.0]

`build` makes OUT/cpu and, where nvcc is on the PATH, OUT/cuda, each with one wheel for this Python. The module in it
includes no torch header, so one wheel serves every supported torch. The CUDA wheel's version ends in +cuNNN.

`test` makes a virtual environment for each wheel and torch, with nothing else of ours, copies the tests into an empty
folder, and runs there those that need neither the sources nor a compiler, and then the command line on the digits.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tests of what is installed. Those that read sources, pages or result files, or compile, are for a checkout.
PACKAGE = ("bench", "cli", "codecs", "critics", "data", "engine", "kernels", "methods", "models", "ops")
PACKAGE += ("planner", "reference", "report")
# Fault drills, memory readings of whole programs, ahead-of-time compilation.
CHECKOUT = ("test_command.py", "test_fuzz.py", "test_faults.py", "_memory.py", "aot")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command; its failure ends everything."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    if subprocess.run(words, cwd=cwd, env={**os.environ, **environment}).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def build(out: Path) -> None:
    """A wheel of each kind that can be built here."""
    kinds = {"cpu": ("0", "")}
    nvcc = shutil.which("nvcc")
    if nvcc:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", said)
        if release is None:
            raise SystemExit(f"{nvcc} --version does not say which release it is:\n{said}")
        kinds["cuda"] = ("1", f"+cu{release[1]}{release[2]}")
    for kind, (cuda, local) in kinds.items():
        shutil.rmtree(out / kind, ignore_errors=True)
        # What setuptools copied for the wheel before would travel again.
        for stale in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
            shutil.rmtree(stale)
        settings = [f"-C--build-option=egg_info --tag-build={local}"] if local else []
        run(
            *(
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--no-isolation",
                "--outdir",
                out / kind,
                *settings,
                ROOT,
            ),
            LCT_CUDA=cuda,
        )
    for wheel in sorted(out.glob("*/*.whl")):
        print(f"{wheel}  {wheel.stat().st_size / 2**20:.1f} MiB")


def test(wheel: Path, torch: str, part: str, folder: Path) -> None:
    """The package of ``wheel`` beside ``torch``, in a fresh environment and an empty folder."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        f"torch=={torch}",
        wheel,
        "pytest",
        "pytest-timeout",
    )
    work = folder / "empty"
    work.mkdir()
    # Some tests run the benchmarks' programs.
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    # pytest's settings.
    shutil.copy(ROOT / "pyproject.toml", work)
    run(python, "-c", "import lct_fast, torch; print(lct_fast.__file__, torch.__version__)", cwd=work)
    run(folder / "env/bin/lct-fast", "info", cwd=work)
    chosen = [f"tests/{name}" for name in PACKAGE if (work / "tests" / name).exists()]
    out = [f"--ignore-glob=*{name}*" for name in CHECKOUT]
    run(
        python,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        f"--shard={part}",
        *out,
        *chosen,
        cwd=work,
        OMP_NUM_THREADS="1",
    )
    train = ("train", "--data", "digits", "--groups", "4", "--epochs", "2", "--out", "run")
    run(folder / "env/bin/lct-fast", *train, cwd=work)
    run(folder / "env/bin/lct-fast", "eval", "run", cwd=work)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("build", help="make the wheels")
    one.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels (dist)")
    two = verbs.add_parser("test", help="test the package that a wheel installs")
    two.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    two.add_argument("--torch", action="append", help="a torch version; again for more (2.12.1 and 2.13.0)")
    two.add_argument("--part", default="0/1", metavar="I/N", help="every N-th test, from the I-th (all)")
    two.add_argument("--keep", type=Path, help="folder for the environments, which then stay")
    args = parser.parse_args()
    if args.verb == "build":
        build(args.out.resolve())
        return 0
    for wheel in args.wheels:
        if not wheel.is_file():
            parser.error(f"{wheel}: expected a wheel file; `build` makes them")
        for torch in args.torch or ("2.12.1", "2.13.0"):
            if args.keep:
                folder = args.keep.resolve() / f"{wheel.stem}-torch{torch}"
                folder.mkdir(parents=True)
                test(wheel.resolve(), torch, args.part, folder)
            else:
                with tempfile.TemporaryDirectory() as made:
                    test(wheel.resolve(), torch, args.part, Path(made))
            print(f"passed: {wheel.name} with torch {torch}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
