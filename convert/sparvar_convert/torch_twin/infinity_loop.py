"""The loop over scales of the PyTorch twin, free-running or fed with given bits, fully traced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparvar_convert.torch_twin.infinity import Cache, Grid, Infinity, Text, rotary


@dataclass
class ScaleTrace:
    """Everything one scale computed; rows are conditional first.

    block_input: before the level embedding. hidden: after every block. raw_logits: head output
    before temperature and guidance. guided_logits: [B, T, N, 2]. removed: options that top-p
    forbids. labels: the bits that were fed back.
    """

    block_input: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    raw_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    guided_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    removed: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Settings:
    """How to draw.

    grids: of the whole schedule. full_grid: last grid of the 1M schedule of this ratio. guidance:
    one a scale. merge_after: mix guidance into the hidden state after this block instead of the
    logits. scales: how many to run. generator: None takes the likelier bit.
    """

    grids: tuple[Grid, ...]
    full_grid: Grid
    guidance: tuple[float, ...]
    temperature: float = 0.5
    top_p: float = 0.97
    merge_after: int | None = None
    scales: int | None = None
    generator: torch.Generator | None = None


@torch.no_grad()
def run(
    model: Infinity,
    settings: Settings,
    texts: Sequence[Tensor],
    *,
    negative: Sequence[Tensor] | None = None,
    forced_bits: Sequence[Tensor] | None = None,
) -> tuple[list[ScaleTrace], Tensor]:
    """Draw scale by scale; the traces and the summed codes [B, d, height, width].

    Args:
        texts: text features [n, Ct] of each prompt. negative: features that replace the learned
            unconditional ones.
        forced_bits: labels [B, T, N] of each scale, fed back instead of the twin's own.
    """
    rows, batch = list(texts), len(texts)
    if any(strength != 1 for strength in settings.guidance):
        rows += negative or [model.cfg_uncond[: len(text)] for text in texts]
    text = model.embed_text(rows)
    x = text.pooled[:, None] + model.pos_start
    cache: Cache = [None] * model.config.depth
    stretch = 2 if model.config.patchify else 1
    sizes = [(height * stretch, width * stretch) for height, width in settings.grids]
    total = torch.zeros(batch, model.config.code_width, *sizes[-1])
    traces: list[ScaleTrace] = []
    for scale in range(settings.scales or len(settings.grids)):
        trace = _forward(model, settings, scale, x, text, cache)
        traces.append(trace)
        _guide(model, settings, scale, trace, text.pooled, batch)
        trace.labels = forced_bits[scale] if forced_bits else _draw(trace, settings.generator)
        total = total + resize(codes(trace.labels, settings.grids[scale], stretch), sizes[-1])
        if scale + 1 < len(sizes):
            following = F.pixel_unshuffle(resize(total, sizes[scale + 1]), stretch)
            x = model.word_embed(following.flatten(2).transpose(1, 2))
            x = x.repeat(len(rows) // batch, 1, 1)
    return traces, total


def _forward(
    model: Infinity, settings: Settings, scale: int, x: Tensor, text: Text, cache: Cache
) -> ScaleTrace:
    """All blocks of one scale; extends the cache."""
    trace = ScaleTrace(x)
    strength = settings.guidance[scale]
    turn = rotary(settings.grids[scale], settings.full_grid, model.config.head_dim)
    x = x + model.lvl_embed.weight[scale]
    for index, block in enumerate(model.all_blocks()):
        x, cache[index] = block(x, text, turn, cache[index])
        trace.hidden.append(x)
        if index == settings.merge_after:
            cond, uncond = x.chunk(2)
            x = (strength * cond + (1 - strength) * uncond).repeat(2, 1, 1)
            trace.hidden[-1] = x
    return trace


def _guide(
    model: Infinity, settings: Settings, scale: int, trace: ScaleTrace, pooled: Tensor, batch: int
) -> None:
    """Logits with temperature and guidance, and the options that top-p removes."""
    x, strength = trace.hidden[-1], settings.guidance[scale]
    if strength == 1 or settings.merge_after is not None:
        trace.raw_logits = model.logits(x[:batch], pooled[:batch])
        guided = trace.raw_logits / settings.temperature
    else:
        trace.raw_logits = model.logits(x, pooled)
        cond, uncond = (trace.raw_logits / settings.temperature).chunk(2)
        guided = strength * cond + (1 - strength) * uncond
    trace.guided_logits = guided.unflatten(-1, (-1, 2))
    ascending, order = trace.guided_logits.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
    removed[..., -1] = False
    trace.removed = torch.zeros_like(removed).scatter(-1, order, removed)


def _draw(trace: ScaleTrace, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return trace.guided_logits.argmax(-1)
    kept = trace.guided_logits.masked_fill(trace.removed, -math.inf).softmax(-1)
    drawn = torch.multinomial(kept.flatten(0, -2), 1, generator=generator)
    return drawn.view(kept.shape[:-1])


def codes(labels: Tensor, grid: Grid, stretch: int) -> Tensor:
    """Labels [B, T, N] to codes of +-1/sqrt(d), [B, d, height, width], patches unfolded."""
    signs = 2 * labels.float() - 1
    signs = signs.transpose(1, 2).unflatten(-1, grid)
    signs = F.pixel_shuffle(signs, stretch)
    return signs / math.sqrt(signs.shape[1])


def resize(x: Tensor, size: Grid) -> Tensor:
    """Trilinear with one frame, as released: neither aligned corners nor antialiasing."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    frames = F.interpolate(x[:, :, None], (1, *size), mode="trilinear", align_corners=False)
    return frames[:, :, 0]
