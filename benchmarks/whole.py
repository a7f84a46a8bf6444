"""A tenth of ImageNet from the command to the first iteration, with images stored in each form.

    python benchmarks/whole.py FOLDER [--tars 100] [--images 1300] [--rounds 7] [--forms jpeg pixels]

FOLDER is laid out like the bucket: tars of photos below ILSVRC2012_img_train/. Ten tars are made of its
photos, each of so many images, and an S3 server on loopback shows them under as many keys as --tars
says. driver.py runs for two iterations, as a user starts it but for its form and rounds.
"""

import argparse
import os
import re
import tarfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from measuring import private_memory, run_apart

from tests.support import make_tar

BUCKET, TARS = "whole", 10  # different ones


class Aliases(ThreadingHTTPServer):
    """An S3 server that only lists and reads: a dict of key -> (bytes, ETag) in one bucket."""

    daemon_threads = True

    def __init__(self, objects):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.url = objects, f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):  # noqa: N802, http.server wants this name
        self.do_GET()

    def do_GET(self):  # noqa: N802, http.server wants this name
        url = urlsplit(self.path)
        key = url.path.removeprefix(f"/{BUCKET}").removeprefix("/")
        if not key:
            [prefix] = parse_qs(url.query).get("prefix", [""])
            self._send(200, self._listing(prefix), {"Content-Type": "application/xml"})
        elif key not in self.server.objects:
            self._send(404, b"", {})
        else:
            body, etag = self.server.objects[key]
            status, headers = 200, {"ETag": etag, "Accept-Ranges": "bytes"}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, memoryview(body)[first : last + 1]
            self._send(status, body, headers)

    def _listing(self, prefix):
        rows = [
            f"<Contents><Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag><Size>{len(body)}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, (body, etag) in sorted(self.server.objects.items())
            if key.startswith(prefix)
        ]
        name = f"<Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{name}{''.join(rows)}</ListBucketResult>".encode()

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def make_objects(folder, tars, images):
    """What the server shows: the tars and their labels."""
    photos = []
    for path in sorted(Path(folder, "ILSVRC2012_img_train").glob("*.tar")):
        with tarfile.open(path) as tar:
            photos += [tar.extractfile(member).read() for member in tar if member.isreg()]
    objects, lines = {}, []
    for number in range(TARS):
        names = [f"n{number:08}_{i}.JPEG" for i in range(images)]
        some = {name: photos[(number * images + i) % len(photos)] for i, name in enumerate(names)}
        body = make_tar(some)
        objects |= {
            f"ILSVRC2012_img_train/n{alias:08}.tar": (body, f'"{number:032x}"')
            for alias in range(number, tars, TARS)
        }
        lines += [f"x/{name} {number}" for name in names]
    return objects | {"train.txt": ("\n".join(lines).encode(), f'"{"f" * 32}"')}


def drive(url, form, rounds):
    """Run driver.py; returns a dict of moment -> seconds since its start, and what it took."""
    start, moments = time.monotonic(), {}
    import ray

    import driver
    from results import Report

    class Noted(Report):
        def say(self, line):
            super().say(line)
            for text, what in ("images in", "loaded"), (f"{rounds} of {rounds} done", "shuffled"):
                if text in line:
                    moments[what] = time.monotonic() - start

        def iteration(self, iteration, *numbers):
            super().iteration(iteration, *numbers)
            moments.setdefault("first iteration", time.monotonic() - start)
            moments["driver's MB"] = private_memory(os.getpid())
            moments["MB spilled"] = spilled()

    def spilled():
        text = ray._private.internal_api.memory_summary(stats_only=True)
        return sum(map(int, re.findall(r"Spilled (\d+) MiB", text)))

    settings = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "RAY_ADDRESS": "local"}
    os.environ.update(settings, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    driver.STORED, driver.SHUFFLE_ROUNDS = form, rounds
    flags = ["--s3-bucket", BUCKET, "--key-prefix", "ILSVRC2012_img_train/", "--iterations", "2"]
    if status := driver.main(flags, report=Noted()):
        raise RuntimeError(f"driver.py ended with {status}")
    return moments


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time a tenth of ImageNet up to the first iteration.")
    parser.add_argument("folder")
    parser.add_argument("--tars", type=int, default=100)
    parser.add_argument("--images", type=int, default=1300, help="of a tar")
    parser.add_argument("--rounds", type=int, default=7, help="of the shuffle")
    parser.add_argument("--forms", nargs="+", default=["jpeg", "pixels"], choices=["jpeg", "pixels"])
    args = parser.parse_args()
    objects = make_objects(args.folder, args.tars, args.images)
    server = Aliases(objects)
    for form in args.forms:
        moments = run_apart(drive, server.url, form, args.rounds)
        print(form, ", ".join(f"{what} {value:.1f}" for what, value in moments.items()), flush=True)


if __name__ == "__main__":
    main()
