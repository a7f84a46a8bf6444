"""The places that results go to: a folder, or `s3://bucket/prefix`, tried at the start of a run."""

import contextlib
import fcntl
import re
import tempfile
import uuid
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

from machinery.errors import InputError, one_line, say
from machinery.storage.s3 import PATIENT, data_client, read_object, s3_errors
from machinery.storage.tf1 import tf

from botocore.config import Config


def open_place(flag, place, mark="", ours="", remote=True, unmarked=lambda folder: False):
    """The folder that a flag names, tried as it will be used; None stays None, ~ is the home folder.

    `ours` is a pattern of the names that will be written there, `mark` one of a file of this program's
    beside them. InputError if the place is of no supported kind (S3 is one if `remote`), would be lost,
    cannot be written, or has such names without a mark, unless `unmarked` says that they are ours.
    """
    if place is None:
        return None
    kinds = "name a folder or s3://bucket/prefix" if remote else "name a local folder"
    in_s3 = remote and re.match("[sS]3://[^/]", place)
    if not place or (not in_s3 and re.match("[A-Za-z][A-Za-z0-9+.-]*:/", place)):
        raise InputError(f"{flag} {place}: {kinds}")
    with write_errors(flag, place):
        folder = S3Folder(f"s3{place[2:]}") if in_s3 else LocalFolder(place)
        if not in_s3 and "working_dir_files" in folder.path.parts:
            lost = "lies in the job's copy of its working directory, which Ray throws away"
            raise InputError(f"{flag} {place}: {lost}; {kinds}, by its absolute path")
        folder.check()
        names = folder.names()
        there = [name for name in names if re.fullmatch(ours, name)]
        marked = any(re.fullmatch(mark, name) for name in names)
        if there and not marked and not unmarked(folder):
            why = f"{one_line(there[0])} there is another program's"
            raise InputError(f"{flag} {place}: {why}; name another place")
    return folder


@contextlib.contextmanager
def write_errors(flag, place):
    """Turn what the disk and TensorFlow's writers raise into an InputError that names the flag."""
    try:
        yield
    except BrokenPipeError:  # a line that nobody reads any more is said within
        raise
    except (OSError, RuntimeError) as error:  # the latter: no such user's home
        raise InputError(f"{flag} {place}: {getattr(error, 'strerror', None) or error}") from error
    except tf.errors.OpError as error:
        said = [line for line in error.message.splitlines() if "; " in line] or [one_line(error)]
        raise InputError(f"{flag} {place}: {said[0].rpartition('; ')[2][:200]}") from error


def as_they_end(jobs):
    """Yield each of a set of futures once it has ended.

    A signal that comes just before a wait without an end, as in `as_completed`, is heard only after it.
    """
    while jobs:
        ended, jobs = wait(jobs, timeout=1, return_when=FIRST_COMPLETED)
        yield from ended


class LocalFolder:
    """A folder on a disk of this machine. Files are written to `path`, where they stay."""

    def __init__(self, place):
        folder = Path(place).expanduser()
        self.place, self.path = str(folder), folder.resolve()

    def check(self):
        """Make the folder, and try to write there."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(b"a")

    def names(self):
        """Names of the files and folders."""
        return [path.name for path in self.path.iterdir()]

    def lock(self, flag, mark):
        """Make the folder this run's, by a lock on a file that ends with the process."""
        self._lock = (self.path / f"{mark}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{flag} {self.place}: another run saves here") from error
        except OSError as error:
            say(f"{self.place} has no locks ({error.strerror}): a second run here goes unnoticed")

    def upload(self, name=None, anew=None):
        """A file is there once it is written, and the folder is this run's once it is locked."""

    download = claim = upload

    def delete(self, name):
        """Delete a file."""
        (self.path / name).unlink(missing_ok=True)

    def close(self):
        """Leave a folder that was locked to others."""
        self._lock.close()


class S3Folder:
    """A folder in S3, whose files go up from and come down to `path`; InputError if S3 refuses it."""

    def __init__(self, place):
        self.place = place
        self.bucket, _, prefix = place.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        with s3_errors(self.bucket):
            self.client = data_client()
        self._scratch, self._run = tempfile.TemporaryDirectory(), uuid.uuid4().hex
        self.path = Path(self._scratch.name)

    @contextlib.contextmanager
    def file(self, name):
        """How boto3 names a file, for requests that are made meanwhile."""
        with s3_errors(self.bucket, self.prefix + name):
            yield {"Bucket": self.bucket, "Key": self.prefix + name}

    def check(self):
        """Put a file here, list, read and delete it; from here on, S3 may take its time."""
        self.try_out(f".check-{self._run}")
        # A store may need it to answer once it has 500 MB of a checkpoint.
        self.client = data_client(PATIENT.merge(Config(read_timeout=30)))

    def try_out(self, name):
        """Do with a file of this name what is going to be done with others."""
        (self.path / name).write_text("This may be deleted.")
        for work in self.upload, self.names, self.download, self.delete:
            work(name)

    def names(self, start=""):
        """Names of the files, or of those whose name starts so."""
        with self.file(start) as there:
            pages = self.client.get_paginator("list_objects").paginate
            listed = pages(Bucket=self.bucket, Prefix=there["Key"]).build_full_result()
            return [file["Key"].removeprefix(self.prefix) for file in listed.get("Contents", [])]

    def lock(self, flag, mark):
        """Name the file that says whose this is: there are no locks in S3, see `claim`."""
        self._owner = f"{mark}.owner"

    def claim(self, anew=False):
        """Make this place this run's. The last to begin has it: InputError if that is another run."""
        if anew or not self.names(self._owner):  # someone has cleaned up
            (self.path / self._owner).write_text(self._run)
            self.upload(self._owner)
            return
        self.download(self._owner)
        if (self.path / self._owner).read_text() != self._run:
            raise InputError(f"{self.place}: another run saves here now")

    def upload(self, name):
        """Put a file of `path` in one piece: not every S3-compatible store knows uploads in parts."""
        with self.file(name) as there, (self.path / name).open("rb") as file:
            self.client.put_object(**there, Body=file)

    def download(self, name):
        """Get a file into `path`."""
        read_object(self.client, self.bucket, self.prefix + name, self.path / name)

    def delete(self, name):
        """Delete a file, also that of `path`."""
        (self.path / name).unlink(missing_ok=True)
        with self.file(name) as there:
            self.client.delete_object(**there)

    def close(self):
        """Throw `path` away."""
        self._scratch.cleanup()
