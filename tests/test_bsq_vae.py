"""BSQ tokenizer with random weights: JAX against the PyTorch twin, precision, presets, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from sparvar_convert.torch_twin import bsq_vae as twins

from sparvar_jax.models import bsq_vae, conv_parts
from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.weights import checkpoint
from tests.released_bsq import load_released

# float32 rounding through some ten layers of values near one; measured 2e-6.
TOLERANCE = 2e-5
CONFIGS = {
    "f4": BsqVaeConfig(8, 4, (1, 2, 2), (1, 2, 2), 24, 1, 2),
    "f2 with levels to spare": BsqVaeConfig(5, 2, (1, 1, 2), (2, 1, 1), 32, 2, 1),
    "f8": BsqVaeConfig(14, 8, (1, 1, 2, 2), (1, 2, 2, 4), 24, 1, 1),
}


def twin_of(config: BsqVaeConfig, seed: int = 0) -> twins.BsqVae:
    fields = {name: value for name, value in vars(config).items() if name != "dtype"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = twins.BsqVae(**fields).requires_grad_(False)
        for name, parameter in twin.named_parameters():
            if "norm" in name:  # at their initial ones and zeros they could be swapped unnoticed
                parameter.add_(0.3 * torch.randn_like(parameter))
    return twin


def model_of(config: BsqVaeConfig, twin: twins.BsqVae) -> BsqVae:
    return load_released(config, {key: value.numpy() for key, value in twin.state_dict().items()})


def random_image(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_twin(name):
    config = CONFIGS[name]
    twin = twin_of(config)
    model = model_of(config, twin)
    image = random_image(2, 4 * config.stride, 3 * config.stride)
    latent = jax.jit(lambda model, x: model.encode(x))(model, image)
    assert latent.shape == (2, 4, 3, config.code_width)
    np.testing.assert_allclose(latent, nhwc(twin.encode(nchw(image))), atol=TOLERANCE, rtol=0)
    # Scaled up, so that some pixels reach the clamp.
    codes = 4 * np.asarray(latent)
    decoded = jax.jit(lambda model, x: model.decode(x))(model, codes)
    assert decoded.shape == image.shape
    np.testing.assert_allclose(decoded, nhwc(twin.decode(nchw(codes))), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("width", [48, 64])
def test_group_norm_equals_torch_far_from_zero(width):
    """A mean of a hundred deviations would cancel in one-pass statistics."""
    x = 100 + np.random.default_rng(0).standard_normal((2, 5, 7, width)).astype(np.float32)
    ours = conv_parts.GroupNorm(width)(jnp.asarray(x))
    theirs = F.group_norm(nchw(x).double(), 24 if width == 48 else 32, eps=1e-6)
    # The mean is off by a few float32 steps at 100, 2^-17 each; one pass would be off by 1e-3.
    np.testing.assert_allclose(ours, nhwc(theirs), atol=4 * 2**-17, rtol=0)


def test_bfloat16_stays_near_float32():
    config = CONFIGS["f4"]
    twin = twin_of(config)
    half_config = BsqVaeConfig(**{**vars(config), "dtype": "bfloat16"})
    half, full = model_of(half_config, twin), model_of(config, twin)
    abstract = nnx.eval_shape(lambda: BsqVae(half_config, rngs=nnx.Rngs(0)))
    kinds = {path: x.dtype.name for path, x in checkpoint.abstract_parameters(abstract).items()}
    islands = {p for p, kind in kinds.items() if kind == "float32"}
    assert islands == {p for p in kinds if "norm" in p or p.startswith("decoder.conv_out")}
    codes = np.random.default_rng(2).choice([-0.35, 0.35], (1, 4, 4, 8)).astype(np.float32)
    decode = jax.jit(lambda model, x: model.decode(x))
    exact, rough = (np.asarray(decode(model, codes)) for model in (full, half))
    assert rough.dtype == np.float32
    # Each of some 20 roundings to 8 bits moves a value near one by up to 2^-9, at random.
    assert np.sqrt(np.mean((exact - rough) ** 2)) < 20**0.5 * 2**-9


@pytest.mark.parametrize("name", bsq_vae.PRESETS)
def test_presets_have_the_released_shapes(name):
    config = BsqVaeConfig.preset(name)
    ours = checkpoint.abstract_parameters(nnx.eval_shape(lambda: BsqVae(config, rngs=nnx.Rngs(0))))
    fields = {name: value for name, value in vars(config).items() if name != "dtype"}
    with torch.device("meta"):
        theirs = twins.BsqVae(**fields)
    assert len(ours) == len(list(theirs.parameters()))
    assert sum(x.size for x in ours.values()) == sum(p.numel() for p in theirs.parameters())
    stride, width = int(name[1:].split("_")[0]), int(name.split("_d")[1])
    assert (config.stride, ours["encoder.conv_out.bias"].shape) == (stride, (width,))
    levels = config.halvings + 1
    assert ours[f"encoder.down.{levels - 1}.block.1.conv2.kernel"].shape == (3, 3, 512, 512)
    assert ours["decoder.up.0.block.0.shortcut.kernel"].shape == (1, 1, 256, 128)
    assert f"decoder.up.{levels - 1}.upsample.bias" in ours
    assert "decoder.up.0.upsample.bias" not in ours


def test_twin_has_the_released_names():
    names = twin_of(CONFIGS["f4"]).state_dict()
    for name in (
        "encoder.conv_in.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.conv.bias",
        "encoder.down.0.downsample.conv.conv.weight",
        "encoder.mid.block_2.norm1.norm.weight",
        "decoder.up.2.upsample.conv.conv.bias",
        "decoder.norm_out.norm.bias",
    ):
        assert name in names
    powers = [128, 64, 32, 16, 8, 4, 2, 1]
    assert names["quantizer.lfq.mask"].tolist() == names["quantize.lfq.mask"].tolist() == powers


def test_to_uint8_truncates():
    steps = jnp.asarray([-1, -0.999, 0, 0.5, 0.9999, 1]).reshape(1, 1, 2, 3)
    picture = bsq_vae.to_uint8(steps)
    assert picture.dtype == jnp.uint8
    assert picture.ravel().tolist() == [0, 0, 127, 191, 254, 255]


def test_megapixel_decode_fits_in_memory():
    """Buffers of a 1024x1024 float32 decode on the CPU, from the compiled program."""
    model = nnx.eval_shape(lambda: BsqVae(BsqVaeConfig.preset("f16_d32"), rngs=nnx.Rngs(0)))
    codes = jax.ShapeDtypeStruct((1, 64, 64, 32), jnp.float32)
    compiled = jax.jit(lambda model, x: model.decode(x)).lower(model, codes).compile()
    # Where resolution doubles last, three maps of 1024x1024x256 are live (the four places of every
    # pixel side by side, rows of them joined, both rows joined), and one half as wide.
    assert compiled.memory_analysis().temp_size_in_bytes <= 3.6 * 2**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 12}, "stride must be a power of two, got 12"),
        ({"stride": 8}, "stride 8 needs at least 4 encoder_multipliers"),
        ({"base_width": 40}, "divisible by 32 or 24, got 40"),
        ({"code_width": 0}, "must be positive"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
@pytest.mark.unchecked
def test_configuration_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        BsqVaeConfig(**{**vars(CONFIGS["f4"]), **change})


def test_refuses_unknown_preset_and_image_size():
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'f32'"):
        BsqVaeConfig.preset("f32")
    model = nnx.eval_shape(lambda: BsqVae(CONFIGS["f4"], rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="multiples of 4, got 8x6"):
        model.encode(jnp.zeros((1, 8, 6, 3)))
