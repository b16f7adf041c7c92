"""`sparvar edit`: redraw a part of a picture with a class-conditional model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options


def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to edit.")],
    model: options.ClassModel,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("edited.png"),
    region: Annotated[
        str | None,
        typer.Option("--box", help="TOP,LEFT,BOTTOM,RIGHT in pixels of the model's picture."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Picture that is light where to draw.")
    ] = None,
    outside: Annotated[
        bool, typer.Option("--outside", help="Draw outside of the box or mask: out-painting.")
    ] = False,
    label: Annotated[
        int | None, typer.Option("--class", help="Class to draw; without it none.")
    ] = None,
    keep_scales: Annotated[
        int, typer.Option("--keep-scales", min=0, help="First scales that are kept whole.")
    ] = 1,
    paste: Annotated[
        bool, typer.Option("--paste", help="Put the picture's own pixels back elsewhere.")
    ] = False,
    smooth: Annotated[bool, typer.Option("--smooth", help="Mix codes instead of drawing.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    guidance: options.Guidance = None,
    plan: options.Plan = None,
    dtype: options.Precision = None,
) -> None:
    """Redraw a part of a picture: in-painting, out-painting, editing by class."""
    drawing = {
        "keep_scales": keep_scales,
        "paste": paste,
        "smooth": smooth,
        "seed": seed,
        "guidance": guidance,
        "plan": plan,
    }
    asked = Asked(picture, model, region, mask, outside, label, options.name_of(dtype))
    side = _run(asked, out, drawing)
    console.output.print(f"{out}: {side}x{side}", highlight=False)


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which picture, where and with what to draw; see the options of `edit`."""

    picture: Path
    model: Path
    box: str | None
    mask: Path | None
    outside: bool
    label: int | None
    dtype: str | None

    def region(self, side: int) -> Any:
        """True where to draw."""
        inside = _region(self.box, self.mask, side)
        return ~inside if self.outside else inside


def _run(asked: Asked, out: Path, drawing: dict[str, Any]) -> int:
    """Write the edited picture; its side in pixels."""
    from sparvar_jax.pipelines import edit as editing
    from sparvar_jax.pipelines import metadata
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.weights.files import whole_file

    console.use_compilation_cache()
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    with whole_file(out) as opened, console.progress() as report:
        options.check_draws(asked.model, "classes")
        pipe = Pipeline.from_checkpoint(asked.model, dtype=asked.dtype, progress=report)
        side = pipe.picture_side
        pictures = _load(asked.picture, side, "RGB")[None]
        result = editing.edit(pipe, pictures, asked.region(side), asked.label, **drawing)
        told = {
            "edited": asked.picture.name,
            "class": str(asked.label),
            "region": asked.box or str(asked.mask),
            "seed": str(drawing["seed"]),
            "plan": drawing["plan"] or pipe.model.defaults.plan,
            "model": pipe.model.name,
            "versions": ", ".join(f"{k} {v}" for k, v in metadata.versions().items()),
        }
        metadata.write_png(opened, result[0], told)
    return side


def _region(box: str | None, mask: Path | None, side: int):
    """True inside of the box, or where the mask is light."""
    from sparvar_jax.pipelines import edit as editing

    if (box is None) == (mask is None):
        raise ValueError("say where to draw: give either --box or --mask")
    if mask is not None:
        return _load(mask, side, "L") >= 128
    try:
        top, left, bottom, right = (int(part) for part in str(box).split(","))
    except ValueError:
        raise ValueError(f"--box must be TOP,LEFT,BOTTOM,RIGHT in pixels, got {box!r}") from None
    return editing.box(side, side, top, left, bottom, right)


def _load(path: Path, side: int, mode: str):
    """A picture cropped to its middle square and resized to the model's size, uint8."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert(mode), (side, side))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read") from None
    return np.asarray(square)
