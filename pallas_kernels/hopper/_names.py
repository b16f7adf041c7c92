"""Kernels keep their names: a mend for jax 0.11, without which no compile cache finds them again.

jax writes a counter of the process into every Mosaic GPU kernel, for the names of debugging dumps.
The text of a program then depends on the order in which kernels were lowered, which is another in
every process that lowers in threads, and the persistent compile cache takes it for a new program.
"""

# What is mended is private to jax and its attributes are not typed.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
import os
from typing import Any

from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir

_NAME, _HOOK = "mosaic_gpu.dump_basename", "get_or_set_dump_options"


def keep_names() -> None:
    """Name every kernel module after its kernel alone.

    Does nothing where dumps are asked for, or with a jax that has no such names.
    """
    original = getattr(core.dialect, _HOOK, None)
    dumps = any(name.startswith("MOSAIC_GPU_DUMP") for name in os.environ)
    if original is None or dumps or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def named(module: Any) -> Any:
        attributes = module.operation.attributes
        if _NAME not in attributes:
            known = "sym_name" in attributes
            attributes[_NAME] = attributes["sym_name"] if known else ir.StringAttr.get("kernel")
        return original(module)

    setattr(core.dialect, _HOOK, named)
