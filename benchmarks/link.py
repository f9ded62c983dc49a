"""What codecs are worth on a link: the two-process step with each of them, and what `auto` chooses, on this network.

    python -m benchmarks.link --out benchmarks/results/link_loopback.json --name "loopback"

To slow the link down, run it in a network of its own (as root; both directions share the rate):

    ip netns add slow && ip netns exec slow ip link set lo up
    ip netns exec slow tc qdisc add dev lo root tbf rate 100mbit burst 2mbit latency 400ms
    ip netns exec slow python -m benchmarks.link --out FILE --name "100 Mb/s"

The network, its data and its optimiser are those of `benchmarks.pipeline`: greedy, a pooled critic, one thread a
process. Contenders take turns; a visit is a few steps, the slower process counting; medians over visits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline.command import ENVIRONMENT, TINY_WIDTHS

CODECS = ("none", "bf16", "int8", "int4", "vq:256,8", "auto")
# Steps before those that are timed: the pipeline and the link's slots fill.
WARM_UP = 4


def work(rank: int, folder: str, samples: int, steps: int, tiny: bool) -> None:
    """Process ``rank``; process 0 writes found.json."""
    import torch
    import torch.distributed as dist

    from benchmarks.pipeline.local import Decoupled
    from benchmarks.pipeline.model import POOLED, Task
    from benchmarks.pipeline.rivals import Setting

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    task = Task(widths=TINY_WIDTHS, batch=32) if tiny else Task()
    contenders = {
        codec: Decoupled(task, Setting("decoupled", "channels_last", 1, "greedy", POOLED, codec), rank)
        for codec in CODECS
    }
    times: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for _ in range(samples):
        for codec, contender in contenders.items():
            dist.barrier()
            for _ in range(WARM_UP):
                contender.step()
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, contender.run(steps))
            times[codec].append(max(everyone) / steps)
    found = {}
    for codec, contender in contenders.items():
        meter = contender.trainer.meter
        choice = contender.trainer.choices[0]
        found[codec] = {
            "seconds": times[codec],
            "seconds_median": statistics.median(times[codec]),
            "bytes_a_step": meter.wire_bytes / max(meter.samples, 1) * task.batch,
            "chosen": contender.trainer.wires[0],
            "reason": choice and choice.reason,
            "predicted_seconds": choice and choice.predicted,
        }
        contender.close()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """Runs both processes and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--name", default="this machine's network", help="what the link is, for the file")
    parser.add_argument("--samples", type=int, default=7, help="visits of each codec")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a visit")
    parser.add_argument("--tiny", action="store_true", help="a tiny network: a trial of the code")
    args = parser.parse_args(argv)
    os.environ |= ENVIRONMENT
    import torch
    from torch.multiprocessing.spawn import spawn

    from lct_fast.bench.machine import commit, cpu_model

    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (folder, args.samples, args.steps, args.tiny), nprocs=2)
        found = json.loads(Path(folder, "found.json").read_text())
    out = {
        "benchmark": "link",
        "link": args.name,
        "tiny": args.tiny,
        "device": cpu_model(),
        "threads": 1,
        "torch": torch.__version__,
        "commit": commit(),
        "codecs": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1) + "\n")
    for codec, row in found.items():
        label = codec if codec == row["chosen"] else f"{codec}: {row['chosen']}"
        print(
            f"{label:<16} {1e3 * row['seconds_median']:8.1f} ms  {row['bytes_a_step'] / 1e6:8.3f} MB a step"
        )
    print(found["auto"]["reason"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
