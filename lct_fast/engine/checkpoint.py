"""Checkpoints: safetensors and JSON, two files a group, a manifest of hashes; a checkpoint exists once it is renamed.

step-00000120/group-1.safetensors group-1.json ... rng.safetensors manifest.json

A group's files hold its weights, gradients within an accumulation, optimisers, schedulers, random state, codecs, the
slots its critic has yet to learn from, and the losses it owes the group before it. They are cut behind one batch and
say nothing of processes, so a run may go on under another schedule.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lct_fast.engine.trainer import Trainer
from lct_fast.engine.worker import Pending, Worker
from lct_fast.methods import Slot

FORMAT = 3
_COUNTERS = ("samples", "wire_bytes", "raw_bytes", "feedback_bytes")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "manifest.json").is_file())
    return found[-1] if found else None


def save(trainer: Trainer, folder: Path, extra: dict[str, Any] | None = None, keep: int = 2) -> Path:
    """Writes the state of ``trainer`` as ``folder/step-N``; older ones beyond ``keep`` go.

    A crash or a full disk on the way leaves earlier checkpoints whole. Over processes each calls it at the same mark
    of the stream, with one folder on a shared file system: the first group's process begins the checkpoint, the last
    group's completes it, with its ``extra`` (JSON).
    """
    trainer.settle()
    final = folder / f"step-{trainer.batch:08d}"
    partial = folder / f".partial-{final.name}"
    try:
        if trainer.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for worker in trainer.workers:
            _write_group(worker, partial)
        if trainer.last:
            _complete(trainer, partial, final, extra or {})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if trainer.last:
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
    found, expected = manifest["units"], [g.units for g in trainer.groups]
    if found != expected:
        raise CheckpointError(
            f"{path} is a checkpoint of another model or split: expected groups starting at "
            f"{[u[0] for u in expected if u]}, got {[u[0] for u in found if u]}; use the run's own config.yaml"
        )
    # What is under way ends before its state goes; a batch that failed is no matter any more.
    with suppress(ValueError):
        trainer.settle()
    read = {}
    for worker in trainer.workers:
        # The group behind keeps the losses that this one's critic is owed.
        for k in (worker.index, worker.index + 1):
            if k < len(expected) and k not in read:
                read[k] = _read_group(path, k, manifest)
        _check_state(path, worker, read[worker.index][0])
        _check_codecs(path, worker, read[worker.index][1])
    rng = _read(path, "rng.safetensors", manifest["sha256"].get("rng.safetensors"))
    for worker in trainer.workers:
        _unpack_worker(worker, *read[worker.index])
        if worker.pending:
            owed = dict(_unpack(read[worker.index + 1][1]["owed"], read[worker.index + 1][0]))
            for pending in worker.pending:
                if pending.batch not in owed:
                    raise CheckpointError(f"{path} lacks the feedback of batch {pending.batch}")
                pending.next_loss = owed[pending.batch].to(worker.device)
    trainer.batch = manifest["batch"]
    _restore_random_states(rng)
    return manifest["extra"]


def load_weights(trainer: Trainer, path: Path) -> dict[str, Any]:
    """As ``load``, weights and buffers only: for evaluation and export."""
    manifest = read_manifest(path)
    for worker in trainer.workers:
        tensors, _ = _read_group(path, worker.index, manifest)
        _check_state(path, worker, tensors)
        worker.group.load_state_dict(_part(tensors, "group."))
    return manifest["extra"]


def _write_group(worker: Worker, folder: Path) -> None:
    """group-k.safetensors, then group-k.json with its hash."""
    tensors, description = _pack_worker(worker)
    file = folder / f"group-{worker.index + 1}.safetensors"
    save_file(tensors, file)
    _sync(file)
    text = file.with_suffix(".json")
    text.write_text(json.dumps(description | {"sha256": _sha256(file)}))
    _sync(text)


def _complete(trainer: Trainer, partial: Path, final: Path, extra: dict[str, Any]) -> None:
    save_file(_random_states(), partial / "rng.safetensors")
    _sync(partial / "rng.safetensors")
    named = [*(f"group-{k}.json" for k in range(1, len(trainer.groups) + 1)), "rng.safetensors"]
    manifest = {
        "format": FORMAT,
        "batch": trainer.batch,
        "method": trainer.method.name,
        "units": [g.units for g in trainer.groups],
        "extra": extra,
        "sha256": {name: _sha256(partial / name) for name in named},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest))
    for path in (partial / "manifest.json", partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(final.parent)


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


def _read(path: Path, name: str, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a file whose hash must be ``sha256``."""
    file = path / name
    _check_hash(file, sha256)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use an older checkpoint") from None


def _read_group(path: Path, index: int, manifest: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of one group, hashes checked."""
    file = path / f"group-{index + 1}.json"
    _check_hash(file, manifest["sha256"].get(file.name))
    description = json.loads(file.read_text())
    return _read(path, f"group-{index + 1}.safetensors", description["sha256"]), description


def _check_hash(file: Path, sha256: str | None) -> None:
    try:
        digest = _sha256(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: use an older checkpoint") from None
    if digest != sha256:
        raise CheckpointError(
            f"{file} is damaged (its SHA-256 is not the one noted): use an older checkpoint"
        )


def _check_state(path: Path, worker: Worker, tensors: dict[str, Tensor]) -> None:
    saved = {n: tuple(t.shape) for n, t in _part(tensors, "group.").items()}
    wanted = {n: tuple(t.shape) for n, t in worker.group.state_dict().items()}
    if saved != wanted:
        odd = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
        raise CheckpointError(
            f"{path} is a checkpoint of another model: group {worker.index + 1}, {odd[0]}: expected "
            f"{wanted.get(odd[0], 'nothing')}, got {saved.get(odd[0], 'nothing')}; use the run's own config.yaml"
        )


def _check_codecs(path: Path, worker: Worker, description: dict[str, Any]) -> None:
    for name in ("decoder", "encoder"):
        codec, saved = getattr(worker, name), description[name]
        if codec is not None and saved["codec"] != codec.name:
            raise CheckpointError(f"{path} was made with codec {saved['codec']}, this run uses {codec.name}")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _pack_worker(worker: Worker) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {f"group.{n}": t for n, t in worker.group.state_dict().items()}
    # Inside an accumulation there are gradients to keep.
    tensors |= {f"grad.{n}": p.grad for n, p in worker.group.named_parameters() if p.grad is not None}
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
    for name in ("decoder", "encoder"):
        codec = getattr(worker, name)
        description[name] = codec and {"codec": codec.name, "state": _pack(codec.state(), name, tensors)}
    description["owed"] = _pack(list(worker.owed), "owed", tensors)
    description["random"] = _pack(worker.random.state, "random", tensors)
    description["meter"] = {name: getattr(worker.meter, name) for name in _COUNTERS}
    return {n: t.detach().contiguous().clone() for n, t in tensors.items()}, description


def _unpack_worker(worker: Worker, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    worker.group.load_state_dict(_part(tensors, "group."))
    gradients = _part(tensors, "grad.")
    for name, parameter in worker.group.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
    for name in ("optimizer", "critic_optimizer"):
        if description[name] is not None:
            getattr(worker, name).load_state_dict(_unpack(description[name], tensors))
    for scheduler, state in zip(worker.schedulers, description["schedulers"], strict=True):
        scheduler.load_state_dict(_unpack(state, tensors))
    worker.pending.clear()
    for state in description["pending"]:
        worker.pending.append(_pending(_unpack(state, tensors), worker.device))
    owed = _unpack(description["owed"], tensors)
    worker.owed = deque((batch, loss.to(worker.device)) for batch, loss in owed)
    for name in ("decoder", "encoder"):
        if description[name] is not None:
            state = _unpack(description[name]["state"], tensors)
            getattr(worker, name).load_state(state, worker.device)
    worker.random.state = _unpack(description["random"], tensors)
    for name, value in description["meter"].items():
        setattr(worker.meter, name, value)


def _pending_state(pending: Pending) -> dict[str, Any]:
    slot = pending.slot
    return {
        "batch": pending.batch,
        "u": slot.u,
        "dlogits": slot.dlogits,
        "loss": slot.loss,
        "scale": slot.scale,
        "target": slot.target,
        "layers": {n: list(pair) for n, pair in slot.layers.items()},
    }


def _pending(state: dict[str, Any], device: torch.device) -> Pending:
    names = ("u", "dlogits", "loss", "scale", "target")
    tensors = {n: state[n] if state[n] is None else state[n].to(device) for n in names}
    layers = {n: (x.to(device), g.to(device)) for n, (x, g) in state["layers"].items()}
    slot = Slot(**tensors, layers=layers)
    return Pending(state["batch"], slot)


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
