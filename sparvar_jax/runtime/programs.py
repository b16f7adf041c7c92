"""Executables of generation steps, kept across processes under a key that needs no lowering.

jax's own compile cache looks a program up by its lowered form, and lowering our kernels is Python's
work: for Infinity-8B on a GPU it takes longer than reading the executables. Here the key is what a
step is traced from. Executables lie in `programs/` in the folder of that cache and are trusted as
much: loading one runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import re
import stat
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import serialize_executable

from pallas_kernels import backends
from sparvar_jax.runtime.unpack import unpack
from sparvar_jax.weights.files import whole_file

# Elsewhere lowering takes next to nothing, and an executable of one CPU need not run on another.
KEPT_ON: tuple[str, ...] = ("gpu",)
FOUND = "/sparvar_jax/programs/found"
_SOURCES = ("sparvar_jax", "pallas_kernels")
_KNOWN = (*_SOURCES, "flax", "jax", "jaxlib", "ml_dtypes", "numpy", "builtins")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_DIGEST = hashlib.sha256().digest_size


class Unkeyed(Exception):
    """A value whose meaning no text of ours tells: code of another package, say."""


def outline(*modules: Any) -> str | None:
    """The structure of nnx modules as text; None if some are of a package the key does not know."""
    try:
        for module in modules:
            for _, part in nnx.iter_modules(module):
                _text(type(part))
    except Unkeyed:
        return None
    return str(jax.tree.structure(modules))


def place(modules: str | None, spec: Any, traced: jax.stages.Traced) -> Path | None:
    """The file of a step's executable; None where it is not kept.

    modules: their outline. spec: everything else that is static; shapes come from `traced`. Not
    kept are programs without a compile cache or off the default device, and those with code of
    other packages than this one in them, added kernels among it, whose changes the key would not
    see.
    """
    config = jax.config.values
    folder = config.get("jax_compilation_cache_dir")
    elsewhere = config.get("jax_default_device") is not None
    remote = "://" in str(folder)
    if not folder or remote or elsewhere or modules is None or jax.default_backend() not in KEPT_ON:
        return None
    if backends.registered():
        return None
    try:
        static = _text(spec)
    except Unkeyed:
        return None
    parts = (
        _environment(),
        f"kernels {backends.path()}",
        *(f"{name} {value}" for name, value in sorted(config.items()) if "cache" not in name),
        static,
        modules,
        str(traced.in_tree),
        str(traced.in_avals),
    )
    name = hashlib.sha256(_ADDRESS.sub("", "\n".join(parts)).encode()).hexdigest()
    return Path(folder) / "programs" / f"{name}.bin"


def load(file: Path, traced: jax.stages.Traced) -> Any | None:
    """The executable in a file; None where there is none, or none that this machine can load.

    Loading runs what is in the file, so files and folders that others may write to are passed over.
    """
    try:
        if not (_private(file.parent) and _private(file)):
            return None
        content = file.read_bytes()
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        compiled = unpack(payload, traced)
    except (OSError, ValueError, RuntimeError):
        return None
    jax.monitoring.record_event(FOUND)
    return compiled


def keep(file: Path, compiled: Any) -> None:
    """Write an executable, whole or not at all, for this user alone; never an error of a call.

    Not kept are programs that call back into Python, and where the folder is not ours to trust.
    """
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except Exception:  # whatever a pickler meets in a program: none of it concerns the picture
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(file.parent):
            return
        with whole_file(file, private=True) as temporary:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
    except (OSError, ValueError, RuntimeError):
        return


def _private(path: Path) -> bool:
    """Whether a file or folder, itself no link, belongs to this user and no one else writes it."""
    found = path.lstat()
    ours = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return ours and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


def _text(value: Any) -> str:
    """A static value as text that is the same in every process; raises Unkeyed."""
    if value is None or isinstance(value, bool | int | float | str | np.dtype):
        return repr(value)
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name.split(".")[0] not in _KNOWN:
        raise Unkeyed(name)
    if kind is value:
        return name
    if not dataclasses.is_dataclass(value):
        raise Unkeyed(name)
    fields = dataclasses.fields(value)
    return f"{name}({', '.join(f'{f.name}={_text(getattr(value, f.name))}' for f in fields)})"


@functools.cache
def _environment() -> str:
    """Versions, device, XLA's flags, and the sources of this package."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in _SOURCES:
        for file in sorted((root / package).rglob("*")):
            if file.suffix in (".py", ".json"):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    device = jax.local_devices()[0]
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    runtime = device.client.platform_version
    flags = os.environ.get("XLA_FLAGS", "")
    return "\n".join([*versions, device.device_kind, runtime, flags, digest.hexdigest()])
