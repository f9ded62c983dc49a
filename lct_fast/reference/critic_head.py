"""critic_head in plain torch: a linear head, softmax cross-entropy and their gradients.

    a        = act(h)                                    none | relu
    logits   = a weight^T + bias
    loss_n   = logsumexp(logits_n) - logits_n[target_n]
    dlogits  = softmax(logits) - onehot(target)          never scaled
    dh       = scale * (dlogits weight) * act'(h)
    dweight  = sum_n row_scale_n * dlogits_n (x) a_n
    dbias    = sum_n row_scale_n * dlogits_n

Everything is computed in float32 (float64 for float64 input) and rounded once, on output. Works on any
device. A row whose target is `ignore_index` has loss 0 and zero gradients; one whose target is any other
number outside [0, V) has loss NaN and zero gradients.
"""

import torch
from torch import Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activate(h: Tensor, activation: str) -> Tensor:
    return h.relu() if activation == "relu" else h


def critic_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None = None,
    activation: str = "none",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss and gradients of a linear softmax head.

    Args:
        h: [N, D], what the head reads, before `activation`.
        weight: [V, D].
        bias: [V] or None.
        target: [N] int64.
        scale: 0-dim; multiplies dh before it is rounded.
        row_scale: [N] or None; the whole factor of each row in dweight and dbias, the 1/N included.
        activation: "none" or "relu".
        ignore_index: the label of rows to leave out.

    Returns:
        loss [N] fp32 (fp64 for fp64 input), dlogits [N, V] and dh [N, D] in h's dtype, dweight [V, D] and
        dbias [V] in weight's dtype, or None and None without row_scale.
    """
    accumulator = _accumulator(h.dtype)
    a = _activate(h.to(accumulator), activation)
    w = weight.to(accumulator)
    logits = a @ w.T
    if bias is not None:
        logits = logits + bias.to(accumulator)

    ignored = target == ignore_index
    counted = (target >= 0) & (target < weight.shape[0]) & ~ignored
    # Any class stands in for a label that must not be read; the rows are overwritten below.
    label = torch.where(counted, target, 0)[:, None]

    loss = torch.logsumexp(logits, dim=1) - logits.gather(1, label)[:, 0]
    loss = loss.masked_fill(~counted, float("nan")).masked_fill(ignored, 0.0)

    onehot = torch.zeros_like(logits).scatter_(1, label, 1.0)
    dlogits = torch.where(counted[:, None], torch.softmax(logits, dim=1) - onehot, 0.0)

    dh = scale * (dlogits @ w)
    if activation == "relu":
        dh = torch.where(h > 0, dh, 0.0)

    dweight = dbias = None
    if row_scale is not None:
        factor = row_scale[:, None] * dlogits
        dweight = (factor.T @ a).to(weight.dtype)
        dbias = factor.sum(0).to(weight.dtype)
    return loss, dlogits.to(h.dtype), dh.to(h.dtype), dweight, dbias


def critic_head_wgrad(
    h: Tensor,
    dlogits: Tensor,
    row_scale: Tensor,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dweight [V, D] and dbias [V] from a dlogits kept earlier, for a row_scale that came later.

    Args:
        h: [N, D], as given to `critic_head`.
        dlogits: [N, V] in h's dtype, as `critic_head` returned it.
        row_scale: [N]; the whole factor of each row, the 1/N included.
        activation: "none" or "relu".
        dtype: of the results; None is float32, float64 for float64 input.
    """
    accumulator = _accumulator(h.dtype)
    a = _activate(h.to(accumulator), activation)
    factor = row_scale[:, None] * dlogits.to(accumulator)
    out = accumulator if dtype is None else dtype
    return (factor.T @ a).to(out), factor.sum(0).to(out)
