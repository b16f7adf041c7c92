"""A plan beside dense: measures, the sheet, `sparvar demo` and `sparvar generate --compare`."""

import re

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from sparvar_jax.cli import main
from sparvar_jax.pipelines import loading, metadata
from sparvar_jax.study import beside
from tests.tiny_var import tiny_model, tiny_pipe

SHORT = "skip_last_scales(3)"
LABEL, SEED = 2, 4


@pytest.fixture(scope="module")
def found():
    return beside.beside_dense(tiny_pipe(), [LABEL], plan=SHORT, seed=SEED)


@pytest.fixture(scope="module")
def expected():
    """The two pictures by plain calls, dense first."""
    return [tiny_pipe()([LABEL], plan=plan, seed=SEED) for plan in ("dense", SHORT)]


def test_both_plans_draw_the_same_subject_and_seed(found, expected):
    np.testing.assert_array_equal(found.dense, expected[0])
    np.testing.assert_array_equal(found.pictures, expected[1])
    truth = peak_signal_noise_ratio(*expected, data_range=255)
    assert found.psnr == pytest.approx(truth, abs=1e-3)
    assert found.plan == SHORT
    assert 0 < found.seconds < 60
    assert 0 < found.dense_seconds < 60


def test_what_was_drawn_before_is_not_drawn_again(found):
    before = (found.dense, 7.0)
    told = []
    again = beside.beside_dense(
        tiny_pipe(),
        [LABEL],
        drawn=before,
        progress=lambda *now: told.append(now),
        plan=SHORT,
        seed=SEED,
    )
    assert again.seconds == 7
    assert again.pictures is before[0]
    assert again.psnr == 99  # what was handed in are dense pictures
    assert told == [("measure", 1, 2), ("measure", 2, 2)]


def test_the_sheet_shows_dense_sparse_and_four_times_their_difference(found):
    page = beside.lettered(found, "class 2, seed 4")
    height, width = page.shape[:2]
    column = width // 3
    zoom = column // 24
    assert column >= beside.NARROWEST
    band = (height - column) // 2
    dense, sparse, gap = (
        page[band : band + column, i * column : (i + 1) * column][::zoom, ::zoom] for i in range(3)
    )
    np.testing.assert_array_equal(dense, found.dense[0])
    np.testing.assert_array_equal(sparse, found.pictures[0])
    exact = 4 * np.abs(dense.astype(int) - sparse.astype(int))
    np.testing.assert_array_equal(gap, exact.clip(0, 255))
    paper = page[0, 0]
    for strip in [page[:band, i * column : (i + 1) * column] for i in range(3)] + [page[-band:]]:
        assert (strip != paper).any()
        edge = np.concatenate([strip[:, :2], strip[:, -2:]], 1)  # no letter is cut off
        assert (edge == paper).all()


def test_a_long_line_is_made_to_fit(found):
    page = beside.lettered(found, "a very long prompt " * 40)
    assert (page[-20:, -2:] == page[0, 0]).all()
    assert (page[-20:] != page[0, 0]).any()


def test_demo_writes_one_picture_that_says_what_it_shows(tmp_path, capsys, expected):
    out = tmp_path / "demo.png"
    common = ["demo", "--model", str(tiny_model()[0]), "--out", str(out)]
    assert main([*common, "--plan", SHORT]) == 0
    shown = capsys.readouterr().out
    line = r"dense took [\d.]+ s, skip_last_scales\(3\) [\d.]+ s \([\d.]+ times as fast\); PSNR "
    assert re.search(line, shown)
    told = metadata.read_metadata(out)
    assert told["plan"] == SHORT
    assert told["measured"] in shown
    with Image.open(out) as picture:
        assert picture.width >= 3 * beside.NARROWEST
    assert main(common) == 2  # this model's own plan is the dense one
    assert "the plan is dense itself" in capsys.readouterr().err
    assert main([*common, "--plan", SHORT, "--size", "1M"]) == 2
    assert main([*common[:-1], "demo.jpg"]) == 2


def test_generate_says_by_which_plan_it_drew_and_compares_on_request(tmp_path, capsys):
    common = ["generate", "--class", str(LABEL), "--model", str(tiny_model()[0])]
    common += ["--out", str(tmp_path / "x.png")]
    assert main([*common, "--plan", SHORT]) == 0
    plain = capsys.readouterr().out
    # One token of the dense plan's 1 + 9 + 36 + 144.
    assert re.search(r"plan skip_last_scales\(3\): \d+ % of the tokens x rows of dense", plain)
    assert "--compare" in plain
    assert "dense took" not in plain
    assert main([*common, "--plan", SHORT, "--compare"]) == 0
    assert "dense took" in capsys.readouterr().out
    assert main(common) == 0
    assert "plan dense\n" in capsys.readouterr().out
    (tmp_path / "x.png").unlink()
    assert main([*common, "--compare"]) == 2
    assert not (tmp_path / "x.png").exists()


def test_the_demo_model_draws_by_a_plan_that_is_hardly_to_be_told_from_dense():
    described = loading.describe_model(loading.model_folder(None))
    plan, _ = described.family.asked("demo", {}).resolve(described)
    assert plan.name == "almost-lossless"
    assert plan.work() < 0.7
    # Every scale is drawn: nothing of the picture is left out.
    assert len(plan.steps) == len(plan.schedule)
