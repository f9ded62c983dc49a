"""Checkpoints: safetensors and JSON, two files a group, a manifest of hashes; a checkpoint exists once it is renamed.

step-00000120/group-1.safetensors group-1.json ... rng.safetensors manifest.json

A group's files hold its weights, gradients within an accumulation, optimisers, schedulers, random state, codecs, the
slots its critic has yet to learn from, and the losses it owes the group before it. They are cut behind one batch and
say nothing of processes, so a run may go on under another schedule.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
# Seconds between two looks for what other processes write.
_POLL = 0.02
_COUNTERS = ("samples", "wire_bytes", "raw_bytes", "feedback_bytes")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    found = sorted(p for p in folder.glob("step-*") if (p / "manifest.json").is_file())
    return found[-1] if found else None


def whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in ``folder`` all of whose hashes are right; ``tell`` gets a line on each newer one.

    None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            _verify(path)
        except CheckpointError as error:
            tell(f"{error}; {path.name} is passed over")
            continue
        return path
    if found:
        raise CheckpointError(f"{folder} holds no whole checkpoint: start again, in another run folder")
    return None


def sweep(folder: Path) -> None:
    """Removes what interrupted writes have left. For when nobody writes there: the start of a run."""
    for left in folder.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def save(
    trainer: Trainer, folder: Path, extra: dict[str, Any] | None = None, keep: int = 2, wait: bool = True
) -> Path:
    """Writes the state of ``trainer`` as ``folder/step-N``; older ones beyond ``keep`` go.

    A crash or a full disk on the way leaves earlier checkpoints whole. Over processes each calls it at the same mark
    of the stream, with one folder on a shared file system; the last group's process, with its ``extra`` (JSON),
    completes the checkpoint when all groups have written.

    Args:
        wait: False to return once the state is copied to host memory. It is written meanwhile, one checkpoint at a
            time; errors come from the next ``step`` or event, from the next ``save``, or from
            ``trainer.finish_saving()``, which waits.

    Raises:
        CheckpointError: it cannot be written; earlier ones are whole.
    """
    trainer.settle()
    _tell_heart(trainer, folder)
    if trainer.first and trainer.saves == 0:
        # The others begin only after the mark that follows.
        sweep(folder)
    trainer.saves += 1
    final = folder / f"step-{trainer.batch:08d}"
    # The number tells apart two of the same batch, of which the first may still be incomplete.
    unfinished = folder / f".partial-{trainer.saves}-{final.name}"
    snapshots = [(w.index, *_snapshot(w)) for w in trainer.workers]
    complete = None
    if trainer.last:
        rng, manifest = _random_states(), _manifest(trainer, extra or {})
        complete = partial(_complete, unfinished, final, rng, manifest, keep, trainer.patience)
    alone = trainer.first and trainer.last
    trainer.writer.submit(partial(_write, unfinished, final, snapshots, complete, alone))
    if wait:
        trainer.writer.finish()
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
    delay = trainer.settings.feedback_delay
    if trainer.method.uses_feedback and manifest.get("feedback_delay", delay) != delay:
        raise CheckpointError(
            f"{path} was made with feedback_delay {manifest['feedback_delay']}, this run has {delay}: a critic would "
            f"learn from some batches twice or never; use the same --feedback-delay"
        )
    found, expected = manifest["units"], [g.units for g in trainer.groups]
    if found != expected:
        raise CheckpointError(
            f"{path} is a checkpoint of another model or split: expected groups starting at "
            f"{[u[0] for u in expected if u]}, got {[u[0] for u in found if u]}; use the run's own config.yaml"
        )
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
    _tell_heart(trainer, path.parent)
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


def _tell_heart(trainer: Trainer, folder: Path) -> None:
    """Errors that end a run over processes name its last good checkpoint."""
    if trainer.ranks is not None:
        trainer.ranks.heart.newest = partial(latest, folder)


def _write(
    unfinished: Path,
    final: Path,
    snapshots: list[tuple[int, dict[str, Tensor], dict[str, Any]]],
    complete: Callable[[], None] | None,
    alone: bool,
) -> None:
    """The groups of this process, and all the rest in the process of the last one; in the writer's thread."""
    files: list[Path] = []
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for index, tensors, description in snapshots:
            file = unfinished / f"group-{index + 1}.safetensors"
            files += [file, file.with_suffix(".json"), file.with_suffix(".tmp")]
            _write_group(file, tensors, description)
        if complete is not None:
            complete()
    except BaseException as error:
        if alone:
            shutil.rmtree(unfinished, ignore_errors=True)
        for file in files:
            # Makes room on a full disk. The folder stays while others may write there; the next run removes it.
            with suppress(OSError):
                file.unlink()
        if not isinstance(error, OSError | SafetensorError | CheckpointError):
            raise
        raise CheckpointError(_unwritten(final, error)) from None


def _unwritten(final: Path, error: BaseException) -> str:
    """What to say of a checkpoint that could not be written."""
    why = str(error)
    if isinstance(error, OSError):
        why = error.strerror or why
    elif "StorageFull" in why or "code: 28" in why:
        why = os.strerror(errno.ENOSPC)
    previous = latest(final.parent)
    left = f"the previous one, {previous}, is whole" if previous else "there is no earlier one"
    return f"checkpoint {final} could not be written ({why}): {left}; make room, then go on with --resume"


def _write_group(file: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """group-k.safetensors, then group-k.json with its hash: it appears when the group is written."""
    save_file(tensors, file)
    _sync(file)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(description | {"sha256": _sha256(file)}))
    _sync(temporary)
    os.replace(temporary, file.with_suffix(".json"))


def _manifest(trainer: Trainer, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "batch": trainer.batch,
        "method": trainer.method.name,
        "feedback_delay": trainer.settings.feedback_delay,
        "units": [g.units for g in trainer.groups],
        "extra": extra,
    }


def _complete(
    unfinished: Path,
    final: Path,
    rng: dict[str, Tensor],
    manifest: dict[str, Any],
    keep: int,
    patience: float,
) -> None:
    """Once every group is written: the manifest, and the name that makes the checkpoint exist."""
    save_file(rng, unfinished / "rng.safetensors")
    _sync(unfinished / "rng.safetensors")
    groups = [unfinished / f"group-{k}.json" for k in range(1, len(manifest["units"]) + 1)]
    _wait_for(groups, patience)
    named = [*groups, unfinished / "rng.safetensors"]
    manifest = manifest | {"sha256": {file.name: _sha256(file) for file in named}}
    (unfinished / "manifest.json").write_text(json.dumps(manifest))
    for path in (unfinished / "manifest.json", unfinished):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(unfinished, final)
    _sync(final.parent)
    # A newer one is damaged, as the run went on before it: it must not displace those that are whole.
    older = sorted(p for p in final.parent.glob("step-*") if p.name < final.name)
    for old in older[: max(0, len(older) - keep + 1)]:
        shutil.rmtree(old)


def _wait_for(files: list[Path], patience: float) -> None:
    """Until all are there: other processes write them at their own time."""
    deadline = time.monotonic() + patience
    while missing := [f for f in files if not f.exists()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{missing[0].name} of another process was not there after {patience:.0f} s"
            )
        # A process that ends by an error must not stay for this.
        if not threading.main_thread().is_alive():
            raise CheckpointError(f"{missing[0].name} of another process was not there at the end")
        time.sleep(_POLL)


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


def _verify(path: Path) -> None:
    """Raises CheckpointError unless every file's hash is the one noted."""
    manifest = read_manifest(path)
    for name, sha256 in manifest["sha256"].items():
        _check_hash(path / name, sha256)
    for k in range(len(manifest["units"])):
        description = json.loads((path / f"group-{k + 1}.json").read_text())
        _check_hash(path / f"group-{k + 1}.safetensors", description["sha256"])


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


def _snapshot(worker: Worker) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a group in host memory, where no later step changes it."""
    tensors, description = _pack_worker(worker)
    copies = {
        n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t.detach(), non_blocking=True)
        for n, t in tensors.items()
    }
    for device in {t.device for t in tensors.values() if t.is_cuda}:
        # All copies are on their way at once; the next step may write over what they read.
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        event.synchronize()
    return copies, description


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
    return tensors, description


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
