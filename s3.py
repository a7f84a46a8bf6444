"""How this program reaches S3: its settings, its patience, and its errors in one line."""

import contextlib
import os
import re

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError

from decoding import one_line

# Standard retries back off exponentially; a stalled or cut body costs one part, not the whole tar.
# A key that stays silent is given up within a quarter of an hour, one that is refused much sooner.
# Checksums "when_required" save a HEAD request an object, which costs as much as decoding a photo, and
# some S3-compatible stores refuse those that boto3 sends by itself.
CHECKSUMS = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
PATIENT = Config(
    connect_timeout=5,
    read_timeout=10,
    retries={"mode": "standard", "total_max_attempts": 10},
    max_pool_connections=32,
    **CHECKSUMS,
)
# The driver's own few requests fail within a minute when nothing answers.
IMPATIENT = Config(
    connect_timeout=5,
    read_timeout=10,
    retries={"mode": "standard", "total_max_attempts": 3},
    **CHECKSUMS,
)


class InputError(Exception):
    """Input that cannot be used. The message is one line: what, in which bucket and key, what to do."""


def s3_resource(config=None, **where):
    """A boto3 S3 resource of the ordinary AWS settings; `where` is an endpoint and region, if given.

    AWS_REGION counts before AWS_DEFAULT_REGION, as in all of AWS's tools but boto3.
    """
    where = {"region_name": os.environ.get("AWS_REGION") or None} | where
    return boto3.resource("s3", config=config or IMPATIENT, **where)


def data_client(config=None, access=(), **where):
    """A boto3 S3 client to read the data with; `access` and `where` are what `s3_location` says."""
    config = config or IMPATIENT
    if "anonymous" in access:
        config = config.merge(Config(signature_version=UNSIGNED))
    client = s3_resource(config, **where).meta.client
    if "requester pays" in access:
        for operation in ("ListObjects", "GetObject", "HeadObject"):
            client.meta.events.register(f"provide-client-params.s3.{operation}", _let_requester_pay)
    return client


def _let_requester_pay(params, **_):
    return params | {"RequestPayer": "requester"}


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
    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("yes", "true", "1")
    pays = os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester"
    access = [*(["anonymous"] if anonymous else []), *(["requester pays"] if pays else [])]
    return where | ({"access": tuple(access)} if access else {})


def bucket_name(text):
    """The name of a bucket, which may be written as s3://name/; InputError if a prefix follows it."""
    name = re.sub("^s3://", "", text, flags=re.IGNORECASE).rstrip("/")
    if not name or ("/" in name and not name.startswith("arn:")):
        hint = "name the bucket alone; what follows it goes into --key-prefix"
        raise InputError(f"--s3-bucket {one_line(text)}: {hint}")
    return name


def explain(error):
    """One line for an error of S3: what S3 or the network said, and what to do about it."""
    if isinstance(error, RetriesExceededError):
        return f"every attempt to read it broke off ({explain(error.last_exception)}): start again"
    code = error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""
    if isinstance(error, S3DownloadFailedError) or code in ("PreconditionFailed", "412"):
        return "has changed since it was listed: start again with the new data"
    if isinstance(error, S3UploadFailedError) and error.__context__:
        return explain(error.__context__)
    if code == "NoSuchBucket":
        return "no such bucket; check its name, AWS_ENDPOINT_URL and the region"
    if code in ("404", "NoSuchKey"):
        return "there is no such key; check the flag that names it"
    if code in ("403", "AccessDenied"):
        return "access denied; check the credentials and the bucket's policy"
    if code == "InvalidObjectState":
        return "lies in an archive storage class; restore it first"
    if type(error).__name__ == "ParamValidationError" and "Invalid bucket name" in str(error):
        return "no bucket can have this name"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        hint = "run `aws configure` or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return f"{one_line(error)}; {hint}"
    return one_line(error)


@contextlib.contextmanager
def s3_errors(bucket, key=""):
    """Turn whatever boto3 raises into an InputError that names bucket and key."""
    transfer_errors = (RetriesExceededError, S3DownloadFailedError, S3ValidationError)
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError, *transfer_errors, OSError, ValueError) as error:
        place = f"{bucket}/{one_line(key)}" if key else bucket
        raise InputError(f"s3://{place}: {explain(error)}") from error
