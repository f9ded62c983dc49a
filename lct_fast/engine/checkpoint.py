"""Checkpoints: safetensors and JSON, two files a group, a manifest of hashes; a checkpoint exists once it is renamed.

step-00000120/group-1.safetensors group-1.json ... rng.safetensors manifest.json

A group's files hold its weights, gradients within an accumulation, optimisers, schedulers, random state, codecs, the
slots its critic has yet to learn from, the losses it owes the group before it, and its replay buffer. They are cut
behind one batch and say nothing of processes, so a run may go on under another schedule. Of replicas the first writes
these files, and every other one what differs in it, as group-1-replica-1.safetensors and .json.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lct_fast.engine.errors import CheckpointError, first_line
from lct_fast.engine.group_state import (
    part_of,
    random_states,
    restore_random_states,
    snapshot,
    unpack,
    unpack_worker,
)
from lct_fast.engine.trainer import Trainer
from lct_fast.engine.worker import Worker

FORMAT = 4
# Seconds between two looks for what other processes write.
_POLL = 0.02


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
    of the stream, with one folder on a shared file system; the last group's process, of replica 0 where there are
    several, with its ``extra`` (JSON), completes the checkpoint when all have written.

    Args:
        wait: False to return once the state is copied to host memory. It is written meanwhile, one checkpoint at a
            time; errors come from the next ``step`` or event, from the next ``save``, or from
            ``trainer.finish_saving()``, which waits.

    Raises:
        CheckpointError: it cannot be written; earlier ones are whole.
        ReplicaError: replicas hold different weights or codebooks.
    """
    trainer.check_whole()
    trainer.settle()
    _tell_heart(trainer, folder)
    if trainer.first and trainer.replica == 0 and trainer.saves == 0:
        # The others begin only after the mark that follows.
        sweep(folder)
    trainer.saves += 1
    final = folder / f"step-{trainer.batch:08d}"
    # The number tells apart two of the same batch, of which the first may still be incomplete.
    unfinished = folder / f".partial-{trainer.saves}-{final.name}"
    for worker in trainer.workers:
        # Replicas meet here, and so begin to write only when replica 0 has swept.
        worker.compare_codebooks()
        worker.compare_weights()
    snapshots = [(_stem(w.index, w.replicas.index), *snapshot(w)) for w in trainer.workers]
    complete = None
    if trainer.reports:
        rng, manifest = random_states(), _manifest(trainer, extra or {})
        complete = partial(_complete, unfinished, final, rng, manifest, keep, trainer.patience)
    alone = trainer.first and trainer.last
    trainer.writer.submit(partial(_write, unfinished, final, snapshots, complete, alone))
    if wait:
        trainer.writer.finish()
    return final


def load(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Puts the checkpoint at ``path`` into ``trainer``, once all of it is checked, and returns ``extra``.

    With another number of replicas every one takes replica 0's buffers; all but replica 0 draw new random numbers.

    Raises:
        CheckpointError: missing or damaged files, a checkpoint of another model, split or method, or one of another
            number of replicas in which feedback or an accumulation is open.
    """
    with _sense(path):
        return _load(trainer, path)


def _load(trainer: Trainer, path: Path) -> dict[str, Any]:
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
    same = manifest.get("replicas", 1) == trainer.replicas
    if not same:
        _check_closed(path, manifest, trainer)
    trainer.give_up()
    read = {}
    for worker in trainer.workers:
        # The group behind keeps the losses that this one's critic is owed.
        for k in (worker.index, worker.index + 1):
            if k < len(expected) and k not in read:
                read[k] = _read_group(path, k, manifest, trainer.replica if same else 0)
        _check_state(path, worker, read[worker.index][0])
        _check_codecs(path, worker, read[worker.index][1])
        _check_kept(path, worker, read[worker.index][1])
    rng = _read(path, "rng.safetensors", manifest["sha256"].get("rng.safetensors"))
    for worker in trainer.workers:
        fresh = worker.random.state
        unpack_worker(worker, *read[worker.index])
        if not same:
            worker.feedback.owed.clear()
            if trainer.replica > 0:
                worker.random.state = fresh
        if worker.feedback.pending:
            owed = dict(unpack(read[worker.index + 1][1]["owed"], read[worker.index + 1][0]))
            for pending in worker.feedback.pending:
                if pending.batch not in owed:
                    raise CheckpointError(f"{path} lacks the feedback of batch {pending.batch}")
                pending.next_loss = owed[pending.batch].to(worker.device)
    trainer.batch = manifest["batch"]
    _tell_heart(trainer, path.parent)
    restore_random_states(rng)
    return manifest["extra"]


def load_weights(trainer: Trainer, path: Path) -> dict[str, Any]:
    """As ``load``, weights and buffers only: for evaluation and export."""
    with _sense(path):
        manifest = read_manifest(path)
        for worker in trainer.workers:
            tensors, _ = _read_group(path, worker.index, manifest)
            _check_state(path, worker, tensors)
            worker.group.load_state_dict(part_of(tensors, "group."))
        return manifest["extra"]


def files(groups: int, replicas: int) -> list[str]:
    """What a whole checkpoint holds: descriptions of each group in each replica. Beside each lie its tensors."""
    return [f"{_stem(k, replica)}.json" for replica in range(replicas) for k in range(groups)]


def _stem(index: int, replica: int) -> str:
    return f"group-{index + 1}-replica-{replica}" if replica else f"group-{index + 1}"


def _tell_heart(trainer: Trainer, folder: Path) -> None:
    """Errors that end a run over processes name its last good checkpoint."""
    if trainer.ranks is not None:
        trainer.ranks.heart.newest = partial(latest, folder)


def _write(
    unfinished: Path,
    final: Path,
    snapshots: list[tuple[str, dict[str, Tensor], dict[str, Any]]],
    complete: Callable[[], None] | None,
    alone: bool,
) -> None:
    """The groups of this process, and all the rest in the process of the last one; in the writer's thread."""
    files: list[Path] = []
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for stem, tensors, description in snapshots:
            file = unfinished / f"{stem}.safetensors"
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
        "replicas": trainer.replicas,
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
    groups = [unfinished / name for name in files(len(manifest["units"]), manifest["replicas"])]
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


@contextmanager
def _sense(path: Path) -> Iterator[None]:
    """Hashes may be right and contents make no sense: that is refused like any damage, in one line."""
    try:
        yield
    except (OSError, CheckpointError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged (its contents do not belong together: {type(error).__name__}, {first_line(error)}): "
            f"use an older checkpoint"
        ) from error


def _verify(path: Path) -> None:
    """Raises CheckpointError unless every file's hash is the one noted."""
    with _sense(path):
        _verify_hashes(path, read_manifest(path))


def _verify_hashes(path: Path, manifest: dict[str, Any]) -> None:
    for name, sha256 in manifest["sha256"].items():
        _check_hash(path / name, sha256)
    for name in files(len(manifest["units"]), manifest["replicas"]):
        description = json.loads((path / name).read_text())
        _check_hash((path / name).with_suffix(".safetensors"), description["sha256"])


def _read(path: Path, name: str, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a file whose hash must be ``sha256``."""
    file = path / name
    _check_hash(file, sha256)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use an older checkpoint") from None


def _read_group(
    path: Path, index: int, manifest: dict[str, Any], replica: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of one group as a replica has it, hashes checked."""
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {}
    for stem in dict.fromkeys((_stem(index, 0), _stem(index, replica))):
        part = _read_description(path, f"{stem}.json", manifest)
        tensors |= _read(path, f"{stem}.safetensors", part["sha256"])
        description |= part
    return tensors, description


def _read_description(path: Path, name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    _check_hash(path / name, manifest["sha256"].get(name))
    description: dict[str, Any] = json.loads((path / name).read_text())
    return description


def _check_closed(path: Path, manifest: dict[str, Any], trainer: Trainer) -> None:
    """Refuses a checkpoint whose open ends belong to the parts of another number of replicas."""
    groups = [_read_description(path, name, manifest) for name in files(len(manifest["units"]), 1)]
    if any(g.get("carried") for g in groups):
        raise CheckpointError(
            f"{path} was made by {manifest.get('replicas', 1)} replicas with recurrent layers, whose state is that of "
            f"their rows: this run has {trainer.replicas}; use as many"
        )
    if any(g["pending"] for g in groups) or manifest["batch"] % trainer.settings.accumulate:
        raise CheckpointError(
            f"{path} was made by {manifest.get('replicas', 1)} replicas, with feedback or an accumulation open: this "
            f"run has {trainer.replicas}; use as many, or a checkpoint behind flush() and a whole update"
        )


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
    saved = {n: tuple(t.shape) for n, t in part_of(tensors, "group.").items()}
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


def _check_kept(path: Path, worker: Worker, description: dict[str, Any]) -> None:
    if worker.kept is not None and description.get("kept") is None:
        raise CheckpointError(
            f"{path} holds no {worker.kept.what}: it is of a run with another schedule or method"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
