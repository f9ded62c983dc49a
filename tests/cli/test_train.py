"""The command line on the digits: runs, resumes, refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lct_fast as lct
from lct_fast import exported
from lct_fast.cli import main
from lct_fast.cli.build import set_up
from lct_fast.cli.config import resolve
from lct_fast.cli.options import Config
from lct_fast.engine import checkpoint

SMALL = ["--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"]


@pytest.fixture(autouse=True)
def _undo_global_state(threads: None) -> None:
    """`train` sets thread count and determinism for its process; the fixture undoes the first."""
    torch.use_deterministic_algorithms(False)


def _train(out: Path, *more: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *more])


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "lct_fast", *args]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return {f"{f.name}:{n}": t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def _metrics(run: Path) -> list[dict[str, object]]:
    """Everything logged but the clock."""
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def test_a_run_leaves_what_the_design_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert _train(run, "--epochs", "2", "--json") == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == summary
    for key in (
        "method",
        "groups",
        "codec",
        "schedule",
        "seed",
        "steps",
        "test_accuracy",
        "exit_test_accuracy",
        "step_seconds_median",
        "seconds",
        "wire_bytes_per_sample",
        "raw_bytes_per_sample",
        "feedback_bytes_per_sample",
        "bubble_fraction",
        "exposed_transfer_fraction",
        "critic_tax",
        "device",
        "versions",
    ):
        assert key in summary, key
    assert summary["steps"] == 10 and len(summary["exit_test_accuracy"]) == 4
    assert len(summary["critic_mac_share"]) == 3 and all(0 < c < 0.1 for c in summary["critic_mac_share"])
    assert 0 < summary["critic_tax"] < 1 and summary["feedback_bytes_per_sample"] == 12
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "trace.json",
        "curves.png",
        "checkpoints",
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["split"] == ["conv3", "conv5", "conv6"] and config["batch_size"] == 64
    trace = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in trace if e["ph"] == "X"} >= {
        "forward",
        "backward",
        "critic",
        "critic update",
        "optimizer",
    }
    epochs = [r for r in _metrics(run) if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2] and epochs[-1]["test_accuracy"] == summary["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["local-critic", "greedy", "backprop"])
def test_killed_mid_epoch_and_resumed_equals_uninterrupted(method: str, tmp_path: Path) -> None:
    # 5 batches an epoch; checkpoints every 3 lie inside epochs. Dropout-free, but order, augmentation,
    # schedulers, Adam's moments and owed feedback must all come back.
    options = [
        *SMALL,
        "--method",
        method,
        "--epochs",
        "40",
        "--checkpoint-every",
        "3",
        "--log-every",
        "2",
        "--augment",
        "crop_flip",
    ]
    if method == "local-critic":
        options += ["--feedback-delay", "2", "--critic", "conv_fc:convs=2,filters=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command("train", *options, "--out", str(whole)), check=True, capture_output=True)
    process = subprocess.Popen(
        _command("train", *options, "--out", str(killed)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while (
        not sum(1 for _ in (killed / "checkpoints").glob("step-*/manifest.json")) >= 2
        and process.poll() is None
    ):
        assert time.monotonic() < deadline, "no checkpoint in 120 s"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    found = checkpoint.latest(killed / "checkpoints")
    assert found is not None and int(found.name[5:]) < 40
    subprocess.run(
        _command("train", *options, "--resume", "--out", str(killed)), check=True, capture_output=True
    )
    a, b = _weights(whole), _weights(killed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert _metrics(whole) == _metrics(killed)


def test_eval_and_export_agree_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert _train(run, "--epochs", "3", "--method", "greedy", "--critic", "mlp_aux") == 0
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [results[f"exit {k}"]["accuracy"] for k in (1, 2, 3, 4)] == summary["exit_test_accuracy"]
    assert {"progressive:0.9", "progressive:0.95", "ensemble"} <= set(results)
    assert main(["eval", str(run), "--exit", "progressive:0.5"]) == 0
    assert "leaving at each exit" in capsys.readouterr().out

    images = lct.data.load("digits").test_images[:50]
    for k in (2, 4):
        plain, traced = tmp_path / f"exit{k}.safetensors", tmp_path / f"exit{k}.pt2"
        assert main(["export", str(run), "--exit", str(k), "--out", str(plain)]) == 0
        assert main(["export", str(run), "--exit", str(k), "--out", str(traced)]) == 0
        module = exported.load(plain)
        x = (images.float() / 255 - module.mean.view(-1, 1, 1)) / module.std.view(-1, 1, 1)
        logits = module(x)
        torch.testing.assert_close(torch.export.load(traced).module()(x), logits, rtol=1e-5, atol=1e-5)
        model = lct.models.build("digits_cnn:width=0.25", 10, 1, 8)
        if k == 4:
            model.load_state_dict(load_file(plain))
            assert torch.equal(model.eval()(x), logits)
    with pytest.raises(ValueError, match=r"expected a file of `lct-fast export`"):
        (tmp_path / "bad.safetensors").write_bytes(b"\0" * 40)
        exported.load(tmp_path / "bad.safetensors")


def test_the_exit_that_meets_a_constraint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "exit.safetensors"
    assert _train(run, "--epochs", "3", "--method", "greedy") == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--table", "--json", "--latency-batch", "3"]) == 0
    rows = json.loads(capsys.readouterr().out)["structures"]
    summary = json.loads((run / "summary.json").read_text())
    assert [r["accuracy"] for r in rows] == summary["exit_test_accuracy"]
    assert [r["macs"] for r in rows] == sorted(r["macs"] for r in rows)
    assert main(["eval", str(run), "--table"]) == 0
    assert "latency of a batch of 1" in capsys.readouterr().out

    def chosen(*constraints: str) -> int:
        assert main(["export", str(run), "--out", str(out), *constraints]) == 0
        assert "<- chosen" in capsys.readouterr().out
        return int(exported.load(out).description["exit"])  # type: ignore[index,arg-type,call-overload]

    assert chosen("--under-macs", str(rows[0]["macs"])) == 1
    assert chosen("--min-accuracy", f"{100 * rows[0]['accuracy']}%") == 1
    best = max(rows, key=lambda r: r["accuracy"])
    assert chosen("--under-macs", "1G") == best["exit"]
    for value, flag in (
        ("-3", "--under-macs"),
        ("4X", "--under-macs"),
        ("1.5", "--min-accuracy"),
        ("0", "--min-accuracy"),
    ):
        assert f"{flag}: expected" in _refused(
            capsys, "export", str(run), "--out", str(out), f"{flag}={value}"
        )
    said = _refused(capsys, "export", str(run), "--out", str(out), "--exit", "2", "--min-accuracy", "0.5")
    assert "leave it out" in said


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_refusals_are_one_line_with_status_2_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    config = tmp_path / "run.yaml"
    config.write_text("batchsize: 32\n")
    cut = tmp_path / "cifar-10-python.tar.gz"
    cut.write_bytes(b"\x1f\x8b\x08" + b"\0" * 20)
    cases = [
        (["--config", str(config)], "unknown config key 'batchsize': did you mean 'batch_size'?"),
        (["--groups", "50"], "50 groups asked for, but the model has only"),
        (["--codec", "zip"], "unknown codec 'zip': choose one of none, bf16"),
        (
            ["--method", "sgd"],
            "method: expected one of local-critic, greedy, penalty, augmented-lagrangian, likelihood-ratio, backprop; "
            "got 'sgd'",
        ),
        (["--critic", "conv"], "unknown critic 'conv'"),
        (["--model", "vgg"], "unknown model 'vgg'"),
        (["--data", "mnist"], "mnist"),
        (["--data", f"cifar10:{cut}"], "cifar-10-python.tar.gz"),
        (["--data", f"cifar10:{tmp_path / 'nowhere'}"], "nowhere"),
        (["--schedule", "serial"], "schedule: expected one of lockstep, pipelined, async; got 'serial'"),
        (["--schedule", "pipelined", "--method", "backprop"], "backprop has no pipelined schedule here"),
        (["--schedule", "pipelined", "--feedback-delay", "0"], "pipelined needs 1 or more, got 0"),
        (["--graphs", "yes"], "graphs: expected one of auto, on, off; got 'yes'"),
        (["--graphs", "on"], "graphs: CUDA graphs are for --schedule pipelined in one process"),
        (
            ["--graphs", "on", "--schedule", "pipelined", "--device", "cpu"],
            "cannot run as CUDA graphs: it runs on the",
        ),
        (["--split", "conv2", "conv9", "conv3"], "'conv9' is not a place to cut"),
        (["--critic", "mlp_aux"], "local-critic needs critics of convolutions and linear layers"),
        (["--critic-loss", "mixed:2"], "critic loss: expected l1, one_sided, half_sided, or mixed:W"),
        (["--critic-target", "first"], "critic_target: expected one of next, last; got 'first'"),
        (
            ["--critic-target", "last", "--schedule", "pipelined"],
            "critic_target: last takes --schedule lockstep",
        ),
        (["--device", "cuda:7"], "device cuda:7: this machine shows"),
        (["--device", "tpu"], "expected cpu, cuda or cuda:0,cuda:1, got 'tpu'"),
        (["--batch-size", "5000"], "batch_size 5000 is larger than the"),
        (["--lr", "-1"], "lr: expected a positive number, got -1.0"),
        (["--step-timeout", "0"], "step_timeout: expected a positive number, got 0.0"),
        (["--start-timeout", "inf"], "start_timeout: expected a positive number, got inf"),
        (["--epochs", "0"], "epochs: expected a number >= 1, got 0"),
        (["--clip-norm", "nan"], "clip_norm: expected a positive number, got nan"),
        (["--seed", str(2**63)], "seed: expected at most 9223372036854775807"),
        # Torch ends the process where it cannot start so many.
        (["--threads", "100000"], "threads: expected at most 1024, got 100000"),
        (["--resume"], "holds no run"),
    ]
    for options, message in cases:
        base = [] if options[0] in ("--data", "--model") else ["--data", "digits"]
        error = _refused(capsys, "train", *base, *options, "--out", str(out))
        assert message in error, (options, error)
        assert not out.exists(), options


def test_a_run_is_never_overwritten_and_resume_keeps_its_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _train(run, "--steps", "3") == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert "already holds a run: add --resume" in _refused(capsys, "train", *SMALL, "--out", str(run))
    error = _refused(capsys, "train", *SMALL, "--steps", "3", "--lr", "0.5", "--out", str(run), "--resume")
    assert "lr is 0.05 in" in error and "0.5 was given" in error
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before

    wide = (run / "config.yaml").read_text().replace("width=0.25", "width=0.5")
    (run / "config.yaml").write_text(wide)
    assert "checkpoint of another model" in _refused(capsys, "train", "--out", str(run), "--resume")


def test_what_changes_no_bit_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(run, "--steps", "6", "--checkpoint-every", "2") == 0
    whole = _weights(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert _train(run, "--steps", "6", "--checkpoint-every", "1", "--device", "cpu", "--resume") == 0
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == [
        "step-00000005",
        "step-00000006",
    ]
    assert whole.keys() == _weights(run).keys()
    assert all(torch.equal(t, whole[name]) for name, t in _weights(run).items())


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    error = _refused(capsys, "train", *SMALL, "--steps", "1", "--out", str(tmp_path / "file" / "run"))
    assert "cannot write the run folder" in error and "choose another --out" in error


def test_out_of_memory_names_the_group(tmp_path: Path) -> None:
    """A process whose address space is too small for the first batch."""
    script = (
        "import resource, sys, torch\n"
        "from lct_fast.cli import build, main\n"
        "real = build.build_trainer\n"
        "def limited(*args):\n"
        "    trainer = real(*args)\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)\n"
        "    return trainer\n"
        "build.build_trainer = limited\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    args = [
        "train",
        "--data",
        "digits",
        "--model",
        "digits_cnn:width=8",
        "--batch-size",
        "1024",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 2, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("lct-fast train:")]
    assert len(error) == 1 and "ran out of memory at batch 0 of 1024 samples" in error[0], done.stderr
    assert "use a smaller batch" in error[0]


def test_torchrun_restarts_imply_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert _train(run, "--steps", "4", "--checkpoint-every", "2") == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _train(run, "--steps", "4", "--checkpoint-every", "2") == 0
    assert {p: p.read_bytes() for p in before} == before, "a complete run is left as it is"
    # Killed after the last checkpoint but before the summary: the end is made up for.
    (run / "summary.json").unlink()
    assert _train(run, "--steps", "4", "--checkpoint-every", "2") == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def test_config_file_and_flags(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "data: digits\nmethod: greedy\ngroups: 2\nepochs: 1\nlr: 1e-2\nlimit: 128\nmodel: digits_cnn:width=0.25\n"
    )
    run = tmp_path / "run"
    assert main(["train", "--config", str(config), "--groups", "3", "--threads", "1", "--out", str(run)]) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["method"], stored["groups"], stored["lr"]) == ("greedy", 3, 0.01)
    # The stored config is itself a config.
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert all(
        torch.equal(a, b) for a, b in zip(_weights(run).values(), _weights(again).values(), strict=True)
    )


def test_critics_learn_as_in_the_paper_but_for_images() -> None:
    assert resolve({}).critic_loss == resolve({"data": "digits:fold=1"}).critic_loss == "l1"
    images = resolve({"data": "cifar10:PATH"})
    assert (images.critic_loss, images.critic_lr, resolve({}).critic_lr) == ("half_sided", 1e-3, 1e-4)
    assert resolve({"data": "cifar10:PATH", "critic_loss": "l1"}).critic_loss == "l1"
    assert lct.LocalCritic().loss == "l1"


def test_why_there_are_no_graphs_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("--steps", "2", "--schedule", "pipelined", "--device", "cpu", "--groups", "2")
    line = "no CUDA graphs for group 1, 2: it runs on the cpu"
    assert _train(tmp_path / "auto", *run) == 0
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert _train(tmp_path / "off", *run, "--graphs", "off") == 0
    assert "CUDA graphs" not in capsys.readouterr().out


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["backends"]["critic_head"]) == {"reference", "cpu", "triton", "cuda"}
    assert facts["backends"]["critic_head"]["reference"] == "available"
    assert facts["versions"]["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_a_chosen_codec_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--groups", "2", "--codec", "auto", "--epochs", "1"]
    assert _train(run, *options) == 0
    assert "cut 1: codec none: nothing is moved: both groups are on one device" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["codec"] == ["none"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["codec"] == "none" and summary["coded_exit_test_accuracy"] is None
    (choice,) = summary["codec_choices"]
    assert choice["codec"] == "none" and choice["predicted_seconds"]["int4"] > 0
    assert _train(run, *options, "--resume") == 0


def test_accuracy_is_reported_with_and_without_the_codec(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _train(run, "--groups", "2", "--codec", "int2", "--epochs", "2", "--json") == 0
    summary = json.loads((run / "summary.json").read_text())
    plain, coded = summary["exit_test_accuracy"], summary["coded_exit_test_accuracy"]
    # Exit 1 comes before anything is sent; behind the cut 2 bits a value cannot be the same.
    assert len(coded) == 2 and coded[0] == plain[0] and coded[1] != plain[1]
    assert summary["test_accuracy"] == plain[1] and summary["codec_choices"] == [None]


def test_runs_are_deterministic_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
        if given is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert set_up(Config(device="cpu", threads=1)) == [torch.device("cpu")]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
        assert torch.are_deterministic_algorithms_enabled()
