"""Everything that needs a CUDA device, in one command: build, correctness, benchmarks, training, sanitizer.

    python -m benchmarks.gpu --out DIR [--sections environment,build,...] [--budget SECONDS] [--data cifar10:PATH]
    python -m benchmarks.gpu --fake --out DIR
    python -m benchmarks.gpu --list

Needs no network: torch, triton, numpy, pytest, pybind11, ninja, nvcc and compute-sanitizer are enough; training
wants the package's other dependencies too. Every section's result is DIR/<section>.json as soon as it ends, next to
the logs of what it ran; a summary comes last. --fake runs all of it on the CPU in the device's place, to test this
command. Exit status 0: all sections asked for passed, or were given nothing to work on; 1: one failed or did not run;
2: no CUDA device, or a wrong option.
"""

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import bench, overlap
from benchmarks.gpu.checks import build, correctness, environment, sanitizer
from benchmarks.gpu.cifar10 import cifar10, no_data, wrong_data
from benchmarks.gpu.host import sources
from benchmarks.gpu.sections import Context, Section, end_commands, run_sections
from lct_fast.bench.cases import by_stem
from lct_fast.bench.machine import commit, cpu_model, versions

# What tells most comes first; benchmarks that are not named follow.
FIRST = ("vq", "critic_head", "bn_relu_pool", "block_quantize")
OTHERS = tuple(stem for stem in by_stem() if stem not in FIRST)
STEM_WEIGHTS = {"vq": 14.0, "critic_head": 12.0, "bn_relu_pool": 10.0}


def _bench(stem: str) -> Section:
    weight = STEM_WEIGHTS.get(stem, 5.0)
    return Section(stem, f"{stem} beside torch and other packages", bench(stem), 20, weight)


# Nothing else runs without the build. The sanitizer, which can take any time, gets what is left at the end.
SECTIONS = (
    Section("environment", "device, driver, versions", environment, 0, 0.5),
    Section("build", "the native module for this device", build, 20, 60),
    Section("correctness", "the test ladder on the device", correctness, 30, 40),
    *map(_bench, FIRST),
    Section("overlap", "groups on streams of this device beside the compiled plain step", overlap, 40, 40),
    Section("cifar10", "local critics, greedy and back-propagation trained", cifar10, 30, 16, no_data),
    *map(_bench, OTHERS),
    Section("sanitizer", "compute-sanitizer memcheck and racecheck", sanitizer, 20, 12),
)


def main(arguments: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0]
    )
    names = [section.name for section in sections]
    parser.add_argument("--out", type=Path, help="folder for results (default runs/gpu, fake runs/gpu-fake)")
    parser.add_argument("--sections", help="comma-separated, run in the order of --list (default all)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (default 540)")
    parser.add_argument("--data", default="", metavar="cifar10:PATH", help="images for the section cifar10")
    parser.add_argument(
        "--fake", action="store_true", help="run all of it on the CPU, in minutes, to test this command"
    )
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for section in sections:
            print(f"{section.name:14} {section.about}")
        return 0
    wanted = names if options.sections is None else [name for name in options.sections.split(",") if name]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        parser.error(f"--sections has {', '.join(unknown) or 'nothing'}; there are {', '.join(names)}")
    if options.data and wrong_data(options.data):
        parser.error(wrong_data(options.data))
    missing = "" if options.fake else no_device()
    if missing:
        print(f"gpu: {missing}", file=sys.stderr)
        return 2
    out = (options.out or Path("runs/gpu-fake" if options.fake else "runs/gpu")).resolve()
    mixed = other_kind(out, options.fake)
    if mixed:
        print(f"gpu: {mixed}", file=sys.stderr)
        return 2
    if options.fake:
        print("fake: the CPU stands in for a device; nothing here says anything of a GPU", flush=True)
    chosen = [section for section in sections if section.name in wanted]
    context = Context(out, options.budget, fake=options.fake, data=options.data, facts=facts(options.fake))
    return run_sections(chosen, context)


def no_device() -> str:
    """Why no CUDA device can be used here, or ""."""
    import torch

    if torch.cuda.is_available():
        return ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return f"no CUDA device: torch {torch.__version__} is built for {built}; run this on a machine with one"


def other_kind(out: Path, fake: bool) -> str:
    """Why a fake record may not go into this folder, or a true one may not, or ""."""
    kinds = {record["fake"] for record in read_records(out).values()}
    if (not fake) not in kinds:
        return ""
    there, here = ("true", "fake") if fake else ("fake", "true")
    return f"{out} holds a {there} record, and this is a {here} one; choose another --out"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the sections that ran, by section; one that does not say so is no fake."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.get("section") == path.stem:
            found[path.stem] = {"fake": False, **record}
    order = [section.name for section in SECTIONS]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))


def facts(fake: bool) -> dict[str, Any]:
    """What every record begins with: which device, versions and sources it is about."""
    import torch

    known = versions()
    return {
        "device": f"{cpu_model()}, in a device's place" if fake else torch.cuda.get_device_name(),
        "machine": platform.machine(),
        **{name: known[name] for name in ("python", "torch", "triton", "numpy")},
        "cuda": torch.version.cuda,
        "commit": commit(),
        "sources": sources(),
    }


def _stop(number: int, frame: object) -> None:
    """Takes the commands along that a section has under way; what sections found is written already."""
    end_commands()
    os._exit(128 + number)


def run() -> int:
    """``main`` as a process of its own: a signal ends what it has started."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return main()
