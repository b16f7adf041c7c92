"""What is drawn on meshes and on one device: families, plans, meshes, and how results compare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models.hart import Hart, HartConfig
from sparvar_jax.models.sampling import image_keys
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Codebook, VqvaeConfig
from sparvar_jax.plans.caches import with_cache
from sparvar_jax.plans.plan import dense_plan, map_attention
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.strategy import Dense, Output
from sparvar_jax.policies import parse_plan
from sparvar_jax.policies.per_head import PerHead
from sparvar_jax.runtime import generate
from tests.house import support
from tests.house.support import lively

BATCH = 4
SIDES = (1, 2, 4)
SHORT = ScaleSchedule.of(((1, 1), (2, 2), (3, 5)))
CLASSES = VarConfig(2, 64, 2, sides=SIDES, classes=5, vocab=48, code_width=8, dtype="float32")
TEXT = HartConfig.preset(
    "hart_tiny", depth=2, width=64, heads=2, sides=(1, 2, 3), text_tokens=7, residual_depth=1,
    residual_steps=4, dtype="float32",
)  # fmt: skip
SPARSE = "sparvar-fast + drop_uncond(1)"
NAMED = {
    "branches": "fastvar(((-1, 0.5),), -2, 0, layers=(0, 2)) + drop_uncond(0, ((-1, 1),))",
    "patches": "prune(0.5, (4, 4), scales=(2,), layers=(1, 2))",
    "shared": "share_rows(1)",
    "budget": "scalekv(keep=0.5)",
}
OTHERS = ("lean dense", "int8 dense", "lean branches", "lean patches", "shared", "budget",
          "lean " + SPARSE)  # fmt: skip
"""What `every` draws of Infinity beside the presets."""
MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 2, 1), (1, 2, 2))
"""Rows x heads, and rows x guidance x heads for plans whose rows are apart."""
DIVIDED = (("infinity", "dense", (2, 2)), ("infinity", SPARSE, (1, 2)),
           ("var", "sparvar-paper", (2, 2)), ("infinity", "lean branches", (1, 2)),
           ("hart", "lean dense", (1, 2)))  # fmt: skip
"""Drawn with the tokens of every scale divided: one, and Infinity's 15, leave a device padding."""
PARTED = (("infinity", "dense", (2, 2, 2)), ("var", "sparvar-paper", (1, 2, 1)))
"""The same on meshes of rows x guidance x heads: conditional rows have devices of their own."""


@dataclasses.dataclass(frozen=True)
class Telling(Dense):
    """Dense attention that reports the mean norm of every row's and head's output."""

    def __call__(self, view, q, place, state):
        out = super().__call__(view, q, place, state).out
        return Output(out, report={"norm": jnp.linalg.norm(out, axis=-1).mean(-1)})


TELLING = map_attention(dense_plan(SHORT, 2), lambda step, layer: Telling())
"""A dense plan whose reports are compared as well."""
SIGHTED = map_attention(
    dense_plan(SHORT, 2), lambda step, layer: PerHead(((step.scale.index,),) * 2)
)
"""Every head sees its own scale alone."""


def plan_of(family, text, schedule):
    """A plan by its text, perhaps after a cache; the dense one of Infinity tells more."""
    if (family, text) == ("infinity", "dense"):
        return TELLING
    cache, _, rest = text.partition(" ")
    cache, text = (cache, rest) if cache in ("lean", "int8") else ("full", text)
    return with_cache(parse_plan(NAMED.get(text, text), schedule, 2), cache)


def families():
    """name -> (model, codebook, schedule, arguments of all pictures, pictures of a slice)."""
    text = support.model()
    classes, labels = lively(Var, CLASSES), jnp.array([1, 3, 0, 4])
    codebook = lively(Codebook, VqvaeConfig(48, 8, base_width=32, multipliers=(1, 1), blocks=1))
    words, book = (
        lively(Hart, TEXT),
        lively(Codebook, VqvaeConfig(TEXT.vocab, TEXT.code_width, base_width=32)),
    )
    features = jax.random.normal(jax.random.key(2), (BATCH, TEXT.text_tokens, TEXT.text_width))
    places = jnp.tile(jnp.arange(TEXT.text_tokens), (BATCH, 1))
    controls = generate.controls(len(SIDES), guidance=2.0, temperature=1.0)
    embed = jax.jit(lambda model, labels: model.embed_condition(labels))

    def of_classes(part):
        return embed(classes, labels[part]), controls, image_keys(0, BATCH)[part]

    def of_text(part):
        condition, _, keys = support.arguments(text, BATCH)
        rows = np.arange(2 * BATCH).reshape(2, BATCH)[:, part].reshape(-1)
        return jax.tree.map(lambda x: x[rows], condition), controls, keys[part]

    def of_words(part):
        condition = support.embed(words, features[part], places[part])
        return condition, controls, image_keys(0, BATCH)[part]

    return {
        "infinity": (text, None, SHORT, of_text),
        "var": (classes, codebook, CLASSES.schedule, of_classes),
        "hart": (words, book, TEXT.schedule, of_words),
    }


def furthest(ours, theirs):
    """Largest difference of two trees of arrays; the shapes must agree."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    distance = 0.0
    for one, other in pairs:
        assert one.shape == other.shape, (one.shape, other.shape)
        distance = max(distance, float(np.abs(np.float64(one) - np.float64(other)).max()))
    return distance


def joined(halves):
    """What one device draws of each half of the pictures, as if it had drawn all of them."""

    def join(*parts):
        groups = max(1, len(parts[0]) * 2 // BATCH)
        runs = [np.split(np.asarray(part), groups) for part in parts]
        return np.concatenate([run for group in zip(*runs, strict=True) for run in group])

    return jax.tree.map(join, *halves)


def distances(ours, theirs):
    """How far two pictures are apart: of all devices, and of one."""
    (one, outputs), (other, others) = ours, theirs
    pairs = {
        name: furthest([getattr(x, name) for x in outputs], [getattr(x, name) for x in others])
        for name in ("tokens", "captured", "reports")
    }
    return pairs | {"devices": len(one.sharding.device_set), "sums": furthest(one, other)}


def drawn(generator, plan, arguments, part=slice(None), capture=True):
    return generator.run(plan, *arguments(part), capture=capture)
