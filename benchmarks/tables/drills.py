"""Fault drills."""

from __future__ import annotations

from benchmarks.tables.markdown import listed, paragraph, table, word
from benchmarks.tables.results import Results

KINDS = {
    "kill": "a process killed",
    "stop": "a process stopped",
    "cut": "connections cut",
    "full": "a full disk",
    "flip": "a flipped bit in a packet",
    "damage": "a damaged checkpoint",
}


def drills(results: Results) -> str:
    """A row a kind."""
    rows = [
        [KINDS[kind], str(found["drills"]), str(found["passed"])]
        + [f"{found[f'survivors_seconds_{which}']:.1f}" for which in ("median", "max")]
        for kind, found in results("fault_drills")["kinds"].items()
    ]
    return table(["fault", "drills", "passed", "s until the survivors ended, median", "longest"], rows)


def words(results: Results) -> str:
    """All of them in a paragraph."""
    report = results("fault_drills")
    runs = report["drills"]
    passed = sum(run["passed"] for run in runs)
    coded = [run["codec"] for run in runs if run.get("codec", "none") != "none"]
    lost = [run for run in runs if run.get("none_left")]
    sizes = sorted({run["size"] for run in runs})
    (timeout,) = {run["step_timeout"] for run in runs}
    last = max(kind["survivors_seconds_max"] for kind in report["kinds"].values())
    failed = [KINDS[kind] for kind, found in report["kinds"].items() if found["passed"] < found["drills"]]
    return paragraph(
        f"Fault drills: {len(runs)} runs over {sizes[0]} to {sizes[-1]} processes, each with one fault at a "
        "random moment: "
        f"{', '.join(KINDS[kind] for kind in report['kinds'])}.",
        f"{len(coded)} of them with {listed([f'`{codec}`' for codec in sorted(set(coded))])} on every cut."
        if coded
        else "",
        f"In {'all' if passed == len(runs) else passed} of them every survivor ended in time (the last "
        f"{last:.1f} s after "
        f"the fault, with a step timeout of {timeout:g} s) and named the right rank, and the run that went on "
        "ended with "
        "the bits of an undisturbed one.",
        f"In {word(len(lost))} of them the damaged checkpoint was the only one, and the run refused to go on without."
        if lost
        else "",
        f"**Not passed**: {len(runs) - passed}, of {listed(failed)}." if failed else "",
        "[benchmarks/results/fault_drills.json](benchmarks/results/fault_drills.json)",
    )


TABLES = {"fault-drills": drills, "fault-drills-words": words}
