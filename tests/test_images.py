"""Every kind of picture that users bring, good and bad."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dyrate_lib.errors import InputError
from dyrate_lib.images import MAX_PIXELS, load_image


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def two_colours(mode="RGB", size=(40, 20)):
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return picture.convert(mode)


@pytest.fixture(autouse=True)
def no_warnings():
    """Nothing here may speak through warnings: a picture is loaded, or it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_path_bytes_and_picture_agree(tmp_path):
    content = encoded(two_colours())
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    expected = np.asarray(two_colours())
    for source in (path, str(path), content, bytearray(content), memoryview(content), two_colours()):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), expected)
    path.unlink()  # nothing holds the file, and the picture is fully read
    assert loaded.getpixel((0, 0)) == (255, 0, 0)


def test_a_given_picture_is_not_changed():
    given = two_colours("P")
    load_image(given).putpixel((0, 0), (1, 2, 3))
    assert given.mode == "P" and given.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, 3),
    }[orientation]  # fmt: skip
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(load_image(content)), upright)
    opened = Image.open(io.BytesIO(content))  # an opened, still unread picture is turned as well
    assert np.array_equal(np.asarray(load_image(opened)), upright)


def test_broken_exif_does_not_spoil_a_good_picture():
    content = encoded(two_colours(), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 40)
    assert load_image(content).size == (40, 20)


def test_cmyk():
    loaded = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = loaded.getpixel((4, 4))
    assert red > 200 and green < 60 and blue < 60


def test_transparency_is_flattened_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    loaded = load_image(encoded(clear))
    assert loaded.getpixel((0, 0)) == (10, 20, 30) and loaded.getpixel((3, 3)) == (255, 255, 255)
    assert load_image(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    loaded = load_image(encoded(palette, transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((1, 1)) == (255, 0, 0)
    keyed = encoded(two_colours(), transparency=(255, 0, 0))  # RGB with one transparent colour
    assert load_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_palette_grey_and_one_bit():
    assert load_image(encoded(two_colours("P"))).getpixel((39, 0)) == (0, 0, 255)
    assert load_image(encoded(Image.new("L", (3, 3), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(encoded(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_greys():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.array_equal(loaded.ravel(), np.arange(256))
    assert np.asarray(load_image(encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF")))[-1, -1, 0] == 255
    floats = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    assert np.asarray(load_image(encoded(floats, "TIFF")))[..., 0].max() == 255
    assert load_image(Image.fromarray(np.full((2, 2), 200, np.int32))).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_one_pixel(kind):
    assert load_image(encoded(Image.new("RGB", (1, 1), (255, 255, 255)), kind)).size == (1, 1)


def test_first_frame_of_an_animation():
    content = encoded(
        Image.new("RGB", (5, 5), (255, 0, 0)),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (5, 5), (0, 255, 0))],
    )
    assert load_image(content).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    with pytest.raises(InputError, match="truncated|not an image"):
        load_image(content[: int(len(content) * share)])


@pytest.mark.parametrize("content", [b"not an image at all", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7 ...", b"<svg></svg>"])
def test_not_an_image(content):
    with pytest.raises(InputError, match="not an image|truncated"):
        load_image(content)


def test_empty_missing_folder_and_null_byte(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InputError, match=r"empty\.jpg: the image file is empty"):
        load_image(tmp_path / "empty.jpg")
    with pytest.raises(InputError, match="empty"):
        load_image(b"")
    with pytest.raises(InputError, match=r"no image at .*gone\.jpg: the file does not exist"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_image("a\0b.png")


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "s3://bucket/a.png", "data:image/png;base64,AAAA"])
def test_urls_are_refused(url):
    with pytest.raises(InputError, match="is a URL, and pictures are not downloaded"):
        load_image(url)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], np.zeros((4, 4, 3), np.uint8)])
def test_other_types_are_refused(source):
    with pytest.raises(InputError, match="must be a path, bytes or a PIL picture, not"):
        load_image(source)


def png_of_size(width, height):
    """A PNG header that promises width x height and holds almost nothing, as decompression bombs do."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (12_000, 12_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_decoding(size):
    with pytest.raises(InputError, match="more than 89 million pixels"):
        load_image(png_of_size(*size))


def test_the_limit_holds_when_pillows_own_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="more than 89 million pixels"):
        load_image(png_of_size(60_000, 60_000))


def test_picture_without_pixels():
    with pytest.raises(InputError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("size", [(201, 1), (1, 60_000), (80_000_000, 1)])
def test_threads_of_pixels_are_refused_before_decoding(size):
    """A processor scales the short side to hundreds of pixels, so these would become gigabytes."""
    with pytest.raises(InputError, match="more than 200 times as long as wide"):
        load_image(png_of_size(*size))
    assert load_image(Image.new("RGB", (200, 1))).size == (200, 1)
