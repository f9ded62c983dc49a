"""Exits as plain modules in files: safetensors with what it takes to rebuild them, or torch.export."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lct_fast import models
from lct_fast.engine.network.group import exit_module
from lct_fast.engine.network.split import split

_COMMON = ("model", "classes", "split", "critic", "exit")
_IMAGES = ("channels", "size", "mean", "std")
_TEXT = ("window",)


def save(module: nn.Module, path: Path, description: dict[str, Any]) -> None:
    """Writes a module's state and its description to ``path`` (.safetensors), or the traced program (.pt2).

    Args:
        module: an exit, ``trainer.module(exit=k)``.
        path: ends in .safetensors or .pt2; an existing file is replaced as a whole.
        description: plain data; ``load`` reads model, classes, split, critic and exit, and of images channels, size,
            mean and std, of a text window.

    Raises:
        ValueError: another file ending.
    """
    if path.suffix not in (".safetensors", ".pt2"):
        raise ValueError(f"expected a file ending in .safetensors or .pt2, got {path.name!r}")
    module = module.eval().cpu()
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if path.suffix == ".pt2":
            sizes = {0: torch.export.Dim("batch", min=1)}
            with warnings.catch_warnings():
                # torch's own RNN modules keep a list of their weights, of which torch.export warns.
                warnings.filterwarnings("ignore", r"(?s).*_flat_weights.*assigned during export", UserWarning)
                program = torch.export.export(module, (_example(description),), dynamic_shapes=(sizes,))
            torch.export.save(program, partial, extra_files={"lct_fast.json": json.dumps(description)})
        else:
            state = {n: t.detach().clone().contiguous() for n, t in module.state_dict().items()}
            save_file(state, partial, metadata={"lct_fast": json.dumps(description)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path | str) -> nn.Module:
    """The exit in a .safetensors file as a plain module in evaluation mode, on the CPU.

    Of images [N, C, H, W] it gives logits [N, classes], and attributes ``mean`` and ``std`` hold their normalisation.
    Of ids [N, T], places in ``description["classes"]``, it gives logits [N, T, classes]; each call begins afresh.
    ``description`` holds the rest.

    Raises:
        ValueError: not such a file, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("lct_fast", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; expected a file of `lct-fast export`") from None
    known = _COMMON + (_TEXT if isinstance(description, dict) and "window" in description else _IMAGES)
    if not isinstance(description, dict) or any(k not in description for k in known):
        raise ValueError(f"{path} has no description of its model: expected a file of `lct-fast export`")
    with torch.random.fork_rng(devices=[]):
        groups = split(
            _model(description),
            example_input=_example(description),
            critic=description["critic"],
            split_points=description["split"],
        )
    module = exit_module(groups, description["exit"])
    module.load_state_dict(state)
    module.description = description  # type: ignore[assignment]
    if "window" not in description:
        module.mean, module.std = torch.tensor(description["mean"]), torch.tensor(description["std"])
    return module.eval()


def _model(description: dict[str, Any]) -> nn.Module:
    spec, classes = description["model"], len(description["classes"])
    if "window" in description:
        return models.build_sequence(spec, classes, description["window"])
    return models.build(spec, classes, description["channels"], description["size"])


def _example(description: dict[str, Any]) -> Tensor:
    if "window" in description:
        return torch.zeros(2, description["window"], dtype=torch.int64)
    return torch.zeros(2, description["channels"], description["size"], description["size"])
