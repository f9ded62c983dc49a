"""The section of the GPU command that trains: which runs, how long, and what is kept. Training is a fake here."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import cifar10 as gpu_cifar10
from benchmarks.gpu.cifar10 import METHODS, cifar10, no_data, plan, wrong_data
from benchmarks.gpu.sections import CUT, Context, SectionFailed
from lct_fast.cli.config import resolve
from tests.gpu_helpers import Clock

# A start and an end of 10 s, and 2 s an epoch.
FIXED, EACH = 10, 2


class Training:
    """Stands in for `lct-fast train`: takes its time, is cut at the end of the budget, fails where told to."""

    def __init__(self, clock: Clock, broken: str = "") -> None:
        self.clock, self.broken, self.trained = clock, broken, list[str]()

    def __call__(self, command: list[str], context: Context, log: str, *_: Any) -> tuple[int, str]:
        options = dict(zip(command[4::2], command[5::2], strict=False))
        method, epochs, out = (command[command.index(name) + 1] for name in ("--method", "--epochs", "--out"))
        assert options and "/somewhere" in " ".join(command)
        self.trained.append(f"{method}-{epochs}")
        if method == self.broken:
            self.clock.now += 1
            return 2, "first\nlct-fast train: no such model\n"
        needed = FIXED + EACH * int(epochs)
        if needed > context.left():
            self.clock.now += context.left()
            return CUT, ""
        self.clock.now += needed
        folder = Path(out)
        assert not folder.exists()
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "weights").write_text("large")
        summary = {
            "method": method,
            "epochs": int(epochs),
            "test_accuracy": 0.5,
            "exit_test_accuracy": [0.4, 0.5],
        }
        summary |= {"seconds": EACH * int(epochs), "step_seconds_median": 0.01}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0, "said\n"


def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, broken: str = ""
) -> tuple[Training, Context]:
    clock = Clock()
    training = Training(clock, broken)
    monkeypatch.setattr(gpu_cifar10, "call", training)
    return training, Context(tmp_path, seconds, clock, data="cifar10:/somewhere")


def test_schedules_grow_as_long_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 x 12 s for one epoch and 3 x 20 s for five leave 44 s: too few for 10 + 20 x 2 x 1.15.
    training, context = trained(tmp_path, monkeypatch, 140)
    found = cifar10(context)
    assert training.trained == [f"{method}-{epochs}" for epochs in (1, 5) for method in METHODS]
    assert [(run["method"], run["epochs"]) for run in found["runs"]] == [
        (method, epochs) for epochs in (1, 5) for method in METHODS
    ]
    assert found["left_out"][0] == "local-critic-20: 56 s needed, 44 s left" and len(found["left_out"]) == 6
    assert found["line"] == "5 epochs: local-critic 50.00%, greedy 50.00%, backprop 50.00%"
    for run in found["runs"]:
        assert run["exit_test_accuracy"] == [0.4, 0.5] and run["step_seconds_median"] == 0.01
        # Nobody's folders, and no weights.
        assert "cifar10:PATH" in run["options"] and "/somewhere" not in " ".join(run["options"])
    assert not list(tmp_path.rglob("checkpoints")) and len(list(tmp_path.rglob("summary.json"))) == 6


def test_what_is_cut_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, context = trained(tmp_path, monkeypatch, 30)
    with pytest.raises(SectionFailed, match="no time for backprop; give a larger --budget") as failure:
        cifar10(context)
    found = failure.value.found
    assert [run["name"] for run in found["runs"]] == ["local-critic-1", "greedy-1"]
    assert found["left_out"][0] == "backprop-1: cut after 6 s"


def test_a_run_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, context = trained(tmp_path, monkeypatch, 100, broken="greedy")
    said = "^greedy-1: status 2: lct-fast train: no such model$"
    with pytest.raises(SectionFailed, match=said) as failure:
        cifar10(context)
    assert [run["name"] for run in failure.value.found["runs"]] == [
        "local-critic-1",
        "backprop-1",
        "local-critic-5",
        "backprop-5",
    ]
    assert training.trained.count("greedy-1") == 1 and "greedy-5" not in training.trained


def test_an_earlier_run_s_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        training, context = trained(tmp_path, monkeypatch, 40)
        assert len(cifar10(context)["runs"]) == 3


def test_options_are_those_of_the_command_line() -> None:
    """All methods train the same network alike, at the same lengths."""
    for fake in (False, True):
        seen = set()
        for run in plan("cifar10:/somewhere", fake):
            pairs = [o for o in run.options if o != "--channels-last"]
            given = {
                k.removeprefix("--").replace("-", "_"): v
                for k, v in zip(pairs[::2], pairs[1::2], strict=True)
            }
            for name in ("groups", "epochs", "seed", "steps", "threads"):
                if name in given:
                    given[name] = int(given[name])
            config = resolve(given)
            assert config.groups == 4 and config.method in METHODS
            assert config.device == ("cpu" if fake else "cuda")
            seen.add((config.model, config.batch_size, config.lr, config.autocast, config.seed))
        assert len(seen) == 1


def test_without_images_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert "add --data cifar10:PATH" in no_data(Context(tmp_path, 1))
    assert no_data(Context(tmp_path, 1, data="cifar10:x")) == no_data(Context(tmp_path, 1, fake=True)) == ""


def test_images_have_to_be_there(tmp_path: Path) -> None:
    assert wrong_data(f"cifar10:{tmp_path}") == wrong_data(f"images:{tmp_path}") == ""
    assert "does not exist" in wrong_data(f"cifar10:{tmp_path}/no")
    assert "--data is cifar10:PATH" in wrong_data(str(tmp_path))
