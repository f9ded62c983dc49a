"""What options are when the user does not say: by data set, then by method."""

from __future__ import annotations

from lct_fast.cli.options import LAYER_PARALLEL, Config
from lct_fast.engine.schedules.schedule import PIPELINED_DELAY
from lct_fast.methods import LikelihoodRatio

# What fits a data set when the user doesn't say; the rest are for 32x32 and larger images.
_DIGITS = {
    "model": "digits_cnn",
    "epochs": 20,
    "batch_size": 64,
    "lr": 0.05,
    "augment": "none",
    "critic": ["pooled_linear:pool=2"],
    "codec": ["none"],
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "critic_lr": 1e-4,
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
    "optimizer": "sgd",
    "weight_decay": 5e-4,
}
# Characters; docs/text.md has what was tried.
_TEXT = {
    "model": "char_lstm",
    "epochs": 10,
    "batch_size": 32,
    "window": 64,
    "lr": 2e-3,
    "augment": "none",
    "critic": ["token_linear"],
    "codec": ["none"],
    "optimizer": "adam",
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "critic_lr": 5e-4,
}
# Over both: an estimated gradient may be far too long, and critics, which nothing trains, are split's choice.
_LIKELIHOOD_RATIO = {"clip_norm": 1.0, "critic": None}
# Batch norm is refused; an epoch takes as long as `copies` of them.
_NOISY_DIGITS = {"model": "digits_cnn:norm=none", "epochs": 10}
# What penalty and augmented-lagrangian need instead: their losses are sums over features.
_LAYER_PARALLEL = {
    "lr": 0.005,
    "beta": 0.01,
}
# Of all other methods; beta is not read there.
_OTHERS = {
    "beta": 0.01,
    "serial_block": 16,
}
# Where a data set's table says nothing.
_ELSEWHERE = {"critic_loss": "l1"}


def fill(config: Config) -> None:
    """Sets the options that are None and have a default that depends on others."""
    kind = config.data.partition(":")[0]
    table = _ELSEWHERE | {"digits": _DIGITS, "text": _TEXT}.get(kind, _IMAGES)
    table = table | (_LAYER_PARALLEL if config.method in LAYER_PARALLEL else _OTHERS)
    if config.method == LikelihoodRatio.name:
        table = table | _LIKELIHOOD_RATIO | (_NOISY_DIGITS if kind == "digits" else {"model": "vgg8"})
    for key, value in table.items():
        if getattr(config, key) is None:
            setattr(config, key, value)
    if getattr(config, "feedback_delay") is None:  # noqa: B009 (typed int, and None until here)
        config.feedback_delay = PIPELINED_DELAY if config.schedule == "pipelined" else 0
