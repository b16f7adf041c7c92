"""The released models by name: repositories, files, revisions and licences, in one table.

Names stand for model directories in the user's data folder, which `sparvar fetch NAME` fills.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path

from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.told import told

UNSTATED = "what its repository states"
"""Of weights whose licence has not been read here."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Source:
    """One part of a released model on the Hugging Face Hub.

    path: file or folder in the repository; "" is all of it. revision: branch, tag or commit.
    sha256: of a single file, where somebody has published it; None leaves the check to what the
    repository announces.
    """

    part: str
    kind: str
    repository: str
    path: str
    licence: str
    revision: str = "main"
    sha256: str | None = None

    @property
    def address(self) -> str:
        """As `sparvar convert` takes it."""
        inner = f"/{self.path}" if self.path else ""
        return f"hf://{self.repository}{inner}@{self.revision}"


@dataclasses.dataclass(frozen=True)
class Release:
    """A released model: its parts and what it draws, in words."""

    name: str
    title: str
    sources: tuple[Source, ...]


def _infinity(name: str, title: str, transformer: str, tokenizer: str) -> Release:
    repository, licence = "FoundationVision/Infinity", "MIT"
    return Release(
        name,
        title,
        (
            Source("transformer", "infinity", repository, transformer, licence),
            Source("tokenizer", "bsq_vae", repository, tokenizer, licence),
            Source("text", "t5", "google/flan-t5-xl", "", "Apache-2.0"),
        ),
    )


def _var(depth: int, pixels: int) -> Release:
    repository, licence = "FoundationVision/var", "MIT"
    return Release(
        f"var-d{depth}",
        f"VAR-d{depth}: ImageNet classes, {pixels} px",
        (
            Source("transformer", "var", repository, f"var_d{depth}.pth", licence),
            Source("tokenizer", "vqvae", repository, "vae_ch160v4096z32.pth", licence),
        ),
    )


def _hart() -> Release:
    repository, qwen2 = "mit-han-lab/hart-0.7b-1024px", "mit-han-lab/Qwen2-VL-1.5B-Instruct"
    return Release(
        "hart-0.7b",
        "HART-0.7B: prompts, 1024 px",
        (
            # The pictures of the authors come from the averaged weights.
            Source("transformer", "hart", repository, "llm/ema_model.bin", UNSTATED),
            Source("tokenizer", "hart_vqvae", repository, "tokenizer", UNSTATED),
            Source("text", "qwen2", qwen2, "", UNSTATED),
        ),
    )


_TABLE = (
    _infinity(
        "infinity-2b",
        "Infinity-2B: prompts, 1024 px",
        "infinity_2b_reg.pth",
        "infinity_vae_d32reg.pth",
    ),
    _infinity(
        "infinity-8b",
        "Infinity-8B: prompts, 1024 px",
        "infinity_8b_weights",
        "infinity_vae_d56_f8_14_patchify.pth",
    ),
    _infinity(
        "infinity-8b-512",
        "Infinity-8B: prompts, 512 px",
        "infinity_8b_512x512_weights",
        "infinity_vae_d56_f8_14_patchify.pth",
    ),
    *(_var(depth, 256) for depth in (16, 20, 24, 30)),
    _var(36, 512),
    _hart(),
)
RELEASES = {release.name: release for release in _TABLE}


def models_folder() -> Path:
    """Where fetched models lie: `sparvar_jax/models` in the user's data folder (XDG)."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "sparvar_jax" / "models"


def is_repository(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def missing_parts(release: Release) -> list[str]:
    """The parts of a release that are not on this machine."""
    folder = models_folder() / release.name
    present = checkpoint.read_config(folder) if (folder / checkpoint.CONFIG).is_file() else {}
    return [source.part for source in release.sources if source.part not in present]


def find(name: str) -> Path:
    """The model directory that a name stands for, without the network.

    A released model is looked for in the user's data folder, owner/name in the Hub's cache.
    Raises ValueError that says how to get a model that is not there.
    """
    if name in RELEASES:
        missing = missing_parts(RELEASES[name])
        if missing:
            lacking = "is not on this machine"
            if len(missing) < len(RELEASES[name].sources):
                lacking = f"lacks its {' and '.join(missing)}"
            raise ValueError(f"{name} {lacking}: get it with `sparvar fetch {name}`")
        return models_folder() / name
    if is_repository(name):
        from sparvar_jax.pipelines import sharing

        return sharing.snapshot(name, local_files_only=True)
    near = difflib.get_close_matches(name, RELEASES, 1)
    raise ValueError(
        f"{told(name, 200)} does not exist: give the folder `sparvar convert` wrote"
        + (f"; did you mean {near[0]}?" if near else f", or one of {', '.join(RELEASES)}")
    )
