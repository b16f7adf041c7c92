"""Draws on meshes of host devices and on one; prints how they compare, as JSON.

A program of its own: the number of devices is fixed when jax starts. Nearly all of its time goes
into compiling, so that what has been drawn is compared with as much as it can be. With the word
"every" it draws every plan of both families on every mesh instead.
"""

import dataclasses
import functools
import gc
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparvar_jax.models import eight_bits
from sparvar_jax.models.bands import WHOLE
from sparvar_jax.models.bsq_vae import BsqVae
from sparvar_jax.models.hart import Hart
from sparvar_jax.models.sampling import image_keys
from sparvar_jax.models.var import Var
from sparvar_jax.pipelines.decoding import look_at
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.caches import with_cache
from sparvar_jax.plans.route import Route
from sparvar_jax.policies import parse_plan, preset_names
from sparvar_jax.runtime import generate
from sparvar_jax.runtime.bound import Bound
from sparvar_jax.runtime.devices import Devices
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.runtime.placement import Placement, mesh_of
from tests.house import support
from tests.house.mesh_cases import (
    BATCH,
    CLASSES,
    DIVIDED,
    MESHES,
    OTHERS,
    PARTED,
    SHORT,
    SIGHTED,
    SPARSE,
    TELLING,
    distances,
    drawn,
    families,
    furthest,
    joined,
    plan_of,
)
from tests.house.support import lively
from tests.tiny_model import TOKENIZER, write_tiny_model


def compare(one, four, plan, arguments):
    """A plan on four devices, and the two pictures of each pair of devices on one."""
    ours = drawn(four, plan, arguments)
    theirs = joined([drawn(one, plan, arguments, part) for part in (slice(0, 2), slice(2, 4))])
    return distances(ours, theirs) | {"alone": furthest(ours[0], theirs[0])}, ours, theirs


def by_hand(four, arguments, code_sum, outputs):
    """Scales drawn one by one, with tokens forced, and without capturing anything."""
    condition, controls, keys = arguments(slice(None))
    state, wrong = four.start(TELLING, BATCH), []
    for index, output in enumerate(outputs):
        state, again = four.decode_scale(
            TELLING, index, condition, state, controls, keys, capture=True
        )
        wrong.append(furthest(again.tokens, output.tokens))
    tokens, other = tuple(output.tokens for output in outputs), image_keys(77, BATCH)
    forced, _ = four.run(TELLING, condition, controls, other, forced=tokens)
    plain, _ = four.run(TELLING, condition, controls, keys)
    return {"by scale": max(wrong), "forced": furthest(forced, code_sum),
            "captured": furthest(plain, code_sum)}  # fmt: skip


def swapped(one, four, arguments):
    """Which weights are copied to the mesh again: none, and after a change the changed one.

    Controls are kept there as well: other ones must show.
    """
    first = drawn(four, TELLING, arguments)[0]
    before = list(four._weights._placed)
    drawn(four, TELLING, arguments)
    kept = all(a is b for a, b in zip(before, four._weights._placed, strict=True))
    bias = four.model.head.bias
    bias[...] = bias[...] + jnp.linspace(-1, 1, bias[...].shape[0])
    other = drawn(four, TELLING, arguments)[0]
    new = sum(a is not b for a, b in zip(before, four._weights._placed, strict=True))
    alone = drawn(one, TELLING, arguments)[0]

    def steered(part):
        condition, _, keys = arguments(part)
        return condition, generate.controls(len(SHORT), guidance=1.2, temperature=3.0), keys

    turned = drawn(four, TELLING, steered)[0]
    return {
        "kept": kept,
        "copied": new,
        "moved": furthest(first, other),
        "fresh": furthest(other, alone),
        "turned": furthest(turned, other),
        "steered": furthest(turned, drawn(one, TELLING, steered)[0]),
    }


def refusals(four, arguments):
    """Messages for three pictures over two devices, and for heads that cannot be divided."""
    condition, controls, keys = arguments(slice(0, 3))
    odd = dataclasses.replace(CLASSES, width=80, heads=5)
    placed = Generator(lively(Var, odd), placement=four.placement)
    calls = {
        "start": lambda: four.start(TELLING, 3),
        "run": lambda: four.run(TELLING, condition, controls, keys),
        "compile": lambda: four.compile(TELLING, condition, 3),
        "heads": lambda: placed.start(TELLING, 2),
        "any": lambda: Devices(tuple(jax.devices()[:3])).place(1, 4),
        "mesh": lambda: mesh_of(3, 3),
        "sight": lambda: four.compile(SIGHTED, arguments(slice(None))[0], BATCH),
        "axis": lambda: Placement(four.placement.mesh, heads="columns"),
        "meet": lambda: Placement(mesh_of(1, 1, guidance=2), guidance="guidance").place(
            1, 4, parse_plan("drop_uncond(1)", SHORT, 2)
        ),
    }
    return {name: refusal(call) for name, call in calls.items()}


def refusal(call):
    """The message of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def some():
    """What the tests of every day ask for."""
    told, placement, kept = {}, Placement(mesh_of(2, 2)), {}
    for name, (model, codebook, schedule, arguments) in families().items():
        one, four = Generator(model, codebook), Generator(model, codebook, placement)
        for text in ("dense", SPARSE) if name != "hart" else ():
            plan = plan_of(name, text, schedule)
            told[f"{name} {text}"], ours, kept[name, text] = compare(one, four, plan, arguments)
            if plan is TELLING:
                told["whole"] = distances(ours, drawn(one, plan, arguments))
                told["by hand"] = by_hand(four, arguments, *ours)
        for family, text, shape in (*DIVIDED, *PARTED):
            if family == name:
                plan, whole = plan_of(name, text, schedule), kept.get((name, text))
                kind = "divided" if len(shape) == 2 else "parted"
                told[f"{kind} {name} {text}"] = divided(one, arguments, plan, shape, whole)
        if name == "infinity":
            told["refusals"] = refusals(four, arguments)
            told["swapped"] = swapped(one, four, arguments)
        if name == "hart":
            told["refusals"]["capture"] = refusal(
                functools.partial(drawn, four, plan_of(name, "dense", schedule), arguments)
            )
    return told | {"relaid": relaid(), "bands": bands(), "pipeline": pipeline()}


def relaid():
    """Whether rows that all devices have get to those that draw them, past the host."""
    before = Placement(mesh_of(1, 4))
    after = Placement(mesh_of(1, 2, guidance=2), guidance="guidance")
    rows = [before.put_parameters(np.arange(8 * n).reshape(2, -1)) for n in (1, 3)]
    with jax.transfer_guard("disallow_explicit"):
        placed = after.put_rows(rows, 2)
    own = [[int(shard.data[0, 0]) for shard in x.addressable_shards] for x in placed]
    return {"own": own, "equal": all(map(np.array_equal, placed, rows))}


def divided(one, arguments, plan, shape, theirs=None):
    """A plan with the tokens of every scale divided; theirs: all pictures, drawn on one device."""
    (rows, guidance, heads) = shape if len(shape) == 3 else (shape[0], 1, shape[1])
    mesh, axis = mesh_of(rows, heads, guidance=guidance), "guidance" if guidance > 1 else None
    many = Generator(one.model, one.codebook, Placement(mesh, divide_from=1, guidance=axis))
    theirs = drawn(one, plan, arguments) if theirs is None else theirs
    if isinstance(one.model, Hart) and shape[0] > 1:
        kept = tuple(dataclasses.replace(output, captured={}) for output in theirs[1])
        return distances(drawn(many, plan, arguments, capture=False), (theirs[0], kept))
    return distances(drawn(many, plan, arguments), theirs)


def every():
    """Every preset, and what else draws less or keeps less, in all families on every mesh."""
    told, found = {}, families()
    narrow = support.model()
    eight_bits.narrow(narrow, eight_bits.kernels(narrow))
    found["narrow"] = (narrow, *found["infinity"][1:])
    for name, (model, codebook, schedule, arguments) in found.items():
        one = Generator(model, codebook)
        texts = {"infinity": (*preset_names(), *OTHERS), "narrow": ("dense",)}
        for text in texts.get(name, (*preset_names(), SPARSE)):
            plan = plan_of(name, text, schedule)
            theirs = drawn(one, plan, arguments)
            for shape in (shape for shape in MESHES if len(shape) == 2 or plan.apart):
                told[f"{name} {text} {shape}"] = divided(one, arguments, plan, shape, theirs)
    model, _, _, arguments = found["infinity"]
    return told | {"infinity route (4, 2)": route(model, arguments)}


@dataclasses.dataclass(frozen=True)
class Brightest:
    """Skips the last scale where a picture of the scale before is bright on average."""

    name = "brightest"

    def features(self, before, now, schedule, decode):
        return decode(now - before).mean((1, 2))

    def choose(self, features):
        return [int(one.mean() > -1) for one in features]


def route(model, arguments):
    """How far a picture is, on two by two devices, whose plan is chosen on the way."""
    plans = tuple(parse_plan(text, SHORT, 2) for text in ("dense", "skip_last_scales(1)"))
    plan = with_cache(dataclasses.replace(plans[0], route=Route(1, Brightest(), plans)), "lean")
    tokenizer = lively(BsqVae, dataclasses.replace(TOKENIZER, code_width=8))
    pictures = []
    for placed in (Devices(tuple(jax.devices()[:8])), None):
        look = Bound(lambda: tokenizer, look_at, placed)
        chosen = []
        generator = Generator(model, placement=placed, decode=look)
        condition, controls, keys = arguments(slice(None))
        pictures.append(generator.run(plan, condition, controls, keys, chosen=chosen.append))
        assert len(chosen[0].steps) == 2, "the plan that is chosen draws two scales"
    return distances(*pictures)


def bands():
    """How far the bands of two and of three devices are from a picture decoded by one."""
    tokenizer = lively(BsqVae, TOKENIZER)
    codes = jax.random.normal(jax.random.key(0), (1, 6, 4, TOKENIZER.code_width))

    def decode(tokenizer, codes, bands=WHOLE):
        return tokenizer.decode_band(bands.own(codes), bands)

    alone, told = Bound(lambda: tokenizer, decode)(codes), {}
    for count in (2, 3):
        placed = Devices(tuple(jax.devices()[:count]))
        image = Bound(lambda: tokenizer, decode, placed, bands=True)(codes)
        told[str(count)] = [furthest(image, alone), image.addressable_shards[0].data.shape[1]]
    return told | {"spread": float(alone.std())}


def pipeline():
    """A model directory on two devices: where its weights lie, and how far the pictures are."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model")
        two, one = (Pipeline.from_checkpoint(model, devices=count) for count in (2, None))
        weights = jax.tree.leaves(nnx.state(two.model.transformer))
        asked = {"plan": "skip_last_scales(5)", "seed": 3}
        pictures = [pipe("a red apple", **asked).astype(int) for pipe in (two, one)]
        placed = two.generator._weights._placed
        return {
            "devices": [len(leaf.sharding.device_set) for leaf in weights],
            "copied": sum(a is not b for a, b in zip(weights, placed, strict=False)),
            "steps": int(np.abs(pictures[0] - pictures[1]).max()),
            "spread": float(pictures[1].std()),
            "narrow": narrow(model),
        }


def narrow(folder):
    """On how many devices 8-bit matrices lie, and whether they are those of one device."""
    two, one = (
        Pipeline.from_checkpoint(folder, devices=count, text_encoder=False, weights="int8")
        for count in (2, None)
    )
    ours, theirs = (jax.tree.leaves(nnx.state(pipe.model.transformer)) for pipe in (two, one))
    small = [leaf for leaf in ours if leaf.dtype == jnp.int8]
    (devices,) = {len(leaf.sharding.device_set) for leaf in (*ours, *small)}
    return [devices, bool(small) and furthest(ours, theirs) == 0]


def main(which):
    gc.freeze()  # traces live on: see tests/conftest.py
    gc.set_threshold(2_000_000, 20, 50)
    jax.config.update("jax_disable_most_optimizations", True)
    print(json.dumps(every() if which == ["every"] else some()))


if __name__ == "__main__":
    main(sys.argv[1:])
