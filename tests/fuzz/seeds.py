"""Small whole files of every format that is read: what the mutations begin with."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sparvar_convert.torch_twin.var import VarTwin

from sparvar_jax.models.infinity import InfinityConfig
from sparvar_jax.models.var import VarConfig
from sparvar_jax.pipelines import sampling_jobs
from tests import tiny_model
from tests.convert import sources

SMALL = InfinityConfig(
    depth=1, width=64, heads=2, text_width=128, bits=16, mlp_width=64, text_max_length=4
)
VAR = VarConfig(1, 64, 1, sides=(1, 2), classes=5, vocab=8, code_width=4)
JOB = sampling_jobs.SampleJob((3, 1), per_class=2, batch=2, settings=(("model", "fuzz"),))


@functools.cache
def weights() -> tuple[dict, ...]:
    made = (
        sources.infinity_weights(SMALL),
        sources.randomised(VarTwin(VAR), 0),
        sources.tokenizer_weights(),
    )
    return tuple({name: value.clone() for name, value in each.items()} for each in made)


def _file(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@functools.cache
def torch_files() -> tuple[bytes, ...]:
    """Flat, container and training checkpoints, new and old, and a bare pickle."""
    infinity, var, tokenizer = weights()
    contents = [
        (infinity, True),
        ({"vae": tokenizer, "ema": {}}, True),
        ({"args": {"lr": np.float32(1)}, "trainer": {"gpt_fsdp": infinity}}, True),
        (var, True),
        (infinity, False),
    ]
    made = [
        _file(lambda file, c=c, new=new: torch.save(c, file, _use_new_zipfile_serialization=new))
        for c, new in contents
    ]
    return (*made, pickle.dumps({"a": [1, 2.5, "x"], "b": {}}, protocol=2))


@functools.cache
def safetensors_files() -> tuple[bytes, ...]:
    return tuple(_file(lambda file, w=w: save_file(w, file)) for w in weights())


@functools.cache
def model() -> dict[str, bytes]:
    """The files of a model directory."""
    with tempfile.TemporaryDirectory() as folder:
        place = tiny_model.write_tiny_model(Path(folder) / "model")
        return {
            str(file.relative_to(place)): file.read_bytes()
            for file in sorted(place.rglob("*"))
            if file.is_file()
        }


@functools.cache
def tokenizer_json() -> bytes:
    return _file(sources.write_tokenizer)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """One picture in every format and mode that this Pillow writes."""
    colours = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    base, made = Image.fromarray(colours), []
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    wanted = [
        (base, "PNG", {"exif": exif}),
        (base.convert("P"), "PNG", {"transparency": 3}),
        (base.convert("LA"), "PNG", {}),
        (deep, "PNG", {}),
        (base.convert("1"), "PNG", {}),
        (base, "JPEG", {"exif": exif}),
        (base.convert("CMYK"), "JPEG", {}),
        (base, "WEBP", {}),
        (base, "TIFF", {}),
        (deep, "TIFF", {}),
        (base, "TIFF", {"compression": "tiff_lzw"}),
        (base, "TIFF", {"compression": "jpeg"}),
        (Image.fromarray(np.float32(colours[..., 0])), "TIFF", {}),
        (base, "GIF", {"save_all": True, "append_images": [base]}),
        (base, "BMP", {}),
        (base, "PPM", {}),
        (base, "TGA", {}),
        (base, "ICO", {}),
        (base, "ICNS", {}),
        (base, "AVIF", {}),
        (base, "JPEG2000", {}),
        (base, "PCX", {}),
        (base, "SGI", {}),
        (base, "DDS", {}),
        (base.convert("L"), "PNG", {"save_all": True, "append_images": [base.convert("L")]}),
    ]
    Image.init()
    for image, kind, options in wanted:
        if kind in Image.SAVE:
            content = io.BytesIO()
            image.save(content, kind, **options)
            made.append(content.getvalue())
    return tuple(made)


@functools.cache
def job_files() -> tuple[bytes, bytes, bytes]:
    """A finished file of samples, a part of one, and the description of its job."""

    def draw(labels, seeds):
        return np.zeros((len(labels), 4, 4, 3), np.uint8)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a.npz"
        sampling_jobs.run_job(JOB, draw, out)
        part = Path(folder)
        sampling_jobs.sample_parts.save(part, 0, draw([1, 1], [0, 1]))
        return out.read_bytes(), (part / "000000.npy").read_bytes(), JOB.describe().encode()


@functools.cache
def shards() -> dict[str, bytes]:
    """A folder of two shards and its index."""
    names = list(weights()[0])
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: files[number % 2] for number, name in enumerate(names)}
    made = {
        file: _file(
            lambda path, file=file: save_file(
                {name: weights()[0][name] for name in names if where[name] == file}, path
            )
        )
        for file in files
    }
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    return made | {"model.safetensors.index.json": json.dumps(index).encode()}
