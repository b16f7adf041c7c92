"""Draws on a mesh of four host devices and on one; prints how they compare, as JSON.

A program of its own: the number of devices is fixed when jax starts.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.models.sampling import image_keys
from sparvar_jax.models.var import Var, VarConfig
from sparvar_jax.models.vqvae import Codebook, VqvaeConfig
from sparvar_jax.plans.plan import dense_plan, map_attention
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.strategy import Dense, Output
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime import generate
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.runtime.placement import Placement, mesh_of
from tests.house import support
from tests.house.support import lively

BATCH = 4
SIDES = (1, 2, 4)
SHORT = ScaleSchedule.of(support.SCHEDULE.sizes[:3])
DENSE = dense_plan(SHORT, 2)
CLASSES = VarConfig(2, 64, 2, sides=SIDES, classes=5, vocab=48, code_width=8, dtype="float32")
SPARSE = "sparvar-fast + drop_uncond(1)"


@dataclasses.dataclass(frozen=True)
class Telling(Dense):
    """Dense attention that reports the mean norm of every row's and head's output."""

    def __call__(self, view, q, place, state):
        out = super().__call__(view, q, place, state).out
        return Output(out, report={"norm": jnp.linalg.norm(out, axis=-1).mean(-1)})


def families():
    """name -> (model, codebook, schedule, arguments of all pictures, pictures of a slice)."""
    text = support.model()
    classes, labels = lively(Var, CLASSES), jnp.array([1, 3, 0, 4])
    codebook = lively(Codebook, VqvaeConfig(48, 8, base_width=32, multipliers=(1, 1), blocks=1))
    controls = generate.controls(len(SIDES), guidance=2.0, temperature=1.0)
    embed = jax.jit(lambda model, labels: model.embed_condition(labels))

    def of_classes(part):
        return embed(classes, labels[part]), controls, image_keys(0, BATCH)[part]

    def of_text(part):
        condition, _, keys = support.arguments(text, BATCH)
        rows = np.arange(2 * BATCH).reshape(2, BATCH)[:, part].reshape(-1)
        return jax.tree.map(lambda x: x[rows], condition), controls, keys[part]

    return {
        "infinity": (text, None, SHORT, of_text),
        "var": (classes, codebook, CLASSES.schedule, of_classes),
    }


def furthest(ours, theirs):
    """Largest difference of two trees of arrays; the shapes must agree."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    distance = 0.0
    for one, other in pairs:
        assert one.shape == other.shape, (one.shape, other.shape)
        distance = max(distance, float(np.abs(np.float64(one) - np.float64(other)).max()))
    return distance


def compare(one, four, plan, arguments):
    """A plan on one device, on four, and the two pictures of each pair of devices alone."""
    whole = slice(None)
    theirs = one.run(plan, *arguments(whole), capture=True)
    ours = four.run(plan, *arguments(whole), capture=True)
    halves = [one.run(plan, *arguments(part)) for part in (slice(0, 2), slice(2, 4))]
    alone = np.concatenate([np.asarray(code_sum) for code_sum, _ in halves])
    captured = [[output.captured for output in drawn[1]] for drawn in (ours, theirs)]
    tokens = [[output.tokens for output in drawn[1]] for drawn in (ours, theirs)]
    return {
        "devices": len(ours[0].sharding.device_set),
        "tokens": furthest(tokens[0], tokens[1]),
        "captured": furthest(*captured),
        "sums": furthest(ours[0], theirs[0]),
        "alone": furthest(ours[0], alone),
    }


def by_hand(four, arguments, outputs):
    """Scales drawn one by one, and with the tokens of an earlier picture."""
    condition, controls, keys = arguments(slice(None))
    state, wrong = four.start(DENSE, BATCH), []
    for index, output in enumerate(outputs):
        state, again = four.decode_scale(DENSE, index, condition, state, controls, keys)
        wrong.append(furthest(again.tokens, output.tokens))
    tokens = tuple(output.tokens for output in outputs)
    other = image_keys(77, BATCH)
    forced, _ = four.run(DENSE, condition, controls, other, forced=tokens)
    captured, _ = four.run(DENSE, condition, controls, keys, capture=True)
    return {"by scale": max(wrong), "forced": furthest(forced, state.code_sum),
            "captured": furthest(captured, state.code_sum)}  # fmt: skip


def swapped(four, arguments):
    """Which weights are copied to the mesh again: none, and after a change the changed one."""
    first = four.run(DENSE, *arguments(slice(None)))[0]
    before = list(four._weights._placed)
    four.run(DENSE, *arguments(slice(None)))
    kept = all(a is b for a, b in zip(before, four._weights._placed, strict=True))
    bias = four.model.head.bias
    bias[...] = bias[...] + jnp.linspace(-1, 1, bias[...].shape[0])
    other = four.run(DENSE, *arguments(slice(None)))[0]
    new = sum(a is not b for a, b in zip(before, four._weights._placed, strict=True))
    alone = Generator(four.model).run(DENSE, *arguments(slice(None)))[0]
    return {"kept": kept, "copied": new, "moved": furthest(first, other),
            "fresh": furthest(other, alone)}  # fmt: skip


def refusals(four, arguments):
    """Messages for three pictures over two devices, and for heads that cannot be divided."""
    condition, controls, keys = arguments(slice(0, 3))
    odd = dataclasses.replace(CLASSES, width=80, heads=5)
    placed = Generator(lively(Var, odd), placement=four.placement)
    calls = {
        "start": lambda: four.start(DENSE, 3),
        "run": lambda: four.run(DENSE, condition, controls, keys),
        "compile": lambda: four.compile(DENSE, condition, 3),
        "heads": lambda: placed.start(DENSE, 2),
        "mesh": lambda: mesh_of(3, 2),
        "axis": lambda: Placement(four.placement.mesh, heads="columns"),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            told[name] = str(error)
    return told


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    told, placement = {}, Placement(mesh_of(2, 2))
    for name, (model, codebook, schedule, arguments) in families().items():
        one, four = Generator(model, codebook), Generator(model, codebook, placement)
        for plan in ("dense", SPARSE):
            told[f"{name} {plan}"] = compare(one, four, parse_plan(plan, schedule, 2), arguments)
        if name == "infinity":
            outputs = four.run(DENSE, *arguments(slice(None)))[1]
            told["by hand"] = by_hand(four, arguments, outputs)
            telling = map_attention(DENSE, lambda step, layer: Telling())
            reports = [
                [output.reports for output in each.run(telling, *arguments(slice(None)))[1]]
                for each in (four, one)
            ]
            told["reports"] = furthest(*reports)
            told["refusals"] = refusals(four, arguments)
            told["swapped"] = swapped(four, arguments)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
