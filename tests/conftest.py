"""One S3 server and one Ray for the whole session; buckets and the network are each test's own."""

import hashlib
import os
import uuid

import pytest
import ray

import demo
import driver
import functions
from alexnet import tf

# A network so thin that a step takes milliseconds; its layers are those of AlexNet.
THIN = (
    ("conv", 8, 11, 4, "norm", "pool"),
    ("conv", 8, 5, 1, "norm", "pool"),
    ("conv", 8, 3, 1),
    ("conv", 8, 3, 1),
    ("conv", 8, 3, 1, "pool"),
    ("dense", 32),
    ("dense", 32),
)


@pytest.fixture(scope="session")
def s3():
    """A client of moto's S3 server, a process of its own; the environment points there too."""
    with demo.s3_server() as environment:
        os.environ.update(environment)
        os.environ.pop("AWS_PROFILE", None)
        yield demo.s3_client(environment)


@pytest.fixture(scope="session")
def cluster(s3):
    """A Ray of 2 CPUs and 2 GPUs that are none; its processes have the S3 server in the environment."""
    os.environ["RAY_ADDRESS"] = "local"  # not one that runs on this machine for something else
    # Ray ends processes that are idle for a second; here they stay for the next test.
    warm = {"idle_worker_killing_time_threshold_ms": 600_000}
    functions.connect(num_cpus=2, num_gpus=2, object_store_memory=500 * 2**20, _system_config=warm)
    yield
    ray.shutdown()


@pytest.fixture
def bucket(s3):
    """The name of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name


def thin_constants(patch):
    patch.setattr(driver, "LAYERS", THIN)
    patch.setattr(driver, "NUM_CLASSES", 10)
    patch.setattr(driver, "ACCURACY_EVERY", 2)
    patch.setattr(driver, "PRECISION", "float32")  # on any CPU


@pytest.fixture
def thin(monkeypatch):
    """driver.py with the thin network, 10 classes and an accuracy every second iteration."""
    thin_constants(monkeypatch)
    return driver


@pytest.fixture(scope="session")
def photos(s3):
    """A bucket of 10 classes of 12 images each, as driver.py's defaults expect it."""
    demo.fill_bucket(s3, "photos", images_per_class=12)
    return "photos"


def train(bucket, *options):
    return driver.main(["--s3-bucket", bucket, *map(str, options)])


def checksums(folder):
    """SHA-256 of every variable and its momentum in the newest checkpoint."""
    reader = tf.train.load_checkpoint(str(folder))
    names = [name for name in reader.get_variable_to_shape_map() if name != "facts"]
    assert len(names) == 32
    return {name: hashlib.sha256(reader.get_tensor(name).tobytes()).hexdigest() for name in names}
