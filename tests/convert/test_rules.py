"""Rule engine: exact round trips, and every violation reported by name and shape in one line."""

import ml_dtypes
import numpy as np
import pytest
from sparvar_convert.rules import (
    CONV,
    KEEP,
    POINTWISE,
    TRANSPOSE,
    ConversionError,
    Ignore,
    Rule,
    Table,
    must_be_zero,
    squeeze,
    translate,
)
from sparvar_convert.stream import convert_tensors, export_tensors

from tests.convert.fakes import DictReader


def bits(array: np.ndarray) -> bytes:
    return np.asarray(array, order="C").tobytes()


@pytest.mark.parametrize(
    ("transform", "shape", "expected"),
    [
        (KEEP, (3, 5), (3, 5)),
        (TRANSPOSE, (3, 5), (5, 3)),
        (CONV, (7, 5, 3, 2), (3, 2, 5, 7)),
        (POINTWISE, (7, 5, 1, 1), (5, 7)),
        (squeeze(0, 2, 3), (1, 4, 1, 1), (4,)),
        (squeeze(0), (1, 2, 3), (2, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_transforms_are_exact_and_invertible(transform, shape, expected, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    there = transform.forward(array)
    assert there.shape == expected == transform.shape(shape)
    assert there.dtype == array.dtype
    back = transform.inverse(there)
    assert back.shape == array.shape
    assert bits(back) == bits(array)


def test_convolution_axes_mean_what_they_say():
    weight = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert CONV.forward(weight)[3, 4, 2, 1] == weight[1, 2, 3, 4]


def test_templates_translate_both_ways():
    source, target = "blocks.{i}.{part:weight|bias}", "layers.{i}.x.{part}"
    assert translate("blocks.12.bias", source, target) == "layers.12.x.bias"
    assert translate("layers.12.x.bias", target, source) == "blocks.12.bias"
    assert translate("blocks.a.bias", source, target) is None
    assert translate("blocks.1.bias.extra", source, target) is None
    assert translate("blocksx1.bias", source, target) is None


def test_rule_with_different_fields_is_refused():
    with pytest.raises(ValueError, match="same fields"):
        Rule("a.{i}", "b.{j}")


TABLE = Table(
    "toy",
    (
        Rule("layer.{i}.weight", "layers.{i}.kernel", TRANSPOSE),
        Rule("gain", "gain", squeeze(0)),
    ),
    (
        Ignore(
            "layer.{i}.zero",
            "zero buffer",
            check=must_be_zero,
            like="layers.{i}.kernel",
            recreate=lambda kernel: np.zeros(kernel.shape[-1], kernel.dtype),
        ),
        Ignore("stale", "not used at inference"),
    ),
)
EXPECTED = {
    "layers.0.kernel": np.zeros((2, 3)),
    "layers.1.kernel": np.zeros((2, 3)),
    "gain": np.zeros(4),
}


def source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "layer.0.weight": rng.normal(size=(3, 2)).astype(np.float16),
        "layer.1.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "layer.0.zero": np.zeros(3, np.float16),
        "layer.1.zero": np.zeros(3, np.float32),
        "gain": rng.normal(size=(1, 4)).astype(ml_dtypes.bfloat16),
        "stale": np.ones(2, np.int64),
    }


def convert(tensors):
    out = {}
    done = convert_tensors(TABLE, DictReader(tensors), EXPECTED, out.__setitem__)
    return out, done


def test_conversion_keeps_bits_and_dtypes_and_reports():
    tensors = source()
    out, done = convert(tensors)
    assert set(out) == set(EXPECTED)
    np.testing.assert_array_equal(out["layers.0.kernel"], tensors["layer.0.weight"].T)
    assert out["layers.0.kernel"].dtype == np.float16
    assert out["gain"].dtype == ml_dtypes.bfloat16
    assert done.tensors == 3
    assert done.parameters == 16
    assert done.dtypes == {"float16": 1, "float32": 1, "bfloat16": 1}
    assert done.ignored["stale"] == "not used at inference"


def test_export_returns_every_bit():
    tensors = source()
    out, _ = convert(tensors)
    back = dict(export_tensors(TABLE, sorted(out), out.__getitem__))
    del tensors["stale"]
    assert set(back) == set(tensors)
    for key, array in tensors.items():
        assert back[key].dtype == array.dtype
        assert back[key].shape == array.shape
        assert bits(back[key]) == bits(array)


def test_all_violations_are_raised_at_once_before_any_read():
    tensors = source()
    del tensors["layer.1.weight"]
    tensors["layer.0.weight"] = np.zeros((5, 2), np.float32)
    tensors["gain"] = np.zeros((1, 4), np.int64)
    tensors["mystery"] = np.zeros((9, 9), np.float32)
    tensors["layer.7.weight"] = np.zeros((3, 2), np.float32)
    reader = DictReader(tensors)
    with pytest.raises(ConversionError) as error:
        convert_tensors(TABLE, reader, EXPECTED, lambda path, array: None)
    message = str(error.value)
    for part in (
        "mystery [9, 9]",
        "layer.7.weight [3, 2] (for layers.7.kernel)",
        "layers.1.kernel [2, 3] (from key layer.1.weight)",
        "layer.0.weight [5, 2] gives layers.0.kernel [2, 5]",
        "expected [2, 3]",
        "gain int64",
    ):
        assert part in message
    assert "\n" not in message
    assert reader.reads == []


def test_wrong_rank_is_a_wrong_shape():
    tensors = source()
    tensors["gain"] = np.zeros((2, 4), np.float32)
    with pytest.raises(ConversionError, match=r"gain \[2, 4\] gives gain nothing"):
        convert(tensors)


def test_two_matching_rules_are_refused():
    table = Table("toy", (Rule("a.{i}", "x.{i}"), Rule("a.{i:.*}", "y.{i}")))
    with pytest.raises(ConversionError, match=r"match more than one rule: a\.0 \[1\]"):
        convert_tensors(
            table, DictReader({"a.0": np.zeros(1, np.float32)}), {}, lambda path, array: None
        )


def test_a_parameter_filled_twice_is_refused():
    table = Table("toy", (Rule("a", "x"), Rule("b", "x")))
    tensors = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    with pytest.raises(ConversionError, match=r"filled twice: x \(by a and b\)"):
        convert_tensors(table, DictReader(tensors), {"x": np.zeros(1)}, lambda path, array: None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_named(bad):
    tensors = source()
    tensors["layer.1.weight"][2, 1] = bad
    with pytest.raises(ConversionError, match=r"layer\.1\.weight holds NaN or infinity"):
        convert(tensors)


def test_ignored_buffer_that_is_not_zero_is_refused():
    tensors = source()
    tensors["layer.1.zero"][0] = 1
    with pytest.raises(ConversionError, match=r"layer\.1\.zero must be all zero"):
        convert(tensors)
