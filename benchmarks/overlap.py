"""K groups of one network on streams of one GPU, beside its compiled plain step: what copies and launches cost.

    python -m benchmarks.overlap --out DIR [--groups 2,4] [--batch 512] [--budget SECONDS] [--trial]

The VGG-like network of arXiv 2102.01963 with pooled critics, local-critic, bf16 autocast, channels-last. Every
contender has CUDA graphs but the one that is named eager. DIR/overlap.json has the figures, DIR/overlap-K.trace.json
the kernels of a few steps (open it at ui.perfetto.dev). Exit status 1: the pipeline does not compute what lockstep
does. --trial runs all of it on the CPU in seconds, where there are no streams to time.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lct_fast as lct
from benchmarks.gpu.sections import write
from lct_fast.bench.machine import commit, versions
from lct_fast.engine.cuda import streams
from lct_fast.engine.schedules.graphs import eager_lines
from lct_fast.engine.schedules.ticks import Ticks

CRITIC = "pooled_linear:pool=4"
# Steps before anything is timed: compilation, warm-up and recording of every slot's graphs.
WARM_UP = 24
# Work on the device, in the words of torch's profiler.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Task:
    """What every contender trains; ``steps`` make a sample."""

    device: str = "cuda"
    groups: int = 4
    batch: int = 512
    width: float = 1.0
    steps: int = 20
    samples: int = 30
    least: int = 7

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return lct.models.build(f"lct_vgg:width={self.width}", 10).to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """Random images [batch, 3, 32, 32] and labels [batch]."""
        g = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, 3, 32, 32, generator=g).contiguous(memory_format=torch.channels_last)
        return x.to(self.device), torch.randint(0, 10, (self.batch,), generator=g).to(self.device)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, fused=True)

    def trainer(self, schedule: str = "pipelined", graphs: bool | None = None) -> lct.Trainer:
        groups = lct.split(
            self.model(),
            example_input=torch.zeros(2, 3, 32, 32, device=self.device),
            critic=CRITIC,
            split_points=lct.models.default_splits("lct_vgg", self.groups),
        )
        return lct.Trainer(
            groups,
            lct.LocalCritic(),
            devices=[self.device],
            optimizer=self.optimizer,
            schedule=schedule,
            feedback_delay=3,
            autocast=torch.bfloat16,
            channels_last=True,
            # Lockstep is what the others are checked against, compilation included.
            compile=self.on_cuda and schedule != "lockstep",
            graphs=graphs,
        )


# A trial of this code: nothing it measures means anything.
TRIAL = Task(device="cpu", batch=4, width=0.0625, steps=1, samples=2, least=1)


class Staged(streams.CudaDevice):
    """A device that reaches none, itself included: copies go through pinned memory of the host."""

    def reaches(self, other: streams.Device) -> bool:
        return False


class Uncopied(streams.CudaDevice):
    """A device whose groups send nothing but the first time: they compute on the first batch in each slot."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.filled: set[int] = set()

    def copy(self, target: Tensor, source: Tensor, stream: Any, there: Any = None) -> None:
        if target.data_ptr() not in self.filled:
            self.filled.add(target.data_ptr())
            super().copy(target, source, stream, there)


def plain(task: Task) -> Callable[[], None]:
    """The network's own step, compiled, in one graph."""
    model = task.model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = task.optimizer(model.parameters())
    run = torch.compile(model) if task.on_cuda else model
    x, y = task.data()

    def step() -> None:
        with torch.autocast(task.device.partition(":")[0], torch.bfloat16):
            logits = run(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not task.on_cuda:
        return step
    device = streams.CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    stream = device.stream("compute")
    # What was made so far was made in another stream.
    _finish(task)
    with device.on(stream):
        for _ in range(3):
            step()
    graph = device.graph(device.pool())
    graph.capture(step, stream)
    return graph.replay


def decoupled(
    task: Task, graphs: bool | None = None, drive: Callable[[torch.device], streams.Device] | None = None
) -> tuple[Callable[[], None], lct.Trainer]:
    """The pipelined step, and its trainer; ``drive`` puts another device under it."""
    trainer = task.trainer(graphs=graphs)
    if drive is not None:
        trainer._run = Ticks(trainer.workers, graphs, drive)
    x, y = task.data()

    def step() -> None:
        trainer.step(x, y)

    return step, trainer


def check(task: Task, steps: int = 8) -> None:
    """Pipelined has the losses of lockstep, within what bf16 leaves open.

    Raises:
        AssertionError: it has not.
    """
    x, y = task.data()
    losses = []
    for schedule in ("lockstep", "pipelined"):
        trainer = task.trainer(schedule)
        stats = [trainer.step(x, y) for _ in range(steps)] + trainer.drain()
        losses.append(torch.stack([s.losses.float().cpu() for s in stats if s.batch >= 0]))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.05)


def sample(task: Task, contenders: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds a step of each, in turn, until there are enough samples or the time is up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(WARM_UP):
            step()
    begin = time.monotonic()
    for done in range(task.samples):
        if done >= task.least and time.monotonic() - begin > seconds:
            break
        for name, step in contenders.items():
            _finish(task)
            start = time.perf_counter()
            for _ in range(task.steps):
                step()
            _finish(task)
            times[name].append((time.perf_counter() - start) / task.steps)
    return times


def trace(task: Task, step: Callable[[], None], path: Path) -> float | None:
    """Writes what the device does in a few steps; the share of the time in which it does nothing, None on the host."""
    _finish(task)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if task.on_cuda else [])]
    with profile(activities=kinds, acc_events=True) as profiler:
        for _ in range(task.steps):
            step()
        _finish(task)
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return idle([(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_DEVICE])


def idle(spans: Sequence[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that no span covers."""
    if not spans:
        return None
    busy, until = 0.0, min(start for start, _ in spans)
    begin = until
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - begin) if until > begin else 0.0


def measure(task: Task, out: Path, seconds: float) -> dict[str, Any]:
    """One number of groups: microseconds a step of every contender, and the shares made of them."""
    check(task)
    ours, trainer = decoupled(task)
    contenders = {"plain, compiled": plain(task), "decoupled": ours}
    if task.on_cuda:
        contenders["decoupled, eager"], _ = decoupled(task, graphs=False)
        contenders["through pinned memory"], _ = decoupled(task, drive=Staged)
        contenders["nothing copied"], _ = decoupled(task, drive=Uncopied)
    times = sample(task, contenders, seconds)
    middle = {name: median(values) for name, values in times.items()}
    bare = middle.get("nothing copied")
    return {
        "groups": task.groups,
        "task": asdict(task),
        "eager_because": eager_lines(trainer.workers),
        "step_us": {name: _spread(values) for name, values in times.items()},
        "against_plain": middle["decoupled"] / middle["plain, compiled"],
        "exposed_copy": None if bare is None else 1 - bare / middle["decoupled"],
        "exposed_copy_through_pinned_memory": None
        if bare is None
        else 1 - bare / middle["through pinned memory"],
        "launch_gaps": trace(task, ours, out / f"overlap-{task.groups}.trace.json"),
    }


def main(arguments: Sequence[str] | None = None, task: Task | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overlap", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default runs/gpu)")
    parser.add_argument("--groups", default="2,4", help="numbers of groups (default 2,4)")
    parser.add_argument("--batch", type=int, default=512, help="samples a batch (default 512)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of sampling (default 60)")
    parser.add_argument("--trial", action="store_true", help="a tiny network on the CPU: whether it works")
    options = parser.parse_args(arguments)
    counts = [int(n) for n in options.groups.split(",")]
    task = task or (TRIAL if options.trial else Task(batch=options.batch))
    # Read when the device is first used. Each group has streams of its own, and shares a queue of the device otherwise.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"versions": versions(), "commit": commit(), "device": task.device, "rows": []}
    if task.on_cuda:
        report["device"] = torch.cuda.get_device_name()
    for count in counts:
        try:
            row = measure(replace(task, groups=count), options.out, options.budget / len(counts))
        except AssertionError as error:
            print(
                f"overlap: {count} groups: not what lockstep computes: {str(error).strip()}", file=sys.stderr
            )
            return 1
        report["rows"].append(row)
        write(options.out / "overlap.json", report)
        print(line(row), flush=True)
    return 0


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    shares = {
        "exposed copy": row["exposed_copy"],
        "through pinned memory": row["exposed_copy_through_pinned_memory"],
        "launch gaps": row["launch_gaps"],
    }
    said = ", ".join(f"{name} {'not measured' if v is None else f'{v:.1%}'}" for name, v in shares.items())
    return f"{row['groups']} groups: {row['against_plain']:.2f} of the plain step, {said}"


def _spread(seconds: list[float]) -> dict[str, float]:
    fifths = quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return {
        "p20": fifths[0] * 1e6,
        "p50": median(seconds) * 1e6,
        "p80": fifths[3] * 1e6,
        "samples": len(seconds),
    }


def _finish(task: Task) -> None:
    if task.on_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
