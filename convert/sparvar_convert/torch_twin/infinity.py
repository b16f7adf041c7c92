"""Infinity in PyTorch, small and plain, with the released key names: the other side of comparisons.

Everything runs in float32 with ordinary attention. The loop over scales can be fed the bits of
another run, so that two frameworks can be compared scale by scale without drifting apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_jax.models.infinity import InfinityConfig

Grid = tuple[int, int]
"""(height, width) in tokens."""

Cache = list[tuple[Tensor, Tensor] | None]
"""Keys and values of every block so far, each [R, H, S, D]."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of [R, H, T, D] queries; `mask` [R, S] marks the keys to see."""
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class KeyValue(nn.Module):
    """Keys and values from one matrix; only values have a trained bias."""

    mat_kv: nn.Linear
    v_bias: Tensor
    zero_k_bias: Tensor

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.mat_kv = nn.Linear(wide, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def key_value(self, memory: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        k, v = F.linear(memory, self.mat_kv.weight, bias).chunk(2, -1)
        return _heads(k, heads), _heads(v, heads)


class TextPool(KeyValue):
    """Learned queries, one a head, that pool a prompt's tokens into one vector."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config.text_width, config.width)
        heads = config.pool_heads
        self.mat_q = nn.Parameter(0.02 * torch.randn(1, heads, config.width // heads))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        heads, dim = self.mat_q.shape[1:]
        k, v = self.key_value(text, heads)
        q = self.mat_q[:, :, None].expand(len(text), -1, -1, -1)
        return self.proj(_attend(q, k, v, dim**-0.5, mask))[:, 0]


class CrossAttention(KeyValue):
    """Attention of picture tokens to the prompt's tokens."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config.width, config.width)
        self.heads = config.heads
        self.mat_q = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        k, v = self.key_value(memory, self.heads)
        q = _heads(self.mat_q(x), self.heads)
        return self.proj(_attend(q, k, v, q.shape[-1] ** -0.5, mask))


class SelfAttention(nn.Module):
    """Cosine attention with one learned temperature a head, over all scales so far."""

    zero_k_bias: Tensor

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias)
        q, k, v = (_heads(part, self.heads) for part in qkv.chunk(3, -1))
        temperature = self.scale_mul_1H11.clamp(max=math.log(100.0)).exp()
        q = rotate(F.normalize(q, dim=-1, eps=1e-12) * temperature, *turn)
        k = rotate(F.normalize(k, dim=-1, eps=1e-12), *turn)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.proj(_attend(q, k, v, 1.0)), (k, v)


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of the last axis by the angles of their positions."""
    even, odd = u[..., 0::2], u[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)


def rotary(grid: Grid, full: Grid, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [height * width, head_dim / 2]; positions are stretched to `full`."""
    half = head_dim // 2
    inverse = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
    y, x = (
        torch.round(torch.arange(n).float() * (whole / n))
        for n, whole in zip(grid, full, strict=True)
    )
    angles = torch.cat(
        [
            torch.outer(y.repeat_interleave(grid[1]), inverse),
            torch.outer(x.repeat(grid[0]), inverse),
        ],
        -1,
    )
    return angles.cos(), angles.sin()


class FeedForward(nn.Module):
    """Two linear layers with tanh-approximated GELU between."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class Text:
    """What the rows' prompts mean to the transformer; padding is masked."""

    pooled: Tensor
    memory: Tensor
    mask: Tensor
    modulation: Tensor


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulated by the pooled text."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ada_gss = nn.Parameter(0.02 * torch.randn(1, 1, 6, config.width))
        self.sa = SelfAttention(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.ca = CrossAttention(config)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, text: Text, turn: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gain1, gain2, scale1, scale2, shift1, shift2 = (self.ada_gss + text.modulation).unbind(2)
        out, seen = self.sa(_norm(x) * (1 + scale1) + shift1, turn, past)
        x = x + gain1 * out
        x = x + self.ca(self.ca_norm(x), text.memory, text.mask)
        return x + gain2 * self.ffn(_norm(x) * (1 + scale2) + shift2), seen


class RmsNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _Holder(nn.Module):
    """A module that only gives its children a prefix."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Infinity(nn.Module):
    """The transformer; `config.chunks` decides how blocks are named, as in released files."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.cfg_uncond = nn.Parameter(
            0.02 * torch.randn(config.text_max_length, config.text_width)
        )
        self.text_norm = RmsNorm(config.text_width)
        self.text_proj_for_sos = _Holder(ca=TextPool(config))
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU("tanh"), nn.Linear(width, width)
        )
        self.pos_start = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.lvl_embed = nn.Embedding(config.levels, width)
        self.word_embed = nn.Linear(config.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        blocks = [Block(config) for _ in range(config.depth)]
        per_chunk = config.depth // config.chunks
        if config.chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.block_chunks = nn.ModuleList(
                _Holder(module=nn.ModuleList(blocks[start : start + per_chunk]))
                for start in range(0, config.depth, per_chunk)
            )
        self.head_nm = _Holder(ada_lin=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)))
        self.head = nn.Linear(width, 2 * config.bits)

    def all_blocks(self) -> Iterator[Block]:
        """Blocks in order, through all chunks."""
        return (module for module in self.modules() if isinstance(module, Block))

    def embed_text(self, rows: Sequence[Tensor]) -> Text:
        """Text features [n, Ct] of each row to what the blocks need."""
        mask = torch.arange(max(map(len, rows)))[None] < torch.tensor([[len(row)] for row in rows])
        text = self.text_norm(nn.utils.rnn.pad_sequence(list(rows), batch_first=True))
        pooled = self.text_proj_for_sos.get_submodule("ca")(text, mask)
        modulation = self.shared_ada_lin(pooled).view(len(rows), 1, 6, -1)
        return Text(pooled, self.text_proj_for_ca(text), mask, modulation)

    def logits(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Head with its modulation: [R, T, C] to [R, T, 2N]."""
        scale, shift = (
            self.head_nm.get_submodule("ada_lin")(pooled).view(len(pooled), 1, 2, -1).unbind(2)
        )
        return self.head(_norm(x) * (1 + scale) + shift)
