"""The ops: schema, shape functions, autograd and choice of backend. One file a stem.

Importing this registers the ops with torch under `torch.ops.lct`; it loads no binary and compiles nothing.
"""

from lct_fast.ops.backend import BackendError, backends, use_backend
from lct_fast.ops.critic_head import CriticHead, critic_head, critic_head_wgrad
from lct_fast.ops.vq import VQEncoding, VQState, vq_decode, vq_encode, vq_state, vq_update

__all__ = [
    "BackendError",
    "CriticHead",
    "VQEncoding",
    "VQState",
    "backends",
    "critic_head",
    "critic_head_wgrad",
    "use_backend",
    "vq_decode",
    "vq_encode",
    "vq_state",
    "vq_update",
]
