"""Under torchrun: this process's place, and what all of them agree on before they train."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from lct_fast.cli.config import Config, ConfigError


def count() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def reads_data(config: Config) -> bool:
    """Whether this process trains the first group, in any replica."""
    return int(os.environ.get("RANK", "0")) % config.groups == 0 or count() == 1


def check(config: Config) -> None:
    """Refuses options that do not fit the processes there are."""
    size = count()
    if size == 1 and config.replicas == 1:
        return
    if config.schedule == "lockstep":
        raise ConfigError(
            f"torchrun started {size} processes, but --schedule {config.schedule} runs in one: use --schedule "
            f"pipelined, or start without torchrun"
        )
    if config.slow_down > 1:
        raise ConfigError(
            "slow_down simulates a slow group in one process: leave it out, or start without torchrun"
        )
    if config.replicas > 1 and config.groups * config.replicas != size:
        needed = config.groups * config.replicas
        raise ConfigError(
            f"--groups {config.groups} in --replicas {config.replicas} take {needed} processes, but there "
            f"{'is 1' if size == 1 else f'are {size}'}: start torchrun with {needed} in all (--nproc-per-node)"
        )
    if config.replicas == 1 and config.groups != size:
        raise ConfigError(
            f"{config.schedule} over processes takes one process a group: --groups {config.groups}, but torchrun "
            f"started {size} processes; use --nproc-per-node {config.groups} or --groups {size}"
        )


def join(devices: list[torch.device]) -> torch.device:
    """Joins the other processes, and returns the device of this one."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = devices[local % len(devices)]
    if device.type == "cuda":
        if str(device) == "cuda":
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"process {local} of this machine has no GPU of its own: it shows {torch.cuda.device_count()}; "
                    f"start fewer processes here, or use --device cpu"
                )
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def from_first(value: Any) -> Any:
    """Rank 0's ``value``, in every process; ``value`` itself without torchrun."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def leave() -> None:
    """The end of a run over processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def speaks(everywhere: bool) -> bool:
    """Whether this process tells of an error; of one that is the same ``everywhere`` only rank 0 does."""
    if is_first() or not everywhere:
        return True
    # The first process to end makes torchrun end the rest.
    time.sleep(3)
    return False


def refuse() -> int:
    """Exit status 2; at once where other processes and the threads of links would keep this one from ending."""
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        os._exit(2)
    return 2
