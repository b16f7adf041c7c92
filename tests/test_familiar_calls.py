"""Calls as people know them from other libraries: results, generators, callbacks, near names."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.results import Pictures
from sparvar_jax.weights import checkpoint, storage
from tests.tiny_model import PARTS as TINY
from tests.tiny_model import random_parameters, write_tiny_model
from tests.tiny_var import tiny_pipe

SHORT = {"plan": "skip_last_scales(2)"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe([2, 3], seed=4, **SHORT)


def test_a_call_gives_an_array_that_has_images(drawn):
    assert isinstance(drawn, Pictures)
    assert drawn.dtype == np.uint8
    assert [type(image) for image in drawn.images] == [Image.Image] * 2
    np.testing.assert_array_equal(np.asarray(drawn.images[1]), drawn[1])
    np.testing.assert_array_equal(np.asarray(drawn[1].images[0]), drawn[1])
    with pytest.raises(AttributeError, match="no pictures any more"):
        _ = (drawn / 2).images


def test_the_output_type_says_what_images_are(pipe, drawn):
    pil, floats, device = (
        pipe([2, 3], seed=4, output_type=kind, **SHORT).images for kind in ("pil", "np", "jax")
    )
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), drawn)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats * 255, np.asarray(drawn, np.float32), atol=1e-4)
    assert isinstance(device, jax.Array)
    np.testing.assert_array_equal(device, floats)
    with pytest.raises(ValueError, match="'pil', 'np', 'jax' or None, got 'pt'"):
        pipe([2], output_type="pt", **SHORT)


@pytest.mark.parametrize("kind", ["jax", "numpy", "torch"])
def test_a_generator_stands_for_a_seed(pipe, kind):
    make = {
        "jax": lambda: jax.random.key(7),
        "numpy": lambda: np.random.default_rng(7),
        "torch": lambda: torch.Generator().manual_seed(7),
    }[kind]
    first, second = (pipe.request([2, 3], generator=make()).keys for _ in range(2))
    assert (first == second).all()
    assert (first[0] != first[1]).all()
    one_each = pipe.request([2, 3], generator=[7, make()]).keys
    assert (one_each[0] == pipe.request([2], seed=7).keys[0]).all()
    assert (one_each[1] == first[0]).all()
    with pytest.raises(ValueError, match="seed or generator, not both"):
        pipe.request([2], generator=make(), seed=1)


def test_the_same_generator_of_torch_draws_the_seed_people_gave_it(pipe):
    generator = torch.Generator().manual_seed(4)
    assert (pipe.request([2], generator=generator).keys == pipe.request([2], seed=4).keys).all()


def test_a_callback_sees_every_scale_and_can_draw_it(pipe, drawn):
    seen = []

    def callback(step, scale, latents):
        seen.append((step, scale.tokens, pipe.decode(latents)))

    pipe([2, 3], seed=4, callback=callback, **SHORT)
    assert [(step, tokens) for step, tokens, _ in seen] == [(0, 1), (1, 16)]
    np.testing.assert_array_equal(seen[-1][2], drawn)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("guidence", "guidance"),
        ("guidance_scal", "guidance_scale"),
        ("cfg_scale", "guidance"),
        ("Seed", "seed"),
        ("num_inference_steps", "plan"),
        ("callback_on_step_end", "callback"),
        ("outputtype", "output_type"),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(pipe, wrong, right):
    with pytest.raises(ValueError, match=f"no option {wrong}.*you may mean {right} for {wrong}"):
        pipe([2], **{wrong: 3})


def test_names_of_other_families_are_not_offered(pipe):
    with pytest.raises(ValueError, match="has no option negative_prompt"):
        pipe([2], negative_prompt="a cat")


def test_a_model_in_8_bits_is_saved_in_8_bits(tmp_path):
    source = write_tiny_model(tmp_path / "dense", ("tokenizer", "text"))
    kind, module, config = TINY["transformer"]
    checkpoint.write_part(
        source,
        "transformer",
        random_parameters(module, config, 0),
        config={"kind": kind, **checkpoint.config_to_json(config)},
        source={"made": "random"},
        defaults={"plan": "skip_last_scales(6)", "size": "0.06M"},
        form="int8",
    )
    pipe = Pipeline.from_pretrained(source, weights="stored")
    assert pipe.save_pretrained(tmp_path / "saved") is None
    saved = Pipeline.from_pretrained(tmp_path / "saved", weights="stored")
    kept = storage.PartReader(tmp_path / "saved" / "transformer").scaled
    assert kept
    assert kept <= storage.PartReader(source / "transformer").scaled
    assert saved.model.defaults == pipe.model.defaults
    for part, module in pipe.model.parts.items():
        before, after = (nnx.state(one) for one in (module, saved.model.parts[part]))
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert saved.model.text_tokenizer.encode(["a cat"])[0].tolist() == (
        pipe.model.text_tokenizer.encode(["a cat"])[0].tolist()
    )
    with pytest.raises(ValueError, match="exists already"):
        pipe.save_pretrained(tmp_path / "saved")
    part = Pipeline.from_pretrained(source, text_encoder=False)
    with pytest.raises(ValueError, match="load the model with text_encoder=True"):
        part.save_pretrained(tmp_path / "other")
