"""Stored runs of other policies replayed through the production loop; all from a sidecar."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models import sampling
from sparvar_jax.plans import schedule
from sparvar_jax.runtime import generate
from tests.golden import infinity_runs
from tests.golden.support import golden_stems, load_golden, load_sidecar

TOLERANCE = 1e-4
"""As in `test_infinity`: the models are the same, and so are guidance and temperature."""


def runs(pattern):
    """(stem, run) of every stored run of a policy."""
    return [(stem, run) for stem in golden_stems(pattern) for run in load_sidecar(stem)["runs"]]


@functools.cache
def load(stem):
    """(sidecar, tensors, generator); the weights lie in the file that the sidecar names."""
    sidecar, tensors = load_golden(stem)
    named = re.search(r"(\w+)\.safetensors", sidecar["weights"])[1]
    _, weights = load_golden(named)
    return sidecar, tensors, generate.Generator(infinity_runs.load_model(sidecar, weights))


def schedule_of(run):
    """The released schedule that begins with a run's scales."""
    sizes = tuple((h, w) for _, h, w in run["scale_schedule"])
    table = next(t for t in schedule.ASPECT_TABLES.values() if t[: len(sizes)] == sizes)
    return schedule.ScaleSchedule(sizes, table[-1])


def name(run, what, scale):
    return f"{run}.{what}.scale_{scale:02d}"


def replay(stem, run, plan, *, before=None):
    """(state, captured, reports) after every scale, on the labels the run drew.

    before: (scale, state) -> the state that the scale is drawn from.
    """
    sidecar, tensors, generator = load(stem)
    about, model = sidecar["runs"][run], generator.model
    text, lengths = infinity_runs.text_of(tensors, "", run)
    condition = jax.jit(lambda model: model.embed_condition(text, lengths, "learned"))(model)
    controls = generate.controls(
        len(plan.schedule), guidance=about["cfg"], temperature=about["tau"]
    )
    state, found = generator.start(plan, len(lengths)), []
    for index in range(len(plan.steps)):
        forced = jnp.asarray(tensors[name(run, "bit_labels", index)])
        state = state if before is None else before(index, state)
        state, output = generator.decode_scale(
            plan, index, condition, state, controls, sampling.image_keys(0, len(lengths)),
            forced=forced, capture=True,
        )  # fmt: skip
        captured = {key: np.asarray(value) for key, value in output.captured.items()}
        kept = dataclasses.replace(state, code_sum=np.array(state.code_sum), codes=None)
        shapes = jax.tree.map(np.shape, state.cache)
        found.append((dataclasses.replace(kept, cache=shapes, shared=()), captured, output.reports))
    return found


def check_captured(found, tensors, run, depth):
    """Largest difference to the hidden states, logits and code sums that are stored."""
    names = {"raw_logits": "raw_logits", "guided_logits": "guided_logits"}
    names |= {f"hidden_after_block_{layer:02d}": f"hidden.{layer}" for layer in range(depth)}
    worst, seen = 0.0, 0
    for scale, (_, captured, _) in enumerate(found):
        for stored, ours in names.items():
            if (key := name(run, stored, scale)) in tensors:
                error = np.abs(captured[ours].reshape(tensors[key].shape) - tensors[key]).max()
                assert error <= TOLERANCE, f"{key}: max abs difference {error:.2e}"
                worst, seen = max(worst, error), seen + 1
    assert seen
    if (key := f"{run}.final_latent") in tensors:
        latent = tensors[key].transpose(0, 2, 3, 1)
        assert np.abs(found[-1][0].code_sum - latent).max() <= TOLERANCE
    return worst
