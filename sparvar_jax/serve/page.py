"""A page in the same server: draw with previews, compare plans, look at attention."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hmac
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
from fastapi import FastAPI
from gradio.themes import Default as Theme  # pyright: ignore[reportMissingImports]
from jaxtyping import UInt8
from PIL import Image
from pydantic import ValidationError

from sparvar_jax.serve.desk import Desk
from sparvar_jax.serve.errors import Refused
from sparvar_jax.serve.menu import Order, preview_steps
from sparvar_jax.serve.schema import ImageRequest
from sparvar_jax.study.report import QUANTITIES, inspect_prompt

PREVIEWS = 6
KEPT_SECONDS = 3600  # of pictures that were shown, on disk
STRONGER = 4  # differences are shown so many times as strong
EXAMPLE = "a red apple on a green background"
# Fonts of the reader's own system: nothing is fetched from elsewhere.
THEME = Theme(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

Pixels = UInt8[np.ndarray, "height width 3"]


def mount(app: FastAPI, desk: Desk, path: str) -> FastAPI:
    """The application with the page at a path; with an API key, it asks for that as password."""
    key = desk.settings.api_key

    def known(user: str, password: str) -> bool:
        del user
        return key is not None and hmac.compare_digest(password.encode(), key.encode())

    return gr.mount_gradio_app(
        app,
        build(desk),
        path,
        auth=None if key is None else known,
        auth_message="any user name, and the API key as password",
        theme=THEME,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=True,
    )


def build(desk: Desk) -> gr.Blocks:
    """The page of a desk."""
    name = desk.pipe.model.name
    kept = (KEPT_SECONDS, KEPT_SECONDS)
    title = f"sparvar: {name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=kept) as page:
        gr.Markdown(f"# {name}\nPictures drawn scale by scale, from coarse to fine.")
        with gr.Tab("Draw"):
            _draw_tab(desk)
        if len(desk.menu.plans) > 1:
            with gr.Tab("Compare plans"):
                _compare_tab(desk)
        if desk.settings.study:
            with gr.Tab("Attention"):
                _attention_tab(desk)
    return page.queue(default_concurrency_limit=None)


def _draw_tab(desk: Desk) -> None:
    prompt, *common = _asked(desk)
    negative = gr.Textbox(label="Not to be seen", lines=1, visible=desk.settings.negative)
    plan = gr.Dropdown(list(desk.menu.plans), label="Plan", value=desk.menu.plans[0])
    button = gr.Button("Draw", variant="primary")
    picture = _picture("Picture")
    said = gr.Markdown()
    given = [prompt, *common, negative, plan]
    gr.on([button.click, prompt.submit], functools.partial(_draw, desk), given, [picture, said])


def _compare_tab(desk: Desk) -> None:
    prompt, *common = _asked(desk)
    plans = list(desk.menu.plans)
    with gr.Row():
        first = gr.Dropdown(plans, label="One plan", value=plans[0])
        second = gr.Dropdown(plans, label="Another plan", value=plans[1])
    button = gr.Button("Compare", variant="primary")
    with gr.Row():
        shown = [_picture(label) for label in ("One plan", "Another plan", f"Apart, x{STRONGER}")]
    said = gr.Markdown()
    given = [prompt, *common, first, second]
    gr.on([button.click, prompt.submit], functools.partial(_compare, desk), given, [*shown, said])


def _attention_tab(desk: Desk) -> None:
    gr.Markdown(
        "Measured in the last scales of a drawing. The first time of a plan and size compiles; "
        "other pictures wait meanwhile."
    )
    prompt, *common = _asked(desk)
    plan = gr.Dropdown(list(desk.menu.plans), label="Plan", value=desk.menu.plans[-1])
    button = gr.Button("Measure", variant="primary")
    shown = gr.Gallery(label="Attention", columns=1, object_fit="contain", format="png")
    said = gr.Markdown()
    given = [prompt, *common, plan]
    button.click(functools.partial(_attention, desk), given, [shown, said])


def _asked(desk: Desk) -> tuple[Any, Any, Any]:
    """Fields that all tabs have: prompt, size, seed."""
    prompt = gr.Textbox(
        label="Prompt", value=EXAMPLE, lines=1, max_length=desk.settings.most_prompt
    )
    sizes = list(desk.menu.shapes)
    with gr.Row():
        size = gr.Dropdown(sizes, label="Size", value=sizes[0], min_width=120)
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
    return prompt, size, seed


def _picture(label: str) -> Any:
    return gr.Image(
        label=label,
        format="png",
        type="numpy",
        interactive=False,
        min_width=200,
        buttons=["download", "fullscreen"],
    )


def _order(desk: Desk, **fields: Any) -> Order:
    """What the page asks for, checked as a request of the API is; what is wrong is shown."""
    try:
        return desk.menu.order(ImageRequest(**fields))
    except ValidationError as error:
        found = error.errors()[0]
        raise gr.Error(f"{found['loc'][0]}: {found['msg']}", print_exception=False) from None
    except Refused as error:
        raise gr.Error(str(error), print_exception=False) from None


async def _events(desk: Desk, order: Order) -> AsyncIterator[tuple[Pixels, bool, float]]:
    """(picture, whether it is done, seconds since its batch began) as they come."""
    try:
        async with desk.placed(order) as draft:
            done = False
            while not done:
                _, event = await draft.next()
                assert event.pixels is not None
                done = event.preview is None
                yield event.pixels, done, event.seconds
    except Refused as error:
        raise gr.Error(str(error), print_exception=False) from None


async def _draw(
    desk: Desk, prompt: str, size: str, seed: int, negative: str, plan: str
) -> AsyncIterator[tuple[Pixels, str]]:
    order = _order(
        desk, prompt=prompt, size=size, seed=seed, negative_prompt=negative or None, plan=plan
    )
    order = dataclasses.replace(order, previews=preview_steps(order.steps, PREVIEWS))
    async for picture, done, seconds in _events(desk, order):
        yield picture, f"Drawn in {seconds:.2f} s." if done else "Drawing…"


async def _compare(
    desk: Desk, prompt: str, size: str, seed: int, first: str, second: str
) -> AsyncIterator[tuple[Pixels | None, Pixels | None, Pixels | None, str]]:
    pictures: list[Pixels | None] = [None, None]
    taken = [0.0, 0.0]
    for index, plan in enumerate((first, second)):
        order = _order(desk, prompt=prompt, size=size, seed=seed, plan=plan)
        async for picture, _, seconds in _events(desk, order):
            pictures[index], taken[index] = picture, seconds
            yield pictures[0], pictures[1], None, f"{plan}: {seconds:.3f} s"
    one, other = pictures
    assert one is not None
    assert other is not None
    apart = np.abs(one.astype(np.int16) - other)
    said = (
        f"{first}: {taken[0]:.3f} s, {second}: {taken[1]:.3f} s. "
        f"The pictures differ by {apart.mean():.2f} of 255 on average."
    )
    yield one, other, np.minimum(apart * STRONGER, 255).astype(np.uint8), said


async def _attention(
    desk: Desk, prompt: str, size: str, seed: int, plan: str
) -> tuple[list[tuple[Any, str]], str]:
    order = _order(desk, prompt=prompt, size=size, seed=seed, plan=plan)
    try:
        work = desk.batcher.alone(functools.partial(_measured, desk, order))
    except Refused as error:
        raise gr.Error(str(error), print_exception=False) from None
    shown, density = await asyncio.wrap_future(work)
    if not shown:
        return shown, f"{plan} ends before the scales that are measured."
    return shown, f"Density of {plan}: {density:.3f}."


def _measured(desk: Desk, order: Order) -> tuple[list[tuple[Any, str]], float]:
    """The pictures of `sparvar inspect`, and the density of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        inspect_prompt(desk.pipe, order.prompt, out, seed=order.seed, **order.bucket.options)
        density = json.loads((out / "inspect.json").read_text())["density"]
        shown = []
        for file in sorted(out.glob("*.png")):
            with Image.open(file) as picture:
                title = QUANTITIES.get(file.stem, f"maps of scale {file.stem.rpartition('-')[2]}")
                shown.append((np.asarray(picture.convert("RGB")), title))
    return shown, density
