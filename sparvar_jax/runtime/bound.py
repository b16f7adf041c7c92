"""Functions of a loaded module, compiled once for every shape of their arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparvar_jax.runtime.compiling import compile_lowered
from sparvar_jax.runtime.parameters import Parameters
from sparvar_jax.runtime.settings import fixed


class Bound:
    """`function(module, *args)` compiled; `module()` gives the module as it is at the call.

    Its weights are arguments, so that changed ones need no compiling. With an abstract module it
    can still be compiled, which fills the persistent cache.
    """

    def __init__(self, module: Callable[[], Any], function: Callable[..., Any]):
        self._module, self._function = module, function
        self._structure: Any = None
        self._parameters, self._reading = Parameters(), threading.Lock()
        self._jitted: Any = None
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        leaves = self._leaves()
        return self._executable(leaves, args)(leaves, *args)

    def shape(self, *args: Any) -> Any:
        """The result with shapes and dtypes instead of arrays; arguments may be such as well."""
        leaves = self._leaves()
        with fixed():
            return jax.eval_shape(self._jitted, leaves, *args)

    def compile(self, *args: Any) -> Any:
        """The executable for arguments of these shapes; they may be abstract."""
        return self._executable(self._leaves(), args)

    def _leaves(self) -> list[Any]:
        """The weights as they are now; another structure of the module starts anew."""
        with self._reading:
            leaves, structure = self._parameters.read((self._module(),))
            if structure is not self._structure:
                self._jitted, self._compiled = jax.jit(self._caller(structure[0])), {}
                self._structure = structure
        return leaves

    def _caller(self, treedef: Any) -> Callable[..., Any]:
        function = self._function

        def call(leaves: Any, *args: Any) -> Any:
            (module,) = jax.tree.unflatten(treedef, leaves)
            return function(module, *args)

        call.__name__ = function.__name__.strip("_<>")
        return call

    def _executable(self, leaves: list[Any], args: tuple[Any, ...]) -> Any:
        flat, treedef = jax.tree.flatten(args)
        name = (treedef, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in flat))
        if name not in self._compiled:
            # From shapes alone, so that programs made without weights are found in the cache.
            shapes = jax.tree.map(_abstract, (leaves, *args))
            with fixed():
                lowered = self._jitted.lower(*shapes)
            self._compiled[name] = compile_lowered(lowered)
        return self._compiled[name]


def to_host(array: jax.Array) -> np.ndarray:
    """An array on the host; the copy is asked for before its values are waited for."""
    array.copy_to_host_async()
    return np.asarray(array)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if spread else None)
