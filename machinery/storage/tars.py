"""The members of a tar, whole or damaged, and the images among them."""

import io
import tarfile
from collections import namedtuple

from machinery.errors import ImageError
from machinery.storage.images import MAX_BYTES, decode_image, kind_of, small_jpeg
from machinery.storage.jpegs import Jpegs

import numpy as np

MAX_HEADER = 2**14  # bytes of a header about the next member; tarfile may take their square of time
MAX_HEADERS = 8  # of such headers about one member; hostile ones would lead deep down
ITSELF = "the tar itself"  # the name under which damage to a tar is left out
A_TAR = "a tar, no image"  # why a tar within a tar is left out

# How much of a tar is one batch, at most. A tar of ImageNet, of up to 1,300 images, is one part.
Part = namedtuple("Part", "images bytes")
PART = Part(2000, 2**28)


def decode_part(tar, size, stored="pixels", start=0, most=PART):
    """Decode the images of a part of a tar, and store them in a form, "pixels" or "jpeg".

    `tar` is a file object, `start` the byte at which the part begins, 0 or the `rest` of the part
    before. Returns images uint8 [n, height, width, 3] or Jpegs, their n names in the tar, what was left
    out as (name, reason), also damage to the tar itself, and `rest`, None after the last part.
    """
    end, as_jpegs = tar.seek(0, io.SEEK_END), stored == "jpeg"
    # What no image is written to takes no memory.
    images = [None] * most.images if as_jpegs else np.empty((most.images, *size, 3), np.uint8)
    decode = small_jpeg if as_jpegs else decode_image
    names, left_out, rest = [], [], None
    for place, member in walk(tar, start, end):
        if len(names) == most.images or place - start >= most.bytes:
            rest = place
            break
        if member and member.isdir():
            continue
        try:
            images[len(names)] = decode(_content(tar, place, member, end), size)
            names.append(member.name)
        except ImageError as error:
            left_out.append((member.name if member else ITSELF, str(error)))
    else:
        tar.seek(max(0, end - tarfile.BLOCKSIZE))
        if any(tar.read()):
            left_out.append((ITSELF, "cut: its end mark is missing"))
        if not start and not names and all(name == ITSELF for name, _ in left_out):
            left_out = [(ITSELF, "empty, or no tar")]
    images = images[: len(names)]
    return Jpegs(images, size) if as_jpegs else images, names, left_out, rest


def _content(tar, place, member, end):
    """The bytes of a member that `walk` has found at a place of a tar."""
    if not member:
        raise ImageError(f"damaged at byte {place}")
    if not member.isreg() or member.issparse():
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


def walk(file, start, end):
    """The members of a tar between two bytes as (place, TarInfo), or (place, None) for damage.

    `tarfile` skips what is no header. Where it gives up, it begins anew behind. The walk can begin
    at any place that it has given, and goes forwards only.
    """
    place, archive, header = start, None, _header_class(file)
    while place < end:
        try:
            if archive is None:
                file.seek(place)
                options = {"encoding": "utf-8", "errors": "replace", "ignore_zeros": True}
                options["pax_headers"] = _Nothing()
                archive = tarfile.TarFile(fileobj=file, tarinfo=header, **options)
            member = archive.next()
            if member and member.size < 0:  # as a header about it says
                raise ValueError
        except (tarfile.TarError, ArithmeticError, LookupError, ValueError):
            header.damaged = place if header.damaged is None else header.damaged
            # What is wrong can be said before the last header, which is read again without that.
            archive, place = None, max(place + tarfile.BLOCKSIZE, header.last)
            continue
        if header.damaged is not None:
            yield header.damaged, None
            header.damaged = None
        if member is None:
            return
        place = archive.offset  # before the caller reads
        yield member.offset, member
        archive.members.clear()  # or a million of them would take 2 GB
    if header.damaged is not None:
        yield header.damaged, None


class _Nothing(dict):
    """What a global header says, which names no member: nothing of it is kept."""

    def __setitem__(self, key, value):
        pass


def _header_class(file):
    """The class of the headers of one walk through a file.

    `last` is where the last block lies that was read as one, `damaged` where the first that is none.
    """

    class Header(tarfile.TarInfo):
        last, damaged, _in_a_row = -1, None, 0

        @classmethod
        def frombuf(cls, block, encoding, errors):
            cls.last = file.tell() - len(block)
            try:
                header = super().frombuf(block, encoding, errors)
                extended = header.type in (b"L", b"K", b"x", b"X", b"g")  # GNU's long names, PAX
                cls._in_a_row = cls._in_a_row + 1 if extended else 0
                too_long = extended and (header.size > MAX_HEADER or cls._in_a_row > MAX_HEADERS)
                if header.size < 0 or too_long:
                    raise tarfile.InvalidHeaderError("hostile")
                return header
            except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError):
                cls._in_a_row = 0
                cls.damaged = cls.last if cls.damaged is None else cls.damaged
                raise

    return Header
