"""One S3 server and one Ray for each process of pytest; buckets and the network are each test's own."""

import os
import shutil
import tempfile
import uuid

# TensorFlow leaves Keras out then, and loading it takes a sixth less.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# Ray writes down clusters here: tests do not see this machine's, and its other runs do not see theirs.
RAY_FOLDER = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")

import driver
from machinery.cluster import joining, nodes, tasks
from tests import support
from tests.fault_proxy import fault_proxy

import pytest
import ray

LONGEST = "test_nodes.py", "test_saving.py"


def pytest_collection_modifyitems(items):
    """The longest files come first: two processes that share the files end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_unconfigure():
    shutil.rmtree(RAY_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def s3():
    """A client of moto's S3 server, a process of its own; the environment points there too."""
    with support.s3_server() as environment:
        os.environ.update(environment)
        os.environ.pop("AWS_PROFILE", None)
        yield support.s3_client(environment)


@pytest.fixture(scope="session")
def one_ray(s3):
    """The address of a Ray of 2 CPUs and 2 GPUs that are none, which knows the S3 server."""
    os.environ["RAY_ADDRESS"] = "local"  # not one that runs on this machine for something else
    settings = {"object_store_memory": 500 * 2**20, "_system_config": support.WARM}
    with joining.join(driver.runtime_env(), None, num_cpus=2, num_gpus=2, **settings):
        tasks.limits.update(task=300, wait=300)
        nodes.places.first_look("functions")
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def bucket(s3):
    """The name of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def said(caplog):
    """A function that gives the lines of the log so far."""
    caplog.set_level("INFO", "driver")
    return lambda: caplog.messages


@pytest.fixture
def proxy(s3, monkeypatch):
    """A FaultProxy between boto3 and the S3 server."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(scope="session")
def undisturbed(one_ray, photos, tmp_path_factory):
    """Checksums of a run of noting workers that nothing disturbs, with 2 mini-batches an iteration."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        support.thin_constants(patch)
        assert support.train_here(photos, folder, actor=support.noting_worker(folder)) == 0
    return support.checksums(folder)


@pytest.fixture
def thin(monkeypatch):
    """driver.py with the thin network, 10 classes and an accuracy every second iteration."""
    support.thin_constants(monkeypatch)
    return driver


@pytest.fixture(scope="session")
def photos(s3):
    """A bucket of 10 classes of 12 images each, as driver.py's defaults expect it."""
    support.fill_bucket(s3, "photos", images_per_class=12)
    return "photos"
