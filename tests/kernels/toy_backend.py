"""What someone outside of the package writes to add kernels for another GPU generation: one file.

Its "kernels" are XLA's, so that results can be compared bit for bit; `served` tells that it ran.
"""

from contextlib import ExitStack

from pallas_kernels.backends import Backend, register
from pallas_kernels.xla import attention as xla

NAME = "toy"
served: list[str] = []


def reason(call) -> str:
    """Made for one generation and one head dim."""
    if call.device.capability != (10, 0):
        return f"toy kernels need compute capability 10.0; the device is {call.device.platform}"
    if call.q.shape[-1] != 32:
        return f"toy kernels take a head dim of 32; got {call.q.shape[-1]}"
    return ""


def dense(call):
    served.append(call.op)
    out, lse = xla.attention(
        call.q, call.k, call.v, call.kv_length, gaps=call.gaps, scale=call.scale
    )
    return (out, lse) if call.return_lse else out


def blocks(call):
    served.append(call.op)
    out, lse = xla.block_sparse_attention(call.q, call.k, call.v, call.blocks, scale=call.scale)
    return (out, lse) if call.return_lse else out


def install() -> ExitStack:
    """Register everything; closing what is returned removes it."""
    with ExitStack() as stack:
        stack.enter_context(register("attention", Backend(NAME, reason, dense), before="cudnn"))
        added = register("block_sparse_attention", Backend(NAME, reason, blocks), before="xla")
        stack.enter_context(added)
        return stack.pop_all()
