"""Whole conversions: every container in, the same bits out, nothing left after failures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from sparvar_convert.export import export_part, save_state_dict
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.torch_twin.var import VarTwin
from sparvar_convert.torch_twin.vqvae import VqvaeTwin

from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.var import VarConfig
from sparvar_jax.models.vqvae import VqvaeConfig
from sparvar_jax.weights import checkpoint
from tests.convert import sources


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        ours[key].dtype == value.dtype and torch.equal(ours[key], value)
        for key, value in theirs.items()
    )


def contents(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "write",
    [
        sources.flat,
        sources.legacy,
        sources.trained,
        lambda weights, folder: sources.trained(weights, folder, "gpt_wo_ddp"),
        sources.single_safetensors,
        sources.sharded,
        lambda weights, folder: sources.sharded(weights, folder, "bin"),
    ],
    ids=["flat", "legacy", "fsdp", "without ddp", "safetensors", "sharded", "sharded bin"],
)
def test_every_container_of_a_transformer(tmp_path, write):
    weights = sources.infinity_weights()
    done = convert_source(write(weights, tmp_path), tmp_path / "model")
    assert (done.kind, done.part) == ("infinity", "transformer")
    assert done.config == sources.INFINITY
    assert same(dict(export_part(tmp_path / "model", "transformer")), weights)


def test_parameters_land_where_they_belong(tmp_path):
    weights = sources.infinity_weights()
    steps = []
    done = convert_source(
        sources.flat(weights, tmp_path),
        tmp_path / "model",
        progress=lambda path, done, total: steps.append((done, total)),
    )
    assert steps == [(i + 1, done.tensors) for i in range(done.tensors)]
    tree = checkpoint.load_part(tmp_path / "model", "transformer")
    block = weights["block_chunks.1.module.0.sa.mat_qkv.weight"]  # chunk 1 begins with block 2
    np.testing.assert_array_equal(tree["blocks"][2]["attn"]["qkv"]["kernel"], block.numpy().T)
    np.testing.assert_array_equal(tree["uncond_text"], weights["cfg_uncond"].numpy())
    config = checkpoint.config_from_json(
        InfinityConfig, checkpoint.read_config(tmp_path / "model")["transformer"]
    )
    model = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))
    assert checkpoint.fill(model, tree).blocks[2].ada_gss[...].shape == (6, 64)


def test_averaged_weights_on_request(tmp_path):
    weights = sources.infinity_weights()
    done = convert_source(sources.trained(weights, tmp_path), tmp_path / "model", ema=True)
    assert "averaged" in done.container
    back = dict(export_part(tmp_path / "model", "transformer"))
    torch.testing.assert_close(back["head.weight"], weights["head.weight"] * 0.5, rtol=0, atol=0)
    with pytest.raises(ConversionError, match="without averaged"):
        convert_source(sources.flat(weights, tmp_path), tmp_path / "other", ema=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(tmp_path, dtype):
    weights = {key: value.to(dtype) for key, value in sources.infinity_weights().items()}
    done = convert_source(sources.sharded(weights, tmp_path), tmp_path / "model")
    assert done.dtypes == {str(dtype).removeprefix("torch."): done.tensors}
    assert same(dict(export_part(tmp_path / "model", "transformer")), weights)


def test_blocks_without_chunks_and_stale_buffers(tmp_path):
    config = InfinityConfig(
        depth=2, width=64, heads=2, text_width=128, bits=16, mlp_width=256, text_max_length=4
    )
    weights = sources.infinity_weights(config)
    stale = {"lvl_1L": torch.zeros(1, 5, dtype=torch.int64), "attn_bias_for_masking": torch.ones(1)}
    done = convert_source(sources.flat(weights | stale, tmp_path), tmp_path / "model")
    assert done.config == config
    assert sorted(key for keys in done.ignored.values() for key in keys if key in stale) == sorted(
        stale
    )
    assert same(dict(export_part(tmp_path / "model", "transformer")), weights)


def test_three_parts_make_one_model(tmp_path):
    model = tmp_path / "model"
    tokenizer = sources.tokenizer_weights()
    convert_source(sources.container(tokenizer, tmp_path), model)
    convert_source(sources.flat(sources.infinity_weights(), tmp_path), model)
    text = sources.text_folder(tmp_path / "t5")
    convert_source(text, model)
    config = checkpoint.read_config(model)
    assert [config[part]["kind"] for part in checkpoint.PARTS] == ["infinity", "bsq_vae", "t5"]
    assert config["defaults"]["plan"] == "dense"
    assert config["transformer"]["patchify"] is False
    copied = (model / "text" / "tokenizer.json").read_bytes()
    assert copied == (text / "tokenizer.json").read_bytes()
    assert same(dict(export_part(model, "tokenizer")), tokenizer)
    exported = dict(export_part(model, "text"))
    for key, value in load_file(text / "model.safetensors").items():
        assert torch.equal(exported[key], value)
    manifest = checkpoint.read_manifest(model)["tokenizer"]
    assert manifest["container"] == "tokenizer container (vae)"
    digest = subprocess.run(
        ["sha256sum", str(tmp_path / "vae.pth")], capture_output=True, check=True, text=True
    )
    assert manifest["files"][0]["sha256"] == digest.stdout.split()[0]
    assert manifest["dtypes"] == {"float32": manifest["tensors"]}


@pytest.mark.parametrize("tokenizer_first", [True, False])
def test_patchify_follows_the_tokenizer(tmp_path, tokenizer_first):
    order = [
        sources.container(sources.tokenizer_weights(code_width=4), tmp_path),
        sources.flat(sources.infinity_weights(), tmp_path),
    ]
    for source in order if tokenizer_first else order[::-1]:
        convert_source(source, tmp_path / "model")
    assert checkpoint.read_config(tmp_path / "model")["transformer"]["patchify"] is True


def test_tokenizer_names_without_wrappers(tmp_path):
    weights = sources.tokenizer_weights()
    bare = {
        key.replace(".conv.conv.", ".conv.")
        if ".conv.conv." in key
        else key.replace(".conv.", ".").replace(".norm.", "."): value
        for key, value in weights.items()
    }
    assert not set(bare) & {"encoder.conv_in.conv.weight", "encoder.norm_out.norm.weight"}
    convert_source(sources.container(bare, tmp_path), tmp_path / "model")
    assert same(dict(export_part(tmp_path / "model", "tokenizer")), weights)


def test_weights_with_the_usual_name_are_preferred(tmp_path):
    weights = sources.infinity_weights()
    sources.flat(weights, tmp_path).rename(tmp_path / "pytorch_model.bin")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    done = convert_source(tmp_path, tmp_path / "model")
    assert done.container == "folder (pytorch_model.bin)"


@pytest.mark.parametrize("name", ["back.pth", "back.safetensors"])
def test_exported_file_converts_again(tmp_path, name):
    weights = sources.tokenizer_weights()
    convert_source(sources.container(weights, tmp_path), tmp_path / "model")
    assert save_state_dict(tmp_path / "model", "tokenizer", tmp_path / name) == len(weights)
    convert_source(tmp_path / name, tmp_path / "again")
    assert same(dict(export_part(tmp_path / "again", "tokenizer")), weights)


def test_class_conditional_models(tmp_path):
    config = VarConfig(
        depth=2, width=64, heads=1, sides=(1, 2, 3), classes=5, vocab=8, code_width=4
    )
    shape = VqvaeConfig(vocab=8, code_width=4, base_width=32, multipliers=(1, 2), blocks=1)
    transformer = sources.randomised(VarTwin(config), 3)
    tokenizer = sources.randomised(VqvaeTwin(shape), 4)
    for weights, kind in ((transformer, "var"), (tokenizer, "vqvae")):
        done = convert_source(sources.flat(weights, tmp_path), tmp_path / "model")
        assert done.kind == kind
        back = dict(export_part(tmp_path / "model", done.part))
        for key in set(weights) - {"quantize.ema_vocab_hit_SV"}:  # statistics: start again at zero
            assert torch.equal(back[key], weights[key]), key
    with pytest.raises(ConversionError, match=r"of kind var, which does not go with a T5"):
        convert_source(sources.text_folder(tmp_path / "t5"), tmp_path / "model")


def drop(key):
    return lambda weights: weights.pop(key)


def drop_block(weights):
    for key in [key for key in weights if key.startswith("block_chunks.0.module.1.")]:
        del weights[key]


def put(key, tensor):
    return lambda weights: weights.update({key: tensor})


BROKEN = {
    "missing key": (drop("head.bias"), r"head\.bias \[32\] \(from key head\.bias\)"),
    "missing size": (drop("cfg_uncond"), "lacks cfg_uncond"),
    "missing block": (drop_block, r"lacks 1 blocks .*\(0, 1\)"),
    "extra key": (put("surprise", torch.zeros(2, 3)), r"unknown keys: surprise \[2, 3\]"),
    "wrong shape": (put("head.weight", torch.zeros(30, 64)), r"head\.weight \[30, 64\] gives"),
    "wrong dtype": (put("head.bias", torch.zeros(32, dtype=torch.int32)), "head.bias int32"),
    "NaN": (put("head.bias", torch.full((32,), torch.nan)), r"head\.bias holds NaN"),
    "key bias": (
        put("text_proj_for_sos.ca.zero_k_bias", torch.ones(64)),
        "zero_k_bias must be all zero",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_leave_nothing(tmp_path, case):
    change, message = BROKEN[case]
    weights = sources.infinity_weights()
    change(weights)
    source = sources.flat(weights, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=message) as error:
        convert_source(source, tmp_path / "new" / "model")
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def bad_file(tmp_path, case: str):
    good = sources.flat(sources.infinity_weights(), tmp_path)
    bad = tmp_path / "bad.pth"
    if case == "truncated":
        bad.write_bytes(good.read_bytes()[:5000])
    elif case == "code":
        torch.save({"head.bias": torch.zeros(2), "x": Harmful(str(tmp_path / "harm"))}, bad)
    elif case == "empty file":
        bad.write_bytes(b"")
    elif case == "text":
        bad.write_text("not a checkpoint")
    elif case == "other kind":
        torch.save({"conv1.weight": torch.zeros(3, 3)}, bad)
    elif case == "not tensors":
        torch.save({"epoch": 3, "lr": 0.1}, bad)
    elif case == "no weights in trainer":
        torch.save({"trainer": {"optimizer": {}}}, bad)
    elif case == "truncated safetensors":
        bad = tmp_path / "bad.safetensors"
        whole = sources.single_safetensors(sources.infinity_weights(), tmp_path)
        bad.write_bytes(whole.read_bytes()[:-100])
    elif case == "several files":
        bad = tmp_path / "folder"
        bad.mkdir()
        (bad / "a.pth").write_bytes(b"")
        (bad / "b.pth").write_bytes(b"")
    elif case == "lost shard":
        bad = sources.sharded(sources.infinity_weights(), tmp_path)
        (bad / "model-00002-of-00003.safetensors").unlink()
    elif case == "disagreeing index":
        bad = sources.sharded(sources.infinity_weights(), tmp_path)
        index = bad / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"].pop("head.bias")
        index.write_text(json.dumps(content))
    return bad


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "truncated or not a PyTorch file"),
        ("truncated safetensors", "truncated or not a safetensors file"),
        ("code", r"refused: its pickle wants to use posix\.mkdir"),
        ("empty file", "truncated or not a PyTorch file"),
        ("text", "truncated or not a PyTorch file"),
        ("other kind", "of no known kind"),
        ("not tensors", r"not tensors: epoch \(int\)"),
        ("no weights in trainer", "training checkpoint without gpt_fsdp"),
        ("missing", "does not exist"),
        ("several files", "several checkpoints"),
        ("lost shard", "lacks the shards model-00002-of-00003"),
        ("disagreeing index", "disagree on 1 tensors, first head.bias"),
    ],
)
def test_bad_files_leave_nothing(tmp_path, case, message):
    source = bad_file(tmp_path, case)
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=message) as error:
        convert_source(source, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_wrong_kind_is_refused(tmp_path):
    source = sources.container(sources.tokenizer_weights(), tmp_path)
    with pytest.raises(ConversionError, match=r"is of kind bsq_vae .*expected infinity"):
        convert_source(source, tmp_path / "model", kind="infinity")
    with pytest.raises(ConversionError, match="unknown kind of checkpoint 'gan'"):
        convert_source(source, tmp_path / "model", kind="gan")


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    convert_source(sources.flat(sources.infinity_weights(), tmp_path), tmp_path / "model")
    before = contents(tmp_path / "model")
    odd = sources.container(sources.tokenizer_weights(code_width=8), tmp_path)
    with pytest.raises(ConversionError, match="16 bits a token, the tokenizer's codes have 8"):
        convert_source(odd, tmp_path / "model")
    text = sources.text_folder(tmp_path / "t5", width=64)
    with pytest.raises(ConversionError, match=r"features of width 128, the text encoder .* 64"):
        convert_source(text, tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_text_encoder_needs_its_tokenizer_and_settings(tmp_path):
    text = sources.text_folder(tmp_path / "t5")
    (text / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"lacks tokenizer\.json and spiece\.model"):
        convert_source(text, tmp_path / "model")
    (text / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"no config\.json beside"):
        convert_source(text, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    source = sources.flat(sources.infinity_weights(), tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr("sparvar_jax.weights.storage.ocp_v1.partial.finalize", full)
    with pytest.raises(ConversionError, match=r"cannot write to .*No space left.*check space"):
        convert_source(source, tmp_path / "model")
    assert contents(tmp_path) == before


def test_converted_weights_load_without_torch(tmp_path):
    convert_source(sources.flat(sources.infinity_weights(), tmp_path), tmp_path / "model")
    code = (
        "import sys; from sparvar_jax.weights import checkpoint;"
        f"tree = checkpoint.load_part({str(tmp_path / 'model')!r}, 'transformer');"
        "assert 'torch' not in sys.modules; print(tree['head']['bias'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(32,)", done.stderr
