"""Pictures and masks of every encoding mean one thing, or are refused in one line."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sparvar_jax.cli import main
from sparvar_jax.pipelines import edit, pictures
from sparvar_jax.pipelines.pictures import read_mask, read_picture, region_of
from tests.tiny_var import tiny_model, tiny_pipe

SIDE = 24
GREY = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
HALF = np.zeros((SIDE, SIDE), bool)
HALF[:, :9] = True


def saved(array, folder, name="a.png", mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(folder / name, **options)
    return folder / name


DEEP = {
    "png": ("a.png", "<u2", {}),
    "little tiff": ("a.tif", "<u2", {}),
    "big tiff": ("a.tif", ">u2", {}),
    "32 bits": ("a.tif", "<i4", {}),
    "pgm": ("a.pgm", "<i4", {}),
}


@pytest.mark.parametrize("case", DEEP)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, case):
    name, dtype, options = DEEP[case]
    file = saved((GREY.astype(np.int64) * 257).astype(dtype), tmp_path, name, **options)
    pixels = read_picture(file, SIDE).pixels
    np.testing.assert_array_equal(pixels, np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("case", DEEP)
@pytest.mark.parametrize("full", [1, 255, 65535, "greys"])
def test_deep_masks_select_what_is_light(tmp_path, case, full):
    name, dtype, options = DEEP[case]
    values = np.where(HALF, 40000, 20000) if full == "greys" else np.where(HALF, full, 0)
    file = saved(values.astype(dtype), tmp_path, name, **options)
    np.testing.assert_array_equal(read_mask(file, SIDE), HALF)


def palette(array, colours):
    image = Image.fromarray(array)
    image = image.convert("P")
    image.putdata(array.reshape(-1).tolist())
    image.putpalette([value for colour in colours for value in colour])
    return image


MASKS = {
    "bool": Image.fromarray(HALF),
    "0 and 1": Image.fromarray(HALF.astype(np.uint8)),
    "0 and 255": Image.fromarray(HALF.astype(np.uint8) * 255),
    "greys": Image.fromarray(np.where(HALF, np.uint8(200), np.uint8(90))),
    "colours": Image.fromarray(np.where(HALF[..., None], np.uint8(255), np.uint8([90, 20, 0]))),
    "0 and 1 in colours": Image.fromarray(np.repeat(HALF[..., None].astype(np.uint8), 3, 2)),
    "opaque": Image.fromarray(HALF.astype(np.uint8) * 255).convert("RGBA"),
    "palette": palette(HALF.astype(np.uint8), [(0, 0, 0), (255, 255, 0)]),
    "dark first": palette((~HALF).astype(np.uint8), [(255, 255, 255), (0, 0, 0)]),
    "grey palette": palette(HALF.astype(np.uint8), [(i, i, i) for i in range(256)]),
    "fractions": Image.fromarray(HALF.astype(np.float32)),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_any_mode(tmp_path, case):
    MASKS[case].save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", SIDE), HALF)


REFUSED_MASKS = {
    "nothing": (np.zeros((SIDE, SIDE), np.uint8), "selects nothing .*values are 0 to 0"),
    "everything": (np.full((SIDE, SIDE), 255, np.uint8), "selects everything .*255 to 255"),
    "ones": (np.ones((SIDE, SIDE), np.uint8), "selects everything"),
    "dark": (np.where(HALF, np.uint8(100), np.uint8(3)), "selects nothing .*values are 3 to 100"),
    "labels": (np.where(HALF, np.uint8(3), np.uint8(0)), "selects nothing .*values are 0 to 3"),
    "too deep": (np.where(HALF, 70000, 0).astype(np.int32), "greys 0 to 70000"),
    "negative": (np.where(HALF, 255, -1).astype(np.int32), "greys -1 to 255"),
    "fractions": (np.where(HALF, 0.7, 0.1).astype(np.float32), "holds fractions"),
    "nan": (np.full((SIDE, SIDE), np.nan, np.float32), "holds fractions"),
}


@pytest.mark.parametrize("case", REFUSED_MASKS)
def test_masks_without_one_meaning_are_refused(tmp_path, case):
    array, message = REFUSED_MASKS[case]
    file = saved(array, tmp_path, "a.tif")
    with pytest.raises(ValueError, match=message):
        read_mask(file, SIDE)


def test_a_transparent_mask_is_refused(tmp_path):
    layer = np.full((SIDE, SIDE, 4), 255, np.uint8)
    layer[..., 3] = HALF * 255
    file = saved(layer, tmp_path)
    with pytest.raises(ValueError, match="transparent places, which may mean either"):
        read_mask(file, SIDE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with a colour", "RGB with a colour"])
def test_transparent_places_are_laid_on_white(tmp_path, mode):
    shown = np.repeat(GREY[..., None] // 2, 3, 2)  # 255 is no colour of it
    if "colour" in mode:
        image = Image.fromarray(np.where(HALF[..., None], np.uint8(255), shown))
        image = image.convert("P") if mode[0] == "P" else image
        value = image.getpixel((0, 0))
        image.save(tmp_path / "a.png", transparency=value)
        opened = np.asarray(Image.open(tmp_path / "a.png").convert("RGBA"))
        expected = np.where(opened[..., 3:] == 0, np.uint8(255), opened[..., :3])
    else:
        layer = np.dstack([shown, np.where(HALF, 0, 255).astype(np.uint8)])
        image = Image.fromarray(layer).convert(mode)
        image.save(tmp_path / "a.tif" if mode != "RGBA" else tmp_path / "a.png")
        expected = np.where(HALF[..., None], np.uint8(255), shown)
    file = next(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="transparent places: they are laid on white"):
        found = read_picture(file, SIDE).pixels
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_plain_modes_are_what_pillow_shows(tmp_path, mode):
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    file = saved(COLOURS, tmp_path, name, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_picture(file, SIDE).pixels
    np.testing.assert_array_equal(found, np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize(
    ("array", "mode"), [(GREY.astype(np.float32), None), (COLOURS, "LAB")], ids=["float", "lab"]
)
def test_pictures_of_other_modes_are_refused(tmp_path, array, mode):
    file = saved(array, tmp_path, "a.tif", mode)
    with pytest.raises(ValueError, match=r"a\.tif has the mode (F|LAB): save it with"):
        read_picture(file, SIDE)


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_as_their_camera_says(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(COLOURS[:, :20]).save(tmp_path / "a.png", exif=exif)
    from PIL import ImageOps

    with Image.open(tmp_path / "a.png") as image:
        expected = ImageOps.fit(ImageOps.exif_transpose(image), (SIDE, SIDE))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", SIDE).pixels, expected)


def bomb(width, height):
    """A PNG that says it has so many pixels, in a few bytes."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(13000, 13000), (20000, 20000), (65000, 65000), (2**31 - 1, 1)])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch, size):
    (tmp_path / "a.png").write_bytes(bomb(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"a\.png .*more than 128 megapixels"):
        read_picture(tmp_path / "a.png", SIDE)


def encoded(kind):
    content = io.BytesIO()
    Image.fromarray(np.tile(COLOURS, (4, 4, 1))).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICNS", "AVIF"]
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_pictures_end_in_one_line(tmp_path, kind, share):
    if kind == "ICNS" and share > 0.5:
        pytest.skip("its largest picture lies before the cut")
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    content = encoded(kind)
    (tmp_path / "a").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"/a is (damaged \(|not a picture that)") as error:
        read_picture(tmp_path / "a", SIDE)
    assert len(str(error.value)) < 400


def test_damaged_exif_is_named(tmp_path):
    file = saved(COLOURS, tmp_path, exif=b"Exif\0\0no tags at all")
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        read_picture(file, SIDE)


@pytest.mark.parametrize("what", ["text", "folder", "nothing", "device", "eps"])
def test_what_is_no_picture(tmp_path, what):
    path = tmp_path / "a"
    if what == "text":
        path.write_text("a picture")
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "eps":  # it would start another program
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"/a (is no file|is not a picture|\()|cannot read .*/a"):
        read_picture(path, SIDE)


def test_the_first_of_several_frames_is_taken_and_said(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames: the first is taken"):
        pixels = read_picture(tmp_path / "a.gif", SIDE).pixels
    np.testing.assert_array_equal(pixels[..., 0], GREY)


def test_masks_lie_on_their_pictures(tmp_path):
    wide = saved(np.tile(np.uint8([[0, 255]]), (20, 20)), tmp_path)
    assert read_mask(wide, SIDE, (80, 40)).shape == (SIDE, SIDE)
    assert read_mask(wide, SIDE, (79, 39)).shape == (SIDE, SIDE)  # rounded
    with pytest.raises(ValueError, match="has 40x20 pixels and the picture 40x40"):
        read_mask(wide, SIDE, (40, 40))
    own = saved(HALF.astype(np.uint8), tmp_path, "b.png")
    np.testing.assert_array_equal(read_mask(own, SIDE, (400, 300)), HALF)


@pytest.mark.parametrize(
    "region", [HALF, HALF.astype(np.uint8), HALF.astype(np.uint8) * 255, HALF.astype(np.int64)]
)
def test_regions_of_numbers_mean_what_booleans_mean(region):
    np.testing.assert_array_equal(region_of(region, (SIDE, SIDE)), HALF)


@pytest.mark.parametrize(
    "region", [HALF * 2, HALF * np.uint8(254), HALF * 1.0, GREY, HALF * -1, np.zeros((0, 0))]
)
def test_regions_of_other_numbers_are_refused(region):
    with pytest.raises(ValueError, match="a region is an array of True and False"):
        region_of(region, region.shape)


def test_a_region_of_bytes_draws_what_its_booleans_draw():
    pipe, pictures_ = tiny_pipe(), COLOURS[None]
    expected = edit.edit(pipe, pictures_, HALF, [1], seed=3)
    found = edit.edit(pipe, pictures_, HALF.astype(np.uint8) * 255, [1], seed=3)
    np.testing.assert_array_equal(found, expected)


def test_every_format_is_one_that_pillow_knows():
    Image.init()
    assert {"PNG", "JPEG", "TIFF", "GIF", "BMP"} <= set(pictures.FORMATS) & set(Image.OPEN)
    assert not {"EPS", "WMF", "MPEG", "HDF5"} & set(pictures.FORMATS)


def test_edits_say_in_one_line_what_is_wrong(tmp_path, capsys):
    model, _ = tiny_model()
    picture = saved(COLOURS, tmp_path)
    empty = saved(np.zeros((SIDE, SIDE), np.uint8), tmp_path, "empty.png")
    common = ["edit", str(picture), "--model", str(model), "--out", str(tmp_path / "out.png")]
    for options, message in (
        (["--mask", str(empty)], "selects nothing"),
        (["--box", "3,3,4,4"], "nothing would be drawn"),
        (["--box", "0,0,24,24", "--keep-scales", "4"], "nothing would be drawn"),
        (["--box", "0,0,24,24", "--outside"], "nothing would be drawn"),
        (["--box", "0,0,24," + "9" * 5000], "TOP,LEFT,BOTTOM,RIGHT"),
    ):
        assert main([*common, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert len(line) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "empty.png"]
