"""Damaged and hostile tars, images and label files, made from random numbers, and what must hold."""

import functools
import hashlib
import io
import re
import tarfile
from collections import Counter

from imagenet import parse_labels
from machinery.errors import ImageError, InputError
from machinery.storage import images, tars
from tests.support import decode_tar, draw_image, encode

import numpy as np

SIZE = (32, 48)  # height and width that images are decoded to
NUM_CLASSES = 10
BLOCK = tarfile.BLOCKSIZE


@functools.cache
def intact_images():
    """Images of every format and many modes that are taken: a dict of bytes -> digest of the pixels."""
    rng = np.random.default_rng(0)
    colour, other = (draw_image(label, rng, (60, 50 + label)) for label in range(2))
    made = [encode(picture, "JPEG", quality=60) for picture in (colour, other, colour.convert("L"))]
    made += [encode(colour, "JPEG", progressive=True), encode(colour.convert("CMYK"), "JPEG")]
    made += [encode(colour.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "1")]
    made += [encode(colour.quantize(), kind) for kind in ("GIF", "BMP")] + [encode(colour, "WEBP")]
    return {data: digest(images.decode_image(data, SIZE)) for data in made}


def an_image(rnd):
    """One of the intact images."""
    return rnd.choice([*intact_images()])


def digest(image):
    """A short fingerprint of an image's pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def damaged(data, rnd, step=1):
    """The data with some bits flipped, and bytes cut, repeated or overwritten, often at whole steps."""
    data = bytearray(data)
    for _ in range(rnd.choice([1, 1, 2, 5])):
        a, grid = rnd.randrange(len(data) + 1), rnd.choice([1, step])
        a = a // grid * grid
        b = min(len(data), a + rnd.choice([1, 4, BLOCK, 3 * BLOCK, len(data)]))
        for _ in range(rnd.choice([0, 1, 50]) if data else 0):
            data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        new = [data[a:b], b"", 2 * data[a:b], bytes(b - a), b"9" * (b - a), rnd.randbytes(b - a)]
        data[a:b] = rnd.choice(new)
    return bytes(data[: rnd.choice([a, len(data), len(data)])])


def ordinary_tar(rnd):
    """A tar as tar programs make them, of images with short and long names."""
    data, folders = io.BytesIO(), ["", "long/" * 25, "é/"]
    form = rnd.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for number in range(rnd.randrange(1, 8)):
            info, content = tarfile.TarInfo(f"{rnd.choice(folders)}n{number}.JPEG"), an_image(rnd)
            info.size, info.mtime = len(content), rnd.choice([0, 1.5])
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def header(name, size, kind=b"0", **fields):
    """One block with a right checksum; `fields` are bytes to put at a place: at386=b"..."."""
    block = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    block[: len(name[:100])], block[124:136], block[156:157] = name[:100], number_field(size), kind
    for field, content in fields.items():
        start = int(field.removeprefix("at"))
        block[start : start + len(content)] = content
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * ord(" "))
    return bytes(block)


def number_field(number):
    """A number in 12 bytes: octal digits, or else base 256, in which it may be negative."""
    if 0 <= number < 8**11:
        return b"%011o\0" % number
    return (b"\x80" if number >= 0 else b"\xff") + (number % 2**88).to_bytes(11, "big")


def member(name, data, kind=b"0", **fields):
    """A header and whole blocks of data."""
    return header(name, len(data), kind, **fields) + data + bytes(-len(data) % BLOCK)


def record(key, value, wrong=0):
    """A PAX record; `wrong` is added to the length that it declares."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    return b"%d" % (len(rest) + len(str(length)) + wrong) + rest


SIZES = [-1, -512, -(2**87), 0, 1, 511, 2**20, 2**33, 2**63, 2**87]
NAMES = [b"../../x.JPEG", b"", b"/", b"a//b/../c", b"x\n\x1b[2J.JPEG", b"\xff\xfe.JPEG", b"x" * 100]
NUMBERS = [b"-512", b"0", b"100", b"9" * 30, b"9" * 5_000, b"1e9", b"", b"1_0", "٣".encode()]


def hostile_member(rnd):
    """Blocks that a tar program would not write."""
    name, image, size = rnd.choice(NAMES), an_image(rnd), rnd.choice(SIZES)
    kind, noise = bytes([rnd.choice(b"LKxgXS17")]), rnd.randbytes(rnd.randrange(2 * BLOCK))
    key = rnd.choice([b"path", b"size", b"mtime", b"GNU.sparse.size", b"GNU.sparse.map"])
    pax = record(key, rnd.choice(NAMES + NUMBERS), wrong=rnd.choice([0, 0, -3, 9]))
    sparse = {
        "at386": number_field(0) + number_field(size),
        "at482": b"\1",
        "at483": number_field(size),
    }
    return rnd.choice(
        [
            header(name, size) + image,
            header(name, len(image) + rnd.choice([-1, 1, -BLOCK, BLOCK])) + image,
            header(name, len(image), bytes([rnd.randrange(256)])) + image,
            header(name, size, kind, **rnd.choice([{}, sparse])),
            member(b"pax", rnd.choice([pax, b"1" * 9_000, noise]), rnd.choice([b"x", b"g"])),
            header(b"x", 0, kind) * rnd.choice([2, 20, 1_100]) + member(name, image),
            member(b"long", b"a/" * rnd.choice([200, 9_000]) + name + b"\0", b"L"),
            noise,
        ]
    )


def hostile_tar(rnd):
    """Intact images among blocks that a tar program would not write."""
    parts = []
    for number in range(rnd.randrange(1, 6)):
        parts += [hostile_member(rnd)] if rnd.random() < 0.6 else []
        parts += [member(b"n%d.JPEG" % number, an_image(rnd))]
    return b"".join(parts) + bytes(rnd.choice([0, 2 * BLOCK]))


def label_file(rnd):
    """Lines of `directory/name.JPEG label`, damaged or hostile."""
    lines = [b"n%08d/n%d.JPEG %d" % (i % 10, i, i % 10) for i in range(rnd.choice([1, 10, 200]))]
    lines += [b"%s %s" % (rnd.choice(NAMES), rnd.choice(NUMBERS))] * rnd.choice([0, 1])
    data = rnd.choice([b"\n", b"\r\n", b"\r"]).join(lines)
    return damaged(data, rnd) if rnd.random() < 0.6 else data


def check_tar(data, decode_tar=decode_tar):
    """Nothing is raised, what tarfile reaches is kept, parts are as the whole, reasons are one line."""
    decoded, names, left_out = decode_tar(data, SIZE)
    kept = pairs(names, decoded)
    assert not reached(data) - Counter(kept), "an intact image is lost"
    assert decoded.shape == (len(names), *SIZE, 3) and (names or left_out)
    assert all(reason.isprintable() and len(reason) < 200 for _, reason in left_out)
    in_parts, spoilt, start = [], [], 0
    while start is not None:
        most = tars.Part(2, 3_000)
        some, names, others, start = tars.decode_part(io.BytesIO(data), SIZE, "pixels", start, most)
        in_parts, spoilt = in_parts + pairs(names, some), spoilt + others
    assert in_parts == kept, "the parts are not the whole"
    assert [n for n, _ in spoilt if n != tars.ITSELF] == [n for n, _ in left_out if n != tars.ITSELF]


def pairs(names, decoded):
    """Base names and digests of decoded images."""
    return [(name.rpartition("/")[2], digest(i)) for name, i in zip(names, decoded, strict=True)]


def reached(data):
    """What tarfile reaches of the intact images, as far as their names cannot be another header's."""
    found, last = Counter(), -1
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as archive:
            while (info := archive.next()) and info.offset > last:  # or it would go in circles
                last = info.offset
                content = data[info.offset_data : info.offset_data + max(0, info.size)]
                name = info.name.rpartition("/")[2]
                ordinary = info.isreg() and not info.issparse() and re.fullmatch(r"n\d\.JPEG", name)
                if ordinary and content in intact_images():
                    found[name, intact_images()[content]] += 1
    except Exception:  # it goes no further: what it has reached counts
        pass
    return found


def check_image(data, decode_image=images.decode_image):
    """Pixels, the same ones each time, or an ImageError of one line."""
    results = []
    for _ in range(2):
        try:
            image = decode_image(data, SIZE)
            assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
            results.append(digest(image))
        except ImageError as error:
            results.append(str(error))
    assert results[0] == results[1], "not the same twice"
    assert results[0].isprintable() and len(results[0]) < 200


def check_labels(data, parse_labels=parse_labels):
    """Labels in range, none lost, or an InputError of one line."""
    try:
        labels = parse_labels(data, NUM_CLASSES, "s3://b/train.txt")
    except InputError as error:
        line = str(error)
        assert line.startswith("s3://b/train.txt") and line.isprintable() and len(line) < 300
        return
    assert all(label in range(NUM_CLASSES) for label in labels.values())
    wanted = [words for line in re.split("[\r\n]", data.decode()) if (words := line.split())]
    pairs = [words for words in wanted if len(words) == 2]
    assert all(labels[path.rpartition("/")[2]] == int(label) for path, label in pairs)


KINDS = [  # maker, check
    (lambda rnd: damaged(ordinary_tar(rnd), rnd, BLOCK), check_tar),
    (hostile_tar, check_tar),
    (lambda rnd: damaged(hostile_tar(rnd), rnd, BLOCK), check_tar),
    (lambda rnd: damaged(an_image(rnd), rnd), check_image),
    (label_file, check_labels),
]
