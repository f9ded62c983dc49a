"""Long sums keep their digits: thousands of rows within one chunk."""

import pytest
import torch

from lct_fast import ops
from tests.ladder import Place


# Enough rows that one running fp32 sum is off by several times what pairwise sums are; 100 classes take the
# CPU's path for many classes, 10 that for few.
@pytest.mark.parametrize("classes", [10, 100])
def test_gradients_over_many_rows(place: Place, classes: int) -> None:
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(4099, 5, generator=g), torch.randn(classes, 5, generator=g)
    bias, target = torch.randn(classes, generator=g), torch.randint(0, classes, (4099,), generator=g)
    row_scale, scale = torch.randn(4099, generator=g) / 4099, torch.tensor(1.0)
    with ops.use_backend("reference"):
        exact, plain = (
            ops.critic_head(h.to(d), weight.to(d), bias.to(d), target, scale.to(d), row_scale.to(d))
            for d in (torch.float64, torch.float32)
        )
    tensors = [t.to(place.device) for t in (h, weight, bias, target, scale, row_scale)]
    got = ops.critic_head(*tensors)
    for name in ("dweight", "dbias"):
        true = getattr(exact, name)
        error, torchs = ((getattr(r, name).cpu().double() - true).abs().max() for r in (got, plain))
        assert error <= 2 * torchs + 2 * torch.finfo(torch.float32).eps * true.abs().max(), name
