"""A folder that every node sees, on NFS or on one machine, as a source of data: s3.Bucket's methods."""

import contextlib
import io
import os
from pathlib import Path

from machinery.errors import InputError, one_line
from machinery.storage.s3 import Tar


class Folder(str):
    """A folder as a source, its path. A file's key is its path in there, its ETag is size and time."""

    kind = "folder"

    @classmethod
    def named(cls, text):
        """The folder of a name such as file:///folder or /folder; None for a name of another kind."""
        path = text[7:] if text[:7].lower() == "file://" else text
        if path == text and not path.startswith(("/", "~/")):
            return None
        folder = Path(os.path.expanduser(path))  # noqa: PTH111, Path's raises where there is no home
        if not folder.is_absolute() or not folder.is_dir():
            raise InputError(f"--s3-bucket {one_line(text)}: no such folder; name it by its full path")
        return cls(folder)

    def keys(self, prefix):
        """All files below a prefix, by key, each as a Tar."""
        with _errors(self):
            start = Path(self, prefix.rpartition("/")[0].lstrip("/"))
            folders = os.walk(start, onerror=_fail, followlinks=True)
            files = (Path(place, name) for place, _, names in folders for name in names)
            keys = (file.relative_to(self).as_posix() for file in files)
            found = (key for key in keys if key.startswith(prefix) and Path(self, key).is_file())
            return sorted(_tar(key, Path(self, key).stat()) for key in found)

    def open(self, tar):
        """A Tar as a file; InputError if it is unreadable, or not as it was listed."""
        with _errors(path := Path(self, tar.key)):
            file = _File(path)
        file.tar = tar
        return file

    def read(self, key):
        """One file as bytes."""
        with _errors(path := Path(self, key)):
            return path.read_bytes()


class _File(io.FileIO):
    def read(self, size=-1):
        with _errors(self.name):
            data = super().read(size)
            if _tar(self.tar.key, os.fstat(self.fileno())) != self.tar:
                raise InputError(f"{one_line(self.name)}: has changed since it was listed: start again")
            return data


def _tar(key, stat):
    return Tar(key, f"{stat.st_size}-{stat.st_mtime_ns}", stat.st_size)


def _fail(error):
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _errors(path):
    try:
        yield
    except OSError as why:
        hint = "check its name and rights, and that every node sees the folder"
        raise InputError(f"{one_line(why.filename or path)}: {why.strerror or why}; {hint}") from why
