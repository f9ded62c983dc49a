"""`torchrun ... -m lct_fast train --replicas 2`: two pipelines of two groups that share every batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lct_fast.cli import processes
from lct_fast.cli.config import Config, ConfigError, resolve
from lct_fast.engine import checkpoint
from tests.cli.test_torchrun import SMALL, _metrics, _run, _same_records, _torchrun

PIPED = ["--groups", "2", "--split", "conv5", "--schedule", "pipelined"]
REPLICATED = [*PIPED, "--replicas", "2"]


@pytest.mark.slow
def test_replicas_write_the_records_of_one_pipeline(tmp_path: Path) -> None:
    ours, alone = tmp_path / "ours", tmp_path / "alone"
    # Without batch norm rows do not depend on each other.
    options = ["--model", "digits_cnn:width=0.25,norm=none", "--epochs", "2"]
    done = _run(_torchrun(4, *options, *REPLICATED, "--out", str(ours)))
    assert done.returncode == 0, done.stderr
    assert "group 1 (conv1 .. conv4) of replica 0 on rank 0: " in done.stdout
    assert "group 2 (conv5 .. head) of replica 1 on rank 3: " in done.stdout
    assert done.stdout.count("test accuracy of the exits") == 2
    one = [sys.executable, "-m", "lct_fast", "train", *SMALL, *options, *PIPED, "--out", str(alone)]
    assert _run(one).returncode == 0

    for mine, theirs in zip(_metrics(ours), _metrics(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            # Sums over half a batch twice in place of a batch once.
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-4)
            assert mine[key] == close, key
    mine, theirs = (json.loads((run / "summary.json").read_text()) for run in (ours, alone))
    for key in ("test_accuracy", "exit_test_accuracy", "steps", "split", "parameters", "groups"):
        assert mine[key] == theirs[key], key
    for key in ("wire_bytes_per_sample", "raw_bytes_per_sample", "feedback_bytes_per_sample"):
        assert mine[key] == theirs[key] > 0, key
    assert (mine["replicas"], mine["processes"], theirs["replicas"]) == (2, 4, 1)
    trace = json.loads((ours / "trace.json").read_text())["traceEvents"]
    assert {e["pid"] for e in trace} == {1, 2}

    evaluated = _run([sys.executable, "-m", "lct_fast", "eval", str(ours), "--exit", "last", "--json"])
    assert json.loads(evaluated.stdout)["results"]["exit 2"]["accuracy"] == mine["test_accuracy"]


@pytest.mark.slow
def test_killed_replicas_go_on_where_the_last_checkpoint_was(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*REPLICATED, "--epochs", "8"]
    assert _run(_torchrun(4, *options, "--out", str(whole))).returncode == 0
    command = _torchrun(4, *options, "--out", str(killed))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline().rpartition(" ")[2]) for _ in range(4)]
    deadline = time.monotonic() + 180
    while (
        sum(1 for _ in (killed / "checkpoints").glob("step-*/manifest.json")) < 2 and process.poll() is None
    ):
        assert time.monotonic() < deadline, "no checkpoint in 180 s"
        time.sleep(0.005)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0, "the run ended before it could be killed"
    found = checkpoint.latest(killed / "checkpoints")
    assert found is not None and int(found.name[5:]) < 40
    assert sorted(p.name for p in found.glob("*replica*.json")) == [
        "group-1-replica-1.json",
        "group-2-replica-1.json",
    ]
    again = _run(_torchrun(4, "--groups", "2", "--resume", "--out", str(killed)))
    assert again.returncode == 0, again.stderr
    # Weights, batch norm's statistics in every replica, losses, evaluations.
    _same_records(killed, whole)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (killed, whole))
    for key in ("test_accuracy", "wire_bytes_per_sample", "feedback_bytes_per_sample"):
        assert ours[key] == theirs[key], key


@pytest.mark.slow
def test_processes_that_do_not_fit_replicas_are_refused_once(tmp_path: Path) -> None:
    done = _run(_torchrun(2, *REPLICATED, "--out", str(tmp_path / "run")))
    assert done.returncode != 0
    assert done.stderr.count("lct-fast train: ") == 1
    assert "--groups 2 in --replicas 2 take 4 processes, but there are 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_fit_replicas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = {"schedule": "pipelined", "groups": 2}
    for options, message in [
        ({"replicas": 0}, "replicas: expected a number >= 1, got 0"),
        (
            {"replicas": 2},
            "replicas: 2 of them take --schedule pipelined, 2 groups or more and no --serial, got --schedule lock",
        ),
        (piped | {"replicas": 2, "groups": 1}, "got --schedule pipelined, 1 and 0.0"),
        (
            piped | {"replicas": 3, "batch_size": 64},
            "batch_size: it is shared equally by 3 replicas, got 64; use 66",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve(options)
    config: Config = resolve(piped | {"replicas": 2})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="take 4 processes, but there is 1: start torchrun with 4 in all"):
        processes.check(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    processes.check(config)
    for rank, reads in enumerate((True, False, True, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert processes.reads_data(config) is reads


@pytest.mark.slow
def test_the_program_in_the_docs_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "replicas.md").read_text()
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
    after = "assert net is model\nprint('weights', float(model.layer4.weight.double().sum()))\n"
    script = tmp_path / "program.py"
    script.write_text(before + program + after)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = _run([*launcher, str(script)])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # The last rank of replica 0 printed every batch; all ranks have one network.
    assert [line.split()[0] for line in lines if line[0].isdigit()] == list("01234")
    assert len([line for line in lines if line.startswith("weights")]) == 4
    assert len({line for line in lines if line.startswith("weights")}) == 1
