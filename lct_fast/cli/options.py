"""Options of a run: one dataclass is the YAML file, the command line and config.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lct_fast import codecs
from lct_fast.engine.schedules.schedule import SCHEDULES
from lct_fast.methods.likelihood_ratio import NOISE
from lct_fast.methods.likelihood_ratio_noise import SAMPLING
from lct_fast.methods.likelihood_ratio_storage import STORAGE
from lct_fast.methods.local_critic import TARGETS

LAYER_PARALLEL = ("penalty", "augmented-lagrangian")
METHODS = ("local-critic", "greedy", *LAYER_PARALLEL, "likelihood-ratio", "backprop")
TEXT_METHODS = ("local-critic", "greedy", "backprop")
LR_SCHEDULES = ("onecycle", "step", "cosine", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw")
AUGMENT = ("none", "crop_flip")
LAMBDA_STORES = ("memory", "disk")


class ConfigError(ValueError):
    """An option that is unknown, of the wrong type, or out of range."""


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field. ``None`` as default of one that is not optional means: from the data set's table below."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Options of ``lct-fast train``; names with ``_`` are written with ``-`` on the command line."""

    data: str = _option(
        "digits", "digits | digits:fold=0..4 | cifar10:PATH | cifar100:PATH | images:DIR | text:FILE"
    )
    limit: int | None = _option(
        None, "train on this many images, balanced over the classes; of a text, characters from its begin"
    )
    window: int | None = _option(None, "text: characters of a training window; default 64")
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
        None,
        "the critics' Adam learning rate (local-critic); default 1e-3 for images, 5e-4 for a text, 1e-4 for digits",
    )
    beta: float = _option(None, "weight of the penalty (penalty, augmented-lagrangian)")
    eta: float | None = _option(None, "step of lambda (penalty, augmented-lagrangian); default 0.2 / beta")
    auxiliary: bool = _option(False, "a small net foretells lambda in place of a store (penalty)")
    lambda_store: str = _option(
        "memory", "where lambda is kept: in the device's memory, or in files of the run folder", LAMBDA_STORES
    )
    lambda_codec: str = _option("none", "what lambda is kept as, e.g. bf16, int8 or downsample:2")
    noise: str = _option("boundary", "where noise goes (likelihood-ratio)", NOISE)
    copies: int = _option(32, "noisy copies of each sample (likelihood-ratio)")
    sigma: float | None = _option(
        None, "standard deviation of the noise (likelihood-ratio); default 0.1, on weights 0.01"
    )
    antithetic: bool = _option(True, "copies come in pairs with opposite noise (likelihood-ratio)")
    one_at_a_time: bool = _option(True, "layer-wise noise in one layer at a time (likelihood-ratio)")
    sampling: str = _option("random", "how noise is drawn (likelihood-ratio)", SAMPLING)
    baseline: bool = _option(True, "take the noise-free loss off the others (likelihood-ratio)")
    learn_sigma: bool = _option(False, "learn the noise's scale too (likelihood-ratio)")
    storage: str = _option("full", "how layers' inputs are kept (layer-wise likelihood-ratio)", STORAGE)
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
    serial_block: int | None = _option(
        None, "such batches in a row; default 16, for penalty and augmented-lagrangian an epoch"
    )
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
    batch_size: int = _option(
        None, "samples a batch, of all replicas together; of a text, streams read side by side"
    )
    accumulate: int = _option(1, "batches to an update")
    optimizer: str = _option(None, "each group's optimiser; default sgd, of a text adam", OPTIMIZERS)
    lr: float = _option(None, "learning rate (its peak, with onecycle)")
    momentum: float = _option(0.9, "momentum of sgd (Nesterov)")
    weight_decay: float = _option(None, "L2 weight decay; default 5e-4, of a text 0")
    lr_schedule: str = _option(
        "onecycle", "onecycle | step (/10 at 50 and 75 %%) | cosine | constant", LR_SCHEDULES
    )
    clip_norm: float | None = _option(None, "largest gradient norm of a group; default none, of a text 1")
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
