"""Export one part of a model directory as a PyTorch state dict under its released names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparvar_convert.families import family_of
from sparvar_convert.rules import ConversionError
from sparvar_convert.stream import export_tensors
from sparvar_jax.models import eight_bits
from sparvar_jax.pipelines.parts import stored_form
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.large_file import large_file
from sparvar_jax.weights.told import told

_BATCH = 32


def export_part(model: str | Path, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Released keys and tensors of one part, in the stored dtypes, bit for bit what was converted.

    Matrices in 8 bits become float32: values times scales. Raises ValueError where the part is
    missing or of an unknown kind.
    """
    described = checkpoint.read_config(model)
    entry = described.get(part)
    if part not in checkpoint.PARTS or entry is None:
        raise ConversionError(f"{model} has no {told(part, 60)}: name one of its parts")
    family = family_of(entry["kind"])
    config = checkpoint.config_from_json(family.config, entry)
    table = family.table(config, ())
    reader = checkpoint.part_reader(model, part)
    module = family.abstract(config)
    paths = list(checkpoint.abstract_parameters(module))
    form = stored_form(described, part)
    dtypes = {} if form is None else eight_bits.kernels(module, form)
    eight_bits.narrow(module, dtypes)
    checkpoint.require_fit(module, reader.shapes)
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        loaded = reader.restore([*batch, *(f"{path}_scale" for path in batch if path in dtypes)])
        for path in dtypes.keys() & loaded.keys():
            values, scale = loaded[path], loaded.pop(f"{path}_scale")
            loaded[path] = eight_bits.dense(values, scale, dtypes[path])
        for key, array in export_tensors(table, loaded, loaded.__getitem__):
            yield key, to_torch(array)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Tensor with the bits and the dtype of a numpy array, bfloat16 included."""
    array = np.array(array, order="C")  # a copy: restored arrays may be read-only
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save_state_dict(model: str | Path, part: str, file: str | Path) -> int:
    """Write one part as `.safetensors` or `.pth`, in its released container; tensors written.

    A BSQ tokenizer's `.pth` has the top-level key `vae`, as released. Raises ValueError.
    """
    file = Path(file)
    if file.suffix not in (".safetensors", ".pth"):
        raise ConversionError(f"{file} must end in .safetensors or .pth")
    tensors = dict(export_part(model, part))
    kind = checkpoint.read_config(model)[part]["kind"]
    with large_file(file) as temporary:
        try:
            if file.suffix == ".safetensors":
                save_file(tensors, temporary)
            else:
                content = {"vae": tensors} if kind == "bsq_vae" else tensors
                with temporary.open("wb") as stream:  # a path's name would be in the file
                    torch.save(content, stream)
        except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk, mostly
            raise ConversionError(f"cannot write {file} ({error}): check space") from error
    return len(tensors)
