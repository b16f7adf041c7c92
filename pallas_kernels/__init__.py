"""Attention on a padded key/value cache: dense, block-sparse, windowed and column-sparse."""

import os as _os

from pallas_kernels import backends as _backends
from pallas_kernels import calls as _calls
from pallas_kernels.api import (
    attention,
    attention_column_sums,
    block_sparse_attention,
    column_sparse_attention,
    implementation_used,
    select_columns,
    window_attention,
)
from pallas_kernels.cudnn import backend as _cudnn
from pallas_kernels.fused import (
    cross_attention,
    residual_norm,
    rotary_to_cache,
    text_memory,
    text_offsets,
)
from pallas_kernels.hopper import backend as _hopper
from pallas_kernels.portable import backend as _portable
from pallas_kernels.quantised import Eight, quantise, quantised_matmul, weight_matmul
from pallas_kernels.sparsity import (
    BlockTable,
    Geometry,
    KeyGrid,
    blocks_from_mask,
    coarsen,
    csla_blocks,
    dense_blocks,
    token_rule,
)
from pallas_kernels.xla import backend as _xla

# The best one first. Filled here, so that no module of the package sees the table without them.
# cuDNN is faster than Triton at dense attention, and slower where it has to copy keys first.
for _op in _calls.OPS:
    _kernels = (_portable.SERVED, _cudnn.SERVED)
    _kernels = _kernels[::-1] if _op == "attention" else _kernels
    _rooms = (_hopper.SERVED, *_kernels, _xla.SERVED)
    _backends.declare(_op, *(_room[_op] for _room in _rooms if _op in _room))
# The one place that reads it; `backends.use` is the same choice in Python.
_backends.use(_os.environ.get("SPARVAR_KERNELS") or None)

__all__ = [
    "BlockTable",
    "Eight",
    "Geometry",
    "KeyGrid",
    "attention",
    "attention_column_sums",
    "block_sparse_attention",
    "blocks_from_mask",
    "coarsen",
    "column_sparse_attention",
    "cross_attention",
    "csla_blocks",
    "dense_blocks",
    "implementation_used",
    "quantise",
    "quantised_matmul",
    "residual_norm",
    "rotary_to_cache",
    "select_columns",
    "text_memory",
    "text_offsets",
    "token_rule",
    "weight_matmul",
    "window_attention",
]
