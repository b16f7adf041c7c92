"""A PyTorch class-conditional VAR with the released key names, to compare frameworks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparvar_convert.torch_twin.vqvae import Quantize
from sparvar_jax.models.var import VarConfig


class _AdaLinear(nn.Sequential):
    """SiLU, then linear: the linear layer is entry 1, as released."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.SiLU(), nn.Linear(inputs, outputs))


class SelfAttention(nn.Module):
    """Self-attention; with l2 norm cosine scores under a learned temperature."""

    def __init__(self, config: VarConfig):
        super().__init__()
        width = config.width
        self.heads, self.l2_norm = config.heads, config.l2_norm
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.zero_k_bias: Tensor
        self.register_buffer("zero_k_bias", torch.zeros(width))
        if config.l2_norm:
            initial = torch.full((1, config.heads, 1, 1), math.log(4.0))
            self.scale_mul_1H11 = nn.Parameter(initial)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: dict[str, Tensor] | None) -> Tensor:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = functional.linear(x, self.mat_qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(q.shape[-1])
        if self.l2_norm:
            temperature = self.scale_mul_1H11.clamp_max(math.log(100.0)).exp()
            q, k, scale = functional.normalize(q, dim=-1) * temperature, _unit(k), 1.0
        if cache is not None:
            k = cache["k"] = torch.cat([cache["k"], k], 2) if "k" in cache else k
            v = cache["v"] = torch.cat([cache["v"], v], 2) if "v" in cache else v
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).flatten(2))


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


class Block(nn.Module):
    """Modulated attention and feed-forward; the modulation comes from the class."""

    def __init__(self, config: VarConfig):
        super().__init__()
        width = config.width
        self.attn = SelfAttention(config)
        self.ffn = nn.Module()
        self.ffn.fc1 = nn.Linear(width, config.mlp_width)
        self.ffn.fc2 = nn.Linear(config.mlp_width, width)
        if config.shared_ada:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = _AdaLinear(width, 6 * width)

    def forward(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, cache: dict[str, Tensor] | None
    ) -> Tensor:
        if hasattr(self, "ada_gss"):
            parts = self.ada_gss + condition
        else:
            parts = self.ada_lin(condition).unflatten(-1, (1, 6, -1))
        g1, g2, s1, s2, b1, b2 = parts.unbind(2)
        x = x + g1 * self.attn(_layer_norm(x) * (1 + s1) + b1, mask, cache)
        h = self.ffn.fc1(_layer_norm(x) * (1 + s2) + b2)  # type: ignore[operator]
        return x + g2 * self.ffn.fc2(functional.gelu(h, approximate="tanh"))  # type: ignore


def _layer_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class VarTwin(nn.Module):
    """The transformer; label `config.classes` is the unconditional one."""

    def __init__(self, config: VarConfig):
        super().__init__()
        width, sides = config.width, config.sides
        self.config = config
        level = torch.cat([torch.full((side * side,), i) for i, side in enumerate(sides)])
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_1LC = nn.Parameter(torch.randn(1, len(level), width) * 0.02)
        self.register_buffer("lvl_1L", level[None])
        hidden = torch.where(level[:, None] >= level[None], 0.0, -torch.inf)
        self.attn_bias_for_masking: Tensor
        self.register_buffer("attn_bias_for_masking", hidden[None, None])
        self.word_embed = nn.Linear(config.code_width, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.lvl_embed = nn.Embedding(len(sides), width)
        self.shared_ada_lin = _AdaLinear(width, 6 * width) if config.shared_ada else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.Module()
        self.head_nm.ada_lin = _AdaLinear(width, 2 * width)
        self.head = nn.Linear(width, config.vocab)

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """One-pass logits `[B, L, V]`; inputs `[B, L - 1, Cd]` of all scales but the first."""
        condition = self.class_emb(labels)
        x = torch.cat([condition[:, None] + self.pos_start, self.word_embed(inputs)], 1)
        x = x + self.positions()
        return self._logits(self._blocks(x, condition, self.attn_bias_for_masking, None), condition)

    def positions(self) -> Tensor:
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def _blocks(
        self,
        x: Tensor,
        condition: Tensor,
        mask: Tensor | None,
        caches: list[dict] | None,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        shared = self.shared_ada_lin(condition)
        if self.config.shared_ada:
            shared = shared.unflatten(-1, (1, 6, -1))
        for index, block in enumerate(self.blocks):
            x = block(x, shared, mask, caches[index] if caches else None)
            if trace is not None:
                trace.append(x)
        return x

    def _logits(self, x: Tensor, condition: Tensor) -> Tensor:
        ada = self.head_nm.ada_lin(condition)  # type: ignore[operator]
        scale, shift = ada.unflatten(-1, (1, 2, -1)).unbind(2)
        return self.head(_layer_norm(x) * (1 + scale) + shift)

    def replay(
        self, labels: Tensor, ids: list[Tensor], quantize: Quantize, cfg: float
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The sampling loop with a cache and given token ids: what it computes at every scale."""
        condition = self.class_emb(
            torch.cat([labels, torch.full_like(labels, self.config.classes)])
        )
        sides, offset, trace = self.config.sides, 0, []
        total = torch.zeros(len(labels), self.config.code_width, sides[-1], sides[-1])
        caches: list[dict] = [{} for _ in self.blocks]
        x = condition[:, None] + self.pos_start + self.positions()[:, :1]
        for scale, side in enumerate(sides):
            if scale:
                inputs = functional.interpolate(total, size=(side, side), mode="area")
                x = self.word_embed(inputs.flatten(2).transpose(1, 2))
                x = (x + self.positions()[:, offset : offset + side * side]).repeat(2, 1, 1)
            hidden: list[Tensor] = []
            raw = self._logits(self._blocks(x, condition, None, caches, hidden), condition)
            t = cfg * scale / (len(sides) - 1)
            guided = (1 + t) * raw[: len(labels)] - t * raw[len(labels) :]
            total = quantize.add(total, quantize.codes(ids[scale]), scale, len(sides))
            step = {"transformer_input": x, "final_hidden": hidden[-1], "raw_logits": raw}
            step |= {f"hidden.{layer}": value for layer, value in enumerate(hidden)}
            trace.append(step | {"guided_logits": guided, "fhat": total})
            offset += side * side
        return trace, total
