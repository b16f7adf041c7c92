"""Repositories on the Hugging Face Hub: a complete snapshot in the cache, else the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sparvar_convert.readers import shards_of
from sparvar_convert.rules import ConversionError
from sparvar_jax.weights.told import told

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
AVERAGED = "ema_model.bin"
"""Averaged weights beside others of the same names, as HART is published."""
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_TEXT_KINDS = ("t5", "qwen2")
_SHARD = re.compile(r".*-\d+-of-\d+\.\w+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Fetched(NamedTuple):
    """Where an address lies on this machine, and the commit it is of."""

    path: Path
    commit: str | None


def download(address: str) -> Fetched:
    """Local path of `hf://owner/name[/path][@revision]`, from the Hub's cache or fetched.

    A snapshot that is complete in the cache is used as it is; the network is asked last.
    """
    repository, inner, revision = _parse(address)
    root = _cached(repository, revision, inner) or _fetched(address, repository, revision, inner)
    return Fetched(root / inner, root.name if _COMMIT.fullmatch(root.name) else None)


def _parse(address: str) -> tuple[str, str, str]:
    """(owner/name, path inside, revision or "") of an address."""
    place, _, revision = address.removeprefix("hf://").partition("@")
    owner, _, rest = place.strip("/").partition("/")
    name, _, inner = rest.partition("/")
    if not owner or not name or ".." in PurePosixPath(place).parts:
        raise ConversionError(f"{address} is not of the form hf://owner/name[/path][@revision]")
    return f"{owner}/{name}", inner, revision


def is_cached(address: str) -> bool:
    """Whether the cache has all of an address, so that it is read without the network."""
    repository, inner, revision = _parse(address)
    return _cached(repository, revision, inner) is not None


class Listed(NamedTuple):
    """A file that an address stands for: path in the repository, bytes, announced sha256."""

    path: str
    size: int
    sha256: str | None


def look_up(address: str) -> list[Listed]:
    """The files of an address as the Hub lists them now; nothing is fetched.

    Raises ConversionError where the Hub cannot be reached or holds no such weights.
    """
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    repository, inner, revision = _parse(address)
    try:
        api = huggingface_hub.HfApi()
        tree = api.list_repo_tree(repository, recursive=True, revision=revision or None)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except Exception as error:  # HTTP, offline and cache errors share no class
        raise ConversionError(
            f"{address} is not in the Hub's cache and the Hub does not answer for it: "
            f"{told(error, 200)}"
        ) from error
    wanted = choose_files(list(files), inner)
    if not wanted:
        raise ConversionError(f"{repository} has no weights at {inner or 'its top'} any more")
    chosen = [files[path] for path in wanted]
    return [Listed(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in chosen]


def _cached(repository: str, revision: str, inner: str) -> Path | None:
    """The snapshot of a repository in the local cache, where it holds all that would be fetched."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        reference = folder / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        if not _COMMIT.fullmatch(commit):
            return None
        snapshot = folder / "snapshots" / commit
        here = snapshot / inner
        if here.is_file():
            return snapshot
        listing = [f"{inner}/{file.name}".lstrip("/") for file in here.iterdir() if file.is_file()]
        return snapshot if _complete(here, choose_files(listing, inner)) else None
    except (OSError, ValueError):  # not there, or its index cannot be read: fetch it
        return None


def _complete(folder: Path, wanted: Sequence[str]) -> bool:
    """Whether these files of a cached folder make a whole checkpoint."""
    names = [PurePosixPath(file).name for file in wanted]
    if not any(name.endswith(WEIGHTS) for name in names):
        return False
    indices = [name for name in names if name.endswith(".index.json")]
    for name in indices:
        shards_of(folder / name)  # raises where one is missing
    if not indices and any(map(_SHARD.fullmatch, names)):
        return False
    settings = folder / "config.json"
    said = settings.read_text(errors="replace") if settings.is_file() else ""
    is_text = any(f'"{kind}"' in said for kind in _TEXT_KINDS)
    return not is_text or any(name in names for name in _TOKENIZERS)


def _fetched(address: str, repository: str, revision: str, inner: str) -> Path:
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        listing = api.list_repo_files(repository, revision=revision or None)
        wanted = choose_files(listing, inner)
        if not wanted:
            raise ConversionError(f"{address} holds no weights: name a file or folder inside it")
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted
            )
        )
    except ConversionError:
        raise
    except Exception as error:  # HTTP, offline and cache errors share no class
        raise ConversionError(f"cannot fetch {address}: {told(error, 200)}") from error


def choose_files(listing: Sequence[str], inner: str = "") -> list[str]:
    """Files to fetch of a repository, or of the file or folder `inner` in it.

    One format of weights (averaged ones before safetensors, these before PyTorch's), settings and
    tokenizer files beside it.
    """
    if inner in listing:
        return [inner]
    here = [file for file in listing if str(PurePosixPath(file).parent) == (inner or ".")]
    here = [file for file in here if not PurePosixPath(file).name.startswith(".")]
    averaged = f"/{AVERAGED}"
    for suffixes in ((averaged,), (".safetensors",), WEIGHTS[1:]):
        if any(f"/{file}".endswith(suffixes) for file in here):
            beside = (*suffixes, ".json", "spiece.model")
            return [file for file in here if f"/{file}".endswith(beside)]
    return []
