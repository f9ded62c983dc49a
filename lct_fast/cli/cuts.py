"""What a run's records say of its cuts: bytes, and how codebooks were used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lct_fast.engine.meter import Meter

_USE = ("codewords", "batches", "used", "perplexity", "drift", "codebooks")


def summary(codecs: Sequence[str], meter: Meter) -> list[dict[str, Any]]:
    """For each cut its codec and its bytes a sample: fp32's, those sent forward, codebooks among these, feedback, and
    those of serial steps.

    Over all cuts they add up to what the summary says of the run, whose ``wire_bytes_per_sample`` has the serial ones.
    """
    return [
        {
            "codec": codec,
            "raw_bytes_per_sample": meter.per_sample(group.raw_bytes),
            "wire_bytes_per_sample": meter.per_sample(group.wire_bytes),
            "codebook_bytes_per_sample": meter.per_sample(group.codebook_bytes),
            "feedback_bytes_per_sample": meter.per_sample(group.feedback_bytes),
            "serial_bytes_per_sample": meter.per_sample(group.serial_bytes),
        }
        for codec, group in zip(codecs, meter.groups, strict=False)
    ]


def codebook_records(meter: Meter, per_epoch: int) -> list[dict[str, Any]]:
    """A record for metrics.jsonl for each evaluation before which codebooks were used: a list over cuts for each key
    of ``Codec.codebook_use``, None where there is no codebook."""
    known = [{reading["batch"]: reading for reading in group.codebook} for group in meter.groups[:-1]]
    records = []
    for batch in sorted({batch for of_cut in known for batch in of_cut}):
        uses = [of_cut.get(batch, {}) for of_cut in known]
        epoch = -(-batch // per_epoch)
        lists = {key: [use.get(key) for use in uses] for key in _USE}
        records.append({"kind": "codebook", "step": batch, "epoch": epoch, **lists})
    return records
