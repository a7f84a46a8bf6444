"""The bytes of images, as pixels or as small JPEGs."""

import io
import re

from machinery.errors import ImageError, one_line
from machinery.storage.jpegs import Jpegs

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError

IMAGE_SIZE = 256  # side of an image in the object store, pixels (the write-up; paper, section 2)
CROP_SIZE = 224  # side of the square crop of it that the network sees, pixels (paper, section 4.1)

# Bytes of an image in each form that it can be stored in; as a JPEG, on an average of ILSVRC-2012.
STORED_BYTES = {"pixels": IMAGE_SIZE * IMAGE_SIZE * 3, "jpeg": 24_000}

MAX_PIXELS = 64 * 2**20  # larger images are taken for decompression bombs; ImageNet's largest has 24 M
MAX_RATIO = 2.5  # of sides, up to which cubic interpolation to twice the size wanted hardly aliases
MAX_SCANS = 100  # of a progressive JPEG, which has some 10; with more, 1 MB can take hours
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # what an image in a tar may be, whatever its name

QUALITY = 90  # of images stored as JPEGs: 23 kB each, 3.1 grey levels off (benchmarks/loading.py)
MAX_BYTES = 4 * MAX_PIXELS  # of a file; a larger one is no image

# The first bytes of all that FORMATS names.
_SIGNATURES = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|BM|RIFF....WEBP", re.DOTALL)


def kind_of(data):
    """What a file is by its first 512 bytes: "image", "tar" or "other"."""
    if _SIGNATURES.match(data):
        return "image"
    return "tar" if data[257:262] == b"ustar" else "other"


def gathered(sources, chosen):
    """Images of one batch or more, in the form that they have there: an array of pixels, or Jpegs.

    `chosen` are their numbers, which count on from one batch to the next.
    """
    first, as_jpegs = sources[0], isinstance(sources[0], Jpegs)
    stored = [each.jpeg(i) if as_jpegs else each[i] for each in sources for i in range(len(each))]
    some = [stored[number] for number in chosen]
    return Jpegs(some, first.shape[1:3]) if as_jpegs else np.stack(some)


def decode_image(data, size):
    """One encoded image as uint8 [height, width, 3] RGB, resized with an antialiasing filter.

    Most JPEGs take libjpeg-turbo and OpenCV; Pillow decides on the rest. Raises ImageError.
    """
    return _decode(data, size)[0]


def small_jpeg(data, size):
    """One encoded image as the bytes of a JPEG of this size: as they are, if they are one already.

    simplejpeg, unlike Pillow, lets other threads run. Raises ImageError.
    """
    pixels, as_they_are = _decode(data, size)
    return data if as_they_are else simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")


def _decode(data, size):
    """`decode_image`, and whether the bytes are a JPEG of just these pixels."""
    height, width = size
    if data.startswith(b"\xff\xd8"):
        # By NumPy: bytes.count takes six times as long, a twentieth of decoding a photo.
        values = np.frombuffer(data, np.uint8)
        if np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)) > MAX_SCANS:
            raise ImageError("too many scans for a JPEG")
    try:
        h, w, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("YCbCr", "RGB", "Gray") and h * w <= MAX_PIXELS:
            # min_factor=2: only halving while decoding is fast (and never below the size wanted).
            pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
            if (h, w) == (height, width):
                return pixels, True
            if h >= height and w >= width:
                # From nearby sizes by cubic interpolation to twice the size, then the mean of each 2x2:
                # this takes half the time of INTER_AREA at once, and is nearer to Lanczos.
                if max(pixels.shape[0] / height, pixels.shape[1] / width) <= MAX_RATIO:
                    pixels = cv2.resize(pixels, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
                return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), False
            return _resize(Image.fromarray(pixels), size), False
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow would fill the rest of some with grey
            raise ImageError("cut or corrupt JPEG") from error
    return _decode_with_pillow(data, size), False


def _resize(image, size):
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))


def _decode_with_pillow(data, size):
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"too large: {image.width}x{image.height} pixels")
            image.draft("RGB", size[::-1])
            if image.mode.startswith("I"):  # 16-bit grey: scaled, where convert() would clip
                grey = np.asarray(image).astype(np.float32) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if image.mode == "CMYK" and "adobe" not in image.info:
                image = ImageChops.invert(image)  # Pillow takes all for Adobe's, in which 255 is no ink
            return _resize(image.convert("RGB"), size)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("no image") from error
    except Exception as error:  # a damaged file can raise anything from any of Pillow's parsers
        raise ImageError(f"no readable image ({one_line(error)[:80]})") from error
