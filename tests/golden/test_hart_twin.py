"""The PyTorch twins of HART against stored arrays, float32; everything from the sidecars."""

import functools

import numpy as np
import pytest
import torch
from sparvar_convert.tables.hart_vqvae import PREFIX
from sparvar_convert.torch_twin.hart import HartTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from tests.golden import hart_runs
from tests.golden.hart_runs import TOLERANCE, golden, ids
from tests.golden.support import golden_stems, load_sidecar
from tests.released_hart import hart_config, tokenizer_config

STEMS = golden_stems("hart_*")
RUNS = [
    (stem, run)
    for stem in STEMS
    for run, said in load_sidecar(stem)["runs"].items()
    if not said["more_smooth"]  # a replay of those is fed mixtures
]


def close(got, expected, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=tolerance, rtol=0)


@functools.cache
def twins(stem: str) -> tuple[HartTwin, VqvaeTwin]:
    data = golden(stem)
    pair = (
        HartTwin(hart_config(data.sidecar)),
        VqvaeTwin(tokenizer_config(data.sidecar), len(data.sides)),
    )
    inner = {name.removeprefix(PREFIX): value for name, value in data.tokenizer.items()}
    for twin, weights in zip(pair, (data.transformer, inner), strict=True):
        twin.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})  # strict
        twin.requires_grad_(False)
    return pair


@pytest.mark.parametrize(("stem", "run"), RUNS)
def test_transformer_twin(stem, run):
    data, (twin, tokenizer) = golden(stem), twins(stem)
    rows = hart_runs.prompts(stem, run)
    tokens = [torch.tensor(part).long() for part in ids(stem, run)]
    name = f"{run}.diffusion"
    noise = None
    if f"{name}.output" in data.tensors:
        noise = torch.tensor(np.asarray(hart_runs.noise(stem, name, tokens[-1].numel())))
    trace, total = twin.replay(
        torch.tensor(data.tensors["text.features"][rows]),
        torch.tensor(data.tensors["text.position_ids"][rows]),
        tokens,
        tokenizer.quantize,
        data.sidecar["runs"][run]["cfg"],
        noise,
    )
    for scale, step in enumerate(trace):
        named = {
            f"hidden_after_block_{int(key.removeprefix('hidden.')):02d}": value
            for key, value in step.items()
            if key.startswith("hidden.")
        }
        plain = ("transformer_input", "raw_logits", "guided_logits", "fhat")
        named |= {key: step[key] for key in plain}
        for key, value in named.items():
            expected = data.at(f"{run}.{key}", scale)
            if expected is not None:
                close(value, expected)
    if noise is not None:
        close(trace[-1]["diffusion.condition"], data.tensors[f"{name}.condition"])
        rows_of = len(noise[0])
        close(trace[-1]["diffusion.output"], data.tensors[f"{name}.output"][:rows_of], 1e-3)
    close(total, data.tensors[f"{run}.final_fhat"], TOLERANCE if noise is None else 1e-3)
    if f"{run}.final_image" in data.tensors:
        stored = torch.tensor(data.tensors[f"{run}.final_fhat"])
        close((tokenizer.decode(stored) + 1) / 2, data.tensors[f"{run}.final_image"])


@pytest.mark.parametrize("stem", STEMS)
def test_tokenizer_twin(stem):
    data, (_, twin) = golden(stem), twins(stem)
    feature = twin.feature(torch.tensor(data.tensors["tokenizer.image"]).float())
    close(feature, data.tensors["tokenizer.encoder_feature"])
    tokens, sums = twin.tokenize(feature, data.sides)
    for scale, got in enumerate(tokens):
        np.testing.assert_array_equal(got, data.at("tokenizer.token_ids", scale))
    close(sums[-2], data.tensors["tokenizer.fhat_before_last"])
    close(sums[-1], data.tensors["tokenizer.fhat_discrete_only_with_phi"])
    discrete = sums[-2] + twin.quantize.codes(tokens[-1])
    close(discrete, data.tensors["tokenizer.fhat_hybrid_discrete_without_phi"])
    close(twin.decode(discrete), data.tensors["tokenizer.image_discrete_without_phi"])
