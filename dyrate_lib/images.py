"""Pictures from anywhere, as the RGB picture a person would see, or an error that says what is wrong with the file."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

MAX_PIXELS = 89_478_485  # Pillow's own threshold of suspicion: a larger picture is refused, not merely warned about
MAX_RATIO = 200  # long side to short one: processors scale the short side, and a thread of pixels would become millions of rows
BACKGROUND = (255, 255, 255)

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """Reads a picture and returns it as RGB, upright, at its own size.

    EXIF rotation is applied; transparency (alpha channels, palettes) is flattened on white; CMYK, greyscale, 16-bit and
    1-bit pictures are converted, 16-bit greyscale by its high byte. Of an animation the first frame is taken.

    Args:
        source: a path, the bytes of an image file, or a PIL picture (which is left untouched).

    Returns:
        A new PIL picture of mode RGB, fully loaded (no file stays open), at least 1 x 1.

    Raises:
        InputError: no such file, a folder, a URL, an empty or truncated file, not an image, more than 89 million
            pixels, more than 200 times as long as wide, or a type that is none of the above.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture given")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the bytes given")
    if isinstance(source, (str, os.PathLike)):
        return _decode(_read(source), str(os.fspath(source)))
    raise InputError(f"an image must be a path, bytes or a PIL picture, not {type(source).__name__}")


def _read(source: str | os.PathLike) -> bytes:
    name = os.fspath(source)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", name) or name.startswith("data:"):
        raise InputError(f"{name[:80]} is a URL, and pictures are not downloaded: save it to a file and pass its path")
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{name} is a folder, not an image file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no image at {name}: the file does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"cannot read the image {name!r}: {error}") from error


def _decode(content: bytes, name: str) -> Image.Image:
    if not content:
        raise InputError(f"{name}: the image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses at the same size
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd metadata is no reason to speak
            with Image.open(io.BytesIO(content)) as picture:
                _check_size(picture, name)
                picture.load()
                return _to_rgb(picture, name)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow can read (it begins with {content[:8]!r})") from None
    except Image.DecompressionBombError:
        raise InputError(_too_large(name)) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... for broken files
        raise InputError(f"{name} is a damaged or truncated image: {error}") from error


def _check_size(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(name) + f" ({width} x {height})")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(f"{name} is {width} x {height}, more than {MAX_RATIO} times as long as wide: crop it first")


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels: scale it down first"


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    _check_size(picture, name)
    try:
        upright = ImageOps.exif_transpose(picture)  # a copy, even when there is nothing to turn
    except Exception:  # unreadable EXIF: the pixels are still good
        upright = picture.copy()
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        upright = _deep_grey(upright)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        colours = upright.convert("RGBA")
        flat = Image.new("RGBA", colours.size, (*BACKGROUND, 255))
        flat.alpha_composite(colours)
        upright = flat
    rgb = upright.convert("RGB")
    rgb.info.clear()
    return rgb


def _deep_grey(picture: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits as 8 bits: Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(picture).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    if picture.mode == "F":
        top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0 if values.max() <= 255.0 else 65535.0
        values = values / top * 255.0
    elif picture.mode.startswith("I;16") or values.max(initial=0.0) > 255.0:
        values = values / 257.0  # 65535 -> 255
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
