"""Run folders as the trainer writes them, made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, exits=4, epochs=3, summary=True, trace=True, diagnoses=False, cuts=False, **options)``.

    Exit k after epoch e: accuracy 0.1 * k + 0.01 * e, test loss 1 / k + 1 / e, train loss half of that. Its group has
    gradient norm k / e and cosine k / exits. The codebook of cut k has 16 words, of which k / exits are in use, and
    perplexity 4 k + e; each cut sends an equal part.
    """

    def make(
        name: str = "run",
        exits: int = 4,
        epochs: int = 3,
        summary: bool = True,
        trace: bool = True,
        diagnoses: bool = False,
        cuts: bool = False,
        **options: Any,
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        config = {"method": "local-critic", "model": "digits_cnn", "groups": exits, "seed": 7, **options}
        (path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        lines, accuracy = [], []
        for e in range(1, epochs + 1):
            accuracy = [0.1 * k + 0.01 * e for k in range(1, exits + 1)]
            loss = [1 / k + 1 / e for k in range(1, exits + 1)]
            half = [x / 2 for x in loss]
            interval = {"kind": "interval", "step": 10 * e, "epoch": e, "seconds": 2.0 * e, "loss": loss}
            epoch = {"kind": "epoch", "epoch": e, "step": 10 * e, "seconds": 2.0 * e, "train_loss": half}
            lines.append({**interval, "lr": 0.1, "samples_per_second": 5000.0})
            lines.append(
                {**epoch, "test_loss": loss, "exit_test_accuracy": accuracy, "test_accuracy": accuracy[-1]}
            )
            if diagnoses:
                norm = [k / e for k in range(1, exits + 1)]
                cosine = [k / exits for k in range(1, exits + 1)]
                reading = {"kind": "diagnosis", "step": 10 * e, "gradient_norm": norm}
                lines.append({**reading, "gradient_cosine": cosine})
            if cuts:
                lines.append(_codebooks(exits - 1, exits, e))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if summary:
            sent = {"cuts": _cuts(exits - 1)} if cuts else {}
            (path / "summary.json").write_text(json.dumps({**config, **_summary(accuracy), **sent}))
        if trace:
            (path / "trace.json").write_text(json.dumps({"traceEvents": _events(exits)}))
        return path

    return make


def _summary(accuracy: list[float]) -> dict[str, Any]:
    return {
        "codec": "none",
        "test_accuracy": accuracy[-1],
        "exit_test_accuracy": accuracy,
        "step_seconds_median": 0.04215,
        "seconds": 1234.5,
        "wire_bytes_per_sample": 8192.0,
        "raw_bytes_per_sample": 32768.0,
        "feedback_bytes_per_sample": 12.0,
        "bubble_fraction": None,
        "exposed_transfer_fraction": None,
        "critic_tax": 0.123,
        "versions": {"torch": "2.13.0"},
        "commit": None,
    }


def _cuts(count: int) -> list[dict[str, Any]]:
    whole = {"raw": 32768.0, "wire": 8192.0, "codebook": 512.0, "feedback": 12.0, "serial": 0.0}
    parts = {f"{key}_bytes_per_sample": value / count for key, value in whole.items()}
    return [{"codec": "vq:16,2", **parts} for _ in range(count)]


def _codebooks(cuts: int, exits: int, epoch: int) -> dict[str, Any]:
    return {
        "kind": "codebook",
        "step": 10 * epoch,
        "epoch": epoch,
        "codewords": [16] * cuts,
        "batches": [10] * cuts,
        "used": [k / exits for k in range(1, exits)],
        "perplexity": [4 * k + epoch for k in range(1, exits)],
        "drift": [0.01 * k for k in range(1, exits)],
        "codebooks": [epoch + k for k in range(1, exits)],
    }


def _events(groups: int) -> list[dict[str, Any]]:
    spans = (("forward", 300), ("critic backward", 100), ("backward", 400), ("optimiser", 50), ("send", 20))
    events = []
    for step in range(6):
        for group in range(1, groups + 1):
            at = 1e9 + 1000 * (step + group)
            for name, length in spans:
                args = {"group": group, "step": step}
                events.append(
                    {"ph": "X", "name": name, "pid": 0, "tid": group, "ts": at, "dur": length, "args": args}
                )
                at += length
    return events
