"""The trained network for use elsewhere, in a folder or `s3://bucket/prefix`."""

import shutil
import tempfile
from pathlib import Path

from machinery.errors import InputError
from machinery.storage.places import open_place, write_errors

FLAG = "--export-dir"
MODEL = "saved_model.pb"  # an exported network is there once this file is
MARK = "exported-by-driver"  # the file that says that the rest is this program's
SCRATCH = ".export-"  # how the folder's name begins in which one is written
NAMES = b"serving_default", b"images", b"probabilities", b"conv1/kernel"  # that are in an export


class SavedModel:
    """A place for the exported network, which is there in one piece or not at all."""

    def __init__(self, place):
        """Name where it goes; InputError if that cannot be written or holds another program's model."""
        mark, ours = rf"{MARK}|{SCRATCH}.*", f"{MODEL}|variables.*|fingerprint.pb"
        self._folder = open_place(FLAG, place, mark, ours, unmarked=_is_export)
        self.place = self._folder and self._folder.place
        for killed in self._folder.path.glob(f"{SCRATCH}*") if place else ():
            shutil.rmtree(killed, ignore_errors=True)

    def write(self, network, mean, keep=False):
        """Export an AlexNet, whose images were centred by a mean image float32 [256, 256, 3].

        InputError if that fails, or it is to `keep` an older export. The old saved_model.pb goes first,
        and the new one comes last: nobody loads the graph of one with the weights of the other.
        """
        folder = self._folder.path  # which stays, as it can be a mount point
        with write_errors(FLAG, self.place):
            if keep and MODEL in self._folder.names():
                raise InputError(f"{self.place} keeps that of an earlier run")
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
                new = Path(scratch) / "new"
                network.export(str(new), mean)
                (folder / MARK).write_text("driver.py may replace what it has exported here.\n")
                self._folder.upload(MARK)
                self._folder.delete(MODEL)
                for entry in sorted(new.iterdir(), key=lambda path: path.name == MODEL):
                    there = folder / entry.name
                    if there.exists():
                        there.rename(new.with_name(f"old-{entry.name}"))
                    entry.rename(there)
                    for file in sorted(there.rglob("*")) if there.is_dir() else [there]:
                        self._folder.upload(file.relative_to(folder).as_posix())


def _is_export(folder):
    """Whether a model without a mark is one that this program has exported before it had marks."""
    if MODEL not in folder.names():
        return False
    folder.download(MODEL)
    model = (folder.path / MODEL).read_bytes()
    return all(name in model for name in NAMES)
