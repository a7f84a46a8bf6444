"""Stores as they answer: credentials that rotate or come late, "slow down", no ETags, checksums."""

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import imagenet
from machinery import results
from machinery.errors import InputError
from machinery.storage import places
from machinery.storage import s3 as reading
from machinery.storage.checkpoints import Checkpoints
from machinery.storage.s3 import Tar
from tests.fault_proxy import fault_proxy
from tests.nodes import Nodes
from tests.support import ITERATIONS, assert_clean, make_tar, photo, train_elsewhere

import pytest


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy between boto3 and moto's server."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def no_keys(s3, tmp_path, monkeypatch):
    """An environment without credentials; a function that sets variables of it, and returns all."""
    environment = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_EC2_METADATA_DISABLED": "true"}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    environment |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}

    def change(**variables):
        environment.update(variables)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return environment

    change()
    return change


@contextlib.contextmanager
def serving(answer):
    """A server for what moto does not do: `answer` gives status, headers and body of a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the name is BaseHTTPRequestHandler's
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


# ---- credentials


def log_in(folder, proxy, access_key):
    """From here on, these are the only credentials that are taken, and those of the user's file."""
    proxy.access_keys = [access_key]
    lines = f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = x\n"
    (folder / "credentials").write_text(lines)


def test_a_run_in_which_credentials_expire_twice(s3, photos, bucket, proxy, no_keys, tmp_path):
    """While two processes load tar after tar, and between two saves."""
    log_in(tmp_path, proxy, "first")
    proxy.faults["GET", "n01500004.tar"] = iter([partial(log_in, tmp_path, proxy, "second")])
    place = f"s3://{bucket}/runs/1"
    settings = ["CHECKPOINT_EVERY=1", "PAUSES=[(5, 'apply')]", f"NOTES='{tmp_path}'"]
    environment = no_keys(AWS_ENDPOINT_URL=proxy.url)
    with (
        contextlib.closing(Nodes(2, others=0, cpus=0, memory=2 * 10**9)) as nodes,
        train_elsewhere(photos, place, nodes.address, *settings, environment=environment) as run,
    ):
        with run.paused(5, "apply"):
            log_in(tmp_path, proxy, "third")
        assert run.wait() == 0, run.output()
    assert " not saved" not in run.output()
    assert_clean(run.output())
    assert Checkpoints(place).start().facts.iteration == ITERATIONS
    refused = [request for request in proxy.requests if request.fault == (400, "ExpiredToken")]
    assert any(request.key.endswith(".tar") for request in refused)
    assert any(request.path.startswith(f"/{bucket}") for request in refused)


CODES = [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (400, "TokenRefreshRequired")]


@pytest.mark.parametrize("refusal", CODES)
def test_credentials_that_are_refused_are_looked_up_again(
    s3, bucket, proxy, no_keys, tmp_path, refusal
):
    """In a listing, a file and a save, each with a client that has used the old ones."""
    log_in(tmp_path, proxy, "first")
    s3.put_object(Bucket=bucket, Key="train.txt", Body=b"a.JPEG 1")
    source, folder = imagenet.source_of(bucket), places.S3Folder(f"s3://{bucket}/x")
    (folder.path / "name").write_text("a")
    folder.upload("name")
    tar = Tar("train.txt", s3.head_object(Bucket=bucket, Key="train.txt")["ETag"], 8)
    with contextlib.closing(source.open(tar)) as file:
        assert file.read(1) == b"a"
    log_in(tmp_path, proxy, "second")
    for method, key in ("GET", bucket), ("GET", "train.txt"), ("PUT", "name"):
        proxy.faults[method, key] = iter([refusal])
    assert [tar.key for tar in source.keys("train")] == ["train.txt"]
    with contextlib.closing(source.open(tar)) as file:
        assert file.read() == b"a.JPEG 1"
    assert source.read("train.txt") == b"a.JPEG 1"
    folder.upload("name")
    assert folder.names() == ["name"]


def test_credentials_that_stay_refused(bucket, proxy, no_keys, tmp_path):
    log_in(tmp_path, proxy, "first")
    proxy.access_keys = ["other"]
    with pytest.raises(InputError) as caught:
        list(imagenet.source_of(bucket).keys(""))
    assert str(caught.value).startswith(f"s3://{bucket}: An error occurred (ExpiredToken)")
    assert str(caught.value).endswith("; refresh the credentials")


def process(folder, stale):
    """A `credential_process` whose credentials are stale so many times."""
    given = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c"}
    answers = [given | {"Expiration": f"{year}-01-01T00:00:00Z"} for year in (2020, 2100)]
    program = folder / "process.py"
    program.write_text(
        "import pathlib\n"
        f"calls = pathlib.Path({str(folder / 'calls')!r})\n"
        "calls.open('a').write('.')\n"
        f"print({list(map(json.dumps, answers))!r}[calls.stat().st_size > {stale}])\n"
    )
    (folder / "config").write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")


def test_a_process_that_hands_out_stale_credentials_for_a_while(s3, bucket, no_keys, tmp_path):
    process(tmp_path, stale=4)
    s3.put_object(Bucket=bucket, Key="a.tar", Body=b"")
    assert len(imagenet.list_tars(imagenet.source_of(bucket), "")[0]) == 1


@pytest.mark.parametrize("output", ["stale", "print([])"])
def test_a_process_that_hands_out_nothing_usable(bucket, no_keys, tmp_path, output):
    process(tmp_path, stale=10**6)
    if output != "stale":
        (tmp_path / "process.py").write_text(output)
    no_keys(AWS_MAX_ATTEMPTS="1")  # ten seconds
    with pytest.raises(InputError) as caught:
        list(imagenet.source_of(bucket).keys(""))
    line = str(caught.value)
    assert line.startswith(f"s3://{bucket}: ") and line.isprintable() and "run `aws configure`" in line
    assert output != "stale" or "still expired" in line


@pytest.mark.parametrize("first", ["slow", "an error", "nothing"])
def test_a_metadata_service_whose_first_answers_are_no_use(s3, bucket, no_keys, first):
    role = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Code": "Success"}
    role |= {"Expiration": "2100-01-01T00:00:00Z"}
    bodies = {"token": b"t", "security-credentials": b"role", "role": json.dumps(role).encode()}
    asked = []

    def answer(request):
        asked.append(request.path)
        if first == "slow" and len(asked) == 1:
            time.sleep(1.5)
        elif first != "slow" and len(asked) <= 5:
            return (500 if first == "an error" else 200), {}, b""
        return 200, {}, bodies[request.path.rstrip("/").rpartition("/")[2]]

    s3.put_object(Bucket=bucket, Key="a.tar", Body=b"")
    with serving(answer) as url:
        no_keys(AWS_EC2_METADATA_SERVICE_ENDPOINT=url, AWS_EC2_METADATA_DISABLED="false")
        assert len(imagenet.list_tars(imagenet.source_of(bucket), "")[0]) == 1
    assert len(asked) >= 3


# ---- slow down


def test_a_store_that_says_slow_down_is_asked_again(proxy, s3, bucket, capsys):
    """Four times, in all the ways to say it; a listing and a save."""
    ways = [(503, "SlowDown"), (429, "TooManyRequests"), (400, "Throttling"), (503, "SlowDownRead")]
    s3.put_object(Bucket=bucket, Key="a.tar", Body=b"")
    proxy.faults["GET", bucket] = iter(ways)
    with results.Report().lines():
        assert len(imagenet.list_tars(imagenet.source_of(bucket), "")[0]) == 1
    said = "S3 answers SlowDownRead: it is asked again for some minutes\n"
    assert capsys.readouterr().out == said
    faults = [request.fault for request in proxy.requests if request.key == bucket]
    assert faults == [*ways, None]


@pytest.mark.parametrize("code", ["SlowDown", "Throttling"])
def test_slow_down_is_borne_for_minutes(code):
    """By the pauses of a run's own limits, of which the tests above and below show that both hold."""
    response = SimpleNamespace(status_code=503), {"Error": {"Code": code}}
    pauses = [reading._again(None, 3, reading.SLOWLY, response, n) for n in range(1, reading.SLOWLY)]
    assert 110 < sum(pauses) < 280
    assert reading._again(None, 3, reading.SLOWLY, response, reading.SLOWLY) is None


# ---- no ETags


def test_a_store_without_etags(monkeypatch, capsys):
    tar = make_tar({"a.JPEG": photo()})
    bodies, headers = {"a.tar": tar, "train.txt": b"a.JPEG 1"}, []

    def answer(request):
        headers.append(dict(request.headers))
        url = urlsplit(request.path)
        if key := url.path.strip("/").partition("/")[2]:
            start, _, stop = request.headers.get("Range", "bytes=0-99999999")[6:].partition("-")
            return (
                206,
                {"Content-Length": str(len(bodies[key]))} if request.command == "HEAD" else {},
                (bodies[key][int(start) : int(stop) + 1]),
            )
        prefix = parse_qs(url.query).get("prefix", [""])[0]
        sizes = {key: len(body) for key, body in bodies.items() if key.startswith(prefix)}
        listed = [f"<Contents><Key>{k}</Key><Size>{sizes[k]}</Size></Contents>" for k in sizes]
        return 200, {}, f"<ListBucketResult>{''.join(listed)}</ListBucketResult>".encode()

    with serving(answer) as url, results.Report().lines():
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        source = imagenet.source_of("b")
        data = imagenet.find(source, "a", "train.txt")
        assert data.tars == [Tar("a.tar", None, len(tar))]
        assert imagenet.read_labels(source, "train.txt", 10) == {"a.JPEG": 1}
        images, *_ = imagenet.load_tarfile(source, data.tars[0], 0, [64, 64], "pixels")
    assert len(images) == 1 and not any("If-Match" in each for each in headers)
    unseen = "tars are listed without ETags, so a tar that changes is not noticed"
    assert f"s3://b: {unseen}\n" in capsys.readouterr().out


# ---- botocore's own settings


@pytest.mark.parametrize("where", ["environment", "config file"])
def test_checksums_that_the_user_wants(s3, bucket, proxy, tmp_path, monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "WHEN_SUPPORTED")
    else:
        (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_supported\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    folder = places.S3Folder(f"s3://{bucket}")
    (folder.path / "name").write_text("a")
    folder.upload("name")
    [put] = [request for request in proxy.requests if request.method == "PUT"]
    assert "x-amz-checksum-crc32" in " ".join([*put.headers, *put.headers.values()]).lower()


def test_a_bucket_that_demands_checksums(bucket, proxy):
    why = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests"
    proxy.always["PUT"] = (400, "InvalidRequest", why)
    with pytest.raises(InputError, match="; set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_SUPPORTED$"):
        places.S3Folder(f"s3://{bucket}").check()


@pytest.mark.parametrize("most", [1, 2])
def test_attempts_that_the_user_has_set(bucket, proxy, monkeypatch, most):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(most))
    proxy.always["GET"] = "503"
    with pytest.raises(InputError, match=r"\(SlowDown\)"):
        list(imagenet.source_of(bucket).keys(""))
    assert Counter(request.fault for request in proxy.requests) == {"503": most}
