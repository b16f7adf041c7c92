"""What a call says, by our names or by those of other libraries, as a subject and options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from sparvar_jax.pipelines.numbers import seeds_of
from sparvar_jax.pipelines.requests import shape_of
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import whole
from sparvar_jax.weights.told import shown

ALIASES = {"guidance_scale": "guidance", "negative_prompt": "negative"}
"""Names other libraries give to options of ours."""
OF_THE_CALL = ("num_images_per_prompt", "height", "width", "generator", "output_type", "callback")
"""Names of a call that are no options of a family."""
MEANT = {
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "num_inference_steps": "plan",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "n": "num_images_per_prompt",
    "callback_on_step_end": "callback",
}
"""Names other libraries have for something close, which only says what is meant."""


def asked(
    model: Any, asking: Any, subject: Any, options: dict[str, Any], side: Any
) -> tuple[Any, Any]:
    """The subject of a call as a list, and its options by our own names.

    asking: the subject's rules, see `subjects`. side: gives the pixels of a side, for models of
    one size. Raises ValueError for a name that there is not, with the nearest one that there is.
    """
    family = model.family
    require_known(model, asking.names, options)
    options = {ALIASES.get(name, name): value for name, value in options.items()}
    given = [options.pop(name) for name in asking.names if name in options]
    given += [] if subject is None else [subject]
    if len(given) != 1:
        raise ValueError(f"{model.name} draws {family.draws}: give them once, got {len(given)}")
    subject = asking.listed(given[0])
    count = whole("num_images_per_prompt", options.pop("num_images_per_prompt", 1))
    most = BOUNDS["num"][1]
    if not 1 <= count <= most:
        raise ValueError(
            f"num_images_per_prompt must be at least 1 and at most {most}, got {shown(count)}"
        )
    subject = subject if count == 1 else asking.repeated(subject, count)
    generator = options.pop("generator", None)
    if generator is not None:
        if "seed" in options:
            raise ValueError("give seed or generator, not both")
        options["seed"] = seeds_of(generator)
    pixels = [options.pop(name, None) for name in ("height", "width")]
    if any(pixel is not None for pixel in pixels):
        options |= _shape(model, pixels[0], pixels[1], options, side)
    return subject, family.asked(model.name, options)


def require_known(model: Any, subjects: Sequence[str], options: dict[str, Any]) -> None:
    """ValueError where an option has a name that this family lacks."""
    own = [field.name for field in dataclasses.fields(model.family.options)]
    foreign = [name for name, ours in ALIASES.items() if ours in own]
    known = [*own, *foreign, *OF_THE_CALL, *subjects]
    unknown = sorted(set(options) - set(known))
    if not unknown:
        return
    near = [_nearest(name, known) for name in unknown]
    meant = [f"{name} for {odd}" for odd, name in zip(unknown, near, strict=True) if name]
    raise ValueError(
        f"{model.name} draws {model.family.draws} and has no option {', '.join(unknown)}: "
        f"use {', '.join(own)}" + (f"; you may mean {', '.join(meant)}" if meant else "")
    )


def _nearest(name: str, known: Sequence[str]) -> str | None:
    meant = MEANT.get(name)
    if meant in known:
        return meant
    found = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.6)
    return found[0] if found else None


def _shape(
    model: Any, height: Any, width: Any, options: dict[str, Any], side: Any
) -> dict[str, Any]:
    """The options that ask for pictures of so many pixels; one side alone asks for a square."""
    height, width = (x if x is not None else y for x, y in ((height, width), (width, height)))
    if not any(field.name == "size" for field in dataclasses.fields(model.family.options)):
        if (height, width) != (side(),) * 2:
            raise ValueError(f"this model draws {side()}x{side()} alone, got {height}x{width}")
        return {}
    if options.keys() & {"aspect_ratio", "size"}:
        raise ValueError("give height and width, or aspect_ratio and size, not both")
    ratio, size = shape_of(model, height, width)
    return {"aspect_ratio": ratio, "size": size}
