"""Models in this package's own form on the Hugging Face Hub: fetched, saved and pushed.

Names and arguments are those of `huggingface_hub.ModelHubMixin`; the files are a model directory's.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from sparvar_jax import __version__
from sparvar_jax.models import eight_bits
from sparvar_jax.pipelines import released
from sparvar_jax.weights import checkpoint, storage
from sparvar_jax.weights.files import whole_file
from sparvar_jax.weights.told import told

FILES = (
    checkpoint.CONFIG,
    checkpoint.MANIFEST,
    *(f"{part}/*" for part in checkpoint.PARTS),
)
"""What is fetched of a repository; everything else in it is left there."""
CARD = "README.md"
Made = TypeVar("Made")
_TAGS = {"prompts": "text-to-image", "classes": "unconditional-image-generation"}


def snapshot(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder in the Hub's cache of a repository that holds a model directory.

    Without a network the cache is asked alone. Raises ValueError in one line where the model is
    neither there nor to be had, or where the repository holds something else.
    """
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=list(FILES),
            )
        )
    except Exception as error:  # HTTP, offline, cache and disk errors share no class
        if local_files_only:
            raise ValueError(
                f"{repository} is no folder here and not in the Hub's cache: get it with "
                f"`sparvar fetch {repository}`"
            ) from error
        raise ValueError(f"cannot fetch {repository}: {told(error, 240)}") from error
    if not (folder / checkpoint.CONFIG).is_file() or not (folder / checkpoint.MANIFEST).is_file():
        raise ValueError(
            f"{repository} holds no model of sparvar_jax: convert its checkpoints with "
            f"`sparvar convert hf://{repository}/FILE --into DIR`, or take one of "
            f"{', '.join(released.RELEASES)}"
        )
    return folder


def obtain(name: str | Path, **hub: Any) -> Path:
    """The model directory of a path, a released name or owner/name, fetched where it is not here.

    hub: arguments of `snapshot`. Converting a released model needs the extra `convert`.
    """
    text = str(name)
    if Path(name).is_dir():
        return Path(name)
    if text not in released.RELEASES:
        return snapshot(text, **hub) if released.is_repository(text) else released.find(text)
    if hub.get("revision"):
        raise ValueError(f"{text} has the revision of its table: leave revision out")
    if released.missing_parts(released.RELEASES[text]) and not hub.get("local_files_only"):
        from sparvar_convert.fetch import fetch

        fetch(text)
    return released.find(text)


def save(model: Any, directory: str | Path) -> Path:
    """Write a loaded model, as its weights are now, as a model directory with a card.

    8-bit matrices stay 8 bits. Raises ValueError where parts of it are there already, or where a
    part was never loaded.
    """
    folder = Path(directory)
    for part, module in model.parts.items():
        _save_part(model, part, module, folder)
    with whole_file(folder / CARD) as file:
        file.write_text(card(model), encoding="utf-8")
    return folder


def _save_part(model: Any, part: str, module: Any, folder: Path) -> None:
    flat = storage.flatten(nnx.to_pure_dict(nnx.state(module)))
    if any(not hasattr(leaf, "__array__") for leaf in flat.values()):
        raise ValueError(
            f"the {part} of {model.name} has shapes alone: load the model with text_encoder=True "
            "to save it"
        )
    kinds = model.family.parts[part]
    kind = next(kind for kind, (cls, _) in kinds.items() if cls is type(module))
    form = eight_bits.form_of(module)
    with checkpoint.new_part(folder, part) as new:
        if form is not None:  # whose layout and e4m3 values Orbax keeps as they are
            writer = storage.OrbaxWriter(new.folder)
            for path, leaf in flat.items():
                writer.write(path, np.asarray(leaf))
            writer.close()
        else:
            new.folder.mkdir()
            arrays = {_stored_name(path, flat): np.asarray(leaf) for path, leaf in flat.items()}
            storage.write_safetensors(new.folder / storage.SAFETENSORS, arrays)
        if part == "text" and model.text_tokenizer is not None:
            copy_tokenizer(model.text_tokenizer.file, new.folder)
        new.config = {"kind": kind, **checkpoint.config_to_json(module.config)}
        new.config |= {} if form is None else {"matrices": form}
        new.source = {"source": f"saved from {model.name}", "sparvar-jax": __version__}
        new.defaults = checkpoint.config_to_json(model.defaults)


def _stored_name(path: str, flat: dict[str, Any]) -> str:
    """Scales lie beside their 8-bit values under a name of their own on disk."""
    values = path.removesuffix("_scale")
    scaled = values != path and values in flat and np.dtype(flat[values].dtype) == np.int8
    return values + storage.SCALE_SUFFIX if scaled else path


def copy_tokenizer(file: Path, folder: Path) -> None:
    """Put a text tokenizer's file into a part; ValueError where it cannot be copied."""
    try:
        shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise ValueError(
            f"the tokenizer {file} cannot be copied ({error.strerror}): it must still lie where "
            "the model was loaded from"
        ) from error


def card(model: Any) -> str:
    """The model card: what this is and how it is used."""
    draws = model.family.draws
    subject = '"a red apple"' if draws == "prompts" else "[207]"
    return (
        f"---\nlibrary_name: sparvar_jax\npipeline_tag: {_TAGS[draws]}\ntags:\n- jax\n"
        f"- {model.family.kind}\n---\n\n# {model.name}\n\nA model directory of sparvar_jax "
        f"{__version__}, family `{model.family.kind}`, that draws {draws}. The licence is that of "
        "the weights it was made from: say it here.\n\n```python\nimport sparvar_jax\n\n"
        'pipe = sparvar_jax.Pipeline.from_pretrained("OWNER/NAME")\n'
        f"pipe({subject}).images[0]\n```\n"
    )


class Shared:
    """What every pipeline can do with models on the Hub, by `ModelHubMixin`'s names."""

    @classmethod
    def from_pretrained(
        cls: type[Made],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Made:
        """Load a model by released name ("infinity-2b"), "owner/name" on the Hub, or path.

        What is not on this machine is fetched, and checkpoints of released models are converted,
        once. options: those of `from_checkpoint`. Raises ValueError in one line, also without a
        network.
        """
        folder = obtain(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        pipeline: Any = cls
        return pipeline.from_checkpoint(folder, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push: Any,
    ) -> str | None:
        """Write the model as its weights are now; the commit's address where it is pushed too.

        push: arguments of `push_to_hub`. The folder must not hold a model yet.
        """
        pipeline: Any = self
        folder = save(pipeline.model, save_directory)
        return _push(folder, repo_id or folder.name, **push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        """Put the model on the Hub in one commit; its address.

        push: `commit_message`, `private`, `token`, `branch`, `create_pr`, as the Hub's library has
        them. Needs a token that may write.
        """
        pipeline: Any = self
        with tempfile.TemporaryDirectory() as place:
            return _push(save(pipeline.model, Path(place) / "model"), repo_id, **push)


def _push(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Push model using sparvar_jax.",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            allow_patterns=[*FILES, CARD],
        )
    except Exception as error:  # HTTP and offline errors share no class
        raise ValueError(f"cannot push to {repo_id}: {told(error, 240)}") from error
    return str(done.commit_url)
