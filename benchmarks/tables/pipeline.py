"""The two-process benchmark: contenders, what the planner predicted of them, and what both say."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import at_most, between, listed, paragraph, table
from benchmarks.tables.results import Results

Row = dict[str, Any]

# Of these the fastest setting is shown, of all others every one.
RIVALS = ("backprop", "two threads", "GPipe", "1F1B", "DDP")
# What a prediction may be off by.
AIM = 10.0
# Ratios this close to 1 are no difference.
EVEN = 0.02


def shown(results: Results) -> list[Row]:
    """The rows of the full run: each rival at its fastest, then every contender that trains in groups."""
    full = [row for row in results("pipeline")["rows"] if not row["screened_only"]]
    rivals = [
        min((row for row in full if row["kind"] == kind), key=lambda row: float(row["us_p50"]))
        for kind in RIVALS
        if any(row["kind"] == kind for row in full)
    ]
    return rivals + [row for row in full if row["kind"] not in RIVALS]


def name(contender: str) -> str:
    """As the pages call it."""
    return contender.replace("pooled_linear:pool=4", "pooled critic").replace("conv_fc", "conv critic")


def pipeline(results: Results) -> str:
    """Milliseconds a batch and eta."""
    one = results("pipeline")["t1_us"]
    rows = [
        [name(row["contender"]), *(f"{row[f'us_{p}'] / 1e3:.1f}" for p in ("p50", "p20", "p80"))]
        + [f"{one / (2 * row['us_p50']):.3f}"]
        for row in shown(results)
    ]
    return table(["contender", "ms", "p20", "p80", "eta"], rows)


def meanwhile(report: Row) -> str:
    """What other programs took of the machine, and what follows."""
    share = f"Other programs used {100 * report['foreign_cpu_share']:.0f} % of the machine meanwhile"
    return (
        f"{share}."
        if report["quiet"]
        else f"{share}, and the file is not marked quiet: the times mean little."
    )


def pipeline_intro(results: Results) -> str:
    """What was measured."""
    report = results("pipeline")
    return paragraph(
        f"Two CPU processes of one thread each train a small convolutional network (batch {report['batch']}, 3x32x32; "
        "cut in two groups), against back-propagation over pipelines: ms a batch, median, p20 and p80, interleaved in "
        "one run, every contender's loss and gradients checked against float64 first, every rival at its fastest "
        "setting. eta = T_1 / (2 T), where T_1 is the fastest plain back-propagation on one thread.",
        meanwhile(report),
        "`python -m benchmarks.pipeline --out FILE`; "
        "[benchmarks/results/pipeline.json](benchmarks/results/pipeline.json)",
    )


def _compared(ratio: float) -> str:
    if abs(ratio - 1) <= EVEN:
        return "no faster and no slower than"
    return "faster than" if ratio < 1 else "slower than"


def pipeline_words(results: Results) -> str:
    """What the figures say, in words that follow from them."""
    r = results("pipeline")
    coding = [r["eta_vq"] / r["eta"] - 1, r["greedy_eta_vq"] / r["greedy_eta"] - 1]
    if all(gain < -EVEN for gain in coding):
        codec = "on a link inside one machine coding costs more than sending"
    elif all(gain > EVEN for gain in coding):
        codec = "coding gained even on a link inside one machine"
    else:
        codec = "on a link inside one machine coding costs about as much as sending"
    conv = r["conv_critic_ratio_to_best_pipeline"]
    return paragraph(
        f"`local-critic` with a pooled critic takes {r['ratio_to_best_pipeline']:.2f} of the time of the best pipeline "
        f"schedule ({r['best_pipeline']}), {r['ratio_to_ddp']:.2f} of DDP's, and divides the work with eta "
        f"{r['eta']:.3f}; its critic takes {100 * r['critic_tax']:.1f} % of the busy time and the groups differ by "
        f"{100 * r['imbalance']:.1f} %.",
        f'"no link" is the ceiling, groups that never communicate (eta {r["eta_ceiling"]:.3f}).',
        f"With `vq:256,8` on the cut eta is {r['eta_vq']:.3f} (greedy {r['greedy_eta_vq']:.3f}, without a codec "
        f"{r['greedy_eta']:.3f}): {codec}.",
        f"With the paper's convolutional critic decoupling takes {conv:.2f} of the best pipeline's time: it is "
        f"{_compared(conv)} a pipeline on this network.",
        "Accuracy is another question: the tables above and below.",
    )


def planner(results: Results) -> str:
    """Measured beside predicted."""
    rows = [
        [
            name(row["contender"]),
            f"{row['us_p50'] / 1e3:.1f}",
            f"{row['predicted_us'] / 1e3:.1f}",
            f"{100 * row['prediction_error']:+.1f} %",
        ]
        for row in results("pipeline")["rows"]
        if "predicted_us" in row
    ]
    return table(["contender", "measured, ms", "predicted, ms", "off by"], rows)


def planner_words(results: Results) -> str:
    """How far the predictions are off, and for whom that is within the aim."""
    errors: dict[str, list[float]] = {}
    for row in results("pipeline")["rows"]:
        if "predicted_us" in row:
            errors.setdefault(row["kind"], []).append(100 * row["prediction_error"])
    ours = errors["decoupled"]
    rivals = [error for kind in errors if kind != "decoupled" for error in errors[kind]]
    if max(rivals) < 0:
        off = f"predicted too short, by {between([-e for e in rivals])} %"
    elif min(rivals) > 0:
        off = f"predicted too long, by {between(rivals)} %"
    else:
        off = f"off by {min(rivals):+.0f} to {max(rivals):+.0f} %"
    missed = {kind: sum(abs(error) > AIM for error in errors[kind]) for kind in errors}
    by = [f"{kind} ({count} of {len(errors[kind])})" for kind, count in missed.items() if count]
    rows = sum(map(len, errors.values()))
    return paragraph(
        "Steps of groups that learn on their own are predicted within "
        f"{at_most(max(map(abs, ours)))} %. Pipeline schedules and DDP are {off}.",
        f"An error of {AIM:.0f} % at most is met by all {rows} rows."
        if not by
        else f"An error of {AIM:.0f} % at most is met by {rows - sum(missed.values())} of {rows} rows, and "
        "**not met** by "
        f"{listed(by)}.",
    )


def from_pipelining(results: Results) -> str:
    """The contenders that the page puts side by side."""
    rows = [
        [row["contender"], f"{row['us_p50'] / 1e3:.1f}"]
        for row in shown(results)
        if row["kind"] in ("GPipe", "1F1B", "DDP", "decoupled") and not row["codec"]
    ]
    return table(["", "ms"], rows)


def critic_words(results: Results) -> str:
    """What a critic costs."""
    r = results("pipeline")
    return paragraph(
        f"The critic's part of the busy time, in the run below: {100 * r['critic_tax']:.1f} % with a pooled one, "
        f"{100 * r['conv_critic_critic_tax']:.0f} % with the paper's convolutional one.",
    )


def _time(page: str) -> str:
    return (
        "Time, over two processes of one thread ([pipeline.json](../benchmarks/results/pipeline.json), the "
        "table in the "
        f"[README](../README.md#measured)): {page} GPUs: **not yet measured**."
    )


def local_critic_time(results: Results) -> str:
    """For the page of local-critic."""
    r = results("pipeline")
    return paragraph(
        _time(
            f"a step takes {r['ratio_to_best_pipeline']:.2f} of the time of the best pipeline schedule's with a pooled "
            f"critic, and {r['conv_critic_ratio_to_best_pipeline']:.2f} with the paper's convolutional one."
        )
    )


def greedy_time(results: Results) -> str:
    """For the page of greedy."""
    ratio = results("pipeline")["greedy_ratio_to_best_pipeline"]
    return paragraph(_time(f"a step takes {ratio:.2f} of the time of the best pipeline schedule's."))


TABLES = {
    "pipeline-intro": pipeline_intro,
    "pipeline": pipeline,
    "pipeline-words": pipeline_words,
    "planner": planner,
    "planner-words": planner_words,
    "from-pipelining": from_pipelining,
    "critic-words": critic_words,
    "local-critic-time": local_critic_time,
    "greedy-time": greedy_time,
}
