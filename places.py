"""The places that results go to: a folder, or `s3://bucket/prefix`.

They are tried at the start of a run, the way that they will be used.
"""

import contextlib
import re
import tempfile
import uuid
from pathlib import Path

from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from imagenet import PARTS
from s3 import PATIENT, InputError, s3_errors, s3_resource

# One plain put for a file of up to 4 GB: not every S3-compatible store knows uploads in parts.
PLAIN_PUTS = TransferConfig(multipart_threshold=4 * 2**30)

# A store may take its time to answer once it has 500 MB of a checkpoint.
AFTER_A_PUT = Config(read_timeout=30)


def checked_place(flag, place, remote=True):
    """A place as a flag names it, with ~ as the home folder; None stays None.

    InputError if it is of a kind that is not supported (S3 is only if `remote`), or would be lost.
    """
    if place is None:
        return None
    kinds = "name a folder or s3://bucket/prefix" if remote else "name a local folder"
    scheme, slashes, rest = re.match("([A-Za-z][A-Za-z0-9+.-]*:)?(/*)(.*)", place, re.DOTALL).groups()
    if not place or (scheme and slashes):
        if not (remote and scheme and scheme.lower() == "s3:" and slashes == "//" and rest):
            raise InputError(f"{flag} {place}: {kinds}")
        return f"s3://{rest}"
    with disk_errors(flag, place):
        folder = Path(place).expanduser()
        if "working_dir_files" in folder.resolve().parts:
            lost = "lies in the job's copy of its working directory, which Ray throws away"
            raise InputError(f"{flag} {place}: {lost}; {kinds}, by its absolute path")
    return str(folder)


@contextlib.contextmanager
def disk_errors(flag, place):
    """Turn what the disk raises into an InputError that names the flag."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter: no such user's home
        raise InputError(f"{flag} {place}: {getattr(error, 'strerror', None) or error}") from error


def make_writable(folder):
    """Make a folder, and try to write there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as scratch:
        (Path(scratch) / "a").write_bytes(b"a")
        (Path(scratch) / "a").rename(folder / f"{Path(scratch).name}.a")
        (folder / f"{Path(scratch).name}.a").unlink()


class S3Folder:
    """A folder in S3, `s3://bucket/prefix`, of files that go up and down whole.

    Every method raises InputError where S3 does not do it.
    """

    def __init__(self, url):
        """Name the folder; nothing is asked of S3 yet."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        with s3_errors(name):
            self.bucket = s3_resource(PATIENT.merge(AFTER_A_PUT)).Bucket(name)

    def _errors(self, name):
        return s3_errors(self.bucket.name, self.prefix + name)

    def check(self, only_puts=False):
        """Raise InputError unless a file can be put here and, without `only_puts`, read and deleted."""
        name = ".check" if only_puts else f".check-{uuid.uuid4().hex}"
        with self._errors(name):
            file = s3_resource().Object(self.bucket.name, self.prefix + name)
            file.put(Body=b"This may be deleted.")
            if only_puts:
                with contextlib.suppress(ClientError):
                    file.delete()
                return
            self.names(name)
            file.get()["Body"].read()
            file.delete()

    def names(self, start=""):
        """Names of the files, or of those whose name starts so."""
        with self._errors(""):
            listed = self.bucket.objects.filter(Prefix=self.prefix + start)
            return [obj.key.removeprefix(self.prefix) for obj in listed]

    def upload(self, path, name):
        """Put a local file."""
        with self._errors(name):
            self.bucket.upload_file(str(path), self.prefix + name, Config=PLAIN_PUTS)

    def upload_stream(self, stream, name, metadata):
        """Put what a file object has to read, with a dict of metadata; some twelve parts are in memory.

        If reading raises, nothing is put. Threads may call this and `metadata` at the same time.
        """
        with self._errors(name):
            put, options = self.bucket.meta.client.upload_fileobj, {"Metadata": metadata}
            put(stream, self.bucket.name, self.prefix + name, ExtraArgs=options, Config=PARTS)

    def metadata(self, name):
        """The metadata that a file was put with."""
        with self._errors(name):
            head = self.bucket.meta.client.head_object
            return head(Bucket=self.bucket.name, Key=self.prefix + name)["Metadata"]

    def download(self, name, path):
        """Get a file."""
        with self._errors(name):
            self.bucket.download_file(self.prefix + name, str(path), Config=PARTS)

    def delete(self, name):
        """Delete a file."""
        with self._errors(name):
            self.bucket.Object(self.prefix + name).delete()
