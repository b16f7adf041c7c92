"""Where a checkpoint comes from: a file, a folder, or a repository on the Hugging Face Hub.

`open_source` finds the weights inside training checkpoints and tokenizer containers, and says in
words what it opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sparvar_convert.readers import (
    ShardedReader,
    TorchReader,
    load_torch,
    open_file,
    require_state_dict,
)
from sparvar_convert.rules import ConversionError
from sparvar_convert.stream import Reader

_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
_NAMED = ("model.safetensors", "pytorch_model.bin")
_TRAINED = ("gpt_fsdp", "gpt_wo_ddp", "var_wo_ddp")
_EMA = "gpt_ema_fsdp"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its tensors, the files they come from, and what it is in words.

    `settings` is the `config.json` that lies beside the weights, if any.
    """

    name: str
    container: str
    files: tuple[Path, ...]
    reader: Reader
    settings: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def open_source(source: str | Path, *, ema: bool = False) -> Source:
    """Open a checkpoint file or folder, or `hf://owner/name[/path][@revision]`.

    `ema` chooses the averaged weights of a training checkpoint. Raises ConversionError.
    """
    name = str(source)
    path = download(name) if name.startswith("hf://") else Path(source)
    if path.is_dir():
        opened = _open_folder(name, path)
    elif path.is_file():
        opened = _open_single(name, path, ema)
    else:
        raise ConversionError(f"{path} does not exist: give a checkpoint file or folder")
    if ema and "averaged" not in opened.container:
        raise ConversionError(f"{path} is a {opened.container} without averaged (EMA) weights")
    return opened


def _open_single(name: str, file: Path, ema: bool) -> Source:
    if file.suffix == ".safetensors":
        return Source(name, "safetensors file", (file,), open_file(file), _settings(file.parent))
    container, tensors = find_state_dict(load_torch(file), file, ema)
    return Source(name, container, (file,), TorchReader(tensors), _settings(file.parent))


def find_state_dict(content: Any, file: Path, ema: bool) -> tuple[str, Mapping[str, Any]]:
    """The state dict inside a loaded PyTorch file, and what kind of container held it."""
    if isinstance(content, Mapping):
        trainer = content.get("trainer", content)
        if isinstance(trainer, Mapping):
            wanted = (_EMA,) if ema else _TRAINED
            for key in wanted:
                if isinstance(trainer.get(key), Mapping):
                    name = f"training checkpoint ({key}{', averaged' if ema else ''})"
                    return name, require_state_dict(trainer[key], file)
            if trainer is not content:
                raise ConversionError(
                    f"{file} is a training checkpoint without {' or '.join(wanted)}; it has "
                    f"{', '.join(map(str, trainer))}"
                )
        for key in ("ema",) if ema else ("vae",):
            if isinstance(content.get(key), Mapping):
                name = f"tokenizer container ({key}{', averaged' if ema else ''})"
                return name, require_state_dict(content[key], file)
    return "flat state dict", require_state_dict(content, file)


def _open_folder(name: str, folder: Path) -> Source:
    settings = _settings(folder)
    indices = sorted(folder.glob("*.index.json"), key=lambda file: "safetensors" not in file.name)
    if indices:
        reader = ShardedReader(indices[0])
        kind = f"sharded folder ({indices[0].name})"
        return Source(name, kind, reader.files, reader, settings)
    for suffix in _WEIGHTS:
        files = sorted(folder.glob(f"*{suffix}"))
        files = [file for file in files if file.name in _NAMED] or files
        if len(files) == 1:
            return Source(name, f"folder ({files[0].name})", (files[0],), _flat(files[0]), settings)
        if files:
            raise ConversionError(
                f"{folder} holds several checkpoints ({', '.join(f.name for f in files[:6])}) and "
                "no index: name one of the files"
            )
    raise ConversionError(
        f"{folder} holds no weights: expected an index of shards or one of *{', *'.join(_WEIGHTS)}"
    )


def _flat(file: Path) -> Reader:
    if file.suffix == ".safetensors":
        return open_file(file)
    return TorchReader(find_state_dict(load_torch(file), file, ema=False)[1])


def _settings(folder: Path) -> Mapping[str, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConversionError(f"{file} is not valid JSON ({error}): download it again") from error
    return settings if isinstance(settings, Mapping) else None


def download(address: str) -> Path:
    """Local path of `hf://owner/name[/path][@revision]`, fetched or from the Hub's cache."""
    import huggingface_hub

    place, _, revision = address.removeprefix("hf://").partition("@")
    owner, _, rest = place.strip("/").partition("/")
    name, _, inner = rest.partition("/")
    if not owner or not name:
        raise ConversionError(f"{address} is not of the form hf://owner/name[/path][@revision]")
    repository = f"{owner}/{name}"
    try:
        api = huggingface_hub.HfApi()
        listing = api.list_repo_files(repository, revision=revision or None)
        wanted = choose_files(listing, inner)
        if not wanted:
            raise ConversionError(f"{address} holds no weights: name a file or folder inside it")
        root = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=wanted
        )
    except ConversionError:
        raise
    except Exception as error:  # HTTP, offline and cache errors share no class
        text = " ".join(str(error).split())[:200]
        raise ConversionError(f"cannot fetch {address}: {text}") from error
    return Path(root) / inner


def choose_files(listing: Sequence[str], inner: str = "") -> list[str]:
    """Files to fetch of a repository, or of the file or folder `inner` in it.

    One format of weights (safetensors before PyTorch's), settings and tokenizer files beside it.
    """
    if inner in listing:
        return [inner]
    here = [file for file in listing if str(PurePosixPath(file).parent) == (inner or ".")]
    for suffixes in ((".safetensors",), _WEIGHTS[1:]):
        if any(file.endswith(suffixes) for file in here):
            beside = (*suffixes, ".json", "spiece.model")
            return [file for file in here if file.endswith(beside)]
    return []
