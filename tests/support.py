"""What tests, benchmarks and the demo share: an S3 server on loopback, buckets, pictures and tars."""

import contextlib
import io
import socket
import subprocess
import sys
import tarfile
import time

import boto3
import numpy as np
from botocore.config import Config
from PIL import Image, ImageDraw


def draw_image(label, rng, size=(320, 280)):
    """A picture of a class: shapes of the class's hue and kind, at random places, on a noisy ground."""
    width, height = size
    ground = rng.integers(0, 120, 3) + rng.integers(0, 40, (height, width, 3))
    image = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    hue = Image.new("HSV", (1, 1), (label % 10 * 25, 230, 230)).convert("RGB").getpixel((0, 0))
    for _ in range(12):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(20, 60)
        box = (x - r, y - r, x + r, y + r)
        shape = draw.rectangle if label % 2 else draw.ellipse
        shape(box, fill=tuple(np.clip(np.add(hue, rng.integers(-25, 25, 3)), 0, 255).tolist()))
    return image


def encode(image, kind, **options):
    """An image as bytes of a format that Pillow writes."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def jpeg(image, quality=85):
    """An image as JPEG bytes."""
    return encode(image, "JPEG", quality=quality)


def make_tar(files):
    """A dict of name -> bytes as the bytes of a tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def free_port():
    """A port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3_server(log=subprocess.DEVNULL):
    """Run moto's S3 server as a process on a free port of loopback; yields its environment."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto's S3 server does not start")
            time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait()


def s3_client(environment):
    """A boto3 S3 client of the server that `s3_server` runs."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"mode": "standard"}),
    )


def fill_bucket(s3, bucket, images_per_class, num_classes=10):
    """Put class tars and train.txt into a new bucket, laid out like ImageNet's."""
    s3.create_bucket(Bucket=bucket)
    rng, lines = np.random.default_rng(0), []
    for label in range(num_classes):
        wnid = f"n{1500000 + label:08d}"
        names = [f"{wnid}_{number}.JPEG" for number in range(images_per_class)]
        files = {name: jpeg(draw_image(label, rng)) for name in names}
        s3.put_object(Bucket=bucket, Key=f"ILSVRC2012_img_train/{wnid}.tar", Body=make_tar(files))
        lines += [f"{wnid}/{name} {label}" for name in names]
    s3.put_object(Bucket=bucket, Key="train.txt", Body="\n".join(lines).encode())
