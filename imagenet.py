"""ImageNet in S3: listing the tars, downloading and decoding them, the label file."""

import contextlib
import functools
import hashlib
import io
import json
import posixpath
import re
import sys
import tarfile

import boto3
import cv2
import numpy as np
import ray
import simplejpeg
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from PIL import Image, ImageChops, UnidentifiedImageError
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError
from s3transfer.subscribers import BaseSubscriber
from tqdm import tqdm

IMAGE_SIZE = (
    224  # side of the square crop of an image that the network sees, pixels (paper, section 4.1)
)

MAX_PIXELS = 64 * 2**20  # larger images are taken for decompression bombs; ImageNet's largest has 24 M

MAX_RATIO = 2.5  # of sides, up to which cubic interpolation to twice the size wanted hardly aliases

MAX_SCANS = 100  # of a progressive JPEG, which has some 10; with more, 1 MB can take hours

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # what an image in a tar may be, whatever its name

MAX_NAMED = 5  # left-out members (or keys) that a report names; the others are only counted

# Standard retries back off exponentially; a stalled or cut body costs one part, not the whole tar.
# A key that stays silent is given up within a quarter of an hour, one that is refused much sooner.
# "when_required" saves a HEAD request an object, which costs as much as decoding a photo.
_RETRYING = Config(
    connect_timeout=5,
    read_timeout=10,
    retries={"mode": "standard", "total_max_attempts": 10},
    max_pool_connections=32,
    response_checksum_validation="when_required",
)
_PARTS = TransferConfig(
    multipart_chunksize=8 * 2**20,
    io_chunksize=8 * 2**20,  # a part at once: in small pieces, threads take turns for half the time
    max_concurrency=4,
    num_download_attempts=8,
)
# The driver's own few requests fail within a minute when nothing answers.
_IMPATIENT = Config(
    connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3}
)


class InputError(Exception):
    """Input that cannot be used. The message is one line: what, in which bucket and key, what to do."""


def one_line(text):
    """Any text on one printable ASCII line: names from tars can hold newlines and escape codes."""
    return re.sub("[^ -~]", lambda char: ascii(char[0])[1:-1], " ".join(str(text).split()))


def s3_resource(config=None, **where):
    """A boto3 S3 resource of the ordinary AWS settings; `where` is an endpoint and region, if given."""
    return boto3.resource("s3", config=config or _IMPATIENT, **where)


def s3_location():
    """Endpoint (only one that is configured) and region of this process, for `s3_resource` elsewhere.

    Credentials are not part of it: every node has its own.
    """
    plain = s3_resource(_IMPATIENT.merge(Config(ignore_configured_endpoint_urls=True))).meta.client.meta
    meta = s3_resource().meta.client.meta
    where = {"region_name": meta.region_name}
    if meta.endpoint_url != plain.endpoint_url:
        where["endpoint_url"] = meta.endpoint_url
    return where


def explain(error):
    """One line for an error of S3: what S3 or the network said, and what to do about it."""
    if isinstance(error, RetriesExceededError):
        return f"every attempt to read it broke off ({explain(error.last_exception)}): start again"
    if isinstance(error, S3DownloadFailedError):  # it has another ETag than listed
        return "has changed since it was listed: start again with the new data"
    code = error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""
    hint = {
        "NoSuchBucket": "no such bucket; check its name, AWS_ENDPOINT_URL and the region",
        "404": "there is no such key; check the flag that names it",
        "NoSuchKey": "there is no such key; check the flag that names it",
        "AccessDenied": "access denied; check the credentials and the bucket's policy",
        "403": "access denied; check the credentials and the bucket's policy",
    }.get(code)
    if hint:
        return hint
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            f"{one_line(error)}; run `aws configure` or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return one_line(error)


class S3Folder:
    """A folder in S3, `s3://bucket/prefix`, of files that go up and down whole.

    Every method raises InputError where S3 does not do it.
    """

    def __init__(self, url):
        """Name the folder; nothing is asked of S3 yet."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        with s3_errors(name):
            self.bucket = s3_resource(_RETRYING).Bucket(name)

    def check_writable(self, name):
        """Raise InputError unless this file could be put: begins an upload and gives it up."""
        with s3_errors(self.bucket.name, self.prefix + name):
            target = s3_resource().Object(self.bucket.name, self.prefix + name)
            target.initiate_multipart_upload().abort()

    def names(self, start=""):
        """Names of the files, or of those whose name starts so."""
        with s3_errors(self.bucket.name, self.prefix):
            listed = self.bucket.objects.filter(Prefix=self.prefix + start)
            return [obj.key.removeprefix(self.prefix) for obj in listed]

    def upload(self, path, name):
        """Put a local file."""
        with s3_errors(self.bucket.name, self.prefix + name):
            self.bucket.upload_file(str(path), self.prefix + name, Config=_PARTS)

    def upload_stream(self, stream, name, metadata):
        """Put what a file object has to read, with a dict of metadata; some twelve parts are in memory.

        If reading raises, nothing is put. Threads may call this and `metadata` at the same time.
        """
        with s3_errors(self.bucket.name, self.prefix + name):
            self.bucket.meta.client.upload_fileobj(
                stream,
                self.bucket.name,
                self.prefix + name,
                ExtraArgs={"Metadata": metadata},
                Config=_PARTS,
            )

    def metadata(self, name):
        """The metadata that a file was put with."""
        with s3_errors(self.bucket.name, self.prefix + name):
            head = self.bucket.meta.client.head_object
            return head(Bucket=self.bucket.name, Key=self.prefix + name)["Metadata"]

    def download(self, name, path):
        """Get a file."""
        with s3_errors(self.bucket.name, self.prefix + name):
            self.bucket.download_file(self.prefix + name, str(path), Config=_PARTS)

    def delete(self, name):
        """Delete a file."""
        with s3_errors(self.bucket.name, self.prefix + name):
            self.bucket.Object(self.prefix + name).delete()


@contextlib.contextmanager
def s3_errors(bucket, key=""):
    """Turn whatever boto3 raises into an InputError that names bucket and key."""
    transfer_errors = (RetriesExceededError, S3DownloadFailedError, S3ValidationError)
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError, *transfer_errors, OSError, ValueError) as error:
        place = f"{bucket}/{one_line(key)}" if key else bucket
        raise InputError(f"s3://{place}: {explain(error)}") from error


def digest(value):
    """A short fingerprint of a JSON-like value, such as the listed tars with their ETags."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def list_tars(bucket, prefix):
    """The tars below a prefix, as listed: a dict key -> ETag in the order of keys, and keys left out.

    Raises InputError where the bucket cannot be listed or holds no tar below the prefix.
    """
    with s3_errors(bucket):
        objects = s3_resource().Bucket(bucket).objects
        listed = list(objects.filter(Prefix=prefix))
        tars = {obj.key: obj.e_tag for obj in listed if obj.key.endswith(".tar")}
        if not tars:
            keys = [obj.key for obj in listed[:3]] or [obj.key for obj in objects.limit(3)]
            raise InputError(
                f"s3://{bucket}: no key with the prefix {one_line(prefix)!r} ends in .tar; "
                + (f"there are: {', '.join(map(one_line, keys))}" if keys else "the bucket is empty")
            )
    return tars, [obj.key for obj in listed if obj.key not in tars]


def estimate_images(bucket, tars):
    """About how many images a dict of tars holds, from the sizes of all and the head of the first."""
    with s3_errors(bucket):
        objects = s3_resource().Bucket(bucket).objects
        total = sum(obj.size for obj in objects.filter(Prefix=posixpath.commonprefix(list(tars))))
        first, head = s3_resource().Object(bucket, next(iter(tars))), b""
        if first.content_length:
            # No second attempt for a body that breaks off: there is an answer without it.
            with contextlib.suppress(IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                head = first.get(Range="bytes=0-1048575")["Body"].read()
    members, _ = _members(io.BytesIO(head))
    if not members:
        return total // 110_000  # bytes of an average ILSVRC-2012 JPEG
    return round(total * len(members) / (members[-1].offset_data + members[-1].size))


def load_tarfiles_from_s3(bucket, keys, size, **options):
    """Start to download and decode tars, one remote task each, and return at once.

    `keys` are the tars' keys, or a dict of them with the ETags that the objects must have; `size` is
    [height, width]; `options` are Ray's for the tasks. Returns a list of (images_ref, filenames_ref,
    report_ref): images uint8 [n, height, width, 3] RGB, a list of n base names, and a dict with
    `key`, `images` (n), `left_out` (a count) and `named` (the first few, each one line).
    """
    with s3_errors(bucket):
        where = s3_location()
    etags = keys if isinstance(keys, dict) else dict.fromkeys(keys)
    load = _load_tarfile.options(num_returns=3, scheduling_strategy="SPREAD", **options)
    return [tuple(load.remote(bucket, key, etag, tuple(size), where)) for key, etag in etags.items()]


def report_loading(bucket, report_refs):
    """Show the progress of tasks that load tars as they end, then what was left out and why.

    A progress bar on a terminal, plain lines elsewhere. Raises a task's InputError.
    """
    reports, left = [], list(report_refs)
    bar = tqdm(total=len(left), desc="Loading", unit="tar", disable=not sys.stderr.isatty())
    while left:
        done, left = ray.wait(left, num_returns=1)
        try:
            reports += ray.get(done)
        except ray.exceptions.RayTaskError as error:
            bar.close()
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        images = sum(report["images"] for report in reports)
        bar.set_postfix(images=images, refresh=False)
        bar.update()
        if bar.disable and len(reports) * 10 // len(report_refs) > (len(reports) - 1) * 10 // len(
            report_refs
        ):
            print(f"Loading: {len(reports)} of {len(report_refs)} tars, {images} images", flush=True)
    bar.close()
    spoilt = sorted((report for report in reports if report["left_out"]), key=lambda r: r["key"])
    for report in spoilt[:MAX_NAMED]:
        names = "; ".join(report["named"])
        print(f"s3://{bucket}/{one_line(report['key'])}: {report['left_out']} left out: {names}")
    if len(spoilt) > MAX_NAMED:
        rest = sum(report["left_out"] for report in spoilt[MAX_NAMED:])
        print(f"{rest} left out of {len(spoilt) - MAX_NAMED} more tars")


@ray.remote
def _load_tarfile(bucket, key, etag, size, where):
    cv2.setNumThreads(1)  # tasks run side by side
    tar = download(bucket, key, etag, where)
    images, names, left_out = decode_tar(tar, size)
    named = [f"{one_line(name)[:100]}: {why}" for name, why in left_out[:MAX_NAMED]]
    report = {"key": key, "images": len(names), "left_out": len(left_out), "named": named}
    return images, names, report


def download(bucket, key, etag=None, where=None):
    """One object as bytes in memory (io.BytesIO); InputError if it is unreadable or has changed."""
    body = io.BytesIO()
    with s3_errors(bucket, key):
        with create_transfer_manager(_retrying_client(**(where or s3_location())), _PARTS) as transfers:
            get = transfers.download(bucket, key, body, subscribers=[_OnlyIf(etag)])
        get.result()
    return body


@functools.cache
def _retrying_client(**where):
    return s3_resource(_RETRYING, **where).meta.client


class _OnlyIf(BaseSubscriber):
    """Has a transfer fetch only an object that has this ETag."""

    def __init__(self, etag):
        self._etag = etag

    def on_queued(self, future, **_):
        if self._etag:
            future.meta.provide_object_etag(self._etag)


def decode_tar(tar, size):
    """Decode every image of a tar (a file object): the array is allocated once, for all members.

    Returns images uint8 [n, height, width, 3], their n base names, and (name, reason) of what was
    left out: members that are no regular file or no readable image, and damage to the tar itself.
    """
    members, left_out = _members(tar)
    images = np.empty((len(members), *size, 3), np.uint8)
    names = []
    for member in members:
        try:
            tar.seek(member.offset_data)
            images[len(names)] = decode_image(tar.read(member.size), size)
        except ImageError as error:
            left_out.append((member.name, str(error)))
        else:
            names.append(posixpath.basename(member.name))
    return images[: len(names)], names, left_out


def _members(tar):
    """The regular files that lie whole in a tar, and (name, reason) for everything else."""
    end = tar.seek(0, io.SEEK_END)
    files, left_out = [], []
    for place, member in _walk(tar, end):
        if not member:
            left_out.append(("the tar itself", f"damaged at byte {place}"))
        elif member.type not in _REGULAR:
            left_out += [] if member.isdir() else [(member.name, "no regular file")]
        elif member.offset_data + member.size > end:
            left_out.append((member.name, "cut off by the end of the tar"))
        else:
            files.append(member)
    tar.seek(max(0, end - tarfile.BLOCKSIZE))
    if any(tar.read()):
        left_out.append(("the tar itself", "cut: its end mark is missing"))
    if not files and all(name == "the tar itself" for name, _ in left_out):
        left_out = [("the tar itself", "empty, or no tar")]
    return files, left_out


_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NO_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE)
_NO_DATA += (tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)  # which has some, but there is no telling where
# Headers of more about the next member: GNU's of long names, those of PAX; a global one names nothing.
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENDED += (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
# A record of PAX, `length key=value` and a newline, with a key that matters or another one.
_RECORD = re.compile(rb"(\d{1,19}) (?:(path|size|GNU\.sparse\.size|GNU\.sparse\.realsize)=)?")


def _walk(tar, end):
    """The members of a tar as (place, TarInfo), and (place, None) where one must have been damaged.

    Goes from header to header, and block by block where there is none, so always forwards. The walk of
    `tarfile` itself ends at some damage, and hostile headers lead it in circles, or deep down.
    """
    place, damaged, records = 0, False, {}
    while place < end:
        tar.seek(place)
        block = tar.read(tarfile.BLOCKSIZE)
        member = _header(block)
        if not member:
            if any(block) and not damaged:
                yield place, None
            damaged, records = damaged or any(block), {}
            place += len(block)
            continue
        damaged, member.offset = False, place
        place += len(block)
        if member.type in _EXTENDED:
            content = tar.read(min(_whole_blocks(member.size), end - place))
            place += _whole_blocks(member.size)
            records = _records(member.type, content) | records  # of two, the first one counts
            continue
        member.name, member.offset_data = records.get("path", member.name), place
        member.type = records.get("type", member.type)
        size = records.get("size", member.size)
        if size is not None:
            member.size = size
            place += 0 if member.type in _NO_DATA else _whole_blocks(size)
        records = {}
        yield member.offset, member


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


class ImageError(Exception):
    """Bytes that are no usable image; the message says why."""


def decode_image(data, size):
    """One encoded image as uint8 [height, width, 3] RGB, resized with an antialiasing filter.

    Colour JPEGs, nearly all of ImageNet, take libjpeg-turbo and OpenCV; Pillow decides on the rest.
    Raises ImageError.
    """
    height, width = size
    if data.startswith(b"\xff\xd8") and _count_scans(data) > MAX_SCANS:
        raise ImageError("too many scans for a JPEG")
    try:
        h, w, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("YCbCr", "RGB", "Gray") and h * w <= MAX_PIXELS:
            # min_factor=2: only halving while decoding is fast (and never below the size wanted).
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=height, min_width=width, min_factor=2
            )
            if h >= height and w >= width:
                return _shrink(pixels, size)
            return _resize(Image.fromarray(pixels), size)
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow would fill the rest of some with grey
            raise ImageError("cut or corrupt JPEG") from error
    return _decode_with_pillow(data, size)


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
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


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


def read_labels(bucket, key, num_classes):
    """The label file, lines of `directory/name.JPEG label`, as a dict name.JPEG -> int.

    Raises InputError with the line number for a line that is malformed, a label that is no integer
    or outside 0..num_classes-1, and a name that has two labels.
    """
    data = download(bucket, key).getvalue()
    return parse_labels(data, num_classes, f"s3://{bucket}/{one_line(key)}")


def parse_labels(data, num_classes, place):
    """`read_labels` on the file's bytes; `place` names it in errors."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{place}, line {line}: not text; is it a label file?") from error
    labels = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *rest = line.split()
        name = posixpath.basename(path)
        if not name or len(rest) != 1:
            raise InputError(
                f"{place}, line {number}: not `directory/name.JPEG label`: {shorten(line)}"
            )
        label = rest[0]
        if not (re.fullmatch("[0-9]{1,9}", label) and int(label) < num_classes):
            raise InputError(
                f"{place}, line {number}: label {shorten(label)} is no integer in 0..{num_classes - 1}"
            )
        if labels.setdefault(name, int(label)) != int(label):
            raise InputError(
                f"{place}, line {number}: {shorten(name)} already has label {labels[name]}"
            )
    if not labels:
        raise InputError(f"{place}: holds no label; is it a label file?")
    return labels


def shorten(text):
    """At most 60 characters of a text, quoted, on one line."""
    return f"'{one_line(text)[:60]}'"
