"""A PyTorch VQVAE with the released key names, to compare frameworks side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparvar_jax.models.vqvae import VqvaeConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normed 3x3 convolutions and a shortcut, 1x1 where the width changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """Single-head attention over all pixels, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    """Halves (zeros right and below, stride 2) or doubles (nearest) and convolves."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


def _level(inputs: int, outputs: int, blocks: int, attention: bool) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(ResBlock(outputs if i else inputs, outputs) for i in range(blocks))
    level.attn = nn.ModuleList(PixelAttention(outputs) for _ in range(blocks if attention else 0))
    return level


def _run_level(level: nn.Module, x: Tensor) -> Tensor:
    for index, block in enumerate(level.block):  # type: ignore[arg-type]
        x = block(x)
        if len(level.attn):  # type: ignore[arg-type]
            x = level.attn[index](x)  # type: ignore[index]
    return x


def _middle(channels: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1, middle.block_2 = ResBlock(channels, channels), ResBlock(channels, channels)
    middle.attn_1 = PixelAttention(channels)
    return middle


def _run_middle(middle: nn.Module, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))  # type: ignore[operator]


class Encoder(nn.Module):
    """Image to latent."""

    def __init__(self, config: VqvaeConfig):
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.base_width
            level = _level(before, width, config.blocks, attention=i == last)
            if i != last:
                level.downsample = Resample(width, up=False)
            self.down.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = _run_level(level, x)
            x = level.downsample(x) if hasattr(level, "downsample") else x  # type: ignore
        return self.conv_out(functional.silu(self.norm_out(_run_middle(self.mid, x))))


class Decoder(nn.Module):
    """Latent to image; levels are numbered as in the encoder and run from last to first."""

    def __init__(self, config: VqvaeConfig):
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_width, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i + 1] if i < last else widths[-1]
            level = _level(before, width, config.blocks + 1, attention=i == last)
            if i:
                level.upsample = Resample(width, up=True)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = _run_middle(self.mid, self.conv_in(latent))
        for level in reversed(self.up):
            x = _run_level(level, x)
            x = level.upsample(x) if hasattr(level, "upsample") else x  # type: ignore
        return self.conv_out(functional.silu(self.norm_out(x)))


class _SharedConvs(nn.Module):
    def __init__(self, convolutions: list[nn.Conv2d]):
        super().__init__()
        self.qresi_ls = nn.ModuleList(convolutions)


class Quantize(nn.Module):
    """Codebook and the shared convolutions that smooth every scale's codes."""

    def __init__(self, config: VqvaeConfig, scales: int):
        super().__init__()
        self.config = config
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, config.vocab))
        width = config.code_width
        self.quant_resi = _SharedConvs(
            [nn.Conv2d(width, width, 3, padding=1) for _ in range(config.phis)]
        )
        self.embedding = nn.Embedding(config.vocab, config.code_width)

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return list(self.quant_resi.qresi_ls)  # type: ignore[arg-type]

    def add(self, total: Tensor, codes: Tensor, scale: int, scales: int) -> Tensor:
        """Add one scale's codes `[B, Cd, side, side]` to the running sum."""
        if codes.shape[-2:] != total.shape[-2:]:
            codes = functional.interpolate(codes, size=total.shape[-2:], mode="bicubic")
        phi = self.convolutions[self.config.phi(scale, scales)]
        share = self.config.residual
        return total + (1 - share) * codes + share * phi(codes)

    def codes(self, ids: Tensor) -> Tensor:
        """Codebook rows of square token maps `[B, side * side]` as `[B, Cd, side, side]`."""
        side = round(ids.shape[1] ** 0.5)
        return self.embedding(ids).transpose(1, 2).unflatten(2, (side, side))


class VqvaeTwin(nn.Module):
    """The class-conditional models' tokenizer; images are RGB `[B, 3, H, W]` in [-1, 1]."""

    def __init__(self, config: VqvaeConfig, scales: int = 10):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantize(config, scales)
        self.quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)

    def feature(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))

    def tokenize(self, feature: Tensor, sides: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids of every scale, and the running sum after every scale."""
        total, ids, sums = torch.zeros_like(feature), [], []
        for scale, side in enumerate(sides):
            rest = functional.interpolate(feature - total, size=(side, side), mode="area")
            flat = rest.flatten(2).transpose(1, 2).reshape(-1, feature.shape[1])
            book = self.quantize.embedding.weight
            distance = (flat**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * flat @ book.T
            ids.append(distance.argmin(1).view(feature.shape[0], -1))
            total = self.quantize.add(total, self.quantize.codes(ids[-1]), scale, len(sides))
            sums.append(total)
        return ids, sums

    def decode(self, total: Tensor) -> Tensor:
        """Image in [-1, 1] from the sum of all scales."""
        return self.decoder(self.post_quant_conv(total)).clamp(-1, 1)
