"""A trained run, read back from its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from lct_fast.cli import build
from lct_fast.cli.config import Config, ConfigError, read_yaml, resolve
from lct_fast.cli.run_folder import RunFolder
from lct_fast.data import ImageData, TextData
from lct_fast.engine import Trainer, checkpoint


@dataclass(slots=True)
class TrainedRun:
    """A run's options, data and trainer with the newest checkpoint's weights."""

    config: Config
    images: ImageData | TextData
    trainer: Trainer
    device: torch.device


def load_run(path: Path, data: str | None = None) -> TrainedRun:
    """Rebuilds the run in folder ``path``; ``data`` replaces the data set's spec, e.g. when its files have moved.

    Raises:
        ConfigError, CheckpointError: no run there, or no whole checkpoint.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} holds no run: expected a folder with config.yaml, as `lct-fast train --out` makes"
        )
    config = resolve(read_yaml(path / "config.yaml"))
    if data is not None:
        config.data = data
    found = checkpoint.latest(path / "checkpoints")
    if found is None:
        raise ConfigError(
            f"{path} holds no whole checkpoint yet: go on with `lct-fast train --resume --out {path}`"
        )
    devices = build.set_up(config)
    images = build.load_data(config, RunFolder(path).vocabulary())
    groups, _ = build.build_groups(config, build.facts(config, images), devices[0])
    # Read in one process, however it was trained.
    here = dataclasses.replace(config, schedule="lockstep", replicas=1)
    trainer = build.build_trainer(here, groups, devices, 1)
    checkpoint.load_weights(trainer, found)
    return TrainedRun(config, images, trainer, devices[0])
