"""Values out of range, and options that do not go together."""

from __future__ import annotations

import dataclasses
from typing import Any

from lct_fast import codecs
from lct_fast.cli.build_method import build_method
from lct_fast.cli.options import LAYER_PARALLEL, TEXT_METHODS, Config, ConfigError
from lct_fast.engine.hybrid import Hybrid
from lct_fast.methods import Greedy, LikelihoodRatio
from lct_fast.methods.local_critic import own_share


def check(config: Config, known: dict[str, dataclasses.Field[Any]]) -> None:
    """Refuses values out of range and options that do not go together.

    Raises:
        ConfigError: the first of them, in one line.
    """
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
    for key, most in (("seed", 2**63 - 1), ("threads", 1024)):
        if (getattr(config, key) or 0) > most:
            raise ConfigError(f"{key}: expected at most {most}, got {getattr(config, key)}")
    if config.schedule == "pipelined" and config.method == "backprop":
        raise ConfigError(
            "backprop has no pipelined schedule here: use --schedule lockstep, or local-critic or greedy"
        )
    try:
        own_share(config.critic_loss)
        build_method(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.critic_target == "last" and config.schedule != "lockstep":
        raise ConfigError(
            f"critic_target: last takes --schedule lockstep, got {config.schedule}; elsewhere feedback goes back over "
            f"one cut"
        )
    if config.schedule == "pipelined" and config.feedback_delay < 1:
        raise ConfigError(f"feedback_delay: pipelined needs 1 or more, got {config.feedback_delay}")
    _check_likelihood_ratio(config, known)
    _check_text(config)
    _check_serial(config)
    _check_async(config, known)
    _check_layer_parallel(config, known)
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
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"clip_norm: expected a positive number, got {config.clip_norm}")


def _check_likelihood_ratio(config: Config, known: dict[str, dataclasses.Field[Any]]) -> None:
    if config.method != LikelihoodRatio.name:
        for key in (
            "noise",
            "copies",
            "sigma",
            "antithetic",
            "one_at_a_time",
            "sampling",
            "baseline",
            "learn_sigma",
            "storage",
        ):
            if getattr(config, key) != known[key].default:
                raise ConfigError(f"{key}: is for --method likelihood-ratio, this run's is {config.method}")
        return
    if config.schedule != "lockstep":
        raise ConfigError(
            f"likelihood-ratio has no {config.schedule} schedule: every group asks those behind it for their loss of "
            f"the same batch; use --schedule lockstep"
        )
    if config.codec != ["none"]:
        raise ConfigError(
            f"codec: likelihood-ratio sends what crosses as it is; leave it out, got {config.codec}"
        )
    if config.compile and config.noise != "boundary":
        raise ConfigError(f"compile: noise {config.noise} goes into single layers; use --noise boundary")


def _check_text(config: Config) -> None:
    if config.data.partition(":")[0] != "text":
        if config.window is not None:
            raise ConfigError(f"window: is for text:FILE, this run's data is {config.data}")
        return
    if config.window is not None and config.window < 1:
        raise ConfigError(f"window: expected a number >= 1, got {config.window}")
    if config.augment != "none":
        raise ConfigError(f"augment: a text has none, got {config.augment!r}; leave it out")
    if config.method not in TEXT_METHODS:
        raise ConfigError(
            f"{config.method} does not train texts: its samples are images; use {', '.join(TEXT_METHODS)}"
        )


def _check_serial(config: Config) -> None:
    try:
        schedule = config.schedule if config.serial else "lockstep"
        block = 16 if config.serial_block is None else config.serial_block
        hybrid = Hybrid(config.serial, schedule, block, config.serial_microbatches)
        hybrid.check_rows(config.batch_size)
    except ValueError as error:
        raise ConfigError(f"--serial, --serial-block, --serial-microbatches: {error}") from None
    if config.serial and config.method == "backprop":
        raise ConfigError(
            "serial: all batches of backprop are serial; leave --serial out, or choose another method"
        )


def _check_layer_parallel(config: Config, known: dict[str, dataclasses.Field[Any]]) -> None:
    if config.method not in LAYER_PARALLEL:
        for key in ("eta", "auxiliary", "lambda_store", "lambda_codec"):
            if getattr(config, key) != known[key].default:
                raise ConfigError(
                    f"{key}: is for {' and '.join(LAYER_PARALLEL)}, this run's method is {config.method}"
                )
        return
    try:
        codecs.build(config.lambda_codec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.auxiliary and (config.lambda_store, config.lambda_codec) != ("memory", "none"):
        raise ConfigError(
            "auxiliary: nets take the place of a store; leave out --lambda-store and --lambda-codec"
        )
    if config.replicas > 1:
        raise ConfigError(
            f"replicas: {config.method} keeps a state for each sample, which they do not share; use 1"
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
