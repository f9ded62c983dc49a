"""Options of a run: one dataclass is the YAML file, the command line and config.yaml."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lct_fast import codecs
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.schedules import PIPELINED_DELAY, SCHEDULES
from lct_fast.methods import Greedy
from lct_fast.methods.local_critic import TARGETS, own_share

METHODS = ("local-critic", "greedy", "backprop")
LR_SCHEDULES = ("onecycle", "step", "cosine", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw")
AUGMENT = ("none", "crop_flip")


class ConfigError(ValueError):
    """An option that is unknown, of the wrong type, or out of range."""


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field. ``None`` as default of one that is not optional means: from the data set's table below."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Options of ``lct-fast train``; names with ``_`` are written with ``-`` on the command line."""

    data: str = _option("digits", "digits | digits:fold=0..4 | cifar10:PATH | cifar100:PATH | images:DIR")
    limit: int | None = _option(None, "train on this many images, balanced over the classes")
    model: str = _option(None, "a model's spec, e.g. lct_vgg:width=0.25")
    method: str = _option("local-critic", "how groups learn", METHODS)
    groups: int = _option(4, "number of groups K")
    split: list[str] | None = _option(
        None,
        "names of the modules that start groups 2..K; default: the model's own, else balanced by measurement",
    )
    critic: list[str] = _option(None, "critic's spec, one for all cuts or one a cut, e.g. conv_fc:convs=1")
    critic_every: int = _option(1, "update the critics on every n-th update (local-critic)")
    critic_loss: str = _option(
        None,
        "the critic's loss (local-critic): l1, the paper's | one_sided | half_sided | mixed:W, W from 0 to 1; "
        "default half_sided for images, l1 for the rest",
    )
    critic_target: str = _option(
        "next", "whose loss critics foretell (local-critic); last: in lockstep only", TARGETS
    )
    critic_lr: float = _option(
        None, "the critics' Adam learning rate (local-critic); default 1e-3 for images, 1e-4 for the rest"
    )
    codec: list[str] = _option(
        None, f"what crosses cuts in training, one for all or one a cut: auto | {' | '.join(codecs.names())}"
    )
    schedule: str = _option("lockstep", "how groups share time", SCHEDULES)
    feedback_delay: int = _option(
        None, "batches until a critic learns from a batch (local-critic); default 0, pipelined 3"
    )
    serial: float = _option(
        0.0, "share of batches trained by back-propagation through all groups, 0 <= Q < 1 (not for backprop)"
    )
    serial_block: int = _option(16, "such batches in a row")
    serial_microbatches: int = _option(1, "equal parts that such a batch is cut into")
    buffer: int = _option(1, "async: slots of the replay buffer at each cut")
    reuse_limit: int | None = _option(
        None, "async: how often a group trains on what a slot holds at most; with all at it the group idles"
    )
    slow_group: int | None = _option(None, "async in one process: number of the group that is slow")
    slow_down: float = _option(1.0, "async in one process: how many times as slow that group is")
    replicas: int = _option(1, "pipelines that share every batch (pipelined, under torchrun)")
    epochs: int = _option(None, "passes over the data")
    steps: int | None = _option(None, "stop after this many batches; with it, epochs only bounds the run")
    batch_size: int = _option(None, "samples a batch, of all replicas together")
    accumulate: int = _option(1, "batches to an update")
    optimizer: str = _option("sgd", "each group's optimiser", OPTIMIZERS)
    lr: float = _option(None, "learning rate (its peak, with onecycle)")
    momentum: float = _option(0.9, "momentum of sgd (Nesterov)")
    weight_decay: float = _option(5e-4, "L2 weight decay")
    lr_schedule: str = _option(
        "onecycle", "onecycle | step (/10 at 50 and 75 %%) | cosine | constant", LR_SCHEDULES
    )
    clip_norm: float | None = _option(None, "largest gradient norm of a group")
    augment: str = _option(None, "augmentation of training images", AUGMENT)
    ignore_index: int = _option(-100, "label that carries no loss")
    autocast: str = _option("none", "mixed precision", ("none", "bf16"))
    compile: bool = _option(False, "run groups through torch.compile")
    channels_last: bool = _option(False, "channels-last memory")
    checksum: bool | None = _option(
        None, "over processes, check the contents of packets; default: on the CPU"
    )
    graphs: str = _option(
        "auto", "CUDA graphs, pipelined in one process; auto: where they can be", ("auto", "on", "off")
    )
    device: str = _option("auto", "auto | cpu | cuda | cuda:0,cuda:1")
    threads: int | None = _option(None, "CPU threads; default: torch's")
    seed: int = _option(0, "seed of weights, order and augmentation")
    diagnose: int = _option(
        0, "batches between readings of every group's gradient; cosines to the true one in lockstep; 0: never"
    )
    checkpoint_every: int | None = _option(None, "batches between checkpoints; default: once an epoch")
    log_every: int = _option(20, "batches between lines of metrics.jsonl")
    start_timeout: float = _option(
        600.0, "seconds a process may take to start and for its first batch, before all end (over processes)"
    )
    step_timeout: float = _option(
        300.0, "seconds a process's training loop may stand still later; more than its longest step"
    )


# What fits a data set when the user doesn't say; the rest are for 32x32 and larger images.
_DIGITS = {
    "model": "digits_cnn",
    "epochs": 20,
    "batch_size": 64,
    "lr": 0.05,
    "augment": "none",
    "critic": ["pooled_linear:pool=2"],
    "codec": ["none"],
}
_IMAGES = {
    "model": "lct_vgg",
    "epochs": 50,
    "batch_size": 128,
    "lr": 0.1,
    "augment": "crop_flip",
    "critic": ["pooled_linear:pool=4"],
    # docs/critics.md: with the paper's, short trainings stay far behind.
    "critic_loss": "half_sided",
    "critic_lr": 1e-3,
    "codec": ["none"],
}
# Where a data set's table says nothing.
_ELSEWHERE = {"critic_loss": "l1", "critic_lr": 1e-4}


def resolve(given: dict[str, Any]) -> Config:
    """A checked Config from the options given; the data set's defaults fill the rest.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; one line.
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown config key {key!r}: {hint}")
    values = {k: _typed(known[k], v) for k, v in given.items() if v is not None}
    config = Config(**values)
    table = _DIGITS if config.data.partition(":")[0] == "digits" else _IMAGES
    for key, value in (_ELSEWHERE | table).items():
        if getattr(config, key) is None:
            setattr(config, key, value)
    if getattr(config, "feedback_delay") is None:  # noqa: B009 (typed int, and None until here)
        config.feedback_delay = PIPELINED_DELAY if config.schedule == "pipelined" else 0
    _check(config, known)
    return config


def _check(config: Config, known: dict[str, dataclasses.Field[Any]]) -> None:
    for key, f in known.items():
        choices, value = f.metadata["choices"], getattr(config, key)
        if choices and value not in choices:
            raise ConfigError(f"{key}: expected one of {', '.join(choices)}; got {value!r}")
    for key in (
        "groups",
        "replicas",
        "critic_every",
        "epochs",
        "batch_size",
        "accumulate",
        "log_every",
        "buffer",
    ):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}: expected a number >= 1, got {getattr(config, key)}")
    for key in ("limit", "steps", "threads", "checkpoint_every", "reuse_limit"):
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise ConfigError(f"{key}: expected a number >= 1, got {getattr(config, key)}")
    for key in ("lr", "critic_lr", "start_timeout", "step_timeout"):
        if not 0 < getattr(config, key) < float("inf"):
            raise ConfigError(f"{key}: expected a positive number, got {getattr(config, key)}")
    for key in ("feedback_delay", "weight_decay", "momentum", "seed", "diagnose"):
        if not 0 <= getattr(config, key) < float("inf"):
            raise ConfigError(f"{key}: expected a number >= 0, got {getattr(config, key)}")
    if config.schedule == "pipelined" and config.method == "backprop":
        raise ConfigError(
            "backprop has no pipelined schedule here: use --schedule lockstep, or local-critic or greedy"
        )
    try:
        own_share(config.critic_loss)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.critic_target == "last" and config.schedule != "lockstep":
        raise ConfigError(
            f"critic_target: last takes --schedule lockstep, got {config.schedule}; elsewhere feedback goes back over "
            f"one cut"
        )
    if config.schedule == "pipelined" and config.feedback_delay < 1:
        raise ConfigError(f"feedback_delay: pipelined needs 1 or more, got {config.feedback_delay}")
    _check_serial(config)
    _check_async(config, known)
    if config.replicas > 1 and (config.schedule != "pipelined" or config.groups < 2 or config.serial):
        raise ConfigError(
            f"replicas: {config.replicas} of them take --schedule pipelined, 2 groups or more and no --serial, got "
            f"--schedule {config.schedule}, {config.groups} and {config.serial}"
        )
    if config.batch_size % config.replicas:
        raise ConfigError(
            f"batch_size: it is shared equally by {config.replicas} replicas, got {config.batch_size}; use "
            f"{-(-config.batch_size // config.replicas) * config.replicas}"
        )
    if config.graphs == "on" and config.schedule != "pipelined":
        raise ConfigError("graphs: CUDA graphs are for --schedule pipelined in one process")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise ConfigError(f"clip_norm: expected a positive number, got {config.clip_norm}")


def _check_serial(config: Config) -> None:
    try:
        schedule = config.schedule if config.serial else "lockstep"
        hybrid = Hybrid(config.serial, schedule, config.serial_block, config.serial_microbatches)
        hybrid.check_rows(config.batch_size)
    except ValueError as error:
        raise ConfigError(f"--serial, --serial-block, --serial-microbatches: {error}") from None
    if config.serial and config.method == "backprop":
        raise ConfigError(
            "serial: all batches of backprop are serial; leave --serial out, or choose another method"
        )


def _check_async(config: Config, known: dict[str, dataclasses.Field[Any]]) -> None:
    if config.schedule != "async":
        for key in ("buffer", "reuse_limit", "slow_group", "slow_down"):
            if getattr(config, key) != known[key].default:
                raise ConfigError(f"{key}: is for --schedule async, this run's is {config.schedule}")
        return
    if config.method != Greedy.name:
        raise ConfigError(f"{config.method} has no async schedule: use --method greedy")
    if not 1 <= config.slow_down < float("inf"):
        raise ConfigError(f"slow_down: expected a number >= 1, got {config.slow_down}")
    if config.slow_group is not None and not 1 <= config.slow_group <= config.groups:
        raise ConfigError(f"slow_group: expected 1..{config.groups}, got {config.slow_group}")
    if config.slow_down > 1 and config.slow_group is None:
        raise ConfigError(f"slow_down {config.slow_down}: say which group is slow with --slow-group")


def _typed(f: dataclasses.Field[Any], value: Any) -> Any:
    kinds = str(f.type)
    if "list" in kinds:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in items):
            raise ConfigError(f"{f.name}: expected a list of names, got {value!r}")
        return items
    wanted = next(t for t in (bool, int, float, str) if t.__name__ in kinds)
    if wanted is float and isinstance(value, str):
        # YAML reads 1e-4, without a dot, as a string.
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{f.name}: expected float, got {value!r}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{f.name}: expected {wanted.__name__}, got {value!r}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(k, str) for k in loaded):
        raise ConfigError(f"config {path}: expected a mapping of options, got {type(loaded).__name__}")
    return loaded


def write_yaml(config: Config, path: Path) -> None:
    """Writes every option, resolved."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option of Config as a flag; flags not given stay None."""
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        if f.default is not None and f.default is not False:
            text += f" (default {f.default})"
        kinds = str(f.type)
        if "bool" in kinds:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif "list" in kinds:
            parser.add_argument(flag, nargs="+", default=None, help=text)
        else:
            kind: Any = int if "int" in kinds else float if "float" in kinds else str
            metavar = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else None
            parser.add_argument(flag, type=kind, default=None, help=text, metavar=metavar)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line, over those of ``--config``."""
    flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    from_file = read_yaml(args.config) if args.config else {}
    return from_file | {k: v for k, v in flags.items() if v is not None}
