"""`lct-fast` with one fault at a chosen moment, for benchmarks/fault_drills.py: a process of a drill, never of a run.

LCT_DRILL holds a `Fault` as JSON. It strikes in the process of its rank, behind its batch, in the first attempt only.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lct_fast.cli import main
from lct_fast.engine import checkpoint
from lct_fast.engine.transport import packet
from lct_fast.engine.transport.heartbeat import Heartbeat
from lct_fast.engine.transport.ranks import ProcessTransport

KINDS = ("kill", "stop", "cut", "full", "flip")


@dataclass(frozen=True)
class Fault:
    """`kind` strikes in `rank`, `delay` seconds after it has trained on `batch`. `note` is the file that says when."""

    kind: str
    rank: int
    batch: int
    delay: float
    seed: int
    note: str
    part: str = "header"


def arm(fault: Fault) -> None:
    """Makes the fault happen."""
    strikes: dict[str, Callable[[Fault], None]] = {
        "kill": lambda f: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda f: os.kill(os.getpid(), signal.SIGSTOP),
        "cut": _cut,
        "full": _fill,
        "flip": _flip,
    }
    done = Heartbeat.done

    def strike() -> None:
        time.sleep(fault.delay)
        _note(fault)
        strikes[fault.kind](fault)

    def watched(heart: Heartbeat, batch: int) -> None:
        done(heart, batch)
        if batch == fault.batch:
            threading.Thread(target=strike, daemon=True).start()

    Heartbeat.done = watched  # type: ignore[method-assign,assignment]


def _note(fault: Fault) -> None:
    partial = Path(fault.note).with_suffix(".tmp")
    partial.write_text(json.dumps({"at": time.time()}))
    os.replace(partial, fault.note)


def _cut(fault: Fault) -> None:
    """Shuts down every connection of this process to the others', but not those to the store."""
    store = int(os.environ["MASTER_PORT"])
    for name in os.listdir("/proc/self/fd"):
        try:
            link = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with link:
            if link.family not in (socket.AF_INET, socket.AF_INET6) or link.type != socket.SOCK_STREAM:
                continue
            try:
                if link.getpeername()[1] != store:
                    link.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It listens, or has been closed meanwhile.
                continue


def _fill(fault: Fault) -> None:
    """From now on the disk of this process takes half of a checkpoint's file."""

    def full(tensors: dict[str, Tensor], file: Path) -> None:
        save_file(tensors, file)
        os.truncate(file, file.stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    setattr(checkpoint, "save_file", full)  # noqa: B010 (it is imported there)


def _flip(fault: Fault) -> None:
    """One bit of the header or body of the next packet to the group behind changes on its way."""
    send, chance = ProcessTransport.send, random.Random(fault.seed)

    def flipped(transport: ProcessTransport, header: Tensor, body: Tensor | None) -> None:
        if transport.peer > fault.rank and (body is not None or fault.part == "header"):
            ProcessTransport.send = send  # type: ignore[method-assign]
            if body is None or fault.part == "header":
                header = header.clone()
                # Without checksums only the format number is checked bit by bit.
                word = chance.randrange(len(header)) if sealed() else 0
                header[word] ^= 1 << chance.randrange(63)
            else:
                body = body.clone()
                body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        send(transport, header, body)

    ProcessTransport.send = flipped  # type: ignore[method-assign,assignment]


def sealed() -> bool:
    """Whether packets carry checksums, as they do from format 3 on."""
    return (packet.MAGIC & 0xFFFF) >= 3


def run() -> int:
    """As `python -m lct_fast`, with the fault."""
    described: dict[str, Any] | None = json.loads(os.environ.get("LCT_DRILL", "null"))
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if described is not None and first_attempt and described["rank"] == int(os.environ["RANK"]):
        arm(Fault(**described))
    return main()


if __name__ == "__main__":
    sys.exit(run())
