"""A tenth of ImageNet from the command to the first iteration, with images stored in each form.

    python benchmarks/whole.py FOLDER [--tars 100] [--images 1300] [--rounds 7] [--forms jpeg pixels]
    python benchmarks/whole.py FOLDER --tars 1 --images 90000   # one tar of 10 GB
    sudo python benchmarks/whole.py FOLDER --tars 10 --store 320 --cold --iterations 20
    python benchmarks/whole.py FOLDER --tars 300 --images 100 --rounds 8 --iterations 3 --node-dies

FOLDER is laid out like the bucket: tars of photos below ILSVRC2012_img_train/. Up to ten tars are made
of its photos, each of so many --images, and an S3 server on loopback shows them under as many keys as
--tars says. driver.py runs for some iterations, as a user starts it but for its form and the --rounds
of its shuffle. With --store, the object store has so many MB; with --cold, the page cache is dropped
every second. With --node-dies, there are two nodes of one worker; after the first iteration one of them
is killed with all that lies there, and another one comes.
"""

import io
import logging
import os
import re
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from threading import Thread

from measuring import TRAIN, private_memory, read_flags, read_photos, run_apart

from tests.support import title, titled

import flask
from werkzeug.serving import make_server

BUCKET, TARS = "whole", 10  # different ones, on disk
LISTED = '<Contents><Key>{}</Key><ETag>"{}"</ETag><Size>{}</Size></Contents>'


def serve(folder):
    """Serve the files of a folder as those of one bucket of S3, on loopback: its URL."""
    app = flask.Flask("s3")

    @app.get(f"/{BUCKET}")
    def listing():
        keys = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))]
        found = [key for key in keys if key.startswith(flask.request.args.get("prefix", ""))]
        files = [(key, (folder / key).stat()) for key in found]
        rows = [LISTED.format(key, file.st_ino, file.st_size) for key, file in files]
        return f"<ListBucketResult>{''.join(rows)}</ListBucketResult>"

    @app.get(f"/{BUCKET}/<path:key>")
    def read(key):
        with (folder / key).open("rb") as file:
            wanted, stat = flask.request.range, os.fstat(file.fileno())
            first, end = wanted.ranges[0] if wanted else (0, stat.st_size)
            file.seek(first)
            status, etag = 206 if wanted else 200, {"ETag": f'"{stat.st_ino}"'}
            return flask.Response(file.read(end - first), status, etag)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it says what is asked
    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def fill(place, folder, tars, images):
    """Put tars of a folder's photos, and their labels, into a new folder; only TARS of them differ."""
    photos, lines = read_photos(folder), []
    (place / TRAIN).mkdir()
    for number in range(tars):
        path = place / TRAIN / f"n{number:08}.tar"
        if number >= TARS:
            path.hardlink_to(place / TRAIN / f"n{number % TARS:08}.tar")
            continue
        with tarfile.open(path, "w") as tar:
            for i in range(images):
                photo, info = photos[(number * images + i) % len(photos)], tarfile.TarInfo()
                info.name, info.size = f"n{number:08}_{i}.JPEG", len(photo)
                tar.addfile(info, io.BytesIO(photo))
                lines.append(f"x/{info.name} {number}")
    (place / "train.txt").write_text("\n".join(lines))


def drive(url, form, args):
    """Run driver.py; returns a dict of moment -> seconds since its start, and what it took.

    The first iteration computes; its end is that of loading, labelling and shuffling, and one step.
    "without the node" are the seconds from a node's death to the end of the next iteration.
    """
    start, moments, speeds = time.monotonic(), {}, []
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
            text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
            moments["MB spilled"] = sum(map(int, re.findall(r"Spilled (\d+) MiB", text)))
            if args.node_dies and iteration == 1:
                moments["without the node"] = now - moments["last iteration"]
            moments["last iteration"] = time.monotonic() - start
            if args.node_dies and iteration == 0:
                [other] = machines.worker_nodes
                kill(raylet_of(other))
                machines.remove_node(other, allow_graceful=False)
                machines.add_node(**node)

    def note(what, pids):
        moments[what] = max([moments.get(what, 0), *map(private_memory, pids)])

    def every_second():
        while True:
            below = titled(os.getpid(), "ray::")
            tasks = [each.pid for each in below if not title(each).startswith("ray::Worker")]
            note("MB of the driver", [os.getpid()])
            if "first iteration" not in moments:
                note("MB of a task", tasks)
            elif args.node_dies and "without the node" not in moments:
                note("MB of a task without the node", tasks)
            if args.cold:
                Path("/proc/sys/vm/drop_caches").write_text("1")
            time.sleep(1)

    settings = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= settings | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    if args.node_dies:
        node = {"num_cpus": 1, "object_store_memory": (args.store or 2000) * 10**6}
        machines = Cluster(initialize_head=True, head_node_args=node)
        machines.add_node(**node)
        os.environ["RAY_ADDRESS"] = machines.address
    driver.STORED, driver.SHUFFLE_ROUNDS = form, args.rounds
    Thread(target=every_second, daemon=True).start()
    flags = ["--s3-bucket", BUCKET, "--key-prefix", TRAIN, "--iterations", str(args.iterations)]
    driver.main(flags, report=Noted())
    return moments


def main():
    """Measure and print."""
    flags = {"tars": 100, "images": 1300, "rounds": 7, "forms": ["jpeg", "pixels"], "iterations": 2}
    args = read_flags(__doc__, "folder", **flags, store=int, cold=False, node_dies=False)
    with tempfile.TemporaryDirectory() as place:
        fill(Path(place), args.folder, args.tars, args.images)
        url = serve(Path(place))
        for form in args.forms:
            moments = run_apart(drive, url, form, args)
            print(form, ", ".join(f"{k} {value:.1f}" for k, value in moments.items()), flush=True)


if __name__ == "__main__":
    main()
