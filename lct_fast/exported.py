"""Exits as plain modules in files: safetensors with what it takes to rebuild them, or torch.export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lct_fast import models
from lct_fast.engine.group import exit_module
from lct_fast.engine.split import split

_KEYS = ("model", "classes", "channels", "size", "split", "critic", "exit", "mean", "std")


def save(module: nn.Module, path: Path, description: dict[str, Any]) -> None:
    """Writes a module's state and its description to ``path`` (.safetensors), or the traced program (.pt2).

    Args:
        module: an exit, ``trainer.module(exit=k)``.
        path: ends in .safetensors or .pt2; an existing file is replaced as a whole.
        description: plain data; ``load`` reads model, classes, channels, size, split, critic and exit.

    Raises:
        ValueError: another file ending.
    """
    if path.suffix not in (".safetensors", ".pt2"):
        raise ValueError(f"expected a file ending in .safetensors or .pt2, got {path.name!r}")
    module = module.eval().cpu()
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if path.suffix == ".pt2":
            batch = torch.export.Dim("batch", min=1)
            example = torch.zeros(2, description["channels"], description["size"], description["size"])
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, partial, extra_files={"lct_fast.json": json.dumps(description)})
        else:
            state = {n: t.detach().clone().contiguous() for n, t in module.state_dict().items()}
            save_file(state, partial, metadata={"lct_fast": json.dumps(description)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path | str) -> nn.Module:
    """The exit in a .safetensors file as a plain module in evaluation mode, on the CPU.

    Attributes ``mean`` and ``std`` hold the input's normalisation, ``description`` the rest.

    Raises:
        ValueError: not such a file, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("lct_fast", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; expected a file of `lct-fast export`") from None
    if not isinstance(description, dict) or any(k not in description for k in _KEYS):
        raise ValueError(f"{path} has no description of its model: expected a file of `lct-fast export`")
    channels, size = description["channels"], description["size"]
    with torch.random.fork_rng(devices=[]):
        model = models.build(description["model"], len(description["classes"]), channels, size)
        groups = split(
            model,
            example_input=torch.zeros(2, channels, size, size),
            critic=description["critic"],
            split_points=description["split"],
        )
    module = exit_module(groups, description["exit"])
    module.load_state_dict(state)
    module.description = description  # type: ignore[assignment]
    module.mean, module.std = torch.tensor(description["mean"]), torch.tensor(description["std"])
    return module.eval()
