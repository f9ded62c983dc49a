"""Sections of `benchmarks.gpu` before any time is taken: what is here, the build, the ladder, the sanitizer."""

import importlib.util
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.host import ROOT, environ, last_line, say, tool
from benchmarks.gpu.sections import CUT, Context, SectionFailed, call

PACKAGES = (
    "torch", "triton", "numpy", "pytest", "pybind11", "ninja", "setuptools", "pip",
    # What training wants beside them.
    "PyYAML", "tqdm", "safetensors", "matplotlib", "scikit-learn", "pillow",
)  # fmt: skip
# Without what only compiles, for any device: that needs none, and takes minutes.
TESTS = (
    "tests/test_ladder.py",
    "tests/reference",
    "tests/ops",
    "tests/kernels",
    "tests/engine/test_on_gpu.py",
)
# With the CPU in the device's place: one op, on backend cpu.
FAKE_TESTS = ("tests/test_ladder.py", "tests/ops/test_consensus.py", "-k", "cpu-cpu or test_ladder")
# Enough to see that exercises are called as they should be.
FAKE_EXERCISES = ("consensus", "critic_head", "vq")
# Of the section's time; then pytest has to end by itself, as what it found is written at its end.
TESTING_SHARE = 0.9
# The project's own settings, less those of plugins that a bare machine lacks. Another torch's warnings are no
# finding about the device. What hangs shows where.
PYTEST_INI = """[pytest]
addopts = --import-mode=importlib
faulthandler_timeout = 100
markers =
    cuda: needs a CUDA device
    slow: more than 2 s
"""


def environment(context: Context) -> dict[str, Any]:
    """What ran where: device, driver, versions."""
    import torch

    found: dict[str, Any] = {
        "nvcc": say(tool("nvcc") or "nvcc", "--version"),
        "compute_sanitizer": tool("compute-sanitizer"),
        "ncu": tool("ncu"),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if not context.fake:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "devices": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks_mhz": say(
                "nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem", "--format=csv,noheader"
            ),
        }
    found["line"] = ", ".join(f"{name} {context.facts.get(name)}" for name in ("device", "torch", "triton"))
    return found


def build(context: Context) -> dict[str, Any]:
    """Build the native module for this device and make the tree importable, without the network.

    With a fake device what was built before is probed.
    """
    found = {} if context.fake else _compile(context)
    # A module of the package itself, without which `lct_fast.kernels` is no part of it.
    module = "lct_fast.kernels" if context.fake else "lct_fast.kernels.critic_head"
    probe = (
        f"import json; from lct_fast import _native; import {module}; "
        "native = _native.load(); "
        "print(json.dumps(native.build_info() if native else {'absent': _native.why_absent()}))"
    )
    status, text = call([sys.executable, "-c", probe], context, "build-probe.log", environ(context), ROOT)
    if status:
        raise SectionFailed(f"the package does not import after the build: {last_line(text)}", found)
    info = json.loads(last_line(text))
    found["build_info"] = info
    if "absent" in info:
        raise SectionFailed(info["absent"], found)
    if not context.fake and not info.get("cuda"):
        raise SectionFailed(f"lct_fast._C has no CUDA kernels: {info}", found)
    target = "no device, nothing built" if context.fake else f"sm_{found['archs']}"
    found["line"] = f"{target}, {info.get('compiler', '')}"
    return found


def _compile(context: Context) -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    env = environ(context, LCT_CUDA="1", LCT_CUDA_ARCHS=f"{major}{minor}{'a' if major >= 9 else ''}")
    install = ["-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "--no-index"]
    found: dict[str, Any] = {"archs": env["LCT_CUDA_ARCHS"]}
    found["pip"], text = call([sys.executable, *install], context, "build-pip.log", env, ROOT)
    if found["pip"] == 0:
        return found
    found["pip_said"] = text[-2000:]
    # No pip, or one that may not write here.
    in_place = [sys.executable, "setup.py", "build_ext", "--inplace"]
    found["setup.py"], text = call(in_place, context, "build-setup.py.log", env, ROOT)
    if found["setup.py"]:
        found["setup.py_said"] = text[-2000:]
        raise SectionFailed(
            f"neither pip nor setup.py builds it: {last_line(text)}; see build-setup.py.log", found
        )
    put_kernels_in(ROOT)
    return found


def put_kernels_in(root: Path) -> None:
    """Makes kernels/ importable as `lct_fast.kernels` in a tree that is not installed."""
    link = root / "lct_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")


def correctness(context: Context) -> dict[str, Any]:
    """The ladder of ops and kernels on the device, split over processes as most of it is compilation."""
    shards = 2 if context.fake else max(1, min(8, (os.cpu_count() or 2) // 2))
    ini = context.out / "pytest.ini"
    ini.write_text(PYTEST_INI)
    chosen = FAKE_TESTS if context.fake else tuple(path for path in TESTS if (ROOT / path).exists())
    # The plugins of a machine that is not ours take time and may change results.
    env = environ(context, OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    seconds = TESTING_SHARE * context.left()

    def run(shard: int) -> tuple[int, str, Path]:
        report = context.out / f"correctness-{shard}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-v", "-rs"]
        command += [f"--shard={shard}/{shards}", f"--seconds={seconds:.0f}", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "--ignore-glob=*_aot.py", *chosen]
        status, text = call(command, context, f"correctness-{shard}.log", env, ROOT)
        return status, text, report

    with ThreadPoolExecutor(shards) as pool:
        done = list(pool.map(run, range(shards)))
    found = _count([report for _, _, report in done])
    found["shards"] = shards
    found["line"] = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    # 2: stopped when the time was up, with a report. 5: this shard got no tests.
    stopped = [shard for shard, (status, _, report) in enumerate(done) if status == 2 and report.exists()]
    broken = [
        (status, last_line(text))
        for shard, (status, text, _) in enumerate(done)
        if status not in (0, 1, 5) and shard not in stopped
    ]
    if found["failed"]:
        raise SectionFailed(f"{found['line']}, first {found['failures'][0]}", found)
    if broken:
        raise SectionFailed(
            f"pytest ended with status {broken[0][0]}: {broken[0][1]}; {found['line']}", found
        )
    if stopped:
        raise SectionFailed(f"{found['line']}; no time for the others, give a larger --budget", found)
    if not found["passed"]:
        raise SectionFailed(f"no test ran: {last_line(done[0][1])}", found)
    return found


def sanitizer(context: Context) -> dict[str, Any]:
    """compute-sanitizer over every op on awkward shapes: stray accesses, then races.

    With a fake device the same runs without it, and nothing is checked by a sanitizer.
    """
    program = tool("compute-sanitizer")
    if program is None and not context.fake:
        raise SectionFailed(
            "compute-sanitizer is not on the PATH nor beside nvcc; add CUDA's bin folder to PATH"
        )
    # Without torch's cache every tensor is an allocation of its own, whose ends the tool knows.
    env = environ(context, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")

    def run(check: str, stem: str, backend: str) -> dict[str, Any]:
        device = "cpu" if context.fake else "cuda"
        exercise = [sys.executable, "-m", f"tests.ops.{stem}_exercise", backend, device]
        if check != "memcheck":
            exercise.append("--few")
        options = ["--tool", check, "--error-exitcode", "9", "--target-processes", "application-only"]
        watched = exercise if context.fake else [str(program), *options, *exercise]
        if context.left() < 1:
            return {"status": CUT, "summary": "no time left; give a larger --budget"}
        status, text = call(watched, context, f"{check}-{stem}-{backend}.log", env, ROOT)
        summary = [line for line in text.splitlines() if "SUMMARY" in line]
        return {"status": status, "summary": summary[-1] if summary else last_line(text)}

    checks = ("plain",) if context.fake else ("memcheck", "racecheck")
    jobs = [(check, *exercise) for check in checks for exercise in exercises(context.fake)]
    # Most of the time goes into starting up and compiling, on the host.
    with ThreadPoolExecutor(2 if context.fake else max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
        results = list(pool.map(lambda job: run(*job), jobs))
    found: dict[str, Any] = {" ".join(job): result for job, result in zip(jobs, results, strict=True)}
    bad = [name for name, result in found.items() if result["status"] not in (0, CUT)]
    cut = [name for name, result in found.items() if result["status"] == CUT]
    clean = f"{len(jobs) - len(bad) - len(cut)} of {len(jobs)} clean"
    found["sanitizer"] = None if context.fake else program
    found["line"] = f"{clean}; run without a sanitizer, which checks nothing" if context.fake else clean
    if bad:
        raise SectionFailed(f"{', '.join(bad)}: {found[bad[0]]['summary']}", found)
    if cut:
        raise SectionFailed(f"{clean}; no time for {', '.join(cut)}", found)
    return found


def exercises(fake: bool = False) -> list[tuple[str, str]]:
    """Every op that has an exercise, with each of its backends that a device runs; a few on cpu for a fake one."""
    from lct_fast import ops

    stems = sorted(path.stem.removesuffix("_exercise") for path in (ROOT / "tests/ops").glob("*_exercise.py"))
    stems = [stem for stem in stems if stem in FAKE_EXERCISES] if fake else stems
    return [
        (stem, backend)
        for stem in stems
        for backend in (("cpu",) if fake else ("cuda", "triton"))
        if any(backend in ops.backends(name) for name in ops.names() if name.startswith(stem))
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # Installed without its metadata, as some images do.
        return "unknown" if importlib.util.find_spec(package) else None


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
