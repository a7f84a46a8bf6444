"""Damaged and hostile tars, images and label files against the decoders.

    python -m tests.fuzz --inputs 10000 --seed 0

Each input follows from the seed and its number. They are tried one after the other in a process of
their own that may neither write, nor take more than CPU_SECONDS or MEMORY for an input; where it dies,
another one goes on behind the input. Whatever must not happen is a finding. The last line counts them.
"""

import argparse
import functools
import hashlib
import io
import multiprocessing
import random
import re
import resource
import signal
import sys
import tarfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import decoding
import imagenet
import s3
from tests.support import decode_tar, draw_image, encode

SIZE = (32, 48)  # height and width that images are decoded to
NUM_CLASSES = 10

CPU_SECONDS = 30  # for one input, of processor time
MEMORY = 2 * 2**30  # bytes of address space for one input, above what the process has
PATIENCE = 300  # seconds without an answer after which the process counts as stuck

BLOCK = 512


# ---- images


@functools.cache
def intact_images():
    """Images of every format and mode that is taken, as bytes."""
    rng = np.random.default_rng(0)
    pictures = [draw_image(label, rng, (60 + 7 * label, 50 + 5 * label)) for label in range(8)]
    colour, grey = pictures[0], pictures[1].convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return [
        *(encode(picture, "JPEG", quality=60) for picture in pictures),
        encode(colour, "JPEG", progressive=True),
        encode(colour, "JPEG", subsampling=0, restart_marker_rows=1),
        encode(colour, "JPEG", keep_rgb=True),
        encode(colour, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        encode(grey, "JPEG"),
        encode(colour.convert("CMYK"), "JPEG"),
        encode(colour.convert("CMYK"), "JPEG", progressive=True),
        *(encode(colour.convert(mode), "PNG") for mode in ("RGB", "RGBA", "LA", "L", "P", "1")),
        encode(deep, "PNG"),
        encode(colour.quantize(), "PNG", transparency=3),
        encode(colour.quantize(), "GIF"),
        encode(colour, "GIF", save_all=True, append_images=pictures[1:3]),
        *(encode(image, "BMP") for image in (colour, grey, colour.quantize(), grey.convert("1"))),
        *(encode(colour.convert("RGBA"), "WEBP", lossless=lossless) for lossless in (False, True)),
    ]


@functools.cache
def bombs():
    """Small files of very many pixels, or of very much work."""
    side = 8192
    still = Image.new("L", (side, side), 90)
    progressive = encode(still, "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    stills = [still, *(Image.new(mode, still.size) for mode in ("RGBA", "I;16", "1"))]
    return [
        *(encode(image, "PNG", compress_level=1) for image in stills),
        encode(still, "GIF"),
        encode(still, "JPEG"),
        progressive,
        encode(Image.new("CMYK", still.size), "JPEG"),
        *(progressive[:-2] + last_scan * number + progressive[-2:] for number in (20, 2_000)),
        png_with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20))),
        png_with_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200 * 2**20))),
    ]


def png_with_chunk(kind, content):
    """A PNG with one more chunk behind its header."""
    png = encode(Image.new("L", (40, 40)), "PNG")
    chunk = kind + content
    return png[:33] + len(content).to_bytes(4, "big") + chunk + crc(chunk) + png[33:]


def crc(data):
    return zlib.crc32(data).to_bytes(4, "big")


def with_other_size(data, rnd):
    """An image whose header declares another width and height, with the checksum made to fit."""
    data = bytearray(data)
    order, length, place = {
        b"\xff\xd8": ("big", 2, max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5),
        b"\x89P": ("big", 4, 16),
        b"GI": ("little", 2, 6),
        b"BM": ("little", 4, 18),
        b"RI": ("little", 3, 24),
    }[bytes(data[:2])]
    for start in (place, place + length):
        side = rnd.choice([0, 1, 2, 100, 255, 4_000, 8_192, 30_000, 2**16 - 1, 2**24, 2**31, 2**32 - 1])
        if rnd.random() < 0.7:
            data[start : start + length] = (side % 256**length).to_bytes(length, order)
    if data[:2] == b"\x89P":
        data[29:33] = crc(data[12:29])
    return bytes(data)


def hostile_image(rnd):
    """An image that lies about itself, and may be damaged as well."""
    if rnd.random() < 0.03:
        return rnd.choice(bombs())
    data = with_other_size(rnd.choice(intact_images()), rnd)
    return damaged(data, rnd) if rnd.random() < 0.3 else data


# ---- damage


def damaged(data, rnd, step=1):
    """The data with a few bits flipped, and bytes cut, swapped, repeated or overwritten.

    Half of the places are multiples of `step`.
    """

    def place(limit):
        at = rnd.randrange(limit + 1)
        return at // step * step if rnd.random() < 0.5 else at

    data = bytearray(data)
    for _ in range(rnd.choice([1, 1, 1, 2, 3, 8])):
        a, b, c, d = sorted(place(len(data)) for _ in range(4))
        how = rnd.choice(["flip", "flip", "flip", "cut", "end", "swap", "repeat", "fill", "noise"])
        b = min(b, a + rnd.choice([4, 100, BLOCK, 3 * BLOCK, len(data)]))
        if how == "flip" and data:
            for _ in range(rnd.choice([1, 1, 2, 10, 100])):
                data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        elif how == "cut":
            del data[a:b]
        elif how == "end":
            del data[c:]
        elif how == "swap":
            data[a:d] = data[c:d] + data[b:c] + data[a:b]
        elif how == "repeat":
            data[b:b] = data[a:b] * rnd.choice([1, 2, 5])
        elif how == "fill":
            data[a:b] = rnd.choice([b"\0", b"\xff", b"9", b" "]) * (b - a)
        elif how == "noise":
            data[a:b] = rnd.randbytes(b - a)
    return bytes(data)


# ---- tars


def ordinary_tar(rnd):
    """A tar as tar programs make them, of images with short and long names, and a folder or two."""
    data = io.BytesIO()
    kind = rnd.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=data, mode="w", format=kind) as tar:
        for number in range(rnd.randrange(1, 8)):
            content = rnd.choice(intact_images())
            folder = rnd.choice(["", "", "n01440764/", "a/" * 20, "long/" * 25, "длинный/" * 9])
            info = tarfile.TarInfo(f"{folder}n{number}.JPEG")
            info.size, info.mtime = len(content), rnd.choice([0, 1.5])
            tar.addfile(info, io.BytesIO(content))
            if rnd.random() < 0.1:
                info = tarfile.TarInfo(f"folder{number}")
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
    return data.getvalue()


def header(name, size, kind=b"0", **fields):
    """One block with a right checksum; `fields` are bytes to put at a place: at386=b"..."."""
    block = bytearray(BLOCK)
    block[: len(name[:100])] = name[:100]
    block[100:108] = b"0000644\0"
    block[124:136] = number_field(size)
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for field, content in fields.items():
        start = int(field.removeprefix("at"))
        block[start : start + len(content)] = content
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * ord(" "))
    return bytes(block[:BLOCK])


def number_field(number):
    """A number in 12 bytes: octal digits, or else base 256, in which it may be negative."""
    if 0 <= number < 8**11:
        return b"%011o\0" % number
    return (b"\x80" if number >= 0 else b"\xff") + (number % 2**88).to_bytes(11, "big")


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def member(name, data, kind=b"0", **fields):
    return header(name, len(data), kind, **fields) + padded(data)


def record(key, value, wrong=0):
    """A PAX record; `wrong` is added to the length that it declares."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))
    return b"%d" % (length + wrong) + rest


SIZES = [-1, -512, -1024, -(2**20), -(2**87), 0, 1, 511, 2**20, 2**33, 2**62, 2**63, 2**64, 2**87]
NAMES = [
    *(b"/etc/passwd", b"../../../x.JPEG", b"..", b".", b"", b"/", b"a/", b"a//b/../c.JPEG"),
    *(b"x\n\x1b[2J.JPEG", b"\xff\xfe.JPEG", b"\xed\xb2\x80", b"a b.JPEG", "é.JPEG".encode()),
    *(b"C:\\x.JPEG", b"-rf", b"~root/.ssh", b"%s%n", b"x" * 100, b"x/" * 50),
]
NUMBERS = [
    *(b"-1", b"-512", b"0", b"100", b"1024", b"%d" % 2**40, b"9" * 30, b"9" * 5_000),
    *(b"1e9", b"nan", b"", b" 7", b"1_0", b"0x10", "٣".encode()),
]


def hostile_pax(rnd):
    """The content of an extended header that is anything but what the standard says."""
    keys = [b"path", b"size", b"linkpath", b"mtime", b"uid", b"hdrcharset", b"GNU.sparse.size"]
    keys += [b"GNU.sparse.map", b"GNU.sparse.major", b"GNU.sparse.realsize", b"GNU.sparse.name", b"k"]
    values = NAMES + NUMBERS + [b"BINARY", b"1", b"0,1,2", b"0,512", b"x" * 3_000]
    sparse = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
    choices = [
        *[lambda: record(rnd.choice(keys), rnd.choice(values))] * 4,
        lambda: record(b"size", rnd.choice(NUMBERS)),
        lambda: record(rnd.choice(keys), rnd.choice(values), wrong=rnd.randrange(-9, 10)),
        lambda: sparse + record(b"GNU.sparse.realsize", b"%d" % abs(rnd.choice(SIZES))),
        lambda: b"0 path=x\n",
        lambda: b"%d path=x\n" % 10**9,
        lambda: b"1" * rnd.randrange(20_000),
        lambda: b"9" * 5_000 + b" path=x\n",
        lambda: b"3 " + b"03 " * rnd.randrange(3_000) + b"=x\n",
        lambda: b"".join(b"%d k%07d=\n" % (12, i) for i in range(rnd.randrange(2_000))),
        lambda: rnd.randbytes(rnd.randrange(600)),
    ]
    return b"".join(rnd.choice(choices)() for _ in range(rnd.randrange(1, 5)))


def hostile_member(rnd):
    """Blocks that a tar program would not write."""
    name, image = rnd.choice(NAMES), rnd.choice(intact_images())
    pax, size = hostile_pax(rnd), rnd.choice(SIZES)
    sparse = {"at386": number_field(0) + number_field(rnd.choice(SIZES)), "at483": number_field(size)}
    many = rnd.choice([2, 20, 1_100])
    chain = header(b"x", 0, rnd.choice([b"L", b"K", b"x", b"g"])) * many
    choices = [
        lambda: member(name, image),
        lambda: header(name, size) + padded(image),
        lambda: header(name, len(image) + rnd.choice([-1, 1, -BLOCK, BLOCK])) + padded(image),
        lambda: header(b"x", rnd.choice([0, size]), rnd.choice([b"%d" % i for i in range(1, 8)])),
        lambda: header(name, len(image), bytes([rnd.randrange(256)])) + padded(image),
        lambda: header(name, 0, rnd.choice([b"1", b"2"]), at157=rnd.choice(NAMES)),
        lambda: header(name, len(image), b"S", **sparse) + padded(image),
        lambda: header(name, len(image), b"S", at482=b"\1", **sparse) + b"\1" * BLOCK + padded(image),
        lambda: member(b"long", rnd.choice([name, b"a/" * 5_000 + name]) + b"\0", b"L"),
        lambda: header(b"long", size, rnd.choice([b"L", b"K", b"x", b"g", b"X"])) + padded(name),
        lambda: member(b"pax", pax, rnd.choice([b"x", b"x", b"X", b"g"])),
        lambda: member(b"pax", pax, b"x") + member(name, b"1\n0\n%d\n" % len(image)),
        lambda: chain + member(name, image),
        lambda: bytes(BLOCK * rnd.randrange(1, 5)),
        lambda: rnd.randbytes(rnd.randrange(2 * BLOCK)),
        lambda: header(name, size, at0=b"\xff" * 100, at345=b"\xff" * 155),
    ]
    return rnd.choice(choices)()


def hostile_tar(rnd):
    """Intact images among blocks that a tar program would not write."""
    parts = []
    for number in range(rnd.randrange(1, 8)):
        parts += [hostile_member(rnd)] if rnd.random() < 0.6 else []
        parts += [member(b"n%d.JPEG" % number, rnd.choice(intact_images()))]
    tar = b"".join(parts) + bytes(rnd.choice([0, 2 * BLOCK]))
    return damaged(tar, rnd, BLOCK) if rnd.random() < 0.4 else tar


# ---- label files


def label_file(rnd):
    """Lines of `directory/name.JPEG label`, damaged or hostile."""
    number = rnd.choice([1, 10, 200])
    lines = [b"n%08d/n%d.JPEG %d" % (i % NUM_CLASSES, i, i % NUM_CLASSES) for i in range(number)]
    values = [*NAMES, *NUMBERS, b"9" * 100_000, b"a" * 100_000, b"\0", b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
    if rnd.random() < 0.5:
        for _ in range(rnd.choice([1, 3])):
            line = b"%s%s%s" % (rnd.choice(values), rnd.choice([b" ", b"\t", b""]), rnd.choice(values))
            lines.insert(rnd.randrange(len(lines) + 1), line)
    data = rnd.choice([b"\n", b"\r\n", b"\n\n", b"\r"]).join(lines)
    return damaged(data, rnd) if rnd.random() < 0.5 else data


# ---- what must hold


def check_tar(data, decode_tar=decode_tar):
    """Findings on a tar: decode_tar raises nothing, keeps what it must, says what it leaves out."""
    images, names, left_out = decode_tar(data, SIZE)
    kept = [(base(name), digest(image)) for name, image in zip(names, images, strict=True)]
    must = intact_members(data)
    lost = Counter(pixels for _, pixels in must) - Counter(pixels for _, pixels in kept)
    lost += Counter(pair for pair in must if ORDINARY_NAME.fullmatch(pair[0])) - Counter(kept)
    findings = [f"intact, but not kept: {number} x {what}" for what, number in lost.items()]
    if images.shape != (len(names), *SIZE, 3) or images.dtype != np.uint8:
        findings.append(f"images are {images.dtype} {images.shape}")
    if in_parts(data) != (kept, [name for name, _ in left_out if name != decoding.ITSELF]):
        findings.append("other images, or others left out, in parts")
    if not (names or left_out):
        findings.append("nothing is kept and nothing is left out")
    if any(name.encode(errors="replace").decode() != name for name in names):
        findings.append("a name is no base name, or no text")
    for name, reason in left_out:
        if not (isinstance(name, str) and reason.isprintable() and len(reason) < 200):
            findings.append(f"left out {name!r} because of {reason!r}")
    return findings


def in_parts(data):
    """A tar in parts of two images or 3,000 bytes: names with digests, and what is left out."""
    kept, left_out, start = [], [], 0
    while start is not None:
        most = decoding.Part(2, 3_000)
        images, names, some, start = decoding.decode_part(io.BytesIO(data), SIZE, "pixels", start, most)
        kept += [(base(name), digest(image)) for name, image in zip(names, images, strict=True)]
        left_out += [name for name, _ in some if name != decoding.ITSELF]
    return kept, left_out


ORDINARY_NAME = re.compile(r"n\d\.JPEG")  # others may come from a header that is not intact


def base(path):
    """A path's last part."""
    return path.rpartition("/")[2]


def intact_members(data):
    """What tarfile reaches of the intact images, as pairs of base name and pixels."""
    pixels, reached, last = intact_pixels(), [], -1
    try:
        options = {"encoding": "utf-8", "errors": "replace"}
        archive = tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True, **options)  # noqa: SIM115
        while (info := archive.next()) and info.offset > last:  # a negative size leads it in circles
            last = info.offset
            content = data[info.offset_data : info.offset_data + max(0, info.size)]
            if info.isreg() and not info.issparse() and content in pixels:
                reached.append((base(info.name), pixels[content]))
    except Exception:  # tarfile goes no further: what it has reached counts
        pass
    return reached


@functools.cache
def intact_pixels():
    """A digest of the pixels of each intact image: a dict by its bytes."""
    return {image: digest(decoding.decode_image(image, SIZE)) for image in intact_images()}


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def check_image(data, decode_image=decoding.decode_image):
    """Findings on an image: pixels, the same ones each time, or an ImageError of one line."""
    results = []
    for _ in range(2):
        try:
            image = decode_image(data, SIZE)
            results.append((image.shape, image.dtype, digest(image)))
        except decoding.ImageError as error:
            results.append(str(error))
    first, second = results
    if first != second:
        return [f"not the same twice: {first}, then {second}"]
    if isinstance(first, str):
        return [] if first.isprintable() and len(first) < 200 else [f"error is not one line: {first!r}"]
    return [] if first[:2] == ((*SIZE, 3), np.uint8) else [f"the image is {first}"]


def check_labels(data, parse_labels=imagenet.parse_labels):
    """Findings on a label file: labels in range, none lost, or an InputError of one line."""
    try:
        labels = parse_labels(data, NUM_CLASSES, "s3://b/train.txt")
    except s3.InputError as error:
        line = str(error)
        fine = line.startswith("s3://b/train.txt") and line.isprintable() and len(line) < 300
        return [] if fine else [f"error is not one line: {line!r}"]
    wanted = [words for line in data.decode().split("\n") if (words := line.split())]
    lost = [words for words in wanted if labels[words[0].rpartition("/")[2]] != int(words[1])]
    wrong = [label for label in labels.values() if label not in range(NUM_CLASSES)]
    return [f"labels lost {lost} or wrong {wrong}"] if lost or wrong else []


KINDS = [  # share of the inputs, maker, check
    (40, lambda rnd: damaged(ordinary_tar(rnd), rnd, BLOCK), check_tar),
    (25, hostile_tar, check_tar),
    (15, lambda rnd: damaged(rnd.choice(intact_images()), rnd), check_image),
    (10, hostile_image, check_image),
    (10, label_file, check_labels),
]


def attempt(seed, number):
    """Try one input; its findings."""
    rnd = random.Random(f"{seed}, {number}")
    [(_, make, check)] = rnd.choices(KINDS, weights=[share for share, _, _ in KINDS])
    return check(make(rnd))


# ---- the process that tries them, and the one that watches it

WRITING = ("os.mkdir", "os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.truncate")
WRITING += ("os.chmod", "os.chown", "os.utime", "os.system", "subprocess.Popen", "socket.connect")


def serve(connection, attempt, seed, numbers, cpu_seconds):
    """Try inputs in turn and send the findings of each, under limits that end the process."""
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    written, trying = [], False

    def audit(event, arguments):
        writing = event == "open" and not set(arguments[1] or "r") <= set("rbt")
        if trying and (writing or event in WRITING):
            written.append(f"{event} {arguments[:2]}")

    sys.addaudithook(audit)
    check_image(intact_images()[0])  # starts OpenCV's threads and Pillow's parsers
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write to any file ends the process
    for number in numbers:
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_seconds, resource.RLIM_INFINITY))
        written.clear()
        trying = True
        try:
            findings = attempt(seed, number)
        except BaseException as error:  # whatever comes is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            findings = [f"{type(error).__name__}: {error} in {where.name}, line {where.lineno}"]
        trying = False
        connection.send([finding[:300] for finding in findings + written])


def run(inputs, seed, attempt=attempt, cpu_seconds=CPU_SECONDS, patience=PATIENCE):
    """Try so many inputs; a list of the findings, one line each."""
    server = multiprocessing.get_context("forkserver")  # it imports once, for all processes
    server.set_forkserver_preload([__name__, attempt.__module__])
    findings, number = [], 0
    while number < inputs:
        connection, theirs = server.Pipe(duplex=False)
        numbers = range(number, inputs)
        child = server.Process(target=serve, args=(theirs, attempt, seed, numbers, cpu_seconds))
        child.start()
        theirs.close()
        try:
            while number < inputs:
                found = connection.recv() if connection.poll(patience) else ["stuck"]
                findings += [f"input {number} of seed {seed}: {finding}" for finding in found]
                number += 1
                if found == ["stuck"]:
                    break
        except EOFError:
            child.join()
            how = signal.Signals(-child.exitcode).name if child.exitcode < 0 else child.exitcode
            findings.append(f"input {number} of seed {seed}: the process died of {how}")
            number += 1
        finally:
            child.kill()
            child.join()
            connection.close()
    return findings


def main():
    """Run as the command line says; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Fuzz the decoders.")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    findings = run(args.inputs, args.seed)
    for finding in findings:
        print(finding)
    seconds = time.monotonic() - start
    print(f"{args.inputs} inputs of seed {args.seed} in {seconds:.0f} s: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
