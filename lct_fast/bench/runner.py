"""One case from start to end: every contender checked, then all that passed timed in turns. A row each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lct_fast.bench.case import OURS, Bench, Case, Contender, Place
from lct_fast.bench.roofline import Roofline
from lct_fast.bench.rule import Accuracy, WrongOutput
from lct_fast.bench.sampling import Percentiles, Sample, Sampler, percentiles
from lct_fast.engine.cuda import streams
from lct_fast.ops import BackendError

Row = dict[str, Any]


class Ready(NamedTuple):
    """A contender that passed its check, how to time it, and the most bytes it had allocated at once."""

    contender: Contender
    run: Callable[[], Any]
    accuracy: Accuracy
    peak_bytes: int | None


def measure(
    bench: Bench, shape: str, place: Place, samples: int, sampler: Sampler, roof: Roofline
) -> list[Row]:
    """Rows of one shape. Raises ValueError where no backend of ours can run."""
    case = bench.case(shape, place)
    facts: Row = {"op": bench.name, "shape": shape, "sizes": bench.parse(shape)}
    facts |= {"dtype": facts["sizes"].get("dtype", "f32"), "bytes": case.traffic, "flops": case.flops}
    ready, rows = [], []
    for contender in case.contenders:
        try:
            ready.append(prepare(contender, case, place.device))
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            rows.append(facts | _row(contender, {_verdict(contender, error): said}))
    least = roof.least_us(case.traffic, case.flops, case.arithmetic)
    for chosen, graphs in _rounds(ready, place.device):
        runs = [r.contender.run if graphs is False else r.run for r in chosen]
        taken = sampler.take([r.contender for r in chosen], runs, samples, f"{bench.name} {shape}")
        rows += [facts | row for row in _timed(chosen, taken, least, graphs)]
    # Compiled functions share their code, and torch keeps few versions of one.
    torch.compiler.reset()
    return rows


def _verdict(contender: Contender, error: Exception) -> str:
    """What a backend or another package does not take is skipped; anything else is a failure."""
    refused = isinstance(error, BackendError) or (contender.package and not isinstance(error, WrongOutput))
    return "skipped" if refused else "failed"


def _rounds(ready: list[Ready], device: str) -> list[tuple[list[Ready], bool | None]]:
    """Who is timed together, and whether as CUDA graphs: on all sides, or, for what cannot be captured, on none."""
    if device != "cuda":
        return [(ready, None)]
    captured = [r for r in ready if r.contender.graphs]
    return [(captured, True)] + ([(ready, False)] if len(captured) < len(ready) else [])


def prepare(contender: Contender, case: Case, device: str) -> Ready:
    """Run it once and check it; on a device capture it into a graph and check what that writes."""
    out = _fresh(contender, contender.run)
    accuracy = case.check(contender.outputs(out), contender.slack)
    del out
    peak = peak_bytes(contender, device) if contender.in_torch else None
    if device != "cuda" or not contender.graphs:
        return Ready(contender, contender.run, accuracy, peak)
    try:
        replay, out = _capture(contender)
    except RuntimeError:
        # Something in it waits for the device.
        torch.cuda.synchronize()
        return Ready(replace(contender, graphs=False), contender.run, accuracy, peak)
    _fresh(contender, replay)
    return Ready(contender, replay, case.check(contender.outputs(out), contender.slack), peak)


def _fresh(contender: Contender, run: Callable[[], Any]) -> Any:
    if contender.reset:
        contender.reset()
    return run()


def _capture(contender: Contender) -> tuple[Callable[[], Any], Any]:
    # Capture wants what is lazy (compilation, handles, workspaces) done before it, on the stream that is captured. The
    # engine's graphs leave torch as it was where one fails, so that the next contender's does not fail for that.
    device = streams.device(torch.device("cuda"))
    side, graph = device.stream("capture"), device.graph(device.pool())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _fresh(contender, contender.run)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    out = graph.capture(contender.run, side)
    return graph.replay, out


def peak_bytes(contender: Contender, device: str) -> int:
    """The most that torch has allocated at once during a run, results included, beyond what was there before."""
    if contender.reset:
        contender.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        kept = contender.run()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most


def _row(contender: Contender, known: Row) -> Row:
    return {
        "contender": contender.name,
        "backend": contender.backend,
        "failed": "",
        "skipped": "",
        "us_p20": None,
        "us_p50": None,
        "us_p80": None,
        "samples": 0,
        "undisturbed": 0,
        "graphs": None,
        "share_of_roofline": None,
        "error": None,
        "error_of_rule": None,
        "peak_bytes": None,
        "times_as_fast_as": {},
    } | known


def _timed(ready: list[Ready], taken: list[list[Sample]], least: float, graphs: bool | None) -> list[Row]:
    found: list[tuple[Ready, Percentiles, int]] = [
        (r, percentiles(samples), sum(s.undisturbed for s in samples))
        for r, samples in zip(ready, taken, strict=True)
    ]
    rivals = {r.contender.name: p.p50 for r, p, _ in found if r.contender.name != OURS}
    return [
        _row(
            r.contender,
            {
                "us_p20": p.p20,
                "us_p50": p.p50,
                "us_p80": p.p80,
                "samples": p.samples,
                "undisturbed": undisturbed,
                "graphs": graphs,
                "share_of_roofline": least / p.p50,
                "error": r.accuracy.error,
                "error_of_rule": r.accuracy.of_rule,
                "peak_bytes": r.peak_bytes,
                "times_as_fast_as": {
                    name: us / p.p50 for name, us in rivals.items() if r.contender.name == OURS
                },
            },
        )
        for r, p, undisturbed in found
    ]
