"""vq in plain torch: vectors coded as the index of the nearest word of a codebook.

Row n of x [N, G * D] is G vectors of D columns; each has a codebook of its own, [K, D].

    code(n, g)  = argmin_k |x_ng - c_gk|^2 = argmin_k |c_gk|^2 / 2 - x_ng . c_gk     ties to the lowest k
    counts_gk   = how many rows have code k
    sums_gk     = sum of the x_ng that have code k
    error       = sum_ng |x_ng - c_g,code(n,g)|^2

Codes are packed: code i = n * G + g takes bits [i b, (i + 1) b) of one flat stream, b = ceil(log2 K), least
significant bit first. A vector whose squared error is not finite (a NaN or an Inf in it) has code 0, is left
out of counts, sums, error and candidates, and raises the flag.

Everything is computed in float32 (float64 for float64 input). Sums are made of partial sums over chunks of
CHUNK rows, added up in order. Works on any device.
"""

import torch
from torch import Tensor

CHUNK = 4096


def bits_of(codewords: int) -> int:
    """Bits of a code: ceil(log2 K)."""
    return (codewords - 1).bit_length()


def bytes_of(rows: int, groups: int, codewords: int) -> int:
    """Bytes of the packed codes of `rows` rows."""
    return -(-rows * groups * bits_of(codewords) // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, [M] int64, to ceil(M * bits / 8) bytes; bits beyond the last number are 0."""
    one_by_one = (codes[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = one_by_one.flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8))
    return (stream.view(-1, 8) << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of a packed stream, [count] int64."""
    one_by_one = (stream.long()[:, None] >> torch.arange(8, device=stream.device)) & 1
    numbers = one_by_one.flatten()[: count * bits].view(count, bits)
    return (numbers << torch.arange(bits, device=stream.device)).sum(1)


def _first(equal: Tensor, dim: int) -> Tensor:
    """The lowest index along dim where `equal` holds, the size of dim where it does nowhere."""
    shape = [1] * equal.dim()
    shape[dim] = -1
    size = equal.shape[dim]
    index = torch.arange(size, device=equal.device).view(shape)
    return torch.where(equal, index, size).amin(dim)


def candidate_scores(errors: Tensor, place: Tensor) -> Tensor:
    """error / r, r an odd number below 2^24 hashed from the error and the row's place in its chunk.

    The largest of many such scores belongs to a row with probability proportional to its error, as 1 / r has
    the tail of an exponential race: k-means++'s sampling, without a generator's state.

    Args:
        errors: [..., n]; place: [n] int64, n mod CHUNK.

    Returns:
        [..., n] float32.
    """
    errors = errors.float()
    h = errors.view(torch.int32).long() & 0xFFFFFFFF
    h = h ^ (place * 0x9E3779B1 & 0xFFFFFFFF)
    # The finalizer of MurmurHash3.
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return errors / ((h >> 8) | 1).float()


def vq_encode(
    x: Tensor, codebook: Tensor, candidates: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes of x and what a codebook learns from.

    Args:
        x: [N, G * D].
        codebook: [G, K, D] float32 (float64 for float64 x).
        candidates: R, how many vectors a group to put forward for the revival of unused words.

    Returns:
        codes [ceil(N G b / 8)] uint8, counts [G, K] int64, sums [G, K, D], squared_error [], candidates
        [G, R, D], candidate_scores [G, R] float32, flag [] bool. Candidate r of a group is, of the rows n
        with (n mod CHUNK) mod R = r, the vector with the largest score, ties to the lowest n; where no such
        row has a score above 0 it is NaN, with score 0.
    """
    groups, codewords, depth = codebook.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    words = codebook.to(dtype)
    half_norm = words.square().sum(2, keepdim=True).mT / 2
    counts = torch.zeros(groups, codewords, dtype=torch.int64, device=x.device)
    sums = torch.zeros(groups, codewords, depth, dtype=dtype, device=x.device)
    squared_error = torch.zeros((), dtype=dtype, device=x.device)
    best = torch.zeros(groups, candidates, device=x.device)
    rows = torch.full((groups, candidates, depth), float("nan"), dtype=dtype, device=x.device)
    flag = torch.zeros((), dtype=torch.bool, device=x.device)
    packed = [torch.empty(0, dtype=torch.uint8, device=x.device)]

    for chunk in x.split(CHUNK) if len(x) else ():
        part = chunk.to(dtype).reshape(len(chunk), groups, depth).transpose(0, 1)
        score = half_norm - part @ words.mT
        score = score.masked_fill(score.isnan(), float("inf"))
        code = _first(score == score.amin(2, keepdim=True), 2)
        nearest = words.gather(1, code[:, :, None].expand(-1, -1, depth))
        error = (part - nearest).square().sum(2)
        good = error.isfinite()
        flag |= ~good.all()
        code = torch.where(good, code, 0)
        error = torch.where(good, error, 0)
        part = torch.where(good[:, :, None], part, 0)
        packed.append(pack(code.T.flatten(), bits_of(codewords)))

        onehot = score.new_zeros(score.shape).scatter_(2, code[:, :, None], good[:, :, None].to(dtype))
        counts += onehot.sum(1).long()
        sums += onehot.mT @ part
        squared_error += error.sum()
        if candidates:
            turns = -(-len(chunk) // candidates)
            short = turns * candidates - len(chunk)
            score = candidate_scores(error, torch.arange(len(chunk), device=x.device))
            by_slot = torch.nn.functional.pad(score, (0, short)).view(groups, turns, candidates)
            largest = by_slot.amax(1)
            turn = _first(by_slot == largest[:, None], 1)
            # A slot without rows has score 0 and is not taken, whatever row stands here.
            row = (turn * candidates + torch.arange(candidates, device=x.device)).clamp(max=len(chunk) - 1)
            better = largest > best
            found = part.gather(1, row[:, :, None].expand(-1, -1, depth))
            rows = torch.where(better[:, :, None], found, rows)
            best = torch.where(better, largest, best)

    return torch.cat(packed), counts, sums, squared_error, rows, best, flag


def vq_decode(codes: Tensor, codebook: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, G * D] from codes, in `dtype`, and a flag: was there a code >= K, which is read as K - 1.

    Args:
        codes: [ceil(rows G b / 8)] uint8, as `vq_encode` packs them.
        codebook: [G, K, D].
        rows: N.
        dtype: of x; words are rounded to it.
    """
    groups, codewords, depth = codebook.shape
    code = unpack(codes, bits_of(codewords), rows * groups).view(rows, groups)
    flag = (code >= codewords).any()
    code = code.clamp(max=codewords - 1)
    group = torch.arange(groups, device=codes.device)
    return codebook[group, code].to(dtype).view(rows, groups * depth), flag


def vq_update(
    codebook: Tensor,
    state_counts: Tensor,
    state_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    candidates: Tensor,
    decay: float,
    eps: float,
    revive_below: float,
) -> None:
    """Moving averages of counts and sums, and the codebook they give, in place.

        n <- decay n + (1 - decay) counts
        m <- decay m + (1 - decay) sums
        N = sum_k n_k,  s_k = (n_k + eps) / (N + K eps) * N,  c_k <- m_k / s_k

    A group whose N is 0 keeps its codebook. The j-th word with n < revive_below takes the j-th candidate that
    is finite, while there are any: c = candidate, n = max(N / K, revive_below), m = n * candidate.

    Args:
        codebook, state_sums (m), sums: [G, K, D].
        state_counts (n): [G, K]; counts: [G, K] int64.
        candidates: [G, R, D].
    """
    codewords = codebook.shape[1]
    n = state_counts.mul_(decay).add_(counts.to(state_counts.dtype), alpha=1 - decay)
    m = state_sums.mul_(decay).add_(sums, alpha=1 - decay)
    total = n.sum(1, keepdim=True)
    smoothed = ((n + eps) / (total + codewords * eps) * total)[:, :, None]
    codebook.copy_(torch.where(smoothed > 0, m / smoothed, codebook))
    slots = candidates.shape[1]
    if slots == 0:
        return
    dead = n < revive_below
    finite = candidates.isfinite().all(2)
    # The finite ones first, in their order.
    order = torch.sort((~finite).to(torch.uint8), dim=1, stable=True).indices
    turn = dead.cumsum(1) - 1
    revived = dead & (turn < finite.sum(1, keepdim=True))
    pick = order.gather(1, turn.clamp(0, slots - 1))
    taken = candidates.gather(1, pick[:, :, None].expand(-1, -1, codebook.shape[2]))
    fresh = (total / codewords).clamp(min=revive_below)
    n.copy_(torch.where(revived, fresh, n))
    m.copy_(torch.where(revived[:, :, None], fresh[:, :, None] * taken, m))
    codebook.copy_(torch.where(revived[:, :, None], taken, codebook))
