"""Functions of a loaded module, compiled once for every shape of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparvar_jax.runtime.compiling import compile_lowered


class Bound:
    """`function(module, *args)` compiled; the module is flattened once, not at every call.

    With an abstract module it can still be compiled, which fills the persistent cache.
    """

    def __init__(self, module: Any, function: Callable[..., Any]):
        self._leaves, treedef = jax.tree.flatten(module)

        def call(leaves: Any, *args: Any) -> Any:
            return function(jax.tree.unflatten(treedef, leaves), *args)

        call.__name__ = function.__name__.strip("_")
        self._function = jax.jit(call)
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        return self.compile(*args)(self._leaves, *args)

    def shape(self, *args: Any) -> Any:
        """The result with shapes and dtypes instead of arrays; arguments may be such as well."""
        return jax.eval_shape(self._function, self._leaves, *args)

    def compile(self, *args: Any) -> Any:
        """The executable for arguments of these shapes; they may be abstract."""
        leaves, treedef = jax.tree.flatten(args)
        name = (treedef, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves))
        if name not in self._compiled:
            # From shapes alone, so that programs made without weights are found in the cache.
            shapes = jax.tree.map(_abstract, (self._leaves, *args))
            self._compiled[name] = compile_lowered(self._function.lower(*shapes))
        return self._compiled[name]


def to_host(array: jax.Array) -> np.ndarray:
    """An array on the host; the copy is asked for before its values are waited for."""
    array.copy_to_host_async()
    return np.asarray(array)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if spread else None)
