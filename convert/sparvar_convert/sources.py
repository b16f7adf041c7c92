"""Where a checkpoint comes from: a file, a folder, or a repository on the Hugging Face Hub.

`open_source` finds the weights inside training checkpoints and tokenizer containers, and says in
words what it opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparvar_convert import hub
from sparvar_convert.archives import load_torch
from sparvar_convert.hub import AVERAGED, WEIGHTS, choose_files
from sparvar_convert.readers import ShardedReader, TorchReader, open_file
from sparvar_convert.rules import ConversionError
from sparvar_convert.state_dicts import require_state_dict
from sparvar_convert.stream import Reader
from sparvar_convert.wrappers import unwrap
from sparvar_jax.weights.json_file import read_json
from sparvar_jax.weights.told import listed

__all__ = ["Source", "choose_files", "find_state_dict", "open_source"]

_NAMED = ("model.safetensors", "pytorch_model.bin")
_TRAINED = ("gpt_fsdp", "gpt_wo_ddp", "var_wo_ddp")
_EMA = "gpt_ema_fsdp"
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its tensors, the files they come from, and what it is in words.

    `settings` is the `config.json` that lies beside the weights, if any; `commit` that of a
    repository on the Hub.
    """

    name: str
    container: str
    files: tuple[Path, ...]
    reader: Reader
    settings: Mapping[str, Any] | None = None
    commit: str | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def open_source(source: str | Path, *, ema: bool = False) -> Source:
    """Open a checkpoint file or folder, or `hf://owner/name[/path][@revision]`.

    `ema` chooses the averaged weights of a training checkpoint. Raises ConversionError.
    """
    name = str(source)
    path, commit = hub.download(name) if name.startswith("hf://") else (Path(source), None)
    try:
        if path.is_dir():
            opened = _open_folder(name, path)
        elif path.is_file():
            opened = _open_single(name, path, ema)
        else:
            raise ConversionError(f"{path} does not exist: give a checkpoint file or folder")
    except ConversionError:
        raise
    except (ValueError, OSError) as error:  # damaged JSON, git-lfs pointers, lost permissions
        raise ConversionError(str(error)) from error
    if ema and "averaged" not in opened.container:
        raise ConversionError(f"{path} is a {opened.container} without averaged (EMA) weights")
    reader, taken = unwrap(opened.reader, name)
    container = f"{opened.container}, {taken}" if taken else opened.container
    return dataclasses.replace(opened, reader=reader, container=container, commit=commit)


def _open_single(name: str, file: Path, ema: bool) -> Source:
    container, reader = _open_file(file, ema)
    return Source(name, container, (file,), reader, _settings(file.parent))


def _open_file(file: Path, ema: bool) -> tuple[str, Reader]:
    if file.suffix == ".safetensors":
        return "safetensors file", open_file(file)
    container, tensors = find_state_dict(load_torch(file), file, ema)
    return container, TorchReader(tensors)


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
                    f"{listed([str(key) for key in trainer])}"
                )
        for key in ("ema",) if ema else ("vae",):
            if isinstance(content.get(key), Mapping):
                name = f"tokenizer container ({key}{', averaged' if ema else ''})"
                return name, require_state_dict(content[key], file)
        for key in () if ema else _CONTAINERS:
            if isinstance(content.get(key), Mapping):
                return f"container ({key})", require_state_dict(content[key], file)
    return "flat state dict", require_state_dict(content, file)


def _open_folder(name: str, folder: Path) -> Source:
    settings = _settings(folder)
    averaged = folder / AVERAGED
    if averaged.is_file():  # what published pictures are drawn with; others are opened by name
        reader = _open_file(averaged, ema=False)[1]
        return Source(name, f"folder ({AVERAGED}, averaged)", (averaged,), reader, settings)
    indices = sorted(_visible(folder, "*.index.json"), key=lambda f: "safetensors" not in f.name)
    if indices:
        reader = ShardedReader(indices[0])
        kind = f"sharded folder ({indices[0].name})"
        return Source(name, kind, reader.files, reader, settings)
    for suffix in WEIGHTS:
        files = _visible(folder, f"*{suffix}")
        files = [file for file in files if file.name in _NAMED] or files
        if len(files) == 1:
            reader = _open_file(files[0], ema=False)[1]
            return Source(name, f"folder ({files[0].name})", (files[0],), reader, settings)
        if files:
            raise ConversionError(
                f"{folder} holds several checkpoints ({listed([f.name for f in files])}) and "
                "no index: name one of the files"
            )
    raise ConversionError(
        f"{folder} holds no weights: expected an index of shards or one of *{', *'.join(WEIGHTS)}"
    )


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files that match, without hidden ones: other systems leave `._name` beside each `name`."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _settings(folder: Path) -> Mapping[str, Any] | None:
    file = folder / "config.json"
    return read_json(file, "download it again") if file.is_file() else None
