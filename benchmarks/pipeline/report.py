"""What the times of `benchmarks.pipeline` say: medians, the best of each kind, efficiency."""

import statistics
import time
from collections.abc import Collection
from typing import Any

from benchmarks.pipeline.balance import Balance
from benchmarks.pipeline.model import CODEC, CONV, POOLED
from lct_fast.bench.machine import FOREIGN
from lct_fast.bench.sampling import percentiles
from lct_fast.engine.meter import GroupMeter

PIPELINES = ("GPipe", "1F1B")
Row = dict[str, Any]


def row(found: Row, first: Row) -> Row:
    """One contender's line: percentiles of its visits, and everything behind them."""
    visits = found["visits"]
    p = percentiles([visit["us"] for visit in visits])
    return {
        "contender": found["name"],
        **found["setting"],
        "us_p20": p.p20,
        "us_p50": p.p50,
        "us_p80": p.p80,
        "samples": p.samples,
        "us": [round(visit["us"], 1) for visit in visits],
        # Of each process, all steps: what is left of us_p50 it spent waiting.
        "cpu_us_p50": [statistics.median(each) for each in zip(*(v["cpu_us"] for v in visits), strict=True)],
        "foreign_cpu_share": [round(visit["foreign"], 4) for visit in visits],
        "repeated_visits": found["repeated"],
        "screened_only": found.get("screened_only", False),
        **first,
        "last_loss": visits[-1]["loss"],
    }


def fastest(rows: list[Row], kinds: Collection[str], **also: str) -> Row | None:
    """The row of the least median of the full run among these kinds whose fields equal ``also``; None if none."""
    full = [r for r in rows if not r.get("screened_only")]
    fitting = [r for r in full if r["kind"] in kinds and all(r[k] == v for k, v in also.items())]
    return min(fitting, key=lambda r: float(r["us_p50"]), default=None)


def efficiency(one_us: float, workers: int, us: float) -> float:
    """eta = T_1 / (K T_K), T_K the time of a batch on K workers."""
    return one_us / (workers * us)


def ratio(a: Row | None, b: Row | None) -> float | None:
    return a["us_p50"] / b["us_p50"] if a and b else None


def summary(rows: list[Row], balance: dict[str, list[float]], workers: int = 2) -> Row:
    """The figures; None for what no row stands for."""
    one = fastest(rows, ["backprop"])
    pipeline = fastest(rows, PIPELINES)
    parallel = fastest(rows, ["DDP"])

    def eta(r: Row | None) -> float | None:
        return efficiency(one["us_p50"], workers, r["us_p50"]) if one and r else None

    out: Row = {
        "t1": one and one["contender"],
        "t1_us": one and one["us_p50"],
        "best_pipeline": pipeline and pipeline["contender"],
        "eta_best_pipeline": eta(pipeline),
        "eta_ddp": eta(parallel),
        "eta_two_threads": eta(fastest(rows, ["two threads"])),
    }
    for prefix, method, critic in (
        ("", "local-critic", POOLED),
        ("greedy_", "greedy", POOLED),
        ("conv_critic_", "local-critic", CONV),
    ):
        ours = fastest(rows, ["decoupled"], method=method, critic=critic, codec="")
        coded = fastest(rows, ["decoupled"], method=method, critic=critic, codec=CODEC)
        ceiling = fastest(rows, ["no link"], method=method, critic=critic)
        out |= {
            f"{prefix}eta": eta(ours),
            f"{prefix}eta_ceiling": eta(ceiling),
            f"{prefix}ratio_to_best_pipeline": ratio(ours, pipeline),
            f"{prefix}ceiling_to_best_pipeline": ratio(ceiling, pipeline),
            f"{prefix}ratio_to_ddp": ratio(ours, parallel),
        }
        if critic == POOLED:
            out |= {f"{prefix}eta_vq": eta(coded), f"{prefix}vq_to_best_pipeline": ratio(coded, pipeline)}
    for prefix, critic in (("", POOLED), ("conv_critic_", CONV)):
        if critic in balance:
            halves = Balance(*balance[critic])
            out |= {f"{prefix}critic_tax": halves.critic_tax, f"{prefix}imbalance": halves.imbalance}
    return out


def meter_cost(ticks: int = 2000, spans: int = 14) -> float:
    """Microseconds of metering a tick of that many spans; more than any here has."""
    meter = GroupMeter(0)
    begin = time.perf_counter()
    for t in range(ticks):
        meter.begin(t)
        for _ in range(spans):
            with meter.span("forward"):
                pass
        meter.end()
    return (time.perf_counter() - begin) / ticks * 1e6


def quiet(rows: list[Row]) -> bool:
    """Whether other programs used at most 5 % of the machine, on the whole and in four samples of five."""
    shares = [share for r in rows for share in r["foreign_cpu_share"]]
    calm = sum(share <= FOREIGN for share in shares)
    return bool(shares) and statistics.mean(shares) <= FOREIGN and calm >= 0.8 * len(shares)


def table(rows: list[Row], t1_us: float | None, workers: int = 2) -> str:
    """Every contender, the slowest first, milliseconds a batch."""
    lines = [f"{'contender':<62} {'ms':>7}  {'p20':>6} {'p80':>6}   eta"]
    for r in sorted(rows, key=lambda r: -float(r["us_p50"])):
        eta = f"{efficiency(t1_us, workers, r['us_p50']):.3f}" if t1_us else "-"
        p20, p50, p80 = (r[k] / 1e3 for k in ("us_p20", "us_p50", "us_p80"))
        lines.append(f"{r['contender']:<62} {p50:>7.1f}  {p20:>6.1f} {p80:>6.1f}  {eta:>5}")
    return "\n".join(lines)
