"""Damaged packets, read and decoded as a group's process would: refused by name or decoded, nothing else.

    python -m tests.engine.fuzz_packets --count 10000 [--native lct_fast/_C...so]

``--native`` takes another build of the native module, such as one under AddressSanitizer.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from lct_fast import codecs
from lct_fast.codecs import CodecError, VectorQuantization
from lct_fast.engine import PacketError
from lct_fast.engine.transport import packet
from lct_fast.engine.transport.packet import Kind, Packet

SPECS = (
    *("none", "bf16", "fp8", "int8", "int4:32", "int2", "topk:4"),
    *("vq:16,4", "vq:5,3", "vq:16,4,2", "downsample:2", "downsample:3+vq:16,4"),
)
ODD = (0, 1, -1, 2, 3, 7, 8, 63, 64, 255, 1 << 16, 1 << 31, 1 << 40, 1 << 62, -(1 << 62))


class Wire:
    """A codec's packets and the decoder they are meant for."""

    def __init__(self, spec: str) -> None:
        self.encoder, self.decoder = codecs.build(spec), codecs.build(spec)
        self.number = packet.codec_number(spec)
        shape = (3, 15, 5, 4) if "5,3" in spec else (3, 8, 6, 4)
        self.shapes = [torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)]
        # Patches need feature maps too.
        if not spec.startswith(("downsample", "vq:16,4,2")):
            self.shapes.append(torch.randn(16, shape[1]))
        for x in self.shapes:
            self.decoder.decode(self.encoder.encode(x))

    def packet(self, draw: random.Random) -> tuple[Tensor, Tensor]:
        x = draw.choice(self.shapes)
        if isinstance(self.encoder, VectorQuantization) and draw.random() < 0.3:
            # The packet carries a codebook.
            self.encoder._renew()
        message = Packet(
            Kind.TRAIN,
            7,
            [torch.arange(len(x)), torch.randn(4)],
            coded=self.encoder.encode(x),
            codec=self.number,
        )
        header = torch.zeros(packet.WORDS, dtype=torch.int64)
        # Exactly as long as the body, so that whatever lies behind it is not ours.
        body = torch.empty(packet.body_bytes(message), dtype=torch.uint8)
        packet.write(message, header, body)
        return header, body

    def read(self, header: Tensor, body: Tensor) -> str:
        """What came of it: "decoded" or the kind of refusal."""
        try:
            got = packet.read(header, body)
            if got.coded is None or got.codec != self.number:
                return "not this codec's"
            y = self.decoder.decode(got.coded)
        except PacketError as error:
            return " ".join(str(error).split()[:2])
        except CodecError:
            return "refused by the codec"
        assert tuple(y.shape) == got.coded.layout.shape and y.dtype == got.coded.layout.dtype
        # Reads all of it, and all that came beside it.
        float(y.double().sum())
        for t in got.tensors:
            t.clone()
        return "decoded"


def damage(header: Tensor, body: Tensor, draw: random.Random) -> Tensor:
    """A few words and bytes are changed, or the body is cut; most of the time the sums are made to fit. The body."""
    for _ in range(draw.randint(1, 4)):
        how = draw.randrange(12)
        if how < 3:
            header[draw.randrange(packet.WORDS)] = draw.choice(ODD)
        elif how < 5:
            header[draw.randrange(packet.WORDS)] = header[draw.randrange(packet.WORDS)].item()
        elif how < 7:
            header[draw.randrange(packet.WORDS)] += draw.choice((-1, 1, 64))
        elif how < 11 and len(body):
            body[draw.randrange(len(body))] = draw.randrange(256)
        elif len(body) > 64:
            body = body[: 64 * draw.randrange(len(body) // 64)].clone()
    header[0] = packet.MAGIC
    if draw.random() < 0.9:
        size = int(header[5])
        packet.seal(header, body, 0.0, checksum=size == len(body) and draw.random() < 0.5)
    return body


def run(count: int, seed: int) -> Counter[str]:
    """``count`` damaged packets of all codecs in turn; how many ended in which way."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    wires = [Wire(spec) for spec in SPECS]
    ends: Counter[str] = Counter()
    for i in range(count):
        wire = wires[i % len(wires)]
        header, body = wire.packet(draw)
        body = damage(header, body, draw)
        try:
            ends[wire.read(header, body)] += 1
        except Exception as error:
            words = {k: v for k, v in enumerate(header.tolist()) if v}
            raise AssertionError(f"packet {i} of {wire.encoder.name}: {error!r}; words {words}") from error
    return ends


def use_native(path: Path) -> None:
    """``lct_fast._C`` from this file."""
    loader = importlib.machinery.ExtensionFileLoader("lct_fast._C", str(path))
    spec = importlib.util.spec_from_file_location("lct_fast._C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["lct_fast._C"] = module


def main() -> int:
    """Prints how the packets ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--native", type=Path)
    args = parser.parse_args()
    if args.native is not None:
        use_native(args.native)
    torch.set_num_threads(1)
    for end, count in run(args.count, args.seed).most_common():
        print(f"{count:6d}  {end}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
