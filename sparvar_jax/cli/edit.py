"""`sparvar edit`: redraw a part of a picture with a class-conditional model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options
from sparvar_jax.weights.told import shown


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
        int, typer.Option("--keep-scales", min=0, max=32, help="First scales that are kept whole.")
    ] = 1,
    paste: Annotated[
        bool, typer.Option("--paste", help="Put the picture's own pixels back elsewhere.")
    ] = False,
    smooth: Annotated[bool, typer.Option("--smooth", help="Mix codes instead of drawing.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    guidance: options.Guidance = None,
    plan: options.Plan = None,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
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
    how = options.loading(dtype, weights, stream)
    asked = Asked(picture, model, region, mask, outside, label, how)
    side = _run(asked, out, drawing)
    console.say(f"{out}: {side}x{side}")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which picture, where and with what to draw; see the options of `edit`."""

    picture: Path
    model: Path
    box: str | None
    mask: Path | None
    outside: bool
    label: int | None
    how: dict[str, Any]
    """How the model is loaded: dtype, weights, stream."""

    def region(self, side: int, of: tuple[int, int]) -> Any:
        """True where to draw. of: (width, height) of the picture's file."""
        inside = _region(self.box, self.mask, side, of)
        return ~inside if self.outside else inside


def _run(asked: Asked, out: Path, drawing: dict[str, Any]) -> int:
    """Write the edited picture; its side in pixels."""
    from sparvar_jax.pipelines import edit as editing
    from sparvar_jax.pipelines import metadata
    from sparvar_jax.pipelines.pictures import read_picture
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.weights.large_file import whole_files

    console.use_compilation_cache()
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    with whole_files([out]) as (opened,), console.progress() as report:
        options.check_draws(asked.model, "classes")
        pipe = Pipeline.from_checkpoint(asked.model, **asked.how, progress=report)
        side = pipe.picture_side
        picture = read_picture(asked.picture, side)
        region = asked.region(side, picture.size)
        _require_drawn(pipe, region, drawing["keep_scales"])
        result = editing.edit(pipe, picture.pixels[None], region, asked.label, **drawing)
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


def _require_drawn(pipe: Any, region: Any, keep_scales: int) -> None:
    """ValueError where an edit would draw nothing."""
    from sparvar_jax.pipelines import edit as editing

    sides = pipe.model.transformer.config.sides
    if not any(
        drawn.any() for drawn in editing.drawn_tokens(region, sides, keep_scales=keep_scales)
    ):
        raise ValueError(
            f"nothing would be drawn: with --keep-scales {keep_scales} of {len(sides)} no token "
            "lies by more than half in the region; give a larger one, or keep fewer scales"
        )


def _region(box: str | None, mask: Path | None, side: int, of: tuple[int, int]) -> Any:
    """True inside of the box, or where the mask is light."""
    from sparvar_jax.pipelines import edit as editing
    from sparvar_jax.pipelines.pictures import read_mask

    if (box is None) == (mask is None):
        raise ValueError("say where to draw: give either --box or --mask")
    if mask is not None:
        return read_mask(mask, side, of)
    try:
        top, left, bottom, right = (int(part) for part in str(box).split(","))
    except ValueError:
        raise ValueError(
            f"--box must be TOP,LEFT,BOTTOM,RIGHT in pixels, got {shown(box)}"
        ) from None
    return editing.box(side, side, top, left, bottom, right)
