"""Whatever kind of picture: the same upright 8-bit pixels. Whatever is wrong with a file: a ValueError that says so."""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from resbackbone.data.pictures import (
    MAX_PIXELS,
    _load_plugins,
    find_pictures,
    parse_size,
    read_picture,
    readable_suffixes,
    resize,
)
from resbackbone.data.preprocessing import CAFFE, TORCHVISION, Preprocessing, preprocessing_for

ORIENTATION = 0x0112


@pytest.fixture
def colors():
    """A picture of 6x4 pixels, no two alike, none symmetric."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(picture):
    return np.asarray(picture).astype(int)


def save(picture, path, **options):
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_come_back_exactly(colors, tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(colors, tmp_path / f"a.{suffix}", **options)
    assert read_picture(path).mode == "RGB"
    assert (pixels(read_picture(path)) == pixels(colors)).all()


def test_jpeg_comes_back_nearly(tmp_path):
    picture = Image.radial_gradient("L").convert("RGB")
    path = save(picture, tmp_path / "a.jpg", quality=95)
    assert abs(pixels(read_picture(path)) - pixels(picture)).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grayscale_has_three_equal_channels(colors, tmp_path, mode):
    gray = colors.convert(mode)
    read = pixels(read_picture(save(gray, tmp_path / "a.png")))
    assert (read == pixels(gray.convert("L"))[..., None]).all()


def test_one_channel(colors, tmp_path):
    read = read_picture(save(colors, tmp_path / "a.png"), channels=1)
    assert read.mode == "L"
    assert (pixels(read) == pixels(colors.convert("L"))).all()


def test_alpha_is_dropped(colors, tmp_path):
    transparent = colors.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(colors.size))
    assert (pixels(read_picture(save(transparent, tmp_path / "a.png"))) == pixels(colors)).all()


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(24))])
def test_palette(colors, tmp_path, transparency):
    palette = colors.quantize(24)
    options = {} if transparency is None else {"transparency": transparency}
    read = read_picture(save(palette, tmp_path / "a.png", **options))
    assert (pixels(read) == pixels(palette.convert("RGB"))).all()


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    path = save(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"), tmp_path / f"a.{suffix}")
    assert abs(pixels(read_picture(path)) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix, channels):
    values = np.array([[0, 1, 128, 129, 256, 257], [32767, 32768, 40000, 65279, 65534, 65535]], dtype=np.uint16)
    read = pixels(read_picture(save(Image.fromarray(values), tmp_path / f"a.{suffix}"), channels=channels))
    expected = np.round(values / 257).astype(int)
    assert (read.reshape(2, 6, channels) == expected[..., None]).all()


def test_sixteen_bits_big_endian(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=">u2")
    path = save(Image.frombytes("I;16B", (3, 1), values.tobytes()), tmp_path / "a.tif")
    assert pixels(read_picture(path, channels=1)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_have_no_known_range(tmp_path, mode):
    path = save(Image.new(mode, (2, 2), 70000), tmp_path / "a.tif")
    with pytest.raises(ValueError, match="32 bits per channel"):
        read_picture(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation(colors, tmp_path, orientation, suffix):
    # What a camera that is held that way stores: the upright picture, turned the other way round.
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = colors if turn is None else colors.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(stored, tmp_path / f"a.{suffix}", exif=exif, **options)
    assert (pixels(read_picture(path)) == pixels(colors)).all()


def test_exif_orientation_of_sixteen_bits(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = Image.fromarray(np.rot90(values).copy())
    assert (pixels(read_picture(save(stored, tmp_path / "a.png", exif=exif), channels=1)) == values // 257).all()


@pytest.mark.parametrize(
    "exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63"]
)
def test_damaged_exif_data_does_not_matter(colors, tmp_path, exif):
    path = save(colors, tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert read_picture(path).size == colors.size


def test_first_frame_of_an_animation(colors, tmp_path):
    frames = [Image.new("RGB", (4, 6), color) for color in ("blue", "red")]
    path = save(colors.quantize(24), tmp_path / "a.gif", save_all=True, append_images=frames)
    assert (pixels(read_picture(path)) == pixels(colors.quantize(24).convert("RGB"))).all()


def png_claiming(width, height):
    """A PNG whose header declares a size; its data ends right there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def encoded(form):
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("text.jpg", b"no picture at all\n" * 20, "it is no JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF, "),
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no JPEG, PNG"),
        ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(99), "Pillow cannot read .heic here (pip install pillow-heif)"),
        ("header.png", b"\x89PNG\r\n\x1a\n", ""),
        ("bomb.png", png_claiming(60000, 60000), "decompression bomb"),
        ("damaged.png", encoded("PNG")[:60] + b"\xff" * 400, ""),
        *(
            (f"cut.{form.lower()}", encoded(form)[: len(encoded(form)) // 2], "")
            for form in ("JPEG", "PNG", "BMP", "GIF")
        ),
        ("cut.webp", encoded("WEBP")[:200], ""),
        ("cut.tif", encoded("TIFF")[:2000], ""),
    ],
)
def test_unreadable_files(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot read picture '.*{name}': .+") as caught:
        read_picture(path)
    assert reason in str(caught.value)
    assert "object at 0x" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jpg': No such file or directory"):
        read_picture(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="Is a directory"):
        read_picture(tmp_path)


def test_preprocessing_of_torchvision(colors):
    tensor = TORCHVISION(colors)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 6, 4), torch.float32)
    red = (pixels(colors)[..., 0] - 123.675) / 58.395
    assert np.allclose(tensor[0, 0], red, atol=1e-6)


def test_preprocessing_of_caffe_is_bgr_and_not_scaled(colors):
    blue_first = CAFFE(colors)[0]
    assert np.allclose(blue_first[0], pixels(colors)[..., 2] - 103.53, atol=1e-4)
    assert np.allclose(blue_first[2], pixels(colors)[..., 0] - 123.675, atol=1e-4)


def test_preprocessing_by_style_and_channels():
    assert preprocessing_for(in_channels=3, style="pytorch") is TORCHVISION
    assert preprocessing_for(in_channels=3, style="caffe") is CAFFE
    gray = preprocessing_for(in_channels=1, style="pytorch")
    assert gray(Image.new("L", (4, 6), 114)).shape == (1, 1, 6, 4)
    assert gray(Image.new("L", (1, 1), 114)).abs() < 0.01
    with pytest.raises(ValueError, match="1 or 3 channels, the backbone's `in_channels` is 4"):
        preprocessing_for(in_channels=4, style="pytorch")


def test_preprocessing_is_checked(colors):
    with pytest.raises(ValueError, match="`order` must be one of"):
        Preprocessing(order="GBR")
    with pytest.raises(ValueError, match="`std` must have 3 entries"):
        Preprocessing(std=(1.0,))
    with pytest.raises(ValueError, match=r"`picture\.mode` must be one of 'RGB'"):
        TORCHVISION(colors.convert("L"))


@pytest.mark.parametrize(
    ("text", "size", "result"),
    [
        ("20", (40, 60), (20, 30)),
        ("20", (60, 40), (30, 20)),
        ("20", (20, 31), (20, 31)),
        ("80", (40, 61), (80, 122)),
        ("10", (40, 63), (10, 16)),
        ("7x9", (40, 60), (7, 9)),
        ("7X9", (40, 60), (7, 9)),
        ("1", (2, 3000), (1, 1500)),
    ],
)
def test_resize(text, size, result):
    height, width = size
    assert resize(Image.new("RGB", (width, height)), size=parse_size(text)).size == result[::-1]


def test_resize_averages_what_it_shrinks():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))
    small = pixels(resize(stripes, size=16))
    assert abs(small - 127.5).max() < 12  # without antialiasing: 0 or 255


def test_a_picture_of_the_right_size_is_not_touched(colors):
    assert resize(colors, size=(6, 4)) is colors


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "640x", "x640", "1x2x3", "1.5", "big", "0x5", "640*480"])
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match="a size is one side in pixels or HEIGHTxWIDTH"):
        parse_size(text)


@pytest.mark.parametrize("size", [(100_000, 100_000), 10**6])
def test_gigantic_sizes(size):
    with pytest.raises(ValueError, match="more than 268,435,456 pixels"):
        resize(Image.new("L", (4, 4)), size=size)


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def names(found):
    return {str(path): str(name) for path, name in found.items()}


def test_folders_are_searched_by_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(
        *(
            tmp_path / "in" / name
            for name in ("b.PNG", "a.jpeg", "deep/er/c.TiFf", "notes.txt", ".hidden.png", ".x/d.png")
        )
    )
    assert list(names(find_pictures(["in"])).items()) == [
        ("in/a.jpeg", "a.jpeg"),
        ("in/b.PNG", "b.PNG"),
        ("in/deep/er/c.TiFf", "deep/er/c.TiFf"),
    ]


def test_files_are_taken_as_they_are_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "in/scan.data", tmp_path / "in/a.png")
    found = find_pictures(["in/scan.data", "in", "in/a.png", tmp_path / "in/a.png"])
    assert names(found) == {"in/scan.data": "scan.data", "in/a.png": "a.png"}


def test_equal_names_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "x/1/a.png", tmp_path / "x/2/a.png", tmp_path / "x/2/b.png")
    assert names(find_pictures(["x/1/a.png", "x/2"])) == {
        "x/1/a.png": "1/a.png",
        "x/2/a.png": "2/a.png",
        "x/2/b.png": "2/b.png",
    }


def test_results_inside_a_folder_are_left_out(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "features/a.png/pyramid.png")
    assert list(find_pictures([tmp_path], exclude=tmp_path / "features")) == [tmp_path / "a.png"]
    assert len(find_pictures([tmp_path], exclude=tmp_path)) == 2
    assert len(find_pictures([tmp_path], exclude=tmp_path.parent)) == 2


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture or folder at '.*gone'"):
        find_pictures([tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"no pictures in '.*'; looked for \.jpg"):
        find_pictures([tmp_path])


def found_in(folder):
    """The names of the pictures in a folder, and what was left out of it, with the reasons."""
    skipped = {}
    found = find_pictures([folder], on_skipped=skipped.__setitem__)
    return [str(name) for name in found.values()], {path.name: reason for path, reason in skipped.items()}


def test_links_to_folders_and_files_are_followed(tmp_path):
    touch(tmp_path / "far/x.png", tmp_path / "far/deep/y.png", tmp_path / "in/a.png")
    (tmp_path / "in/linked").symlink_to(tmp_path / "far")
    (tmp_path / "in/z.png").symlink_to(tmp_path / "far/x.png")
    (tmp_path / "root").symlink_to(tmp_path / "in")
    wanted = ["a.png", "linked/deep/y.png", "linked/x.png", "z.png"]
    for folder in ("in", "root"):
        assert found_in(tmp_path / folder) == (wanted, {})


@pytest.mark.parametrize("target", [".", "in", "in/own", "/", "elsewhere"])
def test_loops_end_and_no_folder_is_searched_twice(tmp_path, target):
    touch(tmp_path / "in/own/a.png", tmp_path / "b.png", tmp_path / "elsewhere/c.png")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/a_link").symlink_to(tmp_path / target if target != "/" else "/")
    (tmp_path / "in/own/again").symlink_to(tmp_path / "in/a_link")
    names = ["a_link/c.png"] if target == "elsewhere" else []
    assert found_in(tmp_path / "in") == ([*names, "own/a.png"], {})


def test_links_to_themselves_and_to_nothing_are_named(tmp_path):
    touch(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").symlink_to("gone.png")
    (tmp_path / "in/folder").symlink_to(tmp_path / "gone")
    (tmp_path / "in/me").symlink_to("me")
    wanted = dict.fromkeys(("b.png", "folder", "me"), "a broken link")
    assert found_in(tmp_path / "in") == (["a.png"], wanted)
    with pytest.warns(UserWarning, match=r"^3 skipped, a broken link: '.*b\.png', '.*folder', '.*me'$"):
        find_pictures([tmp_path / "in"])


def test_a_folder_reached_by_two_paths_counts_once(tmp_path):
    touch(tmp_path / "in/a.png")
    (tmp_path / "also").symlink_to("in")
    assert len(find_pictures([tmp_path / "in", tmp_path / "also", tmp_path / "also/a.png"])) == 1


def test_results_behind_a_link_are_left_out(tmp_path):
    touch(tmp_path / "in/a.png", tmp_path / "out/a.png/pyramid.png")
    (tmp_path / "in/results").symlink_to(tmp_path / "out")
    assert list(find_pictures([tmp_path / "in"], exclude=tmp_path / "out")) == [tmp_path / "in/a.png"]


NOT_WRITTEN = (".pfm", ".rgba", ".jpc", ".j2c")  # as such, from a picture of three channels
PILLOWS = [
    suffix for suffix, form in sorted(readable_suffixes().items()) if form in Image.SAVE and suffix not in NOT_WRITTEN
]


@pytest.mark.parametrize("suffix", PILLOWS)
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_what_pillow_reads_is_found_and_read(tmp_path, suffix, case):
    path = tmp_path / f"a{case(suffix)}"
    picture = Image.radial_gradient("L").convert("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB")
    picture.save(path, readable_suffixes()[suffix])
    assert list(find_pictures([tmp_path])) == [path]
    assert abs(pixels(read_picture(path)) - pixels(picture.convert("RGB"))).mean() < 3


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".jxl", ".psd", ".svg", ".eps", ".cr2", ".ico", ".wmf", ".emf"])
def test_other_pictures_are_counted_and_named(tmp_path, suffix):
    assert suffix.lower() not in readable_suffixes()
    touch(tmp_path / "in/a.png", tmp_path / f"in/b{suffix}", tmp_path / f"in/c{suffix}")
    names, skipped = found_in(tmp_path / "in")
    assert names == ["a.png"]
    assert list(skipped) == [f"b{suffix}", f"c{suffix}"]
    with pytest.warns(UserWarning, match=f"^2 skipped, as .* {suffix.lower()} here.*: '.*b{suffix}', "):
        find_pictures([tmp_path / "in"])
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(ValueError, match=rf"no pictures in .*; looked for \.jpg, .*; 2 skipped, as .*'.*b{suffix}'"):
        find_pictures([tmp_path / "in"])


@pytest.mark.parametrize("suffix", [".avif", ".webp", ".jp2"])
def test_what_this_pillow_lacks_is_named(tmp_path, monkeypatch, suffix):
    touch(tmp_path / "in/a.png", tmp_path / f"in/b{suffix}")
    monkeypatch.setattr("resbackbone.data.pictures.features.check", lambda feature: False)
    _load_plugins.cache_clear()
    try:
        assert list(found_in(tmp_path / "in")[1]) == [f"b{suffix}"]
    finally:
        monkeypatch.undo()
        _load_plugins.cache_clear()


def test_a_plugin_for_heif_is_used_where_it_is_installed(tmp_path, monkeypatch):
    def register_heif_opener():
        Image.register_open("HEIF", lambda file, name: Image.open(file), lambda prefix: prefix[4:8] == b"ftyp")
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    for name in ("OPEN", "EXTENSION", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    _load_plugins.cache_clear()
    touch(tmp_path / "in/a.HEIC")
    try:
        assert found_in(tmp_path / "in") == (["a.HEIC"], {})
    finally:
        _load_plugins.cache_clear()


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    touch(*(tmp_path / "in" / name for name in ("a.png", "Thumbs.db", "notes.txt", ".DS_Store", "._a.png", "labels")))
    assert found_in(tmp_path / "in") == (["a.png"], {})
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(ValueError, match=r"other suffixes there: \.db, \.txt, none$"):
        find_pictures([tmp_path / "in"])


def test_sixteen_bits_of_a_pgm_are_scaled(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.tobytes())
    assert pixels(read_picture(tmp_path / "a.pgm", channels=1)).tolist() == [[0, 1, 128, 255]]


def test_a_picture_of_too_many_pixels_is_refused_where_pillow_was_told_to_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_claiming(60000, 60000))
    with pytest.raises(ValueError, match=rf"it has 60000x60000 pixels, more than {MAX_PIXELS:,}"):
        read_picture(tmp_path / "bomb.png")


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    touch(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"pipe\.png': it is no regular file"):
        read_picture(tmp_path / "pipe.png")
    assert found_in(tmp_path) == (["a.png"], {})


def test_threads_that_overlap_leave_the_filters_of_warnings_as_they_were(colors, tmp_path, monkeypatch):
    """The first to come is the first to leave, which is not how ``warnings.catch_warnings`` nests."""
    path = save(colors, tmp_path / "a.png")
    before = list(warnings.filters)
    inside = {name: threading.Event() for name in ("first", "second")}
    leave = {name: threading.Event() for name in ("first", "second")}

    def wait(image):
        name = threading.current_thread().name
        inside[name].set()
        assert leave[name].wait(10)
        warnings.warn_explicit("about metadata", UserWarning, "", 1, module="PIL.Image")  # an error but for the filter
        return image

    monkeypatch.setattr("resbackbone.data.pictures._upright", wait)
    with ThreadPoolExecutor() as pool:

        def read(name):
            threading.current_thread().name = name
            return read_picture(path)

        reading = []
        for name in ("first", "second"):
            reading.append(pool.submit(read, name))
            assert inside[name].wait(10)
        for name, picture in zip(leave, reading, strict=True):
            leave[name].set()
            assert (pixels(picture.result()) == pixels(colors)).all()
    assert warnings.filters == before
