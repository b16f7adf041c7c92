"""The BSQ image tokenizer in PyTorch with the key names of the released files, NCHW.

It exists to be compared with: no speed, no training. Convolutions and norms sit in wrappers whose
only child is `conv` or `norm`, because the released keys carry these words.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


class Norm(nn.Module):
    """Group norm of 32 groups, or of 24 where only 24 divides the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(24 if width % 32 else 32, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Conv(nn.Module):
    """Same-size convolution; `stride=2` pads right and bottom only."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = size // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice, plus the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), Conv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs), Conv(outputs, outputs)
        self.nin_shortcut = nn.Identity() if inputs == outputs else Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Level(nn.Module):
    """Blocks of one resolution and the change to the next one, if any."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, outputs) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for change in ("downsample", "upsample"):
            if hasattr(self, change):
                x = getattr(self, change)(x)
        return x


class Middle(nn.Module):
    """Two blocks at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResBlock(width, width), ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Image to latent."""

    def __init__(
        self,
        code_width: int,
        base_width: int,
        multipliers: tuple[int, ...],
        blocks: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.conv_in = Conv(3, base_width)
        self.down = nn.ModuleList()
        width = base_width
        for index, multiplier in enumerate(multipliers):
            level = Level(width, base_width * multiplier, blocks)
            width = base_width * multiplier
            if 2**index < stride:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out, self.conv_out = Norm(width), Conv(width, code_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Sum of codes to image."""

    def __init__(
        self,
        code_width: int,
        base_width: int,
        multipliers: tuple[int, ...],
        blocks: int,
        stride: int,
    ) -> None:
        super().__init__()
        width = base_width * multipliers[-1]
        self.conv_in, self.mid = Conv(code_width, width), Middle(width)
        levels = []
        for index, multiplier in reversed(list(enumerate(multipliers))):
            level = Level(width, base_width * multiplier, blocks)
            width = base_width * multiplier
            if index >= 1 and 2**index <= stride:
                level.upsample = Upsample(width)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = Norm(width), Conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class BitQuantiser(nn.Module):
    """Holds the released buffer of powers of two, which bit labels never use."""

    def __init__(self, code_width: int) -> None:
        super().__init__()
        self.lfq = nn.Module()
        self.lfq.register_buffer("mask", 2 ** torch.arange(code_width - 1, -1, -1))


class Quantised(NamedTuple):
    """Labels per scale `[B, d, h, w]` (int8), sum of codes, inputs of every scale but the first."""

    labels: list[Tensor]
    code_sum: Tensor
    inputs: list[Tensor]


def _resize(x: Tensor, size: Size, mode: str) -> Tensor:
    if mode == "area":
        return F.interpolate(x, size, mode="area")
    volume = F.interpolate(x[:, :, None], (1, *size), mode="trilinear", align_corners=False)
    return volume[:, :, 0]


class BsqVae(nn.Module):
    """The tokenizer. `sizes` are latent grids (doubled where the transformer patchifies)."""

    def __init__(
        self,
        code_width: int,
        stride: int,
        encoder_multipliers: tuple[int, ...],
        decoder_multipliers: tuple[int, ...],
        base_width: int = 128,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(code_width, base_width, encoder_multipliers, encoder_blocks, stride)
        self.decoder = Decoder(code_width, base_width, decoder_multipliers, decoder_blocks, stride)
        # Released files hold the one module under both names.
        self.quantizer = self.quantize = BitQuantiser(code_width)

    def encode(self, image: Tensor) -> Tensor:
        """Latent of RGB images `[B, 3, height, width]` in [-1, 1]."""
        return self.encoder(image)

    def quantise(self, latent: Tensor, sizes: list[Size], mode: str = "linear") -> Quantised:
        """Bits of the residual at every scale; `mode` ("linear" or "area") resizes the inputs."""
        final = sizes[-1]
        residual, total, labels, inputs = latent, torch.zeros_like(latent), [], []
        for index, size in enumerate(sizes):
            if index:
                inputs.append(_resize(total, size, mode) if size != final else total)
            small = residual if size == final else _resize(residual, size, "area")
            bits = F.normalize(small, dim=1, eps=1e-12) > 0
            codes = torch.where(bits, 1.0, -1.0) / latent.shape[1] ** 0.5
            codes = codes if size == final else _resize(codes, final, "linear")
            residual, total = residual - codes, total + codes
            labels.append(bits.to(torch.int8))
        return Quantised(labels, total, inputs)

    def decode(self, code_sum: Tensor) -> Tensor:
        """RGB images `[B, 3, height, width]` clamped to [-1, 1]."""
        return self.decoder(code_sum).clamp(-1, 1)
