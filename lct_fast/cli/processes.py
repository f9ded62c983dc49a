"""Under torchrun: this process's place, and what all of them agree on before they train."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lct_fast.cli.config import Config, ConfigError
from lct_fast.engine import PeerError
from lct_fast.engine.errors import first_line

# This attempt's part of the rendezvous store, once the processes have met.
_store: Store | None = None


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


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def meet(start_timeout: float) -> bool:
    """Finds the other processes of this attempt in the rendezvous store; whether any of them was ``restarted``.

    torchrun keeps one store for all attempts, in which addresses of dead processes would be found; and on a machine
    on which nothing failed the count of restarts stays. So rank 0 names the attempt, to those who ask it now.

    Raises:
        PeerError: not all were there within ``start_timeout`` seconds.
    """
    global _store
    if count() == 1:
        return restarted()
    timeout = timedelta(seconds=start_timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        name = _answer(store, size, start_timeout) if rank == 0 else _ask(store, rank)
        _store = PrefixStore(name, store)
        _store.set(f"restarted/{rank}", str(int(restarted())))
        return any(int(_store.get(f"restarted/{r}")) for r in range(size))
    except RuntimeError as error:
        raise PeerError(
            f"not all {count()} processes met within start_timeout, {start_timeout:g} s ({first_line(error)})"
        ) from None


def _ask(store: Store, rank: int) -> str:
    question = uuid.uuid4().hex
    store.set(f"lct_fast/question/{rank}", question)
    name = store.get(f"lct_fast/answer/{question}").decode()
    store.set(f"{name}/heard/{rank}", "1")
    return name


def _answer(store: Store, size: int, timeout: float) -> str:
    """Answers until every rank has heard it: a question may be one that a dead process has left."""
    name = f"lct_fast/attempt/{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout
    while missing := [r for r in range(1, size) if not store.check([f"{name}/heard/{r}"])]:
        for rank in missing:
            if store.check([f"lct_fast/question/{rank}"]):
                store.set(f"lct_fast/answer/{store.get(f'lct_fast/question/{rank}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {missing} are missing")
        time.sleep(0.05)
    return name


def join(devices: list[torch.device], start_timeout: float) -> torch.device:
    """Joins the other processes, within ``start_timeout`` seconds, and returns the device of this one."""
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=start_timeout)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=count(), timeout=timeout)
    return device


def from_first(value: Any) -> Any:
    """Rank 0's ``value``, in every process; ``value`` itself without torchrun."""
    if count() == 1:
        return value
    box = [value]
    try:
        dist.broadcast_object_list(box, src=0)
    except RuntimeError as error:
        raise PeerError(
            f"a process ended or did not answer during the start ({first_line(error)}): see its own error"
        ) from None
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


def hear_no_more() -> None:
    """Over processes: a Ctrl-C that this process is ending by already; launchers pass it on more than once."""
    if count() > 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def refuse(status: int = 2) -> int:
    """``status``; at once where other processes and the threads of links would keep this one from ending."""
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
