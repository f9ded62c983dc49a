"""`torchrun ... -m lct_fast train --schedule pipelined`: one process a group, the records of a lockstep run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lct_fast.engine import checkpoint

SMALL = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--log-every", "2", "--checkpoint-every", "4", "--augment", "crop_flip"),
    # Every process sees these; the delay is said, as lockstep has another default.
    *("--feedback-delay", "3"),
]


def _torchrun(count: int, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "lct_fast", "train", *SMALL, *options]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    files = sorted(path.glob("group-*.safetensors"))
    return {f"{f.name}:{n}": t for f in files for n, t in load_file(f).items()}


def _metrics(run: Path) -> list[dict[str, object]]:
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def _same_records(a: Path, b: Path) -> None:
    ours, theirs = _weights(a), _weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert _metrics(a) == _metrics(b)


@pytest.mark.slow
def test_processes_write_the_records_of_a_lockstep_run(tmp_path: Path) -> None:
    piped, lockstep = tmp_path / "piped", tmp_path / "lockstep"
    options = ["--groups", "2", "--split", "conv5", "--epochs", "3"]
    done = _run(_torchrun(2, *options, "--schedule", "pipelined", "--out", str(piped)))
    assert done.returncode == 0, done.stderr
    assert "group 1 (conv1 .. conv4) on rank 0: " in done.stdout
    assert "group 2 (conv5 .. head) on rank 1: " in done.stdout
    assert done.stdout.count("test accuracy of the exits") == 3
    alone = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options, "--out", str(lockstep)]
    assert _run(alone).returncode == 0
    _same_records(piped, lockstep)

    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (piped, lockstep))
    for key in (
        "test_accuracy",
        "exit_test_accuracy",
        "steps",
        "split",
        "parameters",
        "wire_bytes_per_sample",
    ):
        assert ours[key] == theirs[key], key
    assert ours["feedback_bytes_per_sample"] == theirs["feedback_bytes_per_sample"] == 4
    assert ours["processes"] == 2 and ours["schedule"] == "pipelined" and ours["feedback_delay"] == 3
    for share in ("bubble_fraction", "exposed_transfer_fraction", "critic_tax", "efficiency"):
        assert 0 <= ours[share] < 1, share
    assert theirs["bubble_fraction"] is None
    trace = json.loads((piped / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["name"]) for e in trace if e["ph"] == "X"}
    assert names >= {(1, "send train"), (2, "receive train"), (2, "send feedback"), (1, "receive feedback")}
    assert names >= {(1, "forward"), (2, "backward"), (1, "critic update")}

    evaluated = _run([sys.executable, "-m", "lct_fast", "eval", str(piped), "--exit", "last", "--json"])
    assert json.loads(evaluated.stdout)["results"]["exit 2"]["accuracy"] == ours["test_accuracy"]


@pytest.mark.slow
def test_killed_processes_go_on_where_the_last_checkpoint_was(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--groups", "2", "--split", "conv5", "--epochs", "30"]
    alone = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options, "--out"]
    assert _run([*alone, str(whole)]).returncode == 0
    command = _torchrun(2, *options, "--schedule", "pipelined", "--out", str(killed))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline().rpartition(" ")[2]) for _ in range(2)]
    deadline = time.monotonic() + 120
    while (
        sum(1 for _ in (killed / "checkpoints").glob("step-*/manifest.json")) < 2 and process.poll() is None
    ):
        assert time.monotonic() < deadline, "no checkpoint in 120 s"
        time.sleep(0.005)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0, "the run ended before it could be killed"
    found = checkpoint.latest(killed / "checkpoints")
    assert found is not None and int(found.name[5:]) < 150
    again = _run(_torchrun(2, "--groups", "2", "--resume", "--out", str(killed)))
    assert again.returncode == 0, again.stderr
    _same_records(killed, whole)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (killed, whole))
    for key in (
        "test_accuracy",
        "wire_bytes_per_sample",
        "raw_bytes_per_sample",
        "feedback_bytes_per_sample",
    ):
        assert ours[key] == theirs[key], key
    finished = _run(_torchrun(2, "--groups", "2", "--resume", "--out", str(killed)))
    assert finished.returncode == 0, finished.stderr
    assert "test accuracy" in finished.stdout
    _same_records(killed, whole)


@pytest.mark.slow
def test_processes_that_do_not_fit_are_refused_once(tmp_path: Path) -> None:
    for options, message in [
        (["--groups", "4", "--schedule", "pipelined"], "--groups 4, but torchrun started 2 processes"),
        (["--groups", "2"], "--schedule lockstep runs in one"),
    ]:
        done = _run(_torchrun(2, *options, "--out", str(tmp_path / "run")))
        assert done.returncode != 0
        assert done.stderr.count("lct-fast train: ") == 1 and message in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_program_in_the_docs_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    (program,) = re.findall(r"```python torchrun=\d\n(.*?)```", page, re.S)
    before = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "torch.manual_seed(0)\n"
        "x, y = torch.randn(8, 12), torch.arange(8) % 3\n"
        "loader = [(x, y)] * 5\n"
        "model = torch.nn.Sequential()\n"
        "for name in ('layer1', 'layer2', 'layer3', 'layer4'):\n"
        "    model.add_module(name, torch.nn.Linear(12, 12 if name != 'layer4' else 3))\n"
    )
    after = (
        "assert net is model\nif trainer.first: print('weights', float(model.layer4.weight.double().sum()))\n"
    )
    script = tmp_path / "program.py"
    script.write_text(before + program + after)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run([*launcher, str(script)])
    assert done.returncode == 0, done.stderr
    # The last rank printed every batch; rank 0 got the other group's trained weights.
    assert [line.split()[0] for line in done.stdout.splitlines() if line[0].isdigit()] == list("01234")
    assert "weights" in done.stdout


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_status_1(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "import lct_fast as lct\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 3))\n"
        "x, y = torch.randn(8, 6), torch.arange(8) % 3\n"
        "trainer = lct.Trainer(lct.split(model, example_input=x, split_points=['1']), lct.LocalCritic(),\n"
        "                      schedule='pipelined')\n"
        "if trainer.first:\n"
        "    while True: trainer.step(x, y)\n"
        "for event in trainer.events():\n"
        "    if event.batch == 5: raise ValueError('group 2 had enough')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run([*launcher, str(script)])
    assert done.returncode == 1
    assert "group 2 had enough" in done.stderr and "terminate called" not in done.stderr
    # Rank 0 says whose fault it was, although torchrun ends it.
    assert re.search(
        r"rank 1 \(group 2, .*\) ended by ValueError: group 2 had enough at program.py:\d+", done.stderr
    )
    assert "(SIGABRT)" not in done.stderr
