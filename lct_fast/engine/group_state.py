"""The state of a group, as tensors and JSON, and back: what a checkpoint's files hold."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from lct_fast.engine.errors import CheckpointError
from lct_fast.engine.feedback import Pending
from lct_fast.engine.network import carried
from lct_fast.engine.worker import Worker
from lct_fast.methods import Slot

_COUNTERS = (
    *("samples", "wire_bytes", "raw_bytes", "feedback_bytes"),
    *("serial_steps", "serial_seconds", "serial_bytes"),
    *("updates", "reused", "age", "readings", "codebook", "codebook_bytes"),
)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def snapshot(worker: Worker) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    """Copies of a group's state; what all replicas share is replica 0's to keep."""
    tensors, description = _pack_own(worker)
    if worker.replicas.index == 0:
        _pack_shared(worker, tensors, description)
    return tensors, description


def _pack_shared(worker: Worker, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    tensors |= {f"group.{n}": t for n, t in worker.group.state_dict().items()}
    description["units"] = worker.group.units
    for name in ("optimizer", "critic_optimizer"):
        optimizer = getattr(worker, name)
        description[name] = None if optimizer is None else _pack(optimizer.state_dict(), name, tensors)
    description["schedulers"] = [
        _pack(_plain(s.state_dict()), f"scheduler.{i}", tensors) for i, s in enumerate(worker.schedulers)
    ]
    for name in ("decoder", "encoder"):
        codec = getattr(worker, name)
        description[name] = codec and {"codec": codec.name, "state": _pack(codec.state(), name, tensors)}


def _pack_own(worker: Worker) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What differs between replicas of a group."""
    saved = worker.group.state_dict()
    tensors: dict[str, Tensor] = {
        f"group.{n}": saved[n] for n, _ in worker.group.named_buffers() if n in saved
    }
    # Inside an accumulation there are gradients to keep.
    tensors |= {f"grad.{n}": p.grad for n, p in worker.group.named_parameters() if p.grad is not None}
    description: dict[str, Any] = {
        "pending": [
            _pack(_pending_state(p), f"pending.{i}", tensors) for i, p in enumerate(worker.feedback.pending)
        ]
    }
    description["owed"] = _pack(list(worker.feedback.owed), "owed", tensors)
    description["kept"] = worker.kept and _pack(worker.kept.state(), "kept", tensors)
    state = {name: layer.carried for name, layer in carried.layers(worker.group).items()}
    description["carried"] = state and _pack(state, "carried", tensors)
    description["random"] = _pack(worker.random.state, "random", tensors)
    description["meter"] = {name: copy(getattr(worker.meter, name)) for name in _COUNTERS}
    return tensors, description


def unpack_worker(worker: Worker, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Puts a group's state back."""
    worker.group.load_state_dict(part_of(tensors, "group."))
    gradients = part_of(tensors, "grad.")
    for name, parameter in worker.group.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
    for name in ("optimizer", "critic_optimizer"):
        if description[name] is not None:
            getattr(worker, name).load_state_dict(unpack(description[name], tensors))
    for scheduler, state in zip(worker.schedulers, description["schedulers"], strict=True):
        scheduler.load_state_dict(unpack(state, tensors))
    worker.feedback.pending.clear()
    for state in description["pending"]:
        worker.feedback.pending.append(_pending(unpack(state, tensors), worker.device))
    owed = unpack(description["owed"], tensors)
    worker.feedback.owed = deque((batch, loss.to(worker.device)) for batch, loss in owed)
    for name in ("decoder", "encoder"):
        if description[name] is not None:
            state = unpack(description[name]["state"], tensors)
            getattr(worker, name).load_state(state, worker.device)
    if worker.kept is not None:
        worker.kept.load_state(unpack(description["kept"], tensors))
    if description.get("carried"):
        layers = carried.layers(worker.group)
        for name, state in unpack(description["carried"], tensors).items():
            layers[name].carried = state.to(worker.device)
    worker.random.state = unpack(description["random"], tensors)
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
        "kept": slot.kept,
        "samples": slot.samples,
        "era": slot.era,
    }


def _pending(state: dict[str, Any], device: torch.device) -> Pending:
    names = ("u", "dlogits", "loss", "scale", "target", "samples")
    # A checkpoint from before slots held samples lacks these.
    state = {"samples": None, "kept": {}, "era": 0} | state
    tensors = {n: state[n] if state[n] is None else state[n].to(device) for n in names}
    layers = {n: (x.to(device), g.to(device)) for n, (x, g) in state["layers"].items()}
    kept = {n: t.to(device) for n, t in state["kept"].items()}
    slot = Slot(**tensors, layers=layers, kept=kept, era=state["era"])
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


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``_pack`` made JSON of."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        return tensor.to(memory_format=torch.channels_last) if value.get("channels_last") else tensor
    ((kind, items),) = value.items()
    if kind in ("dict", "counter"):
        unpacked = {k: unpack(v, tensors) for k, v in items}
        return Counter(unpacked) if kind == "counter" else unpacked
    sequence = [unpack(v, tensors) for v in items]
    return tuple(sequence) if kind == "tuple" else sequence


def random_states() -> dict[str, Tensor]:
    """Those of torch's own generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Puts back what ``random_states`` gave; devices that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if (
            name.startswith("cuda:")
            and torch.cuda.is_available()
            and int(name[5:]) < torch.cuda.device_count()
        ):
            torch.cuda.set_rng_state(state, name)
