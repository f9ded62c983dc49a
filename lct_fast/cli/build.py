"""From a Config to data, groups and trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lct_fast import data, models
from lct_fast.cli.build_method import build_method, on_cuda
from lct_fast.cli.options import LAYER_PARALLEL, Config, ConfigError
from lct_fast.data import Batches, ImageData, TextData, Windows
from lct_fast.engine import Async, Hybrid, Trainer, split
from lct_fast.engine.network.group import Group


def set_up(config: Config) -> list[torch.device]:
    """Seeds torch, sets threads and determinism, and returns the devices."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    names = config.device.split(",")
    if config.device == "auto":
        names = ["cuda" if torch.cuda.is_available() else "cpu"]
    try:
        devices = [torch.device(n.strip()) for n in names]
    except RuntimeError:
        raise ConfigError(f"device: expected cpu, cuda or cuda:0,cuda:1, got {config.device!r}") from None
    if any(d.type not in ("cpu", "cuda") for d in devices):
        raise ConfigError(f"device: expected cpu, cuda or cuda:0,cuda:1, got {config.device!r}")
    count = torch.cuda.device_count() if any(d.type == "cuda" for d in devices) else 0
    for d in devices:
        if d.type == "cuda" and (d.index or 0) >= count:
            raise ConfigError(f"device {d}: this machine shows {count} CUDA devices; use --device cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Read when a device's cuBLAS is first used; without it products on several streams may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Deterministic mode would also fill every torch.empty with NaN, which nothing here reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    return devices


def load_data(config: Config, vocabulary: Sequence[str] | None = None) -> ImageData | TextData:
    """The data set of the run, in memory; a text by the ``vocabulary`` of the run, if that is known."""
    path = data.text_path(config.data)
    if path is None:
        return data.load(config.data, limit=config.limit)
    return data.load_text(path, config.limit, vocabulary)


def training_batches(config: Config, images: ImageData | TextData, device: torch.device) -> Batches | Windows:
    """The training set in seeded order, augmented; incomplete last batches are dropped. Of a text windows in order."""
    if isinstance(images, TextData):
        return Windows(images.train, config.batch_size, _window(config), seed=config.seed, device=device)
    return Batches(
        images.train_images,
        images.train_labels,
        config.batch_size,
        mean=images.mean,
        std=images.std,
        seed=config.seed,
        shuffle=True,
        augment=config.augment,
        drop_last=True,
        device=device,
        augmented=_augmented(config),
    )


def _augmented(config: Config) -> Callable[[int], bool] | None:
    """Stored inputs belong to images as they are: with them only serial batches are augmented."""
    if config.method not in LAYER_PARALLEL or config.auxiliary:
        return None
    schedule = _schedule(config, 0)
    return schedule.is_serial if isinstance(schedule, Hybrid) else lambda batch: False


def test_batches(config: Config, images: ImageData | TextData, device: torch.device) -> Batches | Windows:
    """The test set in order."""
    if isinstance(images, TextData):
        return Windows(
            images.test, config.batch_size, _window(config), shift=False, drop_last=False, device=device
        )
    return Batches(
        images.test_images,
        images.test_labels,
        config.batch_size,
        mean=images.mean,
        std=images.std,
        seed=config.seed,
        shuffle=False,
        augment="none",
        drop_last=False,
        device=device,
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the model and the run need to know of the data; only the first group's process holds the data itself.

    ``shape`` is an image's, [channels, height, width], or a text window's, [characters]. ``per_epoch``: batches.
    ``samples``: of the training set, None of a text.
    """

    name: str
    classes: int
    shape: tuple[int, ...]
    per_epoch: int
    samples: int | None
    text: bool = False


def _window(config: Config) -> int:
    assert config.window is not None, "the defaults of a text have one"
    return config.window


def facts(config: Config, images: ImageData | TextData) -> Facts:
    """The facts about the data of this run."""
    if isinstance(images, TextData):
        cpu = torch.device("cpu")
        per_epoch = len(training_batches(config, images, cpu))
        # Refused now if it is too short.
        test_batches(config, images, cpu)
        return Facts(images.name, len(images.vocabulary), (_window(config),), per_epoch, None, text=True)
    count = len(images.train_labels)
    if count < config.batch_size:
        raise ConfigError(f"batch_size {config.batch_size} is larger than the {count} training images")
    return Facts(
        images.name,
        len(images.classes),
        tuple(images.train_images.shape[1:]),
        count // config.batch_size,
        count,
    )


def build_groups(
    config: Config, facts: Facts, device: torch.device, agree: Callable[[Any], Any] = lambda points: points
) -> tuple[list[Group], list[str]]:
    """The model, cut, and the names of the modules that start groups 2..K.

    A split found by measurement varies, so what ``agree`` makes of it counts: rank 0's, over processes.
    """
    build = models.build_sequence if facts.text else models.build
    model = build(config.model, facts.classes, *facts.shape[:2]).to(device)
    kind = torch.int64 if facts.text else None
    example = torch.zeros(config.batch_size, *facts.shape, dtype=kind, device=device)
    points = config.split if config.split is not None else models.default_splits(config.model, config.groups)
    if points is None:
        measured = split(model, config.groups, example, critic=config.critic)
        points = agree([g.units[0] for g in measured[1:]])
    groups = split(model, config.groups, example, critic=config.critic, split_points=points)
    return groups, [g.units[0] for g in groups[1:]]


def total_steps(config: Config, per_epoch: int) -> int:
    """Batches of the whole run."""
    planned = config.epochs * per_epoch
    return min(planned, config.steps) if config.steps else planned


def serial_block(config: Config, per_epoch: int) -> int:
    """Serial batches in a row; where nobody said, an epoch of so many batches."""
    return config.serial_block or per_epoch


def build_trainer(
    config: Config,
    groups: list[Group],
    devices: list[torch.device],
    steps: int,
    samples: int | None = None,
    sample_folder: Path | None = None,
) -> Trainer:
    """The trainer of a run of ``steps`` batches of a set of ``samples``.

    ``sample_folder``: where files with the samples' state go, for a run that asks for such.
    """
    return Trainer(
        groups,
        build_method(config),
        codec=config.codec,
        devices=devices,
        optimizer=partial(_optimizer, config),
        scheduler=partial(_scheduler, config, math.ceil(steps / config.accumulate)),
        schedule=_schedule(config, steps),
        feedback_delay=config.feedback_delay,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        ignore_index=config.ignore_index,
        autocast=torch.bfloat16 if config.autocast == "bf16" else None,
        compile=config.compile,
        channels_last=config.channels_last,
        checksum=config.checksum,
        replicas=config.replicas,
        start_timeout=config.start_timeout,
        step_timeout=config.step_timeout,
        samples=samples if config.method in LAYER_PARALLEL else None,
        sample_codec=config.lambda_codec,
        sample_folder=sample_folder if config.lambda_store == "disk" else None,
        graphs={"auto": None, "on": True, "off": False}[config.graphs],
        diagnose=config.diagnose,
    )


def _schedule(config: Config, steps: int) -> str | Hybrid | Async:
    if config.schedule == "async":
        return Async(steps, config.buffer, config.reuse_limit, config.slow_group, config.slow_down)
    if config.serial:
        block = 16 if config.serial_block is None else config.serial_block
        return Hybrid(config.serial, config.schedule, block, config.serial_microbatches)
    return config.schedule


def _optimizer(config: Config, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    lr, decay, params = config.lr, config.weight_decay, list(params)
    fused = on_cuda(params)
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(
            params, lr, config.momentum, weight_decay=decay, nesterov=nesterov, fused=fused
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(params, lr, weight_decay=decay, fused=fused)


def _scheduler(
    config: Config, updates: int, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if config.lr_schedule == "onecycle":
        # One update more than planned: OneCycleLR counts the step of its construction.
        return schedulers.OneCycleLR(optimizer, config.lr, updates + 1, cycle_momentum=False)
    if config.lr_schedule == "step":
        # arXiv 2102.01963: a tenth at 50 and 75 % of the run.
        return schedulers.MultiStepLR(optimizer, [updates // 2, updates * 3 // 4], 0.1)
    if config.lr_schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, updates)
    return schedulers.ConstantLR(optimizer, 1.0)
