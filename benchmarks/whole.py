"""A tenth of ImageNet from the command to the first iteration, with images stored in each form.

    python benchmarks/whole.py FOLDER [--tars 100] [--images 1300] [--rounds 7] [--forms jpeg pixels]
    python benchmarks/whole.py FOLDER --tars 1 --images 90000   # one tar of 10 GB
    sudo python benchmarks/whole.py FOLDER --tars 10 --store 320 --cold --iterations 20
    python benchmarks/whole.py FOLDER --tars 300 --images 100 --rounds 8 --iterations 3 --node-dies

FOLDER is laid out like the bucket: tars of photos below ILSVRC2012_img_train/. Up to ten tars are made
of its photos, each of so many images, and an S3 server on loopback shows them under as many keys as
--tars says. driver.py runs for some iterations, as a user starts it but for its form and rounds. With
--store, the object store has so many MB; with --cold, the page cache is dropped every second. With
--node-dies, there are two nodes of one worker; after the first iteration one of them is killed with all
that lies there, and another one comes.
"""

import argparse
import io
import os
import re
import statistics
import tarfile
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from measuring import private_memory, ray_workers, read_photos, run_apart

BUCKET, TARS = "whole", 10  # different ones, on disk


class Handler(BaseHTTPRequestHandler):
    """An S3 server that lists and reads `objects`, a dict of key -> (path, ETag), of one bucket."""

    protocol_version, objects = "HTTP/1.1", {}

    def do_GET(self):  # noqa: N802, http.server wants this name
        url = urlsplit(self.path)
        key = url.path.removeprefix(f"/{BUCKET}").removeprefix("/")
        if key not in self.objects:  # a listing
            [prefix] = parse_qs(url.query).get("prefix", [""])
            self._send(200, self._listing(prefix), {"Content-Type": "application/xml"})
            return
        path, etag = self.objects[key]
        size, headers = path.stat().st_size, {"ETag": etag, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (
            (int(wanted[1]), min(int(wanted[2] or size), size - 1)) if wanted else (0, size - 1)
        )
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with path.open("rb") as file:
            file.seek(first)
            self._send(206 if wanted else 200, file.read(last + 1 - first), headers)

    do_HEAD = do_GET  # noqa: N815

    def _listing(self, prefix):
        rows = [
            f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{path.stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, (path, etag) in sorted(self.objects.items())
            if key.startswith(prefix)
        ]
        name = f"<Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{name}{''.join(rows)}</ListBucketResult>".encode()

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *_):
        pass


def make_objects(folder, tars, images, place):
    """What the server shows, the tars and their labels, as files in the folder `place`."""
    photos, objects, lines = read_photos(folder), {}, []
    for number in range(min(TARS, tars)):
        path = place / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(images):
                photo, info = photos[(number * images + i) % len(photos)], tarfile.TarInfo()
                info.name, info.size = f"n{number:08}_{i}.JPEG", len(photo)
                tar.addfile(info, io.BytesIO(photo))
                lines.append(f"x/{info.name} {number}")
        for alias in range(number, tars, TARS):
            objects[f"ILSVRC2012_img_train/n{alias:08}.tar"] = path, f'"{number:032x}"'
    (place / "train.txt").write_text("\n".join(lines))
    return objects | {"train.txt": (place / "train.txt", f'"{"f" * 32}"')}


def drive(url, form, args):
    """Run driver.py; returns a dict of moment -> seconds since its start, and what it took.

    The first iteration computes; its end is that of loading, labelling and shuffling, and one step.
    "without the node" are the seconds from a node's death to the end of the next iteration.
    """
    start, moments = time.monotonic(), {"MB of a task": 0, "MB of the driver": 0}
    if args.store:  # Ray reads it when it loads
        os.environ["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"] = str(args.store * 10**6)
    import driver
    from machinery.results import Report
    from tests.nodes import Cluster, kill, raylet_of

    import ray
    from ray._private.internal_api import memory_summary  # what `ray memory --stats-only` prints

    class Noted(Report):
        def say(self, line):
            super().say(line)
            last_round = f"{args.rounds} of {args.rounds} done"
            for text, what in ("images in", "loaded"), (last_round, "shuffled"):
                if text in line:
                    moments[what] = time.monotonic() - start

        def iteration(self, iteration, *numbers):
            super().iteration(iteration, *numbers)
            now = time.monotonic() - start
            if "first iteration" in moments:
                speeds.append(numbers[1] / (now - moments["last iteration"]))
                moments["images/s"] = statistics.median(speeds)
            moments.setdefault("first iteration", now)
            moments["MB spilled"] = spilled()
            if args.node_dies and iteration == 1:
                moments["without the node"] = now - moments["last iteration"]
            moments["last iteration"] = time.monotonic() - start
            if args.node_dies and iteration == 0:
                [other] = machines.worker_nodes
                kill(raylet_of(other))
                machines.remove_node(other, allow_graceful=False)
                machines.add_node(**node)

    def watch_memory():
        while True:
            note("MB of the driver", [os.getpid()])
            if "first iteration" not in moments:
                note("MB of a task", ray_workers(["Worker"]))
            elif args.node_dies and "without the node" not in moments:
                note("MB of a task without the node", ray_workers(["Worker"]))
            time.sleep(1)

    def note(what, pids):
        moments[what] = max([moments.get(what, 0), *map(private_memory, pids)])

    def drop_caches():
        while True:
            Path("/proc/sys/vm/drop_caches").write_text("1")
            time.sleep(1)

    def spilled():
        text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
        return sum(map(int, re.findall(r"Spilled (\d+) MiB", text)))

    settings = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "RAY_ADDRESS": "local"}
    os.environ.update(settings, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    if args.node_dies:
        node = {"num_cpus": 1, "object_store_memory": (args.store or 2000) * 10**6}
        machines = Cluster(initialize_head=True, head_node_args=node)
        machines.add_node(**node)
        os.environ["RAY_ADDRESS"] = machines.address
    driver.STORED, driver.SHUFFLE_ROUNDS = form, args.rounds
    speeds = []
    Thread(target=watch_memory, daemon=True).start()
    if args.cold:
        Thread(target=drop_caches, daemon=True).start()
    limit = ["--iterations", str(args.iterations)]
    flags = ["--s3-bucket", BUCKET, "--key-prefix", "ILSVRC2012_img_train/", *limit]
    driver.main(flags, report=Noted())
    return moments


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time a tenth of ImageNet up to the first iteration.")
    parser.add_argument("folder")
    parser.add_argument("--tars", type=int, default=100)
    parser.add_argument("--images", type=int, default=1300, help="of a tar")
    parser.add_argument("--rounds", type=int, default=7, help="of the shuffle")
    parser.add_argument("--forms", nargs="+", default=["jpeg", "pixels"], choices=["jpeg", "pixels"])
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--store", type=int, help="MB of the object store")
    parser.add_argument("--cold", action="store_true", help="drop the page cache every second")
    parser.add_argument("--node-dies", action="store_true", help="one of two, after an iteration")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        Handler.objects = make_objects(args.folder, args.tars, args.images, Path(place))
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for form in args.forms:
            moments = run_apart(drive, url, form, args)
            print(form, ", ".join(f"{k} {value:.1f}" for k, value in moments.items()), flush=True)


if __name__ == "__main__":
    main()
