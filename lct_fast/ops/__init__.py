"""The ops: schema, shape functions, autograd and choice of backend. One file a stem.

Importing this registers the ops with torch under `torch.ops.lct`; it loads no binary and compiles nothing.
"""

from lct_fast.ops.backend import BackendError, backends, use_backend
from lct_fast.ops.block_quantize import BlockQuantized, block_dequantize, block_quantize
from lct_fast.ops.critic_head import CriticHead, critic_head, critic_head_wgrad

__all__ = [
    "BackendError",
    "BlockQuantized",
    "CriticHead",
    "backends",
    "block_dequantize",
    "block_quantize",
    "critic_head",
    "critic_head_wgrad",
    "use_backend",
]
