"""`sparvar bench`: what it measures, its table and its page."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from sparvar_jax.cli import main
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.study import bench, bench_page
from tests.tiny_var import tiny_model, tiny_pipe

SHORT = "skip_last_scales(3)"


@pytest.fixture(scope="module")
def report():
    return bench.measure(tiny_pipe(), [SHORT, "dense", SHORT], num=2, seed=4, repeats=2)


class Page(html.parser.HTMLParser):
    """What a page refers to, and the content of its JSON."""

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.content, self._inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "action") if name in values]
        self.sources += [values["src"]] if "src" in values else []
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.content += data if self._inside else ""


def test_every_plan_is_held_against_the_dense_one(report):
    dense, short = report.rows
    assert (dense.plan, short.plan) == ("dense", SHORT)
    assert (dense.psnr, dense.ssim) == (None, None)
    pipe = tiny_pipe()
    for row in report.rows:
        drawn = pipe(bench.default_subject(pipe, 2), seed=4, plan=row.plan)
        np.testing.assert_array_equal(report.pictures[row.plan], drawn)
        assert row.images_per_second == pytest.approx(2 / row.seconds)
        assert row.parts.keys() == {"transformer", "decode"}
        assert 0 < row.parts["transformer"] < 60
    a, b = (report.pictures[name] for name in ("dense", SHORT))
    pairs = zip(a, b, strict=True)
    truth = np.mean([peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs])
    assert short.psnr == pytest.approx(truth, abs=1e-3)
    # One scale of one token reads one key; the dense plan's 4 read all before them.
    assert dense.density == 1
    assert short.density < 0.01
    assert short.planned_gib < dense.planned_gib


def test_equal_pictures_are_as_like_as_can_be(report):
    psnr, ssim = bench.compare(report.pictures["dense"], report.pictures["dense"])
    assert psnr == 99
    assert ssim == pytest.approx(1)


def test_the_page_needs_no_other_file_and_holds_the_numbers(report):
    page = Page(bench_page.page(report))
    assert page.links == []
    (source,) = page.sources
    kind, _, data = source.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (3 * 24, 2 * 24)
    told = json.loads(page.content)
    assert [row["plan"] for row in told["rows"]] == ["dense", SHORT]
    assert told["rows"][1]["psnr"] == report.rows[1].psnr
    assert told["about"]["model"] == "model"


def test_names_cannot_end_the_pages_elements(report):
    odd = bench.Report(report.rows, report.pictures, {"model": "</script><b>", "device": "<i>"})
    text = bench_page.page(odd)
    assert "<b>" not in text
    assert "<i>" not in text
    assert json.loads(Page(text).content)["about"]["model"] == "</script><b>"


def test_sheets_show_both_pictures_and_their_difference():
    dense, sparse = np.zeros((2, 1, 4, 6, 3), np.uint8)
    sparse[0, 1, 2] = 10
    shown = bench_page.sheet(dense, sparse)
    assert shown.shape == (4, 18, 3)
    assert shown[1, 8].tolist() == [10, 10, 10]
    assert shown[1, 14].tolist() == [40, 40, 40]
    large = np.zeros((1, 1024, 700, 3), np.uint8)
    assert bench_page.sheet(large, large).shape == (512, 1050, 3)


def test_the_command_prints_one_table_and_writes_the_page(report, tmp_path, monkeypatch, capsys):
    model, out = tiny_model()[0], tmp_path / "bench.html"
    # A pipeline that has compiled what is drawn here.
    monkeypatch.setattr(Pipeline, "from_checkpoint", lambda *_, **__: tiny_pipe())
    common = ["bench", "--model", str(model), "--quick", "--num", "2", "--out", str(out)]
    assert main([*common, "--plan", SHORT]) == 0
    shown = capsys.readouterr().out
    assert shown.count(SHORT) == 1
    assert "pictures a call: 2 of 24x24" in shown
    assert len(json.loads(Page(out.read_text()).content)["rows"]) == 2
    out.unlink()
    assert main([*common, "--plan", "sparvar-slow"]) == 2
    assert "sparvar-slow" in capsys.readouterr().err
    assert main([*common, "--size", "1M"]) == 2
    assert "leave out size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
