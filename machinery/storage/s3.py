"""How this program reaches S3: its settings, its patience, how it reads, and its errors in one line."""

import contextlib
import functools
import io
import math
import os
import random
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from machinery.errors import InputError, one_line, say

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from botocore.loaders import create_loader
from botocore.session import Session
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

PIECE = 8 * 2**20  # bytes of one request
AHEAD = 4  # pieces that are fetched while one is used
ATTEMPTS = 8  # to read one piece, of which each begins with as many requests as PATIENT says

# Standard retries back off exponentially; a stalled or cut body costs one part, not the whole tar.
# A key that stays silent is given up within a quarter of an hour, one that is refused much sooner.
PATIENT = Config(
    connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 10}, max_pool_connections=32
)
# The driver's own few requests fail within a minute when nothing answers.
IMPATIENT = PATIENT.merge(Config(retries={"total_max_attempts": 3}))

SLOWLY = 14  # requests of one call, in some three minutes, that S3 may answer by "slow down"
SLOW_DOWN = re.compile("429|503|SlowDown|Throttl|TooManyRequests|LimitExceeded")
# The codes that tell of credentials; a HEAD request has no answer but "400".
REFUSED = re.compile("Expired|InvalidAccessKey|Invalid.*Token|InvalidSecurity|TokenRefresh|^400$")

# Settings of botocore with other defaults. Checksums that are not required cost a HEAD request an
# object, and some stores refuse them. A machine's metadata service may need more than a second.
DEFAULTS = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "metadata_service_timeout": 5,
}
LOG_IN = "log in, run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_loader = create_loader()  # what botocore knows of S3, which takes 100 ms to read


def _session(region=None):
    """A new botocore session, in a region unless the settings name one."""
    defaults = {name: (name, f"AWS_{name.upper()}", d, type(d)) for name, d in DEFAULTS.items()}
    # All of AWS's tools but botocore read the first one.
    regions = [name for name in ("AWS_REGION", "AWS_DEFAULT_REGION") if os.environ.get(name)]
    session = Session(defaults | {"region": ("region", regions, region, None)})
    session.register_component("data_loader", _loader)
    return session


@functools.cache  # one for all clients in an environment: a look-up may ask a person
class Keys(Credentials):
    """Credentials that are looked up for the first request, and again where `found` is None.

    A look-up that fails is made again for so many seconds: what hands them out may be slow, or late.
    """

    def __init__(self, region, seconds, environment):
        self._region, self._seconds = region, seconds
        self.found, self._lock = None, threading.Lock()

    def load_credentials(self):
        """What botocore asks for when it makes a client."""
        return self

    def get_frozen_credentials(self):
        """What botocore signs a request with; ValueError if there is nothing."""
        deadline, pause = time.monotonic() + self._seconds, 1
        with self._lock:
            while True:
                try:
                    self.found = found = self.found or _session(self._region).get_credentials()
                    if not found:
                        raise NoCredentialsError
                    return found.get_frozen_credentials()
                except Exception as error:  # files, processes and services raise anything
                    self.found, why = None, one_line(error).rstrip(".")
                    missing = isinstance(error, NoCredentialsError | PartialCredentialsError)
                    no_service = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
                    at_once = missing and no_service and self._seconds < 60  # as a run starts
                    if at_once or time.monotonic() > deadline:
                        raise ValueError(f"{why}; {LOG_IN}") from error
                say(f"{why}: credentials are looked up again in {pause} s")
                time.sleep(pause)
                pause = min(2 * pause, 10)


def _again(keys, most, slowly, response, attempts, **_):
    """Seconds after which a request is made again that S3 has answered by "slow down" or "expired".

    botocore calls it after each request; None leaves the decision to botocore.
    """
    if response is None:
        return None
    status, code = response[0].status_code, response[1].get("Error", {}).get("Code", "")
    pause = min(2 ** (attempts - 1), 20)
    if SLOW_DOWN.search(f"{status} {code}") and attempts < slowly:
        if attempts == 4:
            say(f"S3 answers {one_line(code)}: it is asked again for some minutes")
        return pause * random.uniform(0.75, 1.25)
    if REFUSED.search(code) and attempts < most:
        keys.found = None
        return pause
    return None


def data_client(config=IMPATIENT, anonymous=False, requester_pays=False, **where):
    """A boto3 S3 client of the ordinary AWS settings; all but its Config is what `s3_location` says.

    If the user has set a number of attempts, then it counts, and not that of the Config.
    """
    region = where.get("region_name")
    session = _session(region)
    set_by_user = session.get_config_variable("max_attempts")
    most = set_by_user or config.retries["total_max_attempts"]
    config = config.merge(Config(retries={"mode": "standard", "total_max_attempts": most}))
    if anonymous:
        config = config.merge(Config(signature_version=UNSIGNED))
    keys = Keys(region, most * config.read_timeout, tuple(sorted(os.environ.items())))
    session.register_component("credential_provider", keys)
    client = boto3.Session(botocore_session=session).client("s3", config=config, **where)
    again = functools.partial(_again, keys, most, set_by_user or SLOWLY)
    client.meta.events.register_first("needs-retry.s3", again)
    if requester_pays:
        event, pay = "provide-client-params.s3", {"RequestPayer": "requester"}
        client.meta.events.register(event, lambda params, **_: params | pay)
    return client


_client = functools.cache(data_client)  # a new one takes 50 ms


def s3_location():
    """What `data_client` needs elsewhere: endpoint (only one that is configured), region and access.

    Every node has credentials of its own. AWS_NO_SIGN_REQUEST and AWS_REQUEST_PAYER are GDAL's names.
    """
    plain = data_client(IMPATIENT.merge(Config(ignore_configured_endpoint_urls=True))).meta
    meta = data_client().meta
    return {
        "region_name": meta.region_name,
        "endpoint_url": meta.endpoint_url if meta.endpoint_url != plain.endpoint_url else None,
        "anonymous": os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("yes", "true", "1"),
        "requester_pays": os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester",
    }


class Tar(NamedTuple):
    """A tar, or another object, as it is listed; `size` is in bytes, `etag` None if there is none."""

    key: str
    etag: str | None
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
                for each in page.get("Contents", []):
                    yield Tar(each["Key"], each.get("ETag") or None, each["Size"])

    def open(self, tar):
        """A Tar as a file to read forwards."""
        with s3_errors(self.name):
            return S3File(_client(PATIENT, **self.where), self.name, tar)

    def read(self, key):
        """One object as bytes; InputError if it is unreadable, or changes meanwhile."""
        return read_object(data_client(PATIENT, **self.where), self.name, key)


def read_object(client, bucket, key, path=None):
    """One object as bytes, or into a file; InputError if it is unreadable, or changes meanwhile."""
    with s3_errors(bucket, key):
        head = client.head_object(Bucket=bucket, Key=key)
    tar = Tar(key, head.get("ETag"), head["ContentLength"])
    with contextlib.closing(S3File(client, bucket, tar)) as file:
        if path is None:
            return file.read()
        with path.open("wb") as out:
            return shutil.copyfileobj(file, out, PIECE)


class S3File:
    """An object in S3 as a file to read forwards: threads fetch the next pieces ahead of time.

    AHEAD + 1 pieces are in memory. InputError if it is unreadable or has changed since it was listed.
    """

    def __init__(self, client, bucket, tar, storm=30):
        """Nothing is asked of S3 yet; for `storm` seconds, what breaks off is asked for anew."""
        self._client, self._bucket, self._tar, self._storm = client, bucket, tar, storm
        self._place, self._threads = 0, ThreadPoolExecutor(AHEAD)
        self._pieces = {}  # number -> Future of its bytes

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
        read, begin = [], self._threads.submit
        while self._place < end:
            number, skipped = divmod(self._place, PIECE)
            last = number + (AHEAD if self._pieces else 0)  # of some files, only the head is read
            wanted = range(number, min(last + 1, math.ceil(self._tar.size / PIECE)))
            self._pieces = {n: self._pieces.get(n) or begin(self._fetch, n * PIECE) for n in wanted}
            with s3_errors(self._bucket, self._tar.key):
                read.append(self._pieces[number].result()[skipped : skipped + end - self._place])
            self._place += len(read[-1])
        return b"".join(read)

    def _fetch(self, start):
        stop = min(start + PIECE, self._tar.size)
        what = {"Bucket": self._bucket, "Key": self._tar.key, "Range": f"bytes={start}-{stop - 1}"}
        what |= {"IfMatch": self._tar.etag} if self._tar.etag else {}
        deadline, attempts = time.monotonic() + self._storm, 0
        while True:
            attempts += 1
            try:  # boto3 tries a request again, but not one whose body breaks off
                data = self._client.get_object(**what)["Body"].read()
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
        if code and REFUSED.search(code):
            said += "; refresh the credentials"
        if code and re.search("checksum|Content-MD5", said, re.IGNORECASE):
            said += "; set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_SUPPORTED"
        place = f"{bucket}/{one_line(key)}" if key else bucket
        raise InputError(f"s3://{place}: {said}") from error
