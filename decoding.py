"""The bytes of tars and of images, as pixels or as small JPEGs. Nothing here knows of S3 or of Ray."""

import io
import re
import tarfile
from collections import namedtuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError

MAX_PIXELS = 64 * 2**20  # larger images are taken for decompression bombs; ImageNet's largest has 24 M

MAX_RATIO = 2.5  # of sides, up to which cubic interpolation to twice the size wanted hardly aliases

MAX_SCANS = 100  # of a progressive JPEG, which has some 10; with more, 1 MB can take hours

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # what an image in a tar may be, whatever its name

QUALITY = 90  # of images stored as JPEGs: 23 kB each, 3.1 grey levels off (benchmarks/quality.py)

MAX_BYTES = 4 * MAX_PIXELS  # of a file; a larger one is no image

MAX_RECORDS = 2**20  # bytes that are read of a tar's headers about one member

ITSELF = "the tar itself"  # the name under which damage to a tar is left out

A_TAR = "a tar, no image"  # why a tar within a tar is left out

# How much of a tar is one batch, at most. A tar of ImageNet, of up to 1,300 images, is one part.
Part = namedtuple("Part", "images bytes")
PART = Part(2000, 2**28)


class ImageError(Exception):
    """Bytes that are no usable image; the message says why."""


def one_line(text):
    """Any text on one printable ASCII line: names from tars can hold newlines and escape codes."""
    return re.sub("[^ -~]", lambda char: ascii(char[0])[1:-1], " ".join(str(text).split()))


# The first bytes of all that FORMATS names.
_SIGNATURES = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|BM|RIFF....WEBP", re.DOTALL)


def kind_of(data):
    """What a file is by its first 512 bytes: "image", "tar" or "other"."""
    if _SIGNATURES.match(data):
        return "image"
    return "tar" if data[257:262] == b"ustar" else "other"


class Jpegs:
    """n images uint8 [height, width, 3] RGB as JPEGs: an eighth of the memory of their pixels.

    They read like the array of their pixels: `shape`, `len`, and an image by its number.
    """

    def __init__(self, jpegs, size):
        """Take a list of JPEGs (bytes or uint8 arrays) of images of a size [height, width]."""
        self._data = np.concatenate([np.frombuffer(jpeg, np.uint8) for jpeg in [b"", *jpegs]])
        self._ends = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=int)
        self._size = tuple(size)

    @property
    def shape(self):
        """(n, height, width, 3)."""
        return (len(self), *self._size, 3)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, number):
        return simplejpeg.decode_jpeg(self.jpeg(number), "RGB")

    def jpeg(self, number):
        """An image as it is stored: a view, uint8 [bytes]."""
        return self._data[self._ends[number - 1] if number else 0 : self._ends[number]]


def gathered(sources, chosen):
    """Images of one batch or more, in the form that they have there: an array of pixels, or Jpegs.

    `chosen` are their numbers, which count on from one batch to the next.
    """
    first, as_jpegs = sources[0], isinstance(sources[0], Jpegs)
    stored = [each.jpeg(i) if as_jpegs else each[i] for each in sources for i in range(len(each))]
    some = [stored[number] for number in chosen]
    return Jpegs(some, first.shape[1:3]) if as_jpegs else np.stack(some)


def decode_part(tar, size, stored="pixels", start=0, most=PART):
    """Decode the images of a part of a tar, and store them in a form, "pixels" or "jpeg".

    `tar` is a file object, `start` the byte at which the part begins, 0 or the `rest` of the part
    before; it ends with the tar, or after so many images or bytes. Returns images uint8 [n, height,
    width, 3] or Jpegs, their n names in the tar, (name, reason) of what was left out: members that are
    no regular file or no readable image, and damage to the tar itself; and `rest`, the byte at which
    the next part begins, None after the last one.
    """
    end, as_jpegs = tar.seek(0, io.SEEK_END), stored == "jpeg"
    # What no image is written to takes no memory.
    images = [] if as_jpegs else np.empty((most.images, *size, 3), np.uint8)
    names, left_out = [], []
    for place, member in walk(tar, start, end):
        if len(names) == most.images or place - start >= most.bytes:
            return _in_form(images, names, size), names, left_out, place
        if member and member.isdir():
            continue
        try:
            data = _content(tar, place, member, end)
            if as_jpegs:
                images.append(small_jpeg(data, size))
            else:
                images[len(names)] = decode_image(data, size)
        except ImageError as error:
            left_out.append((member.name if member else ITSELF, str(error)))
        else:
            names.append(member.name)
    tar.seek(max(0, end - tarfile.BLOCKSIZE))
    if any(tar.read()):
        left_out.append((ITSELF, "cut: its end mark is missing"))
    if not start and not names and all(name == ITSELF for name, _ in left_out):
        left_out = [(ITSELF, "empty, or no tar")]
    return _in_form(images, names, size), names, left_out, None


def _in_form(images, names, size):
    return Jpegs(images, size) if isinstance(images, list) else images[: len(names)]


def _content(tar, place, member, end):
    """The bytes of a member that `walk` has found at a place of a tar."""
    if not member:
        raise ImageError(f"damaged at byte {place}")
    if member.type not in _REGULAR:
        raise ImageError("no regular file")
    if member.offset_data + member.size > end:
        raise ImageError("cut off by the end of the tar")
    if member.size > MAX_BYTES:
        raise ImageError(f"too large: {member.size} bytes")
    tar.seek(member.offset_data)
    data = tar.read(member.size)
    if kind_of(data) == "tar":
        raise ImageError(A_TAR)
    return data


_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE)
_NO_DATA += (tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)  # which has some, but there is no telling where
# Headers of more about the next member: GNU's of long names, those of PAX; a global one names nothing.
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENDED += (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
# A record of PAX, `length key=value` and a newline, with a key that matters or another one.
_RECORD = re.compile(rb"(\d{1,19}) (?:(path|size|GNU\.sparse\.size|GNU\.sparse\.realsize)=)?")


def walk(tar, start, end):
    """The members of a tar between two bytes as (place, TarInfo), or (place, None) for damage.

    The walk can begin anew at any such place. It goes from header to header, and block by block where
    there is none, so always forwards. That of `tarfile` itself ends at some damage, and hostile headers
    lead it in circles, or deep down.
    """
    place = first = start  # `first` is that of the headers about one member
    damaged, records = False, {}
    while place < end:
        tar.seek(place)
        block = tar.read(tarfile.BLOCKSIZE)
        member = _header(block)
        if not member:
            if any(block) and not damaged:
                yield place, None
            damaged, records = damaged or any(block), {}
            place = first = place + len(block)
            continue
        damaged = False
        place += len(block)
        if member.type in _EXTENDED:
            content = tar.read(min(_whole_blocks(member.size), end - place, MAX_RECORDS))
            place += _whole_blocks(member.size)
            records = _records(member.type, content) | records  # of two, the first one counts
            continue
        member.name, member.offset_data = records.get("path", member.name), place
        member.type = records.get("type", member.type)
        size = records.get("size", member.size)
        if size is not None:
            member.size = size
            place += 0 if member.type in _NO_DATA else _whole_blocks(size)
        yield first, member
        first, records = place, {}


def _header(block):
    """The header that a block of a tar is, as TarInfo, or None."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError:
        return None
    return member if member.size >= 0 else None


def _whole_blocks(size):
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _records(kind, content):
    """What an extended header's content says of the next member's path, size and type."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "replace")}
    records, place = {}, 0
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        record = _RECORD.match(content, place)
        if not record:
            break
        if not int(record[1]):
            return {}
        start, place = record.end(), place + int(record[1])
        value = content[start : place - 1]
        if record[2] == b"path":
            records["path"] = value.decode("utf-8", "replace")
        elif record[2] == b"size":  # None: no number, so the next header is looked for at once
            records["size"] = int(value) if re.fullmatch(rb"\d{1,19}", value) else None
        elif record[2]:
            records["type"] = tarfile.GNUTYPE_SPARSE
    return records


def decode_image(data, size):
    """One encoded image as uint8 [height, width, 3] RGB, resized with an antialiasing filter.

    Colour JPEGs, nearly all of ImageNet, take libjpeg-turbo and OpenCV; Pillow decides on the rest.
    Raises ImageError.
    """
    pixels, _ = _decode(data, size)
    return pixels


def small_jpeg(data, size):
    """One encoded image as the bytes of a JPEG of this size: as they are, if they are one already.

    simplejpeg, unlike Pillow, lets other threads run. Raises ImageError.
    """
    pixels, as_they_are = _decode(data, size)
    return data if as_they_are else simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")


def _decode(data, size):
    """`decode_image`, and whether the bytes are a JPEG of just these pixels."""
    height, width = size
    if data.startswith(b"\xff\xd8") and _count_scans(data) > MAX_SCANS:
        raise ImageError("too many scans for a JPEG")
    try:
        h, w, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("YCbCr", "RGB", "Gray") and h * w <= MAX_PIXELS:
            # min_factor=2: only halving while decoding is fast (and never below the size wanted).
            least = {"min_height": height, "min_width": width}
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=2, **least)
            if (h, w) == (height, width):
                return pixels, True
            if h >= height and w >= width:
                return _shrink(pixels, size), False
            return _resize(Image.fromarray(pixels), size), False
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow would fill the rest of some with grey
            raise ImageError("cut or corrupt JPEG") from error
    return _decode_with_pillow(data, size), False


def _count_scans(data):
    # By NumPy: bytes.count takes six times as long, a twentieth of decoding a photo.
    values = np.frombuffer(data, np.uint8)
    return np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA))


def _shrink(pixels, size):
    """Pixels that are no smaller than `size` in this size, antialiased.

    From nearby sizes by cubic interpolation to twice the size, then the mean of each 2x2: half the time
    of INTER_AREA at once, and nearer to Lanczos.
    """
    height, width = size
    if max(pixels.shape[0] / height, pixels.shape[1] / width) <= MAX_RATIO:
        pixels = cv2.resize(pixels, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _resize(image, size):
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))


def _decode_with_pillow(data, size):
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"too large: {image.width}x{image.height} pixels")
            image.draft("RGB", size[::-1])
            return _resize(_to_rgb(image), size)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("no image") from error
    except Exception as error:  # a damaged file can raise anything from any of Pillow's parsers
        raise ImageError(f"no readable image ({one_line(error)[:80]})") from error


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16-bit grey: scaled, where convert() would clip
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK" and "adobe" not in image.info:  # Pillow takes every CMYK JPEG for Adobe's,
        image = ImageChops.invert(image)  # in which 255 is no ink
    return image.convert("RGB")
