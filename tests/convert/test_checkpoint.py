"""Model directories: what is written comes back, whole or by pieces, and failures leave nothing."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.weights import checkpoint, storage


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "gain": rng.normal(size=5).astype(np.float32),
        "blocks.0.kernel": rng.normal(size=(64, 32)).astype(ml_dtypes.bfloat16),
        "blocks.0.bias": rng.normal(size=32).astype(np.float16),
        "blocks.10.kernel": rng.normal(size=(64, 32)).astype(np.float16),
    }


CONFIG = {"kind": "toy", "depth": 2}
SOURCE = {"source": "made by a test"}


def write(model, form="orbax", part="transformer"):
    checkpoint.write_part(
        model, part, tensors(), config=CONFIG, source=SOURCE, defaults={"plan": "dense"}, form=form
    )


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_parts_come_back_bit_for_bit(tmp_path, form):
    write(tmp_path / "model", form)
    reader = checkpoint.part_reader(tmp_path / "model", "transformer")
    assert set(reader.shapes) == set(tensors())
    for path, array in reader.restore().items():
        assert array.dtype == tensors()[path].dtype == reader.shapes[path].dtype
        assert array.tobytes() == tensors()[path].tobytes()
        assert reader.read(path).tobytes() == array.tobytes()
    tree = checkpoint.load_part(tmp_path / "model", "transformer")
    assert set(tree["blocks"]) == {0, 10}
    assert isinstance(tree["blocks"][10]["kernel"], jax.Array)
    np.testing.assert_array_equal(tree["gain"], tensors()["gain"])


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_dtype_can_be_chosen_by_path(tmp_path, form):
    write(tmp_path / "model", form)
    rule = {"dtype": lambda path: jnp.bfloat16 if path.endswith("kernel") else jnp.float32}
    tree = checkpoint.load_part(tmp_path / "model", "transformer", **rule)
    assert tree["blocks"][10]["kernel"].dtype == jnp.bfloat16
    assert tree["blocks"][0]["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(
        tree["blocks"][10]["kernel"], tensors()["blocks.10.kernel"].astype(ml_dtypes.bfloat16)
    )
    whole = checkpoint.load_part(tmp_path / "model", "transformer", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype("float32")}


def test_sharding_rule_sees_path_and_shape(tmp_path):
    write(tmp_path / "model")
    seen = {}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])

    def rule(path, shape):
        seen[path] = shape
        return sharding

    tree = checkpoint.load_part(tmp_path / "model", "transformer", sharding=rule)
    assert seen == {path: array.shape for path, array in tensors().items()}
    assert tree["gain"].sharding == sharding


def test_batches_smaller_than_a_tensor_make_one_checkpoint(tmp_path):
    writer = storage.OrbaxWriter(tmp_path / "part", batch_bytes=1)
    for path, array in tensors().items():
        writer.write(path, array)
    assert not (tmp_path / "part").exists()
    writer.close()
    back = storage.PartReader(tmp_path / "part").restore()
    assert {path: array.tobytes() for path, array in back.items()} == {
        path: array.tobytes() for path, array in tensors().items()
    }


def test_int8_error_is_at_most_half_a_step(tmp_path):
    write(tmp_path / "model", "int8")
    stored = storage.PartReader(tmp_path / "model" / "transformer")
    kernel = tensors()["blocks.0.kernel"].astype(np.float32)
    back = stored.read("blocks.0.kernel")
    assert back.dtype == stored.shapes["blocks.0.kernel"].dtype == np.float32
    # A step is 1/127 of the column's peak; float32 rounding adds at most a millionth of that.
    step = np.abs(kernel).max(axis=0) / 127
    assert (np.abs(back - kernel) <= step * (0.5 + 1e-4)).all()
    assert stored.read("blocks.0.bias").tobytes() == tensors()["blocks.0.bias"].tobytes()
    assert not any(path.endswith(storage.SCALE_SUFFIX) for path in stored.shapes)


def test_int8_of_a_zero_column_is_zero():
    values, scale = storage.quantize_int8(np.zeros((4, 3), np.float32))
    assert not values.any()
    assert np.isfinite(scale).all()


def test_config_and_manifest_gather_the_parts(tmp_path):
    write(tmp_path)
    write(tmp_path, "int8", "tokenizer")
    config = checkpoint.read_config(tmp_path)
    assert config["transformer"] == config["tokenizer"] == CONFIG
    assert config["defaults"] == {"plan": "dense"}
    assert checkpoint.read_manifest(tmp_path) == {"transformer": SOURCE, "tokenizer": SOURCE}


class Toy(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])


def abstract_toy():
    return nnx.eval_shape(lambda: Toy(nnx.Rngs(0)))


def test_fill_gives_the_module_its_parameters():
    real = Toy(nnx.Rngs(7))
    tree = nnx.to_pure_dict(nnx.state(real, nnx.Param))
    filled = checkpoint.fill(abstract_toy(), tree)
    assert isinstance(filled, Toy)
    np.testing.assert_array_equal(filled.blocks[1].kernel[...], real.blocks[1].kernel[...])


def test_fill_lists_every_misfit_at_once():
    tree = storage.flatten(nnx.to_pure_dict(nnx.state(Toy(nnx.Rngs(7)), nnx.Param)))
    del tree["blocks.1.kernel"]
    tree["first.bias"] = jnp.zeros(9)
    tree["stray"] = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="do not fit Toy") as error:
        checkpoint.fill(abstract_toy(), storage.nest(tree))
    for part in ("blocks.1.kernel [4, 4]", "stray [2, 2]", "first.bias is [9], expected [4]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    depth: int
    widths: tuple[int, ...] = ()


def test_configs_survive_json():
    config = ToyConfig(3, (1, 2))
    values = json.loads(json.dumps({"kind": "toy", **checkpoint.config_to_json(config)}))
    assert checkpoint.config_from_json(ToyConfig, values) == config
    with pytest.raises(ValueError, match="no fields colour"):
        checkpoint.config_from_json(ToyConfig, {**values, "colour": 1})
    with pytest.raises(ValueError, match="depth"):
        checkpoint.config_from_json(ToyConfig, {"widths": [1]})


def fail_half_way(model, part):
    with checkpoint.new_part(model, part) as new:
        writer = storage.OrbaxWriter(new.folder, batch_bytes=1)
        writer.write("gain", tensors()["gain"])
        raise RuntimeError("half way")


def test_failure_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(tmp_path / "new" / "model", "transformer")
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_there(tmp_path):
    write(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(tmp_path, "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_existing_part_is_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path)


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose a folder") as error:
        write(tmp_path / "file" / "model")
    assert "\n" not in str(error.value)


def test_missing_and_damaged_pieces_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a model directory"):
        checkpoint.read_config(tmp_path)
    write(tmp_path, "safetensors")
    with pytest.raises(ValueError, match="has no tokenizer"):
        checkpoint.load_part(tmp_path, "tokenizer")
    weights = tmp_path / "transformer" / storage.SAFETENSORS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_part(tmp_path, "transformer")
    shutil.rmtree(tmp_path / "transformer")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ValueError, match="holds neither"):
        checkpoint.load_part(tmp_path, "transformer")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_config(tmp_path)
