"""Checkpoints: safetensors and JSON, one file a group, a manifest of hashes; a checkpoint exists once it is renamed.

step-00000120/group-1.safetensors ... rng.safetensors manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lct_fast.engine.trainer import Pending, Trainer, Worker
from lct_fast.methods import Slot

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "manifest.json").is_file())
    return found[-1] if found else None


def save(trainer: Trainer, folder: Path, extra: dict[str, Any], keep: int = 2) -> Path:
    """Writes the state of ``trainer`` (and ``extra``, JSON) as ``folder/step-N``; older ones beyond ``keep`` go.

    Weights, optimisers, schedulers, feedback in flight, counters and random states are saved. A crash or a full
    disk on the way leaves earlier checkpoints whole.
    """
    final = folder / f"step-{trainer.batch:08d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        described = []
        for k, worker in enumerate(trainer.workers, 1):
            tensors, description = _pack_worker(worker)
            save_file(tensors, partial / f"group-{k}.safetensors")
            described.append(description)
        save_file(_random_states(), partial / "rng.safetensors")
        manifest = {
            "format": FORMAT,
            "batch": trainer.batch,
            "method": trainer.method.name,
            "groups": described,
            "meter": {n: getattr(trainer.meter, n) for n in _COUNTERS},
            "extra": extra,
            "sha256": {p.name: _sha256(p) for p in sorted(partial.iterdir())},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest))
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Puts the checkpoint at ``path`` into ``trainer``, once all of it is checked, and returns ``extra``.

    Raises:
        CheckpointError: missing or damaged files, or a checkpoint of another model, split or method.
    """
    manifest = read_manifest(path)
    if manifest["method"] != trainer.method.name:
        raise CheckpointError(
            f"{path} was made by method {manifest['method']!r}, this run uses {trainer.method.name!r}"
        )
    found, expected = [g["units"] for g in manifest["groups"]], [w.group.units for w in trainer.workers]
    if found != expected:
        raise CheckpointError(
            f"{path} is a checkpoint of another model or split: expected groups starting at "
            f"{[u[0] for u in expected if u]}, got {[u[0] for u in found if u]}; use the run's own config.yaml"
        )
    files = [_read(path, f"group-{k}.safetensors", manifest) for k in range(1, len(expected) + 1)]
    rng = _read(path, "rng.safetensors", manifest)
    for k, (worker, tensors) in enumerate(zip(trainer.workers, files, strict=True), 1):
        _check_state(path, k, worker, tensors)
    for worker, tensors, description in zip(trainer.workers, files, manifest["groups"], strict=True):
        _unpack_worker(worker, tensors, description)
    trainer.batch = manifest["batch"]
    for name in _COUNTERS:
        setattr(trainer.meter, name, manifest["meter"][name])
    _restore_random_states(rng)
    return manifest["extra"]


def load_weights(trainer: Trainer, path: Path) -> dict[str, Any]:
    """As ``load``, weights and buffers only: for evaluation and export."""
    manifest = read_manifest(path)
    for k, worker in enumerate(trainer.workers, 1):
        tensors = _read(path, f"group-{k}.safetensors", manifest)
        _check_state(path, k, worker, tensors)
        worker.group.load_state_dict(_part(tensors, "group."))
    return manifest["extra"]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``.

    Raises:
        CheckpointError: no manifest, not JSON, or another format.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} holds no manifest.json: expected a checkpoint folder step-N") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): use an older checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{file}: expected checkpoint format {FORMAT}, got {got}")
    return manifest


_COUNTERS = ("samples", "wire_bytes", "raw_bytes", "feedback_bytes", "steps")


def _read(path: Path, name: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
    file = path / name
    try:
        digest = _sha256(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: use an older checkpoint") from None
    if digest != manifest["sha256"].get(name):
        raise CheckpointError(
            f"{file} is damaged (its SHA-256 is not the manifest's): use an older checkpoint"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use an older checkpoint") from None


def _check_state(path: Path, k: int, worker: Worker, tensors: dict[str, Tensor]) -> None:
    saved = {n: tuple(t.shape) for n, t in _part(tensors, "group.").items()}
    wanted = {n: tuple(t.shape) for n, t in worker.group.state_dict().items()}
    if saved != wanted:
        odd = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
        raise CheckpointError(
            f"{path} is a checkpoint of another model: group {k}, {odd[0]}: expected {wanted.get(odd[0], 'nothing')}, "
            f"got {saved.get(odd[0], 'nothing')}; use the run's own config.yaml"
        )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _pack_worker(worker: Worker) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {f"group.{n}": t for n, t in worker.group.state_dict().items()}
    description: dict[str, Any] = {"units": worker.group.units}
    for name in ("optimizer", "critic_optimizer"):
        optimizer = getattr(worker, name)
        description[name] = None if optimizer is None else _pack(optimizer.state_dict(), name, tensors)
    description["schedulers"] = [
        _pack(_plain(s.state_dict()), f"scheduler.{i}", tensors) for i, s in enumerate(worker.schedulers)
    ]
    description["pending"] = [
        _pack(_pending_state(p), f"pending.{i}", tensors) for i, p in enumerate(worker.pending)
    ]
    return {n: t.detach().contiguous().clone() for n, t in tensors.items()}, description


def _unpack_worker(worker: Worker, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    worker.group.load_state_dict(_part(tensors, "group."))
    for name in ("optimizer", "critic_optimizer"):
        if description[name] is not None:
            getattr(worker, name).load_state_dict(_unpack(description[name], tensors))
    for scheduler, state in zip(worker.schedulers, description["schedulers"], strict=True):
        scheduler.load_state_dict(_unpack(state, tensors))
    worker.pending.clear()
    for state in description["pending"]:
        worker.pending.append(_pending(_unpack(state, tensors), worker.device))


def _pending_state(pending: Pending) -> dict[str, Any]:
    slot = pending.slot
    return {
        "batch": pending.batch,
        "next_loss": pending.next_loss,
        "u": slot.u,
        "dlogits": slot.dlogits,
        "loss": slot.loss,
        "scale": slot.scale,
        "layers": {n: list(pair) for n, pair in slot.layers.items()},
    }


def _pending(state: dict[str, Any], device: torch.device) -> Pending:
    def place(t: Tensor) -> Tensor:
        return t.to(device)

    layers = {n: (place(x), place(g)) for n, (x, g) in state["layers"].items()}
    slot = Slot(
        place(state["u"]), place(state["dlogits"]), place(state["loss"]), place(state["scale"]), layers
    )
    return Pending(state["batch"], slot, place(state["next_loss"]))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what it was built with (functions, its optimiser)."""
    return {n: v for n, v in state.items() if not isinstance(v, Callable) and not _holds_function(v)}  # type: ignore[arg-type]


def _holds_function(value: Any) -> bool:
    return isinstance(value, list) and any(callable(v) for v in value)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; tensors go to ``tensors`` under names that begin with ``name``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        packed: dict[str, Any] = {"tensor": name}
        if (
            value.dim() == 4
            and not value.is_contiguous()
            and value.is_contiguous(memory_format=torch.channels_last)
        ):
            packed["channels_last"] = True
        return packed
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[k, _pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"cannot save {name}: {type(value).__name__} is neither a tensor nor plain data")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.to(memory_format=torch.channels_last) if value.get("channels_last") else tensor
    ((kind, items),) = value.items()
    if kind in ("dict", "counter"):
        unpacked = {k: _unpack(v, tensors) for k, v in items}
        return Counter(unpacked) if kind == "counter" else unpacked
    sequence = [_unpack(v, tensors) for v in items]
    return tuple(sequence) if kind == "tuple" else sequence


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if (
            name.startswith("cuda:")
            and torch.cuda.is_available()
            and int(name[5:]) < torch.cuda.device_count()
        ):
            torch.cuda.set_rng_state(state, name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
