"""Functions of a loaded module, compiled once for every shape of their arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparvar_jax.runtime.compiling import compile_lowered
from sparvar_jax.runtime.devices import Devices, PlacedWeights
from sparvar_jax.runtime.parameters import Parameters
from sparvar_jax.runtime.placement import Placement
from sparvar_jax.runtime.settings import fixed


class Bound:
    """`function(module, *args)` compiled; `module()` gives the module as it is at the call.

    Its weights are arguments, so that changed ones need no compiling. With an abstract module it
    can still be compiled, which fills the persistent cache.

    placement: where rows lead every argument and result, devices that divide them as steps do.
    bands: the function takes `bands` as well, and then gives this device's band of maps made from
    its one argument, a map.
    """

    def __init__(
        self,
        module: Callable[[], Any],
        function: Callable[..., Any],
        placement: Placement | Devices | None = None,
        bands: bool = False,
    ):
        self._module, self._function, self._placement = module, function, placement
        self._weights = None if placement is None else PlacedWeights(placement)
        self._in_bands = bands
        self._structure: Any = None
        self._parameters, self._reading = Parameters(), threading.Lock()
        self._call: Any = None
        self._jitted: Any = None
        self._compiled: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        leaves = self._leaves()
        executable = self._executable(leaves, args)
        if self._weights is not None:
            leaves = self._weights.of(leaves)
            args = self._place(args).put_rows(args)
        return executable(leaves, *args)

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
                self._call, self._compiled = self._caller(structure[0]), {}
                self._jitted, self._structure = jax.jit(self._call), structure
        return leaves

    def _caller(self, treedef: Any, **options: Any) -> Callable[..., Any]:
        function = self._function

        def call(leaves: Any, *args: Any) -> Any:
            (module,) = jax.tree.unflatten(treedef, leaves)
            return function(module, *args, **options)

        call.__name__ = function.__name__.strip("_<>")
        return call

    def _executable(self, leaves: list[Any], args: tuple[Any, ...]) -> Any:
        flat, treedef = jax.tree.flatten(args)
        name = (treedef, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in flat))
        if name not in self._compiled:
            # From shapes alone, so that programs made without weights are found in the cache.
            shapes, jitted = jax.tree.map(_abstract, (leaves, *args)), self._jitted
            if self._placement is not None:
                place = self._place(args)
                shapes = place.parameters(leaves), *place.by_rows(args)
                jitted = jax.jit(self._divided(place, args))
            with fixed():
                lowered = jitted.lower(*shapes)
            self._compiled[name] = compile_lowered(lowered)
        return self._compiled[name]

    def _divided(self, place: Placement, args: Any) -> Callable[..., Any]:
        """The function on every device of a mesh."""
        if not self._in_bands:
            return place.divide(self._call)
        bands = place.bands(args[0].shape[1])
        return place.divide(self._caller(self._structure[0], bands=bands), bands)

    def _place(self, args: Any) -> Placement:
        assert self._placement is not None
        return self._placement.by_pictures(len(jax.tree.leaves(args)[0]))


def to_host(array: jax.Array) -> np.ndarray:
    """An array on the host; the copy is asked for before its values are waited for."""
    array.copy_to_host_async()
    return np.asarray(array)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if spread else None)
