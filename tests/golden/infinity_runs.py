"""Stored Infinity runs replayed through the production generation loop on the stored bits.

Everything comes from a sidecar and its tensors; another configuration needs no code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sparvar_convert.stream import convert_tensors
from sparvar_convert.tables.infinity import table

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans import schedule
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime import generate
from sparvar_jax.weights import checkpoint, storage
from tests.convert.fakes import DictReader
from tests.golden.support import state_dict

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Replay:
    """What one run gave, per scale: the captured arrays, and at the end the code sum."""

    captured: tuple[dict[str, np.ndarray], ...]
    labels: tuple[np.ndarray, ...]
    code_sum: np.ndarray


def configuration(sidecar: Mapping[str, Any]) -> InfinityConfig:
    """The float32 configuration a sidecar describes."""
    config = sidecar["config"]
    return InfinityConfig(
        depth=config["depth"],
        width=config["embed_dim"],
        heads=config["num_heads"],
        text_width=config["text_channels"],
        bits=config["d_vae"],
        mlp_width=config["mlp_hidden"],
        chunks=config["block_chunks"],
        patchify=bool(config["apply_spatial_patchify"]),
        text_max_length=config["text_maxlen"],
        dtype="float32",
    )


def load_model(sidecar: Mapping[str, Any], tensors: Tensors) -> Infinity:
    """The stored weights, through the converter's own table."""
    config = configuration(sidecar)
    module = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))
    weights: dict[str, np.ndarray] = {}
    reader = DictReader(state_dict(dict(tensors)))
    expected = checkpoint.abstract_parameters(module)
    convert_tensors(table(config), reader, expected, weights.__setitem__)
    tree = {path: jnp.asarray(array) for path, array in weights.items()}
    return checkpoint.fill(module, storage.nest(tree))


def schedule_of(run: Mapping[str, Any]) -> schedule.ScaleSchedule:
    """The run's released schedule: the prefix of the ratio's 1M table with its number of scales."""
    count = len(run["scale_schedule"])
    size = next(name for name, scales in schedule.SIZES.items() if scales == count)
    found = schedule.infinity_schedule(run["h_div_w"], size)
    assert found.sizes == tuple((h, w) for _, h, w in run["scale_schedule"])
    return found


def text_of(tensors: Tensors, prefix: str, run: str) -> tuple[jax.Array, jax.Array]:
    """Stored features, concatenated without padding, as padded [B, M, Ct] and lengths."""
    lengths = tensors[f"{prefix}text_lens.{run}"]
    features = tensors[f"{prefix}text_features.{run}"].astype(np.float32)
    text = np.zeros((len(lengths), max(lengths), features.shape[1]), np.float32)
    for row, part in enumerate(np.split(features, np.cumsum(lengths)[:-1])):
        text[row, : len(part)] = part
    return jnp.asarray(text), jnp.asarray(lengths, jnp.int32)


def replay(
    generator: generate.Generator, name: str, run: Mapping[str, Any], tensors: Tensors
) -> Replay:
    """One stored run, scale by scale, on the labels it drew."""
    scales = schedule_of(run)
    insertion, guidance = run["cfg_insertion_layer"][0], run["cfg_list"]
    flags = tuple(value != 1 for value in guidance)
    model = generator.model
    depth = model.config.depth
    merge = depth + insertion if insertion < 0 else None
    plan = dense_plan(scales, depth, guidance=flags, merge_at=merge)
    kind: Any = "learned" if any(flags) else None
    if run["negative_prompt"]:
        kind = text_of(tensors, "negative_", name)
    text, lengths = text_of(tensors, "", name)
    condition = jax.jit(lambda model: model.embed_condition(text, lengths, kind))(model)
    controls = generate.controls(len(scales), guidance=tuple(guidance), temperature=run["tau"])
    batch = len(lengths)
    state = generator.start(plan, batch)
    captured, labels = [], []
    likelier = jax.jit(lambda pairs, top_p: sampling.sample_bits(pairs, top_p, None))
    for index in range(run["stop_after_scales"] or len(scales)):
        forced = jnp.asarray(tensors[f"{name}.bit_labels.scale_{index:02d}"])
        state, output = generator.decode_scale(
            plan,
            index,
            condition,
            state,
            controls,
            sampling.image_keys(0, batch),
            forced=forced,
            capture=True,
        )
        captured.append({key: np.asarray(value) for key, value in output.captured.items()})
        pairs = captured[-1]["guided_logits"].reshape(*forced.shape, 2)
        labels.append(np.asarray(likelier(pairs, controls.top_p)))
    return Replay(tuple(captured), tuple(labels), np.asarray(state.code_sum))
