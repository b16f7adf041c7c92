"""The table of backends: for every operation, those that may serve it, the best one first.

A backend says why it cannot serve a call, or runs it. Someone with kernels for other GPUs adds them
in a file of their own, without a change to this package:

    def reason(call):
        return "" if call.device.capability == (10, 0) else "made for compute capability 10.0"

    register("attention", Backend("mine", reason, run), before="xla")

Register before the first call is traced: jax keeps compiled programs and does not ask again.

**Kernels that cannot be built.** A kernel may fail on a release of jax that nobody has tried. A
caller who did not ask for it by name is then served by the next backend, with one warning for each
(operation, backend, reason); a caller who did gets the error. Failures show at two times:
- while the call is traced (or run, outside of `jax.jit`): errors of `run` are caught where they
  happen. Those of the device (no memory left) are not, for they say nothing about the kernel.
- while the traced program is lowered, too late to choose again. So a backend may have a `probe`,
  which tells before. `probing.lowering_reason` is one: it lowers the kernel alone for the shapes of
  the call. That takes as long as the lowering itself; the Hopper kernels do it only with releases
  of jax outside the range that they are tested with.
What was found out about a kernel is kept for calls of the same shapes.

**Paths.** `use("portable")` serves all calls that ask for nothing as if better kernels did not
exist: so one GPU tests and times what others would get. The environment variable SPARVAR_KERNELS
says the same to a process; it is read once, where the package fills this table.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.calls import OPS, Call
from pallas_kernels.probing import describe, signature

Implementation = str
"""The name of a backend, as a caller asks for it: see `names`."""


def nothing(call: Call) -> str:
    """No reason against any call."""
    return ""


@dataclass(frozen=True)
class Backend:
    """One way to serve an operation. All functions take a call of it (`pallas_kernels.calls`).

    name: what callers ask for; one set of kernels has one name in all its operations.
    reason: why it cannot serve the call; "" when it can. Cheap: it is asked at every call.
    run: computes what the public operation returns.
    unasked: why it leaves the call to others unless asked for by name.
    probe: why the kernel cannot be built for the call; asked once for calls of the same shapes, and
        only where nobody asked for the backend by name.
    """

    name: str
    reason: Callable[[Any], str]
    run: Callable[[Any], Any]
    unasked: Callable[[Any], str] = nothing
    probe: Callable[[Any], str] = nothing


PATHS = ("hopper", "portable", "cudnn", "xla")
"""What `use` takes: a path leaves out those in front of it, and its own backend comes first."""

_chosen: dict[str, str | None] = {"path": None}
_table: dict[str, tuple[Backend, ...]] = {op: () for op in OPS}
_added: dict[tuple[str, str], Backend] = {}
_found: dict[tuple[str, Backend, Hashable], str] = {}
_watching: list[set[tuple[str, str]]] = []
_warned: dict[tuple[str, Backend, str], object] = {}


def declare(op: str, *backends: Backend) -> None:
    """Fill the table with the backends of this package, the best one first."""
    _table[op] = backends


def register(op: str, backend: Backend, *, before: str | None = None) -> contextlib.ExitStack:
    """Add a backend to an operation in front of the one named `before` (default: of all).

    What it returns removes the backend at the end of a `with`, and may be dropped to keep it.
    Raises ValueError for an unknown operation, an unknown `before`, or a name that is taken.
    """
    present = _backends(op)
    known = [other.name for other in present]
    if backend.name in known:
        raise ValueError(
            f"{op} has a backend named {backend.name!r} already. Choose another name, or "
            "unregister that one first."
        )
    if before is not None and before not in known:
        raise ValueError(f"before must be one of {known}, the backends of {op}. Got {before!r}.")
    place = 0 if before is None else known.index(before)
    _table[op] = (*present[:place], backend, *present[place:])
    _added[op, backend.name] = backend
    return _at_the_end(unregister, op, backend.name)


def unregister(op: str, name: str) -> None:
    """Remove what `register` has added, with all that was found out about it.

    Raises ValueError for a backend that was not added, those of this package among them.
    """
    if (op, name) not in _added:
        raise ValueError(f"{name!r} was not registered for {op}; registered are {list(_added)}.")
    backend = _added.pop((op, name))
    _table[op] = tuple(other for other in _table[op] if other.name != name)
    for key in [key for key in _found if key[:2] == (op, backend)]:
        del _found[key]
    for key in [key for key in _warned if key[:2] == (op, backend)]:
        del _warned[key]


def use(path: str | None) -> contextlib.ExitStack:
    """Serve calls that ask for no backend on one of `PATHS`; None: on the best for their device.

    Operations that the path's own backend cannot serve go to those behind it. Choose before the
    first call is traced, as with `register`. At the end of a `with` the path before is back.
    Raises ValueError for an unknown path.
    """
    if path is not None and path not in PATHS:
        raise ValueError(
            f"a path of kernels is one of {', '.join(PATHS)}; SPARVAR_KERNELS may also be empty. "
            f"Got {path!r}."
        )
    before, _chosen["path"] = _chosen["path"], path
    return _at_the_end(use, before)


def path() -> str | None:
    """What `use` or SPARVAR_KERNELS has chosen."""
    return _chosen["path"]


@contextlib.contextmanager
def watch() -> Iterator[set[tuple[str, str]]]:
    """What serves in the meantime, in any thread: a set of (operation, name) that fills up.

    Calls are served while a program is traced; one that jax has traced before is not seen again.
    """
    seen: set[tuple[str, str]] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching[:] = [other for other in _watching if other is not seen]


def told(seen: set[tuple[str, str]]) -> str:
    """What `watch` has seen in one line, the operations in the order of `OPS`."""
    served = {op: sorted(name for this, name in seen if this == op) for op in OPS}
    return ", ".join(f"{op} {' and '.join(names)}" for op, names in served.items() if names)


def _at_the_end(undo: Callable[..., Any], *arguments: Any) -> contextlib.ExitStack:
    """What undoes something where a `with` of it ends, and nothing before."""
    stack = contextlib.ExitStack()
    stack.callback(undo, *arguments)
    return stack


def _note(call: Call, backend: Backend) -> None:
    for seen in _watching:
        seen.add((call.op, backend.name))


def registered() -> tuple[tuple[str, str], ...]:
    """(operation, name) of every backend added from outside of this package."""
    return tuple(_added)


def names(op: str | None = None) -> tuple[str, ...]:
    """Backends of an operation, or of any, as a caller may ask for them; the best ones first."""
    tables = _table.values() if op is None else (_backends(op),)
    return tuple(dict.fromkeys(backend.name for table in tables for backend in table))


def check_name(requested: Implementation | None) -> None:
    """Raise ValueError for a name that no operation knows."""
    if requested is not None and requested not in names():
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, names()))}. "
            f"Got {requested!r}."
        )


def select(call: Call, requested: Implementation | None = None) -> Backend:
    """The backend that serves a call: the one asked for, else the first that can.

    Raises ValueError for an unknown name, NotImplementedError with the reason where the backend
    asked for cannot serve the call (without a request: where none can).
    """
    check_name(requested)
    if requested is None:
        return next(_able(call))
    found = next((b for b in _backends(call.op) if b.name == requested), None)
    if found is None:
        raise NotImplementedError(
            f"{requested!r} has no {call.op}: that is served by {', '.join(names(call.op))}."
        )
    if reason := found.reason(call):
        raise NotImplementedError(f"{requested!r} cannot serve this {call.op}: {reason}.")
    return found


def serve(call: Call, requested: Implementation | None = None) -> Any:
    """Run a call on the backend that `select` names, or the next that can be built.

    Raises what `select` raises; errors of a backend that was asked for, or of the last one.
    """
    if requested is not None:
        chosen = select(call, requested)
        out = chosen.run(call)
        _note(call, chosen)
        return out
    failed: list[tuple[Backend, Exception]] = []
    for backend in _able(call):
        try:
            out = backend.run(call)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # whatever a compiler raises
            failed.append((backend, error))
            continue
        # Only now: an error that every backend raises is the caller's, not a kernel's.
        for other, error in failed:
            _found[call.op, other, signature(call)] = describe(error)
            _warn(call.op, other, describe(error))
        _note(call, backend)
        return out
    raise failed[-1][1]


def _backends(op: str) -> tuple[Backend, ...]:
    if op not in _table:
        raise ValueError(f"op must be one of {', '.join(_table)}. Got {op!r}.")
    return _table[op]


def _on_path(op: str) -> list[Backend]:
    """Backends in the order in which they are tried for who asks for none."""
    chosen, backends = path(), list(_backends(op))
    if chosen is None:
        return backends
    better = PATHS[: PATHS.index(chosen)]
    backends = [backend for backend in backends if backend.name not in better]
    return sorted(backends, key=lambda backend: backend.name != chosen)


def _able(call: Call) -> Iterator[Backend]:
    """Backends that can serve a call nobody asked one for, the best one first; at least one."""
    reasons = {}
    for backend in _on_path(call.op):
        reasons[backend.name] = _refusal(backend, call)
        if not reasons[backend.name]:
            yield backend
    if all(reasons.values()):
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"no backend serves this {call.op}. {said}.")


def _refusal(backend: Backend, call: Call) -> str:
    """Why a backend is passed over unless asked for by name."""
    if reason := backend.reason(call) or backend.unasked(call):
        return reason
    if backend.probe is nothing and (call.op, backend) not in {key[:2] for key in list(_found)}:
        return ""
    key = (call.op, backend, signature(call))
    if key not in _found:
        _found[key] = backend.probe(call)
    if _found[key]:
        _warn(call.op, backend, _found[key])
    return _found[key]


def _warn(op: str, backend: Backend, reason: str) -> None:
    mark = object()
    # One step, for steps of a generation are traced in several threads.
    if _warned.setdefault((op, backend, reason), mark) is mark:
        warnings.warn(
            f"{backend.name!r} cannot be built for {op} ({reason}). Another backend serves it; "
            f"implementation={backend.name!r} raises the error.",
            stacklevel=2,
        )
