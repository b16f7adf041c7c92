"""HART's residual head and its last scale against stored arrays, float32.

Everything comes from the sidecars. The head multiplies its first step's rounding by 2e4 before it
clamps: 1e-3 of an array's size. For mixtures see `test_hart.test_mixtures`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import hart_parts, residual_head, vocabulary
from sparvar_jax.models.family import Drawn
from tests.golden import hart_runs
from tests.golden.hart_runs import (
    TOLERANCE,
    close,
    decoded,
    golden,
    ids,
    nhwc,
    ramp,
    replay,
    tokenizer,
    transformer,
)
from tests.golden.support import golden_stems, load_sidecar

STEMS = golden_stems("hart_*")
RUNS = [(stem, run) for stem in STEMS for run in load_sidecar(stem)["runs"]]
RESIDUAL = 1e-3


def near(got, expected, share: float) -> None:
    """Within a share of the array's size."""
    close(got, expected, share * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_last_scale(stem, run, golden_note):
    """Residuals of the stored noise, then the last sum and the picture from stored residuals."""
    data, model, replayed = golden(stem), transformer(stem), replay(stem, run)
    captured, last = replayed.captured[-1], len(data.sides) - 1
    tokens, name = jnp.asarray(ids(stem, run)[-1]), f"{run}.diffusion"
    rows, codes = tokens.size, None
    if f"{name}.output" in data.tensors:
        hidden = captured["residual_condition"]
        condition = data.tensors[f"{name}.condition"]
        close(hidden.reshape(-1, hidden.shape[-1]), condition, TOLERANCE)
        guidance = jnp.float32(ramp(stem, run)[-1]) - 1
        found = jax.jit(lambda m, *args: m.denoise(*args))(
            model, jnp.asarray(hidden), guidance, hart_runs.noise(stem, name, rows)
        )
        expected = data.tensors[f"{name}.output"][:rows]
        golden_note(f"residual within {np.abs(found.residual - expected).max():.1e}")
        near(found.residual, expected, RESIDUAL)
        compare_steps(data.tensors, name, found, rows)
        codes = jnp.asarray(expected).reshape(*tokens.shape, -1)
    before = jnp.asarray(replayed.sums[-2])
    drawn, tolerance = tokens, TOLERANCE
    if data.sidecar["runs"][run]["more_smooth"]:
        share = hart_parts.progress(last, len(data.sides))
        draws = data.at(f"{run}.gumbel_exponentials", last).astype(np.float32)
        kept = np.where(captured["removed"], -np.inf, captured["guided_logits"])
        drawn = vocabulary.mixed(jnp.asarray(kept), jnp.asarray(-np.log(draws)), share)
        tau = data.sidecar["runs"][run]["gumbel_tau"][last]
        largest = float(np.abs(np.asarray(tokenizer(stem).codebook.codes[...])).max())
        tolerance += 2 * replayed.error * (1 + share) / tau * largest
    scale, book = model.config.schedule.scales[-1], tokenizer(stem).codebook
    total, following = model.accumulate(Drawn(drawn, codes), before, scale, None, book)
    assert following is None
    close(total, nhwc(data.tensors[f"{run}.final_fhat"]), tolerance)
    if f"{run}.final_image" in data.tensors:
        stored = nhwc(data.tensors[f"{run}.final_fhat"])
        image = (decoded(tokenizer(stem), stored) + 1) / 2
        close(image, nhwc(data.tensors[f"{run}.final_image"]), TOLERANCE)


def compare_steps(tensors, name: str, found, rows: int) -> None:
    """What every stored step of a residual saw. Where x and noise agree to rounding at the noisiest
    step, the predicted start may have either sign: at most one entry in a thousand."""
    for step in range(len(found.states)):
        stored = tensors.get(f"{name}.x.{step:02d}")
        if stored is not None:
            near(found.states[step], stored[:rows], RESIDUAL)
        stored = tensors.get(f"{name}.network_output.{step:02d}")
        if stored is not None:
            near(found.outputs[step][0], stored[:rows], RESIDUAL)
        stored = tensors.get(f"{name}.pred_xstart.{step:02d}")
        if stored is not None:
            off = np.abs(np.asarray(found.starts[step]) - stored[:rows]) > RESIDUAL
            assert off.mean() <= (1e-3 if step == 0 else 0)


@pytest.mark.parametrize("stem", STEMS)
def test_residual_head_alone(stem):
    """With guidance of several strengths; at exactly one nothing is mixed."""
    data, model = golden(stem), transformer(stem)
    condition = data.tensors["head_alone.condition"]
    rows = len(condition) // 2
    names = sorted({name.rsplit(".", 1)[0] for name in data.tensors if name.endswith(".output")})
    names = [name for name in names if name.startswith("head_alone.cfg_")]
    assert names
    for name in names:
        guidance = float(name.removeprefix("head_alone.cfg_").replace("p", "."))
        found = jax.jit(residual_head.sample)(
            model.residual,
            jnp.asarray(condition).reshape(2, rows, -1),
            jnp.float32(guidance),
            hart_runs.noise(stem, name, rows),
        )
        near(found.residual, data.tensors[f"{name}.output"][:rows], RESIDUAL)
        compare_steps(data.tensors, name, found, rows)


@pytest.mark.parametrize("stem", STEMS)
def test_schedule_of_the_residual_head(stem):
    """Float64 on both sides."""
    tensors, steps = golden(stem).tensors, transformer(stem).config.residual_steps
    names = {
        "times": "timesteps",
        "betas": "betas",
        "alphas": "alphas_cumprod",
        "recip": "sqrt_recip_alphas_cumprod",
        "recipm1": "sqrt_recipm1_alphas_cumprod",
        "mean_start": "posterior_mean_coef1",
        "mean_now": "posterior_mean_coef2",
        "log_least": "posterior_log_variance_clipped",
    }
    for ours, theirs in names.items():
        got = getattr(residual_head.schedule(steps), ours)
        np.testing.assert_allclose(got, tensors[f"schedule.{theirs}"], rtol=1e-10, err_msg=ours)
