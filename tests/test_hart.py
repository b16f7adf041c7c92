"""HART from a prompt to a picture: prompts of fixed length, sampling, plans, commands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sparvar_jax.cli import main
from sparvar_jax.models import hart_parts, prefix_tokens, quantizer
from sparvar_jax.models.prefix_tokens import SYSTEM_PROMPT, load_prefix_tokenizer
from sparvar_jax.models.qwen2 import Qwen2
from sparvar_jax.pipelines import metadata
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import map_segments
from sparvar_jax.policies import parse_plan
from sparvar_jax.study.teacher import teacher_forced_logits
from tests.tiny_hart import CONFIG, WORDS, released, tiny_model, tiny_pipe

PROMPTS = ["a red apple", "the blue owl on a green circle"]


def draw(subject, **options):
    """(code sum, tokens of every scale) of a call."""
    request = tiny_pipe().request(subject, **options)
    *_, last = outputs = list(tiny_pipe().steps(request))
    return np.asarray(last[0].code_sum), [np.asarray(output.tokens) for _, output in outputs]


def test_prompts_have_exactly_so_many_tokens():
    words = load_prefix_tokenizer(tiny_model() / "text")
    ids, mask = words.encode(["red owl", "a <|endoftext|> red"], 6)
    red, owl, end = WORDS.index("red") + 1, WORDS.index("owl") + 1, len(WORDS) + 1
    assert ids.tolist() == [[red, owl, *[end] * 4], [1, end, red, *[end] * 3]]
    assert mask.tolist() == [[True, True, *[False] * 4], [True, False, True, *[False] * 3]]
    assert prefix_tokens.positions(mask).tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    with pytest.warns(UserWarning, match="has 3 tokens and is cut to 2"):
        assert words.encode(["red owl a"], 2)[0].tolist() == [[red, owl]]
    with pytest.raises(ValueError, match="the prompt is empty"):
        words.encode(["a", " "], 6)
    assert SYSTEM_PROMPT.endswith('with "Enhanced Prompt:".\n\nUser Prompt:\n')
    assert len(words.system()) > 100


def test_guidance_grows_but_for_the_last_scale():
    assert hart_parts.guidance_ramp(4.0, 5) == (1, 2, 3, 4, 4)
    request = tiny_pipe().request(PROMPTS)
    assert [step.merge_at for step in request.plan.steps] == [None, 2, 2]
    np.testing.assert_allclose(request.controls.guidance, [1, 3.25, 3.25])
    assert tiny_pipe().request(PROMPTS, guidance="off").plan.row_factor == 1


def test_a_picture_depends_on_its_own_key_and_prompt_alone():
    """Sums of codes are of order one and differ in the order of float32 sums."""
    together, _ = draw(PROMPTS, seed=5)
    swapped, _ = draw(PROMPTS[::-1], seed=[6, 5])
    np.testing.assert_allclose(together, swapped[::-1], atol=2e-4, rtol=0)
    alone, _ = draw(PROMPTS[0], seed=5)
    np.testing.assert_allclose(together[0], alone[0], atol=2e-4, rtol=0)
    assert np.abs(together[0] - draw(PROMPTS, seed=6)[0][0]).max() > 0.1
    assert np.abs(together[0] - draw([PROMPTS[1]] * 2, seed=5)[0][0]).max() > 0.1


@pytest.fixture(scope="module")
def captured():
    """(request, captured arrays, tokens and sums of codes of every scale), smooth."""
    pipe = tiny_pipe()
    request = pipe.request(PROMPTS, seed=3)
    assert request.how == "smooth"
    arguments = (request.plan, request.condition, request.controls, request.keys)
    found = []
    for state, output in pipe.generator.steps(*arguments, how="smooth", capture=True):
        arrays = {name: np.asarray(value) for name, value in output.captured.items()}
        found.append((arrays, np.asarray(output.tokens), np.asarray(state.code_sum)))
    return request, found


def test_mixtures_are_of_kept_codes_and_the_residual_is_added_unsmoothed(captured):
    _, found = captured
    book = tiny_pipe().model.codebook
    for arrays, weights, _ in found:
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert not weights[arrays["removed"]].any()
    arrays, weights, total = found[-1]
    residual = arrays["residual"].reshape(total.shape)
    assert 0.05 < np.abs(residual).max() <= 0.7
    codes = np.asarray(book.lookup(jnp.asarray(weights))).reshape(total.shape)
    np.testing.assert_allclose(total, found[-2][2] + codes + residual, atol=1e-5)


def test_the_residual_is_guided_and_given_the_drawn_ids(captured):
    """The hidden states it saw are those after the last block plus the codes of ids, not mixtures.

    The ids are the categorical draw of the documented key of the last scale.
    """
    request, found = captured
    model, book = tiny_pipe().model.transformer, tiny_pipe().model.codebook
    arrays, last = found[-1][0], len(CONFIG.sides) - 1
    kept = np.where(arrays["removed"], -np.inf, arrays["guided_logits"])
    keys = [jax.random.fold_in(jax.random.fold_in(key, last), 0) for key in request.keys]
    ids = np.stack([jax.random.categorical(key, row) for key, row in zip(keys, kept, strict=True)])
    hidden = jnp.asarray(arrays[f"hidden.{CONFIG.depth - 1}"])
    seen = model.residual_condition(hidden, book.lookup(jnp.asarray(ids)))
    got = arrays["residual_condition"].reshape(seen.shape)
    np.testing.assert_allclose(got, seen, atol=1e-5)
    strength = request.controls.guidance[-1] - 1
    noise = jnp.asarray(arrays["residual_noise"])
    again = model.denoise(jnp.asarray(arrays["residual_condition"]), strength, noise).residual
    np.testing.assert_allclose(arrays["residual"].reshape(again.shape), again, atol=1e-3)
    weaker = model.denoise(jnp.asarray(arrays["residual_condition"]), jnp.float32(0), noise)
    assert np.abs(weaker.residual - again).max() > 0.01


def test_one_pass_without_a_cache_gives_the_same_logits(captured):
    """Two blocks and a head of some ten sums of at most 512 products of order one, float32."""
    request, found = captured
    model, schedule = tiny_pipe().model.transformer, CONFIG.schedule
    codes = [quantizer.next_input(jnp.asarray(total), (side, side), mode="area")
             for (_, _, total), side in zip(found, CONFIG.sides[1:], strict=False)]  # fmt: skip
    codes = tuple(part.reshape(2, -1, CONFIG.code_width) for part in codes)
    once = jax.jit(lambda m: teacher_forced_logits(m, request.condition, codes, schedule))(model)
    for (arrays, _, _), logits in zip(found, once, strict=True):
        raw = arrays["raw_logits"]
        np.testing.assert_allclose(raw, logits[:, -raw.shape[1] :], atol=1e-4, rtol=0)


def test_every_image_draws_noise_of_its_own(captured):
    noise = captured[1][-1][0]["residual_noise"].reshape(CONFIG.residual_steps + 1, 2, -1)
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.2
    assert abs(noise.std() - 1) < 0.1
    assert len(np.unique(noise)) == noise.size


@dataclasses.dataclass(frozen=True)
class Rolled:
    """A token rule that runs every token, in another order in every row."""

    name = "rolled"
    reads = frozenset[str]()
    writes = frozenset[str]()

    def tokens(self, place):
        return place.scale.tokens

    def select(self, x, codes, place, state):
        return (jnp.arange(x.shape[1]) + jnp.arange(1, len(x) + 1)[:, None]) % x.shape[1]

    def restore(self, before, after, kept, place, state):
        return before.at[jnp.arange(len(before))[:, None], kept].set(after), {}


def test_token_rules_take_rotary_rows_along():
    """Every row has tables of its own; in another order the same tokens give the same picture."""

    def change(step, layer, old):
        return dataclasses.replace(old, tokens=Rolled()) if layer else old

    plain = tiny_pipe().request(PROMPTS, seed=3, plan="drop_uncond(1)").plan
    expected, _ = draw(PROMPTS, seed=3, plan=plain)
    total, _ = draw(PROMPTS, seed=3, plan=map_segments(plain, change))
    np.testing.assert_allclose(total, expected, atol=1e-3)


def test_plans_that_drop_scales_or_rows(captured):
    """Scales before the first one that is dropped are as ever."""
    request = tiny_pipe().request(PROMPTS, seed=3, plan="skip_last_scales(1)")
    *_, (state, _) = tiny_pipe().steps(request)
    np.testing.assert_allclose(state.code_sum, captured[1][-2][2], atol=2e-4)
    total, _ = draw(PROMPTS, seed=3, plan="drop_uncond(1)")
    np.testing.assert_allclose(total, draw(PROMPTS, seed=3, plan="drop_uncond(1)")[0], atol=1e-5)
    assert np.abs(total - captured[1][-1][2]).max() > 1e-3


def test_options_that_mean_nothing_are_refused():
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match=r"has no option size: use plan, seed, guidance"):
        pipe.request(PROMPTS, size="1M")
    with pytest.raises(ValueError, match="draws 6x6 alone, got 16x16"):
        pipe.request(PROMPTS, height=16)
    with pytest.raises(ValueError, match="got 1 negative prompts for 2 prompts"):
        pipe.request(PROMPTS, negative=["red"])
    with pytest.raises(ValueError, match="the plan has 4 layers"):
        pipe.request(PROMPTS, plan=parse_plan("dense", CONFIG.schedule, 4))


def test_parts_that_do_not_fit_are_refused():
    model = tiny_pipe().model
    wide = dataclasses.replace(model.text_encoder.config, width=128)
    encoder = nnx.eval_shape(lambda: Qwen2(wide, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"expects text features of width 64, .* gives 128"):
        dataclasses.replace(model, text_encoder=encoder)


def test_commands(tmp_path, capsys):
    """Released folders to a picture: convert, info, generate, and again with the encoder freed."""
    folder, model = released()[0], tmp_path / "model"
    parts = [str(folder / part) for part in ("text", "llm", "tokenizer")]
    assert main(["convert", *parts, "--into", str(model)]) == 0
    assert main(["convert", *parts, "--export", str(tmp_path / "back.pth")]) == 2
    assert "a part of one model, got 3 sources" in capsys.readouterr().err
    assert main(["info", "--model", str(model), "--plan", "sparvar-paper"]) == 0
    said = capsys.readouterr().out
    assert "pictures of 6x6" in said
    assert "prefix" in said
    order = ["generate", "a red apple", "--model", str(model), "--dtype", "float32"]
    pictures = []
    for name, more in (("a.png", []), ("b.png", ["--free-text-encoder"])):
        assert main([*order, "--out", str(tmp_path / name), *more]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    np.testing.assert_array_equal(*pictures)
    np.testing.assert_array_equal(pictures[0], tiny_pipe()("a red apple")[0])
    assert pictures[0].shape == (6, 6, 3)
    told = metadata.read_metadata(tmp_path / "a.png")
    assert (told["prompt"], told["guidance"]) == ("a red apple", "4.5")
    capsys.readouterr()
    assert main([*order, "--size", "1M", "--out", str(tmp_path / "c.png")]) == 2
    assert "has no option size" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_a_pipeline_without_its_text_encoder_takes_features():
    features = tiny_pipe().encode_text(PROMPTS)
    assert features.features.shape == (2, CONFIG.text_tokens, CONFIG.text_width)
    bare = Pipeline(tiny_pipe().model, text_encoder=False)
    request = bare.request(features, seed=5)
    same = tiny_pipe().request(PROMPTS, seed=5)
    jax.tree.map(np.testing.assert_array_equal, request.condition, same.condition)
    with pytest.raises(ValueError, match="has no text encoder"):
        bare.request(PROMPTS)
