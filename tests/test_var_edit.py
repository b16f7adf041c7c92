"""Editing by forced tokens, and the commands for editing and sampling."""

import numpy as np
import pytest
from PIL import Image

from sparvar_jax import cli
from sparvar_jax.pipelines import edit, metadata
from sparvar_jax.pipelines.edit import box, drawn_tokens
from tests.tiny_var import CONFIG, tiny_model, tiny_pipe

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
REGION = box(24, 24, 6, 0, 18, 12)


def drawn_sum(pipe, pictures, region, labels, **options):
    """Code sums of an edit, before the decoder."""
    drawn = drawn_tokens(region, CONFIG.sides, keep_scales=options.pop("keep_scales", 1))
    known = pipe.tokenise(pictures).tokens
    return edit.draw(pipe, pipe.request(labels, **options), known, drawn)[0]


def test_tokens_that_are_drawn():
    masks = drawn_tokens(box(24, 24, 6, 0, 18, 12), (1, 2, 4), keep_scales=0)
    assert masks[0].tolist() == [False]  # a quarter of the picture
    assert masks[1].tolist() == [False, False, False, False]  # half of two quarters
    expected = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(masks[2].reshape(4, 4), expected)
    lower = drawn_tokens(box(24, 24, 6, 0, 18, 12), (1, 2), threshold=0.4, keep_scales=0)
    assert lower[1].tolist() == [True, False, True, False]
    whole = drawn_tokens(np.ones((24, 24), bool), (1, 2, 3), keep_scales=2)
    assert [mask.all() for mask in whole] == [False, False, True]


def test_a_whole_region_is_plain_generation():
    pipe = tiny_pipe()
    everything = np.ones((24, 24), bool)
    result = edit.edit(pipe, PICTURES, everything, [1, 2], keep_scales=0, seed=1)
    assert np.abs(result.astype(int) - pipe([1, 2], seed=1)).max() <= 1


def test_an_empty_region_is_the_tokenizer_alone():
    pipe, nothing = tiny_pipe(), np.zeros((24, 24), bool)
    code_sum = drawn_sum(pipe, PICTURES, nothing, [1, 2])
    # Additions of the same terms in the same order.
    np.testing.assert_allclose(code_sum, pipe.tokenise(PICTURES).code_sum, atol=1e-5)
    np.testing.assert_array_equal(edit.edit(pipe, PICTURES, nothing, 3, paste=True), PICTURES)


def test_known_tokens_stand_and_others_are_drawn():
    pipe = tiny_pipe()
    known = pipe.tokenise(PICTURES).tokens
    masks = drawn_tokens(REGION, CONFIG.sides)
    _, outputs = edit.draw(pipe, pipe.request([1, 2], seed=3), known, masks)
    seen = [np.asarray(output.tokens) for output in outputs]
    assert len(seen) == len(known)
    for tokens, original, drawn in zip(seen, known, masks, strict=True):
        np.testing.assert_array_equal(tokens[:, ~drawn], np.asarray(original)[:, ~drawn])
    different = (seen[-1] != np.asarray(known[-1]))[:, masks[-1]]
    assert different.mean() > 0.5


def test_pasting_keeps_pixels_and_classes_matter():
    pipe = tiny_pipe()
    result = edit.edit(pipe, PICTURES, REGION, [1, 2], seed=3, paste=True)
    np.testing.assert_array_equal(result[:, ~REGION], PICTURES[:, ~REGION])
    assert (result[:, REGION] != PICTURES[:, REGION]).mean() > 0.9
    other = edit.edit(pipe, PICTURES, REGION, [3, 2], seed=3, paste=True)
    np.testing.assert_array_equal(other[1], result[1])
    assert (other[0] != result[0]).any()
    assert edit.edit(pipe, PICTURES, REGION, None, seed=3).shape == PICTURES.shape
    smooth = edit.edit(pipe, PICTURES, REGION, [1, 2], seed=3, smooth=True, paste=True)
    assert (smooth != result).any()


@pytest.mark.parametrize(
    ("pictures", "region", "message"),
    [
        (PICTURES[0], REGION, "uint8 RGB"),
        (PICTURES.astype(np.float32), REGION, "uint8 RGB"),
        (PICTURES, REGION[:12], "the region is"),
        (PICTURES[:, :12, :12], REGION[:12, :12], "need pictures of 24 pixels"),
    ],
)
@pytest.mark.unchecked
def test_impossible_edits_are_refused(pictures, region, message):
    with pytest.raises(ValueError, match=message):
        edit.edit(tiny_pipe(), pictures, region, 1)


@pytest.mark.parametrize("corners", [(0, 0, 0, 5), (5, 0, 3, 5), (0, 0, 5, 25), (-1, 0, 5, 5)])
def test_impossible_boxes_are_refused(corners):
    with pytest.raises(ValueError, match="a box must be"):
        box(24, 24, *corners)


def test_edit_command(tmp_path, capsys):
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(np.tile(PICTURES[0], (2, 3, 1))).save(source)
    model, _ = tiny_model()
    common = [str(source), "--model", str(model), "--out", str(out), "--dtype", "float32"]
    assert cli.main(["edit", *common, "--box", "6,0,18,12", "--class", "2", "--outside"]) == 0
    with Image.open(out) as image:
        assert image.size == (24, 24)
    assert metadata.read_metadata(out)["class"] == "2"
    for options, message in (
        ([], "either --box or --mask"),
        (["--box", "1,2"], "TOP,LEFT,BOTTOM,RIGHT"),
        (["--box", "6,0,18,12", "--class", "9"], "classes must lie"),
    ):
        assert cli.main(["edit", *common, *options]) == 2
        assert message in capsys.readouterr().err


def test_sample_command_resumes_and_tells_jobs_apart(tmp_path, capsys):
    out, (model, _) = tmp_path / "samples.npz", tiny_model()
    command = ["sample", "--model", str(model), "--out", str(out), "--dtype", "float32"]
    command += ["--classes", "0-1,4", "--per-class", "2", "--batch", "2", "--seed", "5"]
    assert cli.main(command) == 0
    with np.load(out) as archive:
        pictures, labels = archive["arr_0"], archive["arr_1"]
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 4, 4])
    expected = tiny_pipe()([1, 1], seed=[7, 8])
    assert np.abs(pictures[2:4].astype(int) - expected).max() <= 1
    assert cli.main(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert cli.main([*command, "--guidance", "3"]) == 2
    assert "another job" in capsys.readouterr().err
    assert cli.main([*command, "--top-p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err
