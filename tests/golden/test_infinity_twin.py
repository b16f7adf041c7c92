"""The PyTorch twin of Infinity against stored arrays of the released code.

Both run float32 on CPU with the same operations in another order. The bound on hidden states and
raw logits is 1e-4 (values of order 10, a few hundred roundings of 6e-8 relative). Guidance g and
temperature t turn an error e of the raw logits into at most (|g| + |1 - g|) / t * e, which bounds
the guided logits; a label may only be compared where the stored gap is more than twice that. The
error used there is the one measured in the same run, which the first bound limits.
"""

import numpy as np
import pytest
import torch
from sparvar_convert.tables import infinity
from sparvar_convert.torch_twin.infinity import Infinity
from sparvar_convert.torch_twin.infinity_loop import Settings, run

from sparvar_jax.plans.schedule import ASPECT_TABLES, nearest_ratio
from tests.convert.fakes import DictReader
from tests.golden.support import (
    golden_stems,
    load_golden,
    load_sidecar,
    most_exempt,
    state_dict,
)

TOLERANCE = 1e-4

CASES = [(stem, name) for stem in golden_stems("infinity_*") for name in load_sidecar(stem)["runs"]]


def split_rows(features: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(features.astype(np.float32)).split(lengths.tolist()))


def stored(tensors: dict, name: str) -> list[np.ndarray]:
    """All scales of one quantity of a run, in order; empty where it was not stored."""
    keys = sorted(key for key in tensors if key.startswith(f"{name}.scale_"))
    return [tensors[key] for key in keys]


def settings_of(side: dict, name: str) -> Settings:
    facts = side["runs"][name]
    layer = facts["cfg_insertion_layer"][0]
    return Settings(
        grids=tuple((height, width) for _, height, width in facts["scale_schedule"]),
        full_grid=ASPECT_TABLES[nearest_ratio(facts["h_div_w"])][-1],
        guidance=tuple(facts["cfg_list"]),
        temperature=facts["tau"],
        merge_after=side["config"]["depth"] + layer if layer < 0 else None,
        scales=facts["stop_after_scales"],
    )


def model_of(side: dict, tensors: dict) -> Infinity:
    weights = state_dict(tensors)
    patchify = bool(side["config"]["apply_spatial_patchify"])
    model = Infinity(infinity.infer_config(DictReader(weights), patchify=patchify))
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return model.eval()


def worst(ours: list, theirs: list[np.ndarray]) -> float:
    pairs = zip(ours, theirs, strict=False)
    return max((float(np.abs(a.numpy() - b).max()) for a, b in pairs), default=0.0)


@pytest.mark.parametrize(("stem", "name"), CASES)
def test_twin_equals_released_code(stem, name):
    side, tensors = load_golden(stem)
    facts, settings = side["runs"][name], settings_of(side, name)
    bits = stored(tensors, f"{name}.bit_labels")
    negative = f"negative_text_features.{name}"
    traces, latent = run(
        model_of(side, tensors),
        settings,
        split_rows(tensors[f"text_features.{name}"], tensors[f"text_lens.{name}"]),
        negative=split_rows(tensors[negative], tensors[f"negative_text_lens.{name}"])
        if facts["negative_prompt"]
        else None,
        forced_bits=[torch.from_numpy(labels.astype(np.int64)) for labels in bits],
    )
    inputs = [trace.block_input for trace in traces]
    assert worst(inputs, stored(tensors, f"{name}.block_input_before_level_embed")) <= TOLERANCE
    for block in range(side["config"]["depth"]):
        hidden = [trace.hidden[block] for trace in traces]
        theirs = stored(tensors, f"{name}.hidden_after_block_{block:02d}")
        assert worst(hidden, theirs) <= TOLERANCE
    raw = worst([t.raw_logits for t in traces], stored(tensors, f"{name}.raw_logits"))
    assert raw <= TOLERANCE
    if f"{name}.final_latent" in tensors:
        assert worst([latent], [tensors[f"{name}.final_latent"]]) <= TOLERANCE
    check_guided(name, settings, traces, tensors, bits, argmax=facts["sampler"] == "argmax")


def check_guided(name, settings, traces, tensors, bits, argmax: bool) -> None:
    """Guided logits within the amplified bound; labels and top-p masks where the gap allows."""
    exempt = total = 0
    kept_gap = np.log((1 - settings.top_p) / settings.top_p)  # where top-p starts to remove
    removed = stored(tensors, f"{name}.removed_by_top_p") or [None] * len(bits)
    guided = stored(tensors, f"{name}.guided_logits")
    for scale, (trace, theirs, labels) in enumerate(zip(traces, guided, bits, strict=True)):
        strength = settings.guidance[scale]
        gain = (abs(strength) + abs(1 - strength)) / settings.temperature
        error = float(np.abs(trace.guided_logits.numpy() - theirs).max())
        assert error <= gain * TOLERANCE
        gap = theirs[..., 1] - theirs[..., 0]
        far = np.abs(gap) > 2 * error
        if argmax:
            ours = trace.guided_logits.argmax(-1).numpy()
            np.testing.assert_array_equal(ours[far], labels[far])
        if removed[scale] is not None:
            far &= np.abs(np.abs(gap) + kept_gap) > 2 * error
            ours = trace.removed.numpy()
            np.testing.assert_array_equal(ours[far], removed[scale][far].astype(bool))
        exempt, total = exempt + int((~far).sum()), total + far.size
    print(f"{name}: {exempt} of {total} bits exempt")
    assert exempt <= most_exempt(total)
