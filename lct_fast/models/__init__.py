"""Networks as `nn.Sequential`s of named units, so that a cut can stand between any two of them.

`build("lct_vgg:width=0.25", num_classes=10)` makes one. The last unit is always `head`, an `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lct_fast._init import he_init
from lct_fast._spec import parse_spec
from lct_fast.models import (
    dgl_cnn,
    digits_cnn,
    lct_vgg,
    mlp,
    preact_resnet,
    resnet5,
    sequence,
    vgg8,
    wide_resnet,
)

_MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "dgl_cnn": dgl_cnn.dgl_cnn,
    "digits_cnn": digits_cnn.digits_cnn,
    "lct_vgg": lct_vgg.lct_vgg,
    "mlp": mlp.mlp,
    **{f"preact_resnet{d}": partial(preact_resnet.preact_resnet, d) for d in preact_resnet.DEPTHS},
    "resnet5": resnet5.resnet5,
    "vgg8": vgg8.vgg8,
    "wide_resnet": wide_resnet.wide_resnet,
}

_SPLITS: dict[str, dict[int, list[str]]] = {
    "dgl_cnn": dgl_cnn.SPLITS,
    "digits_cnn": digits_cnn.SPLITS,
    "lct_vgg": lct_vgg.SPLITS,
    **{f"preact_resnet{depth}": splits for depth, splits in preact_resnet.SPLITS.items()},
    "resnet5": resnet5.SPLITS,
    "vgg8": vgg8.SPLITS,
}


def names() -> list[str]:
    """Names `build` knows, sorted; those for text are `sequence_names()`."""
    return sorted(_MODELS)


def build(spec: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Sequential:
    """A new network, in training mode, He-initialised from torch's global generator.

    Input [N, in_channels, image_size, image_size], output logits [N, num_classes].

    Args:
        spec: `"name"` or `"name:key=value,key=value"`, see `names()`; every model takes width=, a factor
            on its channels, and the other keyword arguments of its function.
        num_classes: classes.
        in_channels: channels of the images.
        image_size: side of the (square) images in pixels.

    Raises:
        ValueError: unknown name or option, a bad value, or images the network cannot take.
    """
    if spec.partition(":")[0].strip() in sequence.MODELS:
        raise ValueError(f"model {spec!r} is for text: choose one for images, {', '.join(names())}")
    name, options = parse_spec(spec, "model", _MODELS)
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for what, value in sizes.items():
        if value < 1:
            raise ValueError(f"model {name!r}: {what} must be at least 1, got {value}")
    try:
        net = _MODELS[name](num_classes, in_channels, image_size, **options)
    except ValueError as error:
        raise ValueError(f"model {spec!r}: {error}") from None
    head = net[-1]
    he_init(net, head if isinstance(head, nn.Linear) else None)
    return net


def sequence_names() -> list[str]:
    """Names `build_sequence` knows, sorted."""
    return sorted(sequence.MODELS)


def build_sequence(spec: str, vocabulary: int, window: int) -> nn.Sequential:
    """A new network on token ids, in training mode, weights drawn from torch's global generator.

    Input int64 [N, T], output logits [N, T, vocabulary].

    Args:
        spec: as for `build`; see `sequence_names()`.
        vocabulary: number of token ids.
        window: tokens of a training window. A recurrent model takes any number, a transformer at most that.

    Raises:
        ValueError: unknown name or option, or a bad value.
    """
    if spec.partition(":")[0].strip() in _MODELS:
        raise ValueError(f"model {spec!r} is for images: choose one for text, {', '.join(sequence_names())}")
    name, options = parse_spec(spec, "model", sequence.MODELS)
    for what, value in {"vocabulary": vocabulary, "window": window}.items():
        if value < 1:
            raise ValueError(f"model {name!r}: {what} must be at least 1, got {value}")
    try:
        net = sequence.MODELS[name](vocabulary, window, **options)
    except ValueError as error:
        raise ValueError(f"model {spec!r}: {error}") from None
    sequence.init_head(net)
    return net


def default_splits(spec_name: str, groups: int) -> list[str] | None:
    """Names of the units that start groups 2..`groups` where the model's authors say so, else None.

    A name is the unit's qualified name, "layer2" or "layer2.0". Options in `spec_name` are ignored, but for the number
    of layers of a model for text, which are shared out evenly.

    Raises:
        ValueError: unknown model.
    """
    name = spec_name.partition(":")[0].strip()
    if name in sequence.MODELS:
        _, options = parse_spec(spec_name, "model", sequence.MODELS)
        return sequence.even_splits(name, options.get("layers", sequence.LAYERS), groups)
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(names())}")
    return [] if groups == 1 else list(_SPLITS.get(name, {}).get(groups, [])) or None


__all__ = ["build", "build_sequence", "default_splits", "names", "sequence_names"]
