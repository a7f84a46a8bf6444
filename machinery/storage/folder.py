"""A folder that every node sees, on NFS or on one machine, as a source of data: s3.Bucket's methods."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

from machinery.errors import InputError, one_line
from machinery.storage.s3 import Tar


class Folder(NamedTuple):
    """A folder as a source. The key of a file is its path in the folder, its ETag is size and time."""

    path: str
    kind: str = "folder"

    @classmethod
    def named(cls, text):
        """The folder of a name such as file:///folder or /folder; None for a name of another kind."""
        path = re.sub("^file://", "", text, flags=re.IGNORECASE)
        if path == text and not path.startswith(("/", "~/")):
            return None
        folder = Path(path).expanduser()
        if not folder.is_absolute() or not folder.is_dir():
            raise InputError(f"--s3-bucket {one_line(text)}: no such folder; name it by its full path")
        return cls(str(folder))

    def __str__(self):
        return self.path

    def keys(self, prefix):
        """All files below a prefix, by key, each as a Tar."""
        root, found = Path(self.path), []
        with _errors(self.path):
            start = root / prefix.rpartition("/")[0].lstrip("/")
            for place, _, names in os.walk(start, onerror=_fail, followlinks=True):
                for path in (Path(place) / name for name in names):
                    key = path.relative_to(root).as_posix()
                    if key.startswith(prefix) and path.is_file():
                        found.append(_listed(key, path.stat()))
        return sorted(found)

    def open(self, tar):
        """A Tar as a file; InputError if it is unreadable, or not as it was listed."""
        return _File(Path(self.path) / tar.key, tar)

    def start_of(self, tar, size):
        """The first bytes of a Tar, so many or fewer."""
        with self.open(tar) as file:
            return file.read(size)

    def read(self, key):
        """One file as bytes."""
        with _errors(Path(self.path) / key):
            return (Path(self.path) / key).read_bytes()


class _File(io.FileIO):
    def __init__(self, path, tar):
        self._path, self._tar = path, tar
        with _errors(path):
            super().__init__(path)
        self.seek(0)

    def read(self, size=-1):
        with _errors(self._path):
            data = super().read(-1 if size is None else size)
            if _listed(self._tar.key, os.fstat(self.fileno())) != self._tar:
                raise InputError(
                    f"{one_line(self._path)}: has changed since it was listed: start again"
                )
        return data


def _listed(key, stat):
    return Tar(key, f"{stat.st_size}-{stat.st_mtime_ns}", stat.st_size)


def _fail(error):
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _errors(path):
    try:
        yield
    except OSError as error:
        hint = "check its name and rights, and that every node sees the folder"
        raise InputError(
            f"{one_line(error.filename or path)}: {error.strerror or error}; {hint}"
        ) from error
