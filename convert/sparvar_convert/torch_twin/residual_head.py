"""HART's residual diffusion head in PyTorch under its released names, to compare frameworks.

Written after the formulas of denoising diffusion, step by step, and sharing nothing with the JAX
head but its shape: tables are made here once more, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparvar_jax.models.residual_head import ResidualShape


class Sinusoid(nn.Module):
    """Numbers to vectors: cosines and sines of 128 frequencies, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = numbers.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class _ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class _Final(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + scale) + shift)


class Denoiser(nn.Module):
    """The network: noisy residuals, a time and hidden states to noise and variance."""

    def __init__(self, shape: ResidualShape):
        super().__init__()
        self.time_embed = Sinusoid(shape.width)
        self.cond_embed = nn.Linear(shape.condition_width, shape.width)
        self.input_proj = nn.Linear(shape.code_width, shape.width)
        self.res_blocks = nn.ModuleList(_ResBlock(shape.width) for _ in range(shape.depth))
        self.final_layer = _Final(shape.width, 2 * shape.code_width)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        y = self.time_embed(times) + self.cond_embed(condition)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class ResidualTwin(nn.Module):
    """The head with its guided sampler."""

    def __init__(self, shape: ResidualShape):
        super().__init__()
        self.steps = shape.steps
        self.net = Denoiser(shape)

    def sample(self, condition: Tensor, strength: float, noise: Tensor) -> Tensor:
        """Residuals `[M, Cv]` of hidden states `[2 M, C]`, conditional rows first.

        noise: `[steps + 1, M, Cv]`, the initial states first.
        """
        strength = 0.0 if strength == 1 else strength
        x = noise[0]
        for draw, step in zip(noise[1:], reversed(range(self.steps)), strict=True):
            time, keep, before = self._places(step)
            out = self.net(torch.cat([x, x]), torch.full((1,), time), condition)
            (eps, variance), (other, _) = (half.chunk(2, -1) for half in out.chunk(2))
            eps = (1 + strength) * eps - strength * other
            start = x / math.sqrt(keep) - math.sqrt(1 / keep - 1) * eps
            x = self._posterior(x, start.clamp(-1, 1), variance, keep, before, draw if step else 0)
        return 0.6 * x

    def _posterior(
        self, x: Tensor, start: Tensor, variance: Tensor, keep: float, before: float, draw: object
    ) -> Tensor:
        beta = 1 - keep / before
        mean = beta * math.sqrt(before) / (1 - keep) * start
        mean = mean + (1 - before) * math.sqrt(1 - beta) / (1 - keep) * x
        least = beta * (1 - before) / (1 - keep)
        if not least:
            return mean
        share = (variance + 1) / 2
        spread = share * math.log(beta) + (1 - share) * math.log(least)
        return mean + torch.exp(spread / 2) * draw  # type: ignore[operator]

    def _places(self, step: int) -> tuple[int, float, float]:
        """(time, what is kept up to a step, and up to the one before)."""
        times = [round(k * 999 / (self.steps - 1)) for k in range(self.steps)]
        return times[step], _kept(times[step]), _kept(times[step - 1]) if step else 1.0


def _kept(time: int) -> float:
    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = (min(1 - level((i + 1) / 1000) / level(i / 1000), 0.999) for i in range(time + 1))
    return math.prod(1 - beta for beta in betas)
