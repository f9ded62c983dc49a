"""Checkpoints: resumed equals uninterrupted, bit for bit; damage and foreign checkpoints are refused whole."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import lct_fast as lct
from lct_fast.engine import checkpoint
from tests.engine import nets

METHODS = {
    "local-critic": lambda: lct.LocalCritic(),
    "late": lambda: lct.LocalCritic(),
    "greedy": lambda: lct.Greedy(),
    "backprop": lambda: lct.Backprop(),
}
SCHEDULERS = {
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


def _trainer(name: str, seed: int = 0, **options: object) -> lct.Trainer:
    method = METHODS[name]()
    critic = "conv_fc:convs=2,filters=4" if name in ("local-critic", "late") else "mlp_aux"
    delay = 3 if name == "late" else 0
    defaults: dict[str, object] = {
        "optimizer": lambda p: torch.optim.Adam(p, 1e-3),
        "scheduler": SCHEDULERS["onecycle"],
        "feedback_delay": delay,
    }
    return lct.Trainer(nets.groups(method, seed=seed, critic=critic), method, **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(METHODS))
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    batches = nets.batches(9)
    whole = _trainer(name)
    for x, y in batches[:5]:
        whole.step(x, y)
    checkpoint.save(whole, tmp_path, {"epoch": 1})
    noise = torch.rand(3)
    for x, y in batches[5:]:
        whole.step(x, y)
    whole.flush()

    resumed = _trainer(name, seed=99)
    assert checkpoint.load(resumed, tmp_path / "step-00000005") == {"epoch": 1}
    assert torch.equal(torch.rand(3), noise), "the random state goes on where it was"
    assert resumed.batch == 5
    for x, y in batches[5:]:
        resumed.step(x, y)
    resumed.flush()
    assert nets.same(nets.state(whole), nets.state(resumed))
    assert whole.meter.wire_bytes == resumed.meter.wire_bytes


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_scheduler_and_layout_resumes(scheduler: str, channels_last: bool, tmp_path: Path) -> None:
    options = {
        "scheduler": SCHEDULERS[scheduler],
        "channels_last": channels_last,
        "feedback_delay": 2,
        "optimizer": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
    }
    batches = nets.batches(8)
    whole, resumed = _trainer("late", **options), _trainer("late", seed=5, **options)
    for x, y in batches[:4]:
        whole.step(x, y)
    checkpoint.load(resumed, checkpoint.save(whole, tmp_path, {}))
    for trainer in (whole, resumed):
        for x, y in batches[4:]:
            trainer.step(x, y)
    assert nets.same(nets.state(whole), nets.state(resumed))
    rates = [[w.optimizer.param_groups[0]["lr"] for w in t.workers] for t in (whole, resumed)]
    assert rates[0] == rates[1]


def test_only_whole_checkpoints_exist_and_old_ones_go(tmp_path: Path) -> None:
    trainer = _trainer("greedy")
    assert checkpoint.latest(tmp_path) is None
    for x, y in nets.batches(4):
        trainer.step(x, y)
        checkpoint.save(trainer, tmp_path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    (tmp_path / "step-00000009").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000004"


def test_a_failed_write_leaves_the_previous_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer("greedy")
    trainer.step(*nets.batches(1)[0])
    first = checkpoint.save(trainer, tmp_path, {})
    trainer.step(*nets.batches(1)[0])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left on device.*step-00000001, is whole"):
        checkpoint.save(trainer, tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    checkpoint.load(_trainer("greedy"), first)


def test_damage_and_foreign_checkpoints_are_refused_before_anything_changes(tmp_path: Path) -> None:
    trainer = _trainer("greedy")
    trainer.step(*nets.batches(1)[0])
    path = checkpoint.save(trainer, tmp_path, {})
    target = _trainer("greedy", seed=4)
    before = nets.state(target)

    def refused(who: lct.Trainer, message: str) -> None:
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(who, path)

    refused(_trainer("local-critic"), "made by method 'greedy', this run uses 'local-critic'")
    refused(lct.Trainer(nets.groups(lct.Greedy(), 2), lct.Greedy()), "another model or split")
    wide = lct.split(
        lct.models.build("digits_cnn:width=0.5", 5, 1, 8),
        example_input=torch.zeros(4, 1, 8, 8),
        critic="mlp_aux",
        split_points=lct.models.default_splits("digits_cnn", 4),
    )
    refused(
        lct.Trainer(wide, lct.Greedy()),
        r"another model: group 1, critic.head.weight: expected \(5, 64\), got \(5, 32\)",
    )

    file = path / "group-2.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(target, "group-2.safetensors is damaged")
    file.write_bytes(content[: len(content) // 2])
    refused(target, "group-2.safetensors is damaged")
    file.unlink()
    refused(target, "group-2.safetensors is missing")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    refused(target, "expected checkpoint format 4, got 99")
    (path / "manifest.json").write_text('{"format": 1, ')
    refused(target, "manifest.json is damaged")
    (path / "manifest.json").unlink()
    refused(target, "holds no manifest.json")
    assert nets.same(before, nets.state(target))


def _steps(trainer: lct.Trainer, batches: list) -> None:  # type: ignore[type-arg]
    for x, y in batches:
        trainer.step(x, y)


def _hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes wait for the event."""
    go, write = threading.Event(), checkpoint._write_group

    def held(*args: Any) -> None:
        assert go.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "_write_group", held)
    return go


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("late", "lockstep"), ("backprop", "lockstep"), ("late", "pipelined"), ("greedy", "pipelined")],
)
def test_what_is_written_in_the_background_is_the_state_at_the_mark(
    name: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = nets.batches(9)
    options = {"schedule": schedule, "feedback_delay": 3}
    trainer, now = _trainer(name, **options), _trainer(name, **options)
    for t in (trainer, now):
        _steps(t, batches[:5])
    expected = checkpoint.save(now, tmp_path / "now", {"epoch": 1})
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    go = _hold_writes(monkeypatch)
    path = checkpoint.save(trainer, tmp_path / "later", {"epoch": 1}, wait=False)
    # Training goes on while nothing is written yet, and draws random numbers.
    _steps(trainer, batches[5:])
    torch.rand(5)
    assert checkpoint.latest(tmp_path / "later") is None
    go.set()
    trainer.finish_saving()
    names = sorted(p.name for p in expected.iterdir() if p.name.startswith("group"))
    assert sorted(p.name for p in path.iterdir() if p.name.startswith("group")) == names
    for file in names:
        assert (path / file).read_bytes() == (expected / file).read_bytes(), file
    assert torch.equal(load_file(path / "rng.safetensors")["cpu"], rng)


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer("greedy")
    batches = nets.batches(3)
    go = _hold_writes(monkeypatch)
    _steps(trainer, batches[:1])
    checkpoint.save(trainer, tmp_path, wait=False)
    _steps(trainer, batches[1:2])
    second = threading.Thread(target=checkpoint.save, args=(trainer, tmp_path), kwargs={"wait": False})
    second.start()
    second.join(0.5)
    assert second.is_alive(), "the second waits for the first"
    assert [p.name for p in tmp_path.iterdir()] == [".partial-1-step-00000001"]
    go.set()
    second.join(60)
    trainer.finish_saving()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_full_disk_in_the_background_is_told_by_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batches = _trainer("greedy"), nets.batches(4)
    _steps(trainer, batches[:1])
    first = checkpoint.save(trainer, tmp_path)
    _steps(trainer, batches[1:2])

    def full(tensors: Any, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise SafetensorError(
            'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        )

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        checkpoint.save(trainer, tmp_path, wait=False)
        assert trainer.writer._thread is not None
        trainer.writer._thread.join(60)
    message = (
        r"step-00000002 could not be written \(No space left on device\): the previous one, .*1, is whole"
    )
    with pytest.raises(checkpoint.CheckpointError, match=message):
        trainer.step(*batches[2])
    assert trainer.batch == 2, "nothing was trained by the step that told"
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    # Told once; with room again it goes on.
    trainer.step(*batches[2])
    checkpoint.save(trainer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_what_an_interrupted_write_left_goes_at_the_first_checkpoint_of_the_next_run(tmp_path: Path) -> None:
    trainer = _trainer("greedy")
    _steps(trainer, nets.batches(1))
    for left in (".partial-7-step-00000001", ".partial-1-step-00000001"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "group-1.safetensors").write_bytes(b"half of it")
    assert checkpoint.latest(tmp_path) is None
    path = checkpoint.save(trainer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    checkpoint.load(_trainer("greedy"), path)


def test_a_group_that_is_never_written_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    missing = [tmp_path / "group-1.json", tmp_path / "group-2.json"]
    missing[0].touch()
    with pytest.raises(
        checkpoint.CheckpointError, match=r"group-2.json of another process was not there after 0 s"
    ):
        checkpoint._wait_for(missing, 0.05)
    threading.Timer(0.1, missing[1].touch).start()
    checkpoint._wait_for(missing, 60.0)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    trainer, told = _trainer("greedy"), list[str]()
    assert checkpoint.whole(tmp_path, told.append) is None
    paths = []
    for x, y in nets.batches(3):
        trainer.step(x, y)
        paths.append(checkpoint.save(trainer, tmp_path, keep=3))
    assert checkpoint.whole(tmp_path, told.append) == paths[2] and not told
    damage: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("group-3.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("group-3.safetensors", lambda b: b[:100]),
        ("group-2.json", lambda b: b.replace(b'"pending"', b'"Pending"')),
        ("rng.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:]),
        ("manifest.json", lambda b: b[:-5]),
    ]
    for name, change in damage:
        content = (paths[2] / name).read_bytes()
        (paths[2] / name).write_bytes(change(content))
        told.clear()
        assert checkpoint.whole(tmp_path, told.append) == paths[1], name
        assert len(told) == 1 and name in told[0] and "step-00000003 is passed over" in told[0]
        (paths[2] / name).write_bytes(content)
    (paths[2] / "group-1.safetensors").unlink()
    # The run that goes on keeps what is whole, and replaces the damaged one when it gets there.
    again = _trainer("greedy")
    checkpoint.load(again, paths[1])
    assert checkpoint.save(again, tmp_path, keep=1) == paths[1]
    assert checkpoint.whole(tmp_path, told.append) == paths[1]
    again.step(*nets.batches(3)[2])
    assert checkpoint.save(again, tmp_path, keep=1) == paths[2]
    assert checkpoint.whole(tmp_path, told.append) == paths[2] and not paths[1].exists()
    (paths[2] / "group-1.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="holds no whole checkpoint"):
        checkpoint.whole(tmp_path, told.append)


def test_another_delay_is_refused_where_it_would_lose_feedback(tmp_path: Path) -> None:
    late = _trainer("late")
    _steps(late, nets.batches(5))
    path = checkpoint.save(late, tmp_path / "late")
    with pytest.raises(checkpoint.CheckpointError, match="made with feedback_delay 3, this run has 0"):
        checkpoint.load(_trainer("late", feedback_delay=0), path)
    greedy = _trainer("greedy")
    _steps(greedy, nets.batches(5))
    checkpoint.load(_trainer("greedy", feedback_delay=3), checkpoint.save(greedy, tmp_path / "greedy"))
