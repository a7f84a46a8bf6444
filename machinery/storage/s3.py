"""How this program reaches S3: its settings, its patience, how it reads, and its errors in one line."""

import contextlib
import functools
import io
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from machinery.errors import InputError, one_line

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

PIECE = 8 * 2**20  # bytes of one request
AHEAD = 4  # pieces that are fetched while one is used
ATTEMPTS = 8  # to read one piece, of which each begins with as many requests as PATIENT says

# Standard retries back off exponentially; a stalled or cut body costs one part, not the whole tar.
# A key that stays silent is given up within a quarter of an hour, one that is refused much sooner.
# Checksums "when_required" save a HEAD request an object, which costs as much as decoding a photo, and
# some S3-compatible stores refuse those that boto3 sends by itself.
PATIENT = Config(
    connect_timeout=5,
    read_timeout=10,
    retries={"mode": "standard", "total_max_attempts": 10},
    max_pool_connections=32,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)
# The driver's own few requests fail within a minute when nothing answers.
IMPATIENT = PATIENT.merge(Config(retries={"mode": "standard", "total_max_attempts": 3}))


def s3_resource(config=IMPATIENT, **where):
    """A boto3 S3 resource of the ordinary AWS settings; `where` is an endpoint and region, if given.

    AWS_REGION counts before AWS_DEFAULT_REGION, as in all of AWS's tools but boto3.
    """
    where = {"region_name": os.environ.get("AWS_REGION") or None} | where
    return boto3.resource("s3", config=config, **where)


def data_client(config=IMPATIENT, anonymous=False, requester_pays=False, **where):
    """A boto3 S3 client to read the data with; all but its Config is what `s3_location` says."""
    if anonymous:
        config = config.merge(Config(signature_version=UNSIGNED))
    client = s3_resource(config, **where).meta.client
    for operation in ("ListObjects", "GetObject", "HeadObject") if requester_pays else ():
        event = f"provide-client-params.s3.{operation}"
        client.meta.events.register(event, lambda params, **_: params | {"RequestPayer": "requester"})
    return client


_client = functools.cache(data_client)  # a new one takes 50 ms


def s3_location():
    """What `data_client` needs elsewhere: endpoint (only one that is configured), region and access.

    Credentials are not part of it: every node has its own. AWS_NO_SIGN_REQUEST and AWS_REQUEST_PAYER,
    named as GDAL names them, say how the data is reached if not by one's own credentials and account.
    """
    plain = s3_resource(IMPATIENT.merge(Config(ignore_configured_endpoint_urls=True))).meta.client.meta
    meta = s3_resource().meta.client.meta
    where = {"region_name": meta.region_name}
    if meta.endpoint_url != plain.endpoint_url:
        where["endpoint_url"] = meta.endpoint_url
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("yes", "true", "1"):
        where["anonymous"] = True
    if os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester":
        where["requester_pays"] = True
    return where


class Tar(NamedTuple):
    """A tar, or another object, as it is listed; `size` is in bytes."""

    key: str
    etag: str
    size: int


class Bucket(NamedTuple):
    """A bucket as a source of data, also on other nodes. `where` is that of `s3_location`."""

    name: str
    where: dict
    kind: str = "bucket"

    @classmethod
    def named(cls, text):
        """The bucket of a name, which may be written as s3://name/; InputError if a prefix follows."""
        name = re.sub("^s3://", "", text, flags=re.IGNORECASE).rstrip("/")
        if not name or ("/" in name and not name.startswith("arn:")):
            hint = "name the bucket alone; what follows it goes into --key-prefix"
            raise InputError(f"--s3-bucket {one_line(text)}: {hint}")
        with s3_errors(name):
            return cls(name, s3_location())

    def __str__(self):
        return f"s3://{self.name}"

    def keys(self, prefix):
        """Yield all that lies below a prefix, by key, each as a Tar."""
        with s3_errors(self.name):
            pages = data_client(**self.where).get_paginator("list_objects").paginate
            for page in pages(Bucket=self.name, Prefix=prefix):
                yield from (Tar(o["Key"], o["ETag"], o["Size"]) for o in page.get("Contents", []))

    def open(self, tar):
        """A Tar as a file to read forwards."""
        return S3File(_client(PATIENT, **self.where), self.name, tar)

    def start_of(self, tar, size):
        """The first bytes of a Tar, so many or fewer."""
        return S3File(data_client(**self.where), self.name, tar, piece=size, ahead=0).read(size)

    def read(self, key):
        """One object as bytes; InputError if it is unreadable, or changes meanwhile."""
        return read_object(data_client(PATIENT, **self.where), self.name, key)


def read_object(client, bucket, key, path=None):
    """One object as bytes, or into a file; InputError if it is unreadable, or changes meanwhile."""
    with s3_errors(bucket, key):
        head = client.head_object(Bucket=bucket, Key=key)
    tar = Tar(key, head["ETag"], head["ContentLength"])
    with contextlib.closing(S3File(client, bucket, tar)) as file:
        if path is None:
            return file.read()
        with path.open("wb") as out:
            return shutil.copyfileobj(file, out, PIECE)


class S3File:
    """An object in S3 as a file to read forwards: threads fetch the next pieces ahead of time.

    What lies behind is let go: `ahead` + 1 pieces are in memory. Raises InputError if the object is
    unreadable or has changed since it was listed.
    """

    def __init__(self, client, bucket, tar, storm=30, piece=PIECE, ahead=AHEAD):
        """Nothing is asked of S3 yet; for `storm` seconds, what breaks off is asked for anew."""
        self._client, self._bucket, self._tar = client, bucket, tar
        self._storm, self._piece, self._ahead, self._place = storm, piece, ahead, 0
        self._pieces = {}  # number -> Future of its bytes
        self._threads = ThreadPoolExecutor(max(1, ahead))

    def close(self):
        """Begin to fetch nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def tell(self):
        """The number of the next byte."""
        return self._place

    def seek(self, offset, whence=io.SEEK_SET):
        """Go to a byte, and return its number."""
        self._place = offset + (self._tar.size if whence == io.SEEK_END else 0)
        return self._place

    def read(self, size=None):
        """The next bytes: so many, or all to the end."""
        end = self._tar.size if size is None else min(self._place + size, self._tar.size)
        read = []
        while self._place < end:
            number, skipped = divmod(self._place, self._piece)
            read.append(self._get(number)[skipped : skipped + end - self._place])
            self._place += len(read[-1])
        return b"".join(read)

    def _get(self, number):
        wanted = range(number, min(number + self._ahead + 1, math.ceil(self._tar.size / self._piece)))
        for behind in self._pieces.keys() - set(wanted):
            self._pieces.pop(behind).cancel()
        for n in wanted:
            if n not in self._pieces:
                self._pieces[n] = self._threads.submit(self._fetch, n * self._piece)
        with s3_errors(self._bucket, self._tar.key):
            return self._pieces[number].result()

    def _fetch(self, start):
        stop = min(start + self._piece, self._tar.size)
        what = {"Bucket": self._bucket, "Key": self._tar.key, "Range": f"bytes={start}-{stop - 1}"}
        deadline, attempts = time.monotonic() + self._storm, 0
        while True:
            attempts += 1
            try:  # boto3 tries a request again, but not one whose body breaks off
                data = self._client.get_object(**what, IfMatch=self._tar.etag)["Body"].read()
                if len(data) != stop - start:
                    raise ValueError("S3 has sent other bytes than it was asked for")
                return data
            except S3_RETRYABLE_DOWNLOAD_ERRORS as error:
                if attempts >= ATTEMPTS:
                    if time.monotonic() > deadline:
                        off = f"every attempt to read it broke off ({one_line(error)}): start again"
                        raise ValueError(off) from error
                    time.sleep(2)


_HINTS = {  # by the codes of S3's answers
    ("PreconditionFailed", "412"): "has changed since it was listed: start again with the new data",
    ("NoSuchKey", "404"): "there is no such key; check the flag that names it",
    ("AccessDenied", "403"): "access denied; check the credentials and the bucket's policy",
    ("NoSuchBucket",): "no such bucket; check its name, AWS_ENDPOINT_URL and the region",
    ("InvalidObjectState",): "lies in an archive storage class; restore it first",
}


@contextlib.contextmanager
def s3_errors(bucket, key=""):
    """Turn whatever boto3 raises into an InputError: bucket, key, what S3 said, and what to do."""
    try:
        yield
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        code = error.response["Error"].get("Code") if isinstance(error, ClientError) else None
        said = next((hint for codes, hint in _HINTS.items() if code in codes), one_line(error))
        if "Invalid bucket name" in str(error):
            said = "no bucket can have this name"
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            said += "; run `aws configure` or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        place = f"{bucket}/{one_line(key)}" if key else bucket
        raise InputError(f"s3://{place}: {said}") from error
