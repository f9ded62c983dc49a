"""Checkpoints: resumed equals uninterrupted, bit for bit; damage and foreign checkpoints are refused whole."""

import json
from pathlib import Path

import pytest
import torch

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
    with pytest.raises(OSError, match="No space left"):
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
    refused(target, "expected checkpoint format 3, got 99")
    (path / "manifest.json").write_text('{"format": 1, ')
    refused(target, "manifest.json is damaged")
    (path / "manifest.json").unlink()
    refused(target, "holds no manifest.json")
    assert nets.same(before, nets.state(target))
