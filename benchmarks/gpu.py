"""Everything that needs a CUDA device, in one command: build, correctness, sanitizer, benchmarks.

    python -m benchmarks.gpu --out DIR [--sections environment,build,...] [--budget SECONDS] [--list]

Needs no network: torch, triton, numpy, pytest, pybind11, ninja, nvcc and compute-sanitizer are enough. Every
section's result is DIR/<section>.json as soon as it ends, next to the logs of what it ran; a summary comes
last. Exit status 0: all sections asked for ran and passed; 1: one failed or did not run; 2: no CUDA device,
or a wrong option.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.sections import CUT, Context, Section, SectionFailed, call, run_sections
from lct_fast.bench.cases import by_stem
from lct_fast.bench.report import best_rival

ROOT = Path(__file__).resolve().parents[1]
# Of what is left; the benchmarks tell more.
SANITIZER_SHARE = 0.35
# Profiles of a section, and the seconds without which one is not begun.
PROFILED = 3
PROFILE_LEAST_S = 30.0
# At most: the decoupled step over the plain one, and shares of a step.
OVERLAP_AIMS = {"against_plain": 1.15, "exposed_copy": 0.03, "launch_gaps": 0.05}
TESTS = (
    "tests/test_ladder.py",
    "tests/reference",
    "tests/ops",
    "tests/kernels",
    "tests/engine/test_on_gpu.py",
)
# The project's own settings, less those of plugins that a bare machine lacks.
PYTEST_INI = """[pytest]
addopts = --import-mode=importlib
filterwarnings = error
markers =
    cuda: needs a CUDA device
    slow: more than 2 s
"""


def environment(context: Context) -> dict[str, Any]:
    """What ran where: device, driver, versions, commit."""
    import platform

    import torch

    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": _say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks_mhz": _say("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem", "--format=csv,noheader"),
        "nvcc": _say("nvcc", "--version"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "commit": _say("git", "rev-parse", "HEAD"),
        "dirty": _say("git", "status", "--porcelain", "--untracked-files=no") not in ("", None),
    }
    for name in ("torch", "triton", "numpy", "pytest", "pybind11", "ninja"):
        found[name] = importlib.import_module(name).__version__ if importlib.util.find_spec(name) else None
    found["line"] = (
        f"{found['device']}, torch {found['torch']}, triton {found['triton']}, commit {found['commit']}"
    )
    return found


def build(context: Context) -> dict[str, Any]:
    """Build the native module for this device and make the tree importable, without the network."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    env = _env(LCT_CUDA="1", LCT_CUDA_ARCHS=f"{major}{minor}{'a' if major >= 9 else ''}")
    install = ["-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "--no-index"]
    attempts = {"pip": install, "setup.py": ["setup.py", "build_ext", "--inplace"]}
    found: dict[str, Any] = {"archs": env["LCT_CUDA_ARCHS"]}
    for name, arguments in attempts.items():
        status, text = call([sys.executable, *arguments], context, f"build-{name}.log", env, ROOT)
        found[name] = status
        if status == 0:
            break
        found[f"{name}_said"] = text[-2000:]
    probe = (
        "import json; from lct_fast import _native; import lct_fast.kernels.critic_head; "
        "native = _native.load(); "
        "print(json.dumps(native.build_info() if native else {'absent': _native.why_absent()}))"
    )
    status, text = call([sys.executable, "-c", probe], context, "build-probe.log", _env(), ROOT)
    if status:
        raise SectionFailed(f"the package does not import after the build: {_last_line(text)}", found)
    info = json.loads(_last_line(text))
    found["build_info"] = info
    if not info.get("cuda"):
        raise SectionFailed(f"lct_fast._C has no CUDA kernels: {info}", found)
    found["line"] = f"sm_{found['archs']}, {info.get('compiler', '')}"
    return found


def correctness(context: Context) -> dict[str, Any]:
    """The ladder of ops and kernels on the device, split over processes as most of it is compilation."""
    shards = max(1, min(8, (os.cpu_count() or 2) // 2))
    ini = context.out / "pytest.ini"
    ini.write_text(PYTEST_INI)
    tests = [path for path in TESTS if (ROOT / path).exists()]

    def run(shard: int) -> tuple[int, str, Path]:
        report = context.out / f"correctness-{shard}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-q", "-rs"]
        command += [f"--shard={shard}/{shards}", f"--junitxml={report}", "-p", "no:cacheprovider", *tests]
        status, text = call(command, context, f"correctness-{shard}.log", _env(OMP_NUM_THREADS="1"), ROOT)
        return status, text, report

    with ThreadPoolExecutor(shards) as pool:
        done = list(pool.map(run, range(shards)))
    found = _count([report for _, _, report in done])
    found["shards"] = shards
    # 5: this shard got no tests.
    broken = [(status, _last_line(text)) for status, text, _ in done if status not in (0, 1, 5)]
    found["line"] = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    if broken:
        raise SectionFailed(
            f"pytest ended with status {broken[0][0]}: {broken[0][1]}; {found['line']}", found
        )
    if found["failed"]:
        raise SectionFailed(f"{found['line']}, first {found['failures'][0]}", found)
    if not found["passed"]:
        raise SectionFailed("no test ran", found)
    return found


def sanitizer(context: Context) -> dict[str, Any]:
    """compute-sanitizer over every op on awkward shapes: stray accesses, then races."""
    tool = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if tool is None:
        raise SectionFailed(
            "compute-sanitizer is not on the PATH nor beside nvcc; add CUDA's bin folder to PATH"
        )
    # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
    env = _env(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    part = context.part(SANITIZER_SHARE)
    found: dict[str, Any] = {}
    for check in ("memcheck", "racecheck"):
        for stem, backend in exercises():
            exercise = [sys.executable, "-m", f"tests.ops.{stem}_exercise", backend, "cuda"]
            if check == "racecheck":
                exercise.append("--few")
            options = ["--tool", check, "--error-exitcode", "9", "--target-processes", "application-only"]
            name = f"{check} {stem} {backend}"
            if part.left() < 1:
                found[name] = {"status": CUT, "summary": "no time left; give a larger --budget"}
                continue
            log = f"{name.replace(' ', '-')}.log"
            status, text = call([tool, *options, *exercise], part, log, env, ROOT)
            summary = [line for line in text.splitlines() if "SUMMARY" in line]
            found[name] = {"status": status, "summary": summary[-1] if summary else _last_line(text)}
    bad = [name for name, result in found.items() if result["status"]]
    found["line"] = f"{len(found) - len(bad)} of {len(found)} clean"
    if bad:
        raise SectionFailed(f"{', '.join(bad)}: {found[bad[0]]['summary']}", found)
    return found


def exercises() -> list[tuple[str, str]]:
    """Every op that has an exercise, with each of its backends that a device runs."""
    from lct_fast import ops

    stems = sorted(path.stem.removesuffix("_exercise") for path in (ROOT / "tests/ops").glob("*_exercise.py"))
    return [
        (stem, backend)
        for stem in stems
        for backend in ("cuda", "triton")
        if any(backend in ops.backends(name) for name in ops.names() if name.startswith(stem))
    ]


def bench(stem: str) -> Callable[[Context], dict[str, Any]]:
    """A section that times the ops of a stem beside torch and the rivals that are installed."""

    def run(context: Context) -> dict[str, Any]:
        out = context.out / f"bench-{stem}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "lct_fast.cli.bench", *(each.name for each in by_stem()[stem])]
        command += ["--device", "cuda", "--rivals", "--out", str(out)]
        # Leaves the stems behind it their share.
        share = 1 / (len(STEMS) - STEMS.index(stem))
        command += ["--budget", f"{0.8 * share * context.left():.0f}"]
        status, text = call(command, context, f"bench-{stem}.log", _env(), ROOT)
        found: dict[str, Any] = {"report": json.loads(out.read_text()) if out.exists() else {}}
        missed = misses(found["report"].get("rows", []))
        found["missed"] = [f"{row['op']} {row['shape']}: {best_rival(row):.2f}x" for row in missed]
        found["line"] = f"{_last_line(text)}; {len(missed)} aims missed"
        if status:
            raise SectionFailed(f"status {status}: {_last_line(text)}", found)
        found["profiles"] = [profile(row, context) for row in missed[:PROFILED]]
        return found

    return run


def aim(op: str, sizes: dict[str, Any]) -> float | None:
    """How many times as fast as the best rival an op should be; None where any figure will do."""
    if op == "vq_encode":
        return 2.0 if sizes["codewords"] <= 256 else 1.3
    if op == "critic_head":
        return 1.5 if sizes["classes"] <= 128 else 1.0
    return 1.3 if op == "bn_relu_pool_critic_head" else None


def misses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the best backend of every op and shape that does not reach its aim."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["op"], row["shape"]
        rival = best_rival(row)
        if rival is not None and (key not in best or rival > (best_rival(best[key]) or 0.0)):
            best[key] = row
    wanted = ((row, aim(row["op"], row["sizes"])) for row in best.values())
    return [row for row, least in wanted if least is not None and (best_rival(row) or 0.0) < least]


def profile(row: dict[str, Any], context: Context) -> dict[str, Any]:
    """Bytes, occupancy and stalls of a row's kernels, where ncu exists and may read the counters."""
    tool = shutil.which("ncu") or _beside_nvcc("ncu")
    if tool is None or context.left() < PROFILE_LEAST_S:
        return {"shape": row["shape"], "said": "ncu is not installed" if tool is None else "no time left"}
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
    command = [tool, "--profile-from-start", "off", "--csv", *(f"--section={name}" for name in sections)]
    command += [sys.executable, "-m", "benchmarks.profile_once", row["op"], row["shape"], row["backend"]]
    log = f"ncu-{row['op']}-{row['shape']}-{row['backend']}.csv"
    status, text = call(command, context, log, _env(), ROOT)
    return {"shape": row["shape"], "status": status, "log": log, "said": _last_line(text)}


def overlap(context: Context) -> dict[str, Any]:
    """Times groups on streams of this device beside the compiled plain step."""
    out = context.out / "overlap.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.overlap", "--out", str(context.out)]
    command += ["--budget", f"{0.5 * context.left():.0f}"]
    status, text = call(command, context, "overlap.log", _env(), ROOT)
    found: dict[str, Any] = {"report": json.loads(out.read_text()) if out.exists() else {}}
    found["line"] = _last_line(text)
    if status:
        raise SectionFailed(f"status {status}: {found['line']}", found)
    found["missed"] = [
        f"{row['groups']} groups, {name}: {row[name]}, aim {most}"
        for row in found["report"]["rows"]
        for name, most in OVERLAP_AIMS.items()
        if row[name] is None or row[name] > most
    ]
    return found


# What tells most comes first; benchmarks that are not named follow.
FIRST = ("vq", "critic_head", "bn_relu_pool", "block_quantize")
STEMS = (*FIRST, *(stem for stem in by_stem() if stem not in FIRST))

SECTIONS = (
    Section("environment", "device, driver, versions, commit", environment, 0),
    Section("build", "the native module for this device", build, 20),
    Section("correctness", "the test ladder on the device", correctness, 30),
    Section("sanitizer", "compute-sanitizer memcheck and racecheck", sanitizer, 30),
    *(Section(stem, f"{stem} beside torch and other packages", bench(stem), 30) for stem in STEMS),
    Section("overlap", "groups on streams of this device beside the compiled plain step", overlap, 60),
)


def main(arguments: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0]
    )
    names = [section.name for section in sections]
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for results (default runs/gpu)"
    )
    parser.add_argument(
        "--sections", default=",".join(names), help="comma-separated, run in the order of --list"
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (default 540)")
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for section in sections:
            print(f"{section.name:12} {section.about}")
        return 0
    wanted = [name for name in options.sections.split(",") if name]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        parser.error(f"--sections has {', '.join(unknown) or 'nothing'}; there are {', '.join(names)}")
    missing = no_device()
    if missing:
        print(f"gpu: {missing}", file=sys.stderr)
        return 2
    chosen = [section for section in sections if section.name in wanted]
    return run_sections(chosen, Context(options.out.resolve(), options.budget))


def no_device() -> str:
    """Why no CUDA device can be used here, or ""."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return f"no CUDA device: torch {torch.__version__} is built for {built}; run this on a machine with one"


def _env(**extra: str) -> dict[str, str]:
    env = {
        name: value for name, value in os.environ.items() if name not in ("LCT_BACKEND", "TRITON_INTERPRET")
    }
    return {**env, **extra}


def _say(*command: str) -> str | None:
    """The last line that a command prints, None where it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _last_line(done.stdout) if done.returncode == 0 else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _beside_nvcc(name: str) -> str | None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return shutil.which(name, path=str(Path(nvcc).resolve().parent))


def _count(reports: Sequence[Path]) -> dict[str, Any]:
    """Totals of JUnit reports, and the names of what failed; a report that is missing counts as nothing."""
    failures: list[str] = []
    total = skipped = 0
    for report in reports:
        if not report.exists():
            continue
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            total += 1
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(f"{case.get('classname')}::{case.get('name')}")
            elif case.find("skipped") is not None:
                skipped += 1
    passed = total - len(failures) - skipped
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


if __name__ == "__main__":
    sys.exit(main())
