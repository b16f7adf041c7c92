"""A PyTorch HART with the released key names, to compare frameworks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparvar_convert.torch_twin.residual_head import ResidualTwin, Sinusoid
from sparvar_convert.torch_twin.vqvae import Quantize
from sparvar_jax.models.hart_parts import HartConfig

Table = tuple[Tensor, Tensor]


class Rms(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def _turn(x: Tensor, table: Table) -> Tensor:
    cos, sin = (part[:, None] for part in table)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class SelfAttention(nn.Module):
    """Attention over all that is cached, at a quarter of the usual scale."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.zero_k_bias: Tensor
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Table, cache: dict[str, Tensor]) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = functional.linear(x, self.qkv_proj.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _turn(q, table), _turn(k, table)
        k = cache["k"] = torch.cat([cache["k"], k], 2) if "k" in cache else k
        v = cache["v"] = torch.cat([cache["v"], v], 2) if "v" in cache else v
        scale = 0.25 / math.sqrt(q.shape[-1])
        out = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated by SiLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Both norms are the same one."""

    def __init__(self, config: HartConfig):
        super().__init__()
        self.attn = SelfAttention(config.width, config.heads)
        self.ffn = FeedForward(config.width, config.mlp_width)
        self.ln_wo_grad = Rms(config.width)

    def forward(self, x: Tensor, table: Table, cache: dict[str, Tensor]) -> Tensor:
        x = x + self.attn(self.ln_wo_grad(x), table, cache)
        return x + self.ffn(self.ln_wo_grad(x))


class HartTwin(nn.Module):
    """The transformer with its residual head."""

    def __init__(self, config: HartConfig):
        super().__init__()
        width = config.width
        self.config = config
        counts = [config.text_tokens, *(side * side for side in config.sides[1:])]
        level = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
        self.register_buffer("lvl_1L", level[None])
        hidden = torch.where(level[:, None] >= level[None], 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", hidden[None, None])
        if config.context_norm:
            self.context_norm = Rms(config.text_width)
        self.context_embed = nn.Linear(config.text_width, width)
        self.word_embed = nn.Linear(config.code_width, width)
        self.lvl_embed = Sinusoid(width) if config.sinusoidal else nn.Embedding(len(counts), width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.Module()
        self.head_nm.ln_wo_grad = Rms(width)
        self.head_nm.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, config.vocab)
        self.decoder_norm = Rms(width)
        self.diffloss = ResidualTwin(config.residual)

    def tables(self, positions: Tensor, scale: int) -> Table:
        """Rotary cosines and sines of a scale's tokens, of every row."""
        channels = self.config.width // self.config.heads
        if scale == 0:
            inverse = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
            angles = positions.float()[..., None] * inverse
            angles = torch.cat([angles, angles], -1)
        else:
            side, final = self.config.sides[scale], self.config.sides[-1]
            steps = torch.arange(side, dtype=torch.float32) / side * final
            offset = positions[:, -1:].float()
            rows = steps.repeat_interleave(side) + offset
            columns = steps.repeat(side) + offset
            inverse = 10000.0 ** (-torch.arange(0, channels, 4) / channels)
            row, column = (axis[..., None] * inverse for axis in (rows, columns))
            angles = torch.cat([row, row, column, column], -1)
        return angles.cos(), angles.sin()

    def logits(self, x: Tensor, condition: Tensor) -> Tensor:
        """The head; scale and shift come from the largest text feature of every channel."""
        ada = self.head_nm.ada_lin(condition.amax(1, keepdim=True))  # type: ignore[operator]
        scale, shift = ada.chunk(2, -1)
        return self.head(self.head_nm.ln_wo_grad(x) * (1 + scale) + shift)  # type: ignore[operator]

    def embed(self, text: Tensor) -> Tensor:
        """Text features of the conditional rows, then zeros, in the transformer's width."""
        text = torch.cat([text, torch.zeros_like(text)])
        return self.context_embed(self.context_norm(text) if self.config.context_norm else text)

    def replay(
        self,
        text: Tensor,
        positions: Tensor,
        ids: list[Tensor],
        quantize: Quantize,
        cfg: float,
        noise: Tensor | None,
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The sampling loop with given ids and noise: what it computes at every scale.

        noise: of the residuals; None leaves them out.
        """
        condition, batch, last = self.embed(text), len(text), len(ids) - 1
        positions = torch.cat([positions, torch.zeros_like(positions)])
        sides = self.config.sides
        total = torch.zeros(batch, self.config.code_width, sides[-1], sides[-1])
        caches: list[dict] = [{} for _ in self.blocks]
        levels, trace = self.lvl_embed(torch.arange(len(sides))), []
        for scale, side in enumerate(sides):
            x = condition
            if scale:
                inputs = functional.interpolate(total, size=(side, side), mode="area")
                x = self.word_embed(inputs.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
            x = x + levels[scale]
            step = {"transformer_input": x}
            for layer, block in enumerate(self.blocks):
                x = block(x, self.tables(positions, scale), caches[layer])
                step[f"hidden.{layer}"] = x
            raw = self.logits(x, condition)
            t = cfg * min(scale, last - 1) / last
            guided = ((1 + t) * raw[:batch] - t * raw[batch:])[:, -(side * side) :]
            codes = quantize.codes(ids[scale])
            if scale < last:
                total = quantize.add(total, codes, scale, len(sides))
            else:
                residual = self.residual(x, codes, t, noise, step)
                total = total + codes + residual
            trace.append(step | {"raw_logits": raw, "guided_logits": guided, "fhat": total})
        return trace, total

    def residual(
        self, x: Tensor, codes: Tensor, t: float, noise: Tensor | None, step: dict[str, Tensor]
    ) -> Tensor | float:
        """What is added to the codes `[B, Cv, n, n]` of the last scale."""
        if noise is None:
            return 0.0
        words = self.word_embed(codes.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
        hidden = self.decoder_norm(x + words).flatten(0, 1)
        found = self.diffloss.sample(hidden, t, noise)
        step |= {"diffusion.condition": hidden, "diffusion.output": found}
        return found.unflatten(0, (len(codes), -1)).transpose(1, 2).unflatten(2, codes.shape[2:])
