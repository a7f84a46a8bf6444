"""imagenet.py: listing, loading and decoding over real S3, Ray and image bytes, and the label file."""

import contextlib
import io
import os
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import imagenet
from machinery import ending, results
from machinery.cluster import tasks
from machinery.errors import InputError
from machinery.storage.images import decode_image
from machinery.storage.s3 import Bucket, Tar, s3_location
from tests.support import Screen, decode_tar, draw_image, encode, jpeg, make_tar

import cv2
import numpy as np
import pytest
import ray
import simplejpeg
from PIL import Image, ImageChops

SIZE = [256, 256]


def picture(width=500, height=400):
    """A smooth picture without symmetry: each channel rises in a direction of its own."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x / width, y / height, (x + y) / (width + height)]
    return Image.fromarray((np.stack(channels, -1) * 255).round().astype(np.uint8))


def difference(data, wanted, size=SIZE):
    """Mean absolute difference, grey levels, of a decoded image from Pillow's Lanczos of `wanted`."""
    height, width = size
    lanczos = np.asarray(wanted.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    decoded = decode_image(data, size)
    assert decoded.shape == (height, width, 3) and decoded.dtype == np.uint8
    return np.abs(decoded.astype(int) - lanczos).mean()


def put_tar(s3, bucket, key, names, size=(300, 260)):
    rng = np.random.default_rng(0)
    files = {name: jpeg(draw_image(i, rng, size)) for i, name in enumerate(names)}
    s3.put_object(Bucket=bucket, Key=key, Body=make_tar(files))


# ---- listing


def test_list_has_every_page(s3, bucket):
    keys = [f"train/{number:04}.tar" for number in range(1005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: s3.put_object(Bucket=bucket, Key=key, Body=b""), keys))
    assert s3.list_objects(Bucket=bucket)["IsTruncated"], "all keys fit on one page"
    tars, others = imagenet.list_tars(imagenet.source_of(bucket), "train/")
    assert [tar.key for tar in tars] == keys and others == 0


def test_list_filters_by_prefix_and_leaves_out_what_is_no_tar(s3, bucket):
    keys = ["train/a.tar", "train/b.tar", "train/", "train/b.tar.txt", "train/readme", "other/c.tar"]
    for key in keys:
        s3.put_object(Bucket=bucket, Key=key, Body=key.encode())
    source = imagenet.source_of(bucket)
    tars, others = imagenet.list_tars(source, "train/")
    heads = [s3.head_object(Bucket=bucket, Key=key) for key in keys[:2]]
    assert tars == [Tar(key, head["ETag"], len(key)) for key, head in zip(keys, heads, strict=False)]
    assert others == 3
    assert [tar.key for tar in imagenet.list_tars(source, "train/b")[0]] == ["train/b.tar"]


# ---- loading


def test_load_returns_at_once_with_one_task_a_tar_and_two_tars_a_cpu(one_ray, bucket, monkeypatch):
    tars = [Tar(f"{key}.tar", None, 0) for key in "abcdef"]
    # No node has a gate, so that none of the tasks can run while load_tarfiles_from_s3 does.
    monkeypatch.setattr(tasks, "start", partial(tasks.start, resources={"gate": 1}))
    loaded = imagenet.load_tarfiles_from_s3(imagenet.source_of(bucket), tars, SIZE)
    assert [tar[:3] for tar in loaded[4:]] == [(None, None, None)] * 2  # they wait
    started = [{ref.task_id() for ref in tar[:3]} for tar in loaded[:4]]
    assert [len(ids) for ids in started] == [1] * 4 and len(set.union(*started)) == 4
    for images, *_ in loaded[:4]:
        ray.cancel(images)


def test_load_returns_images_names_and_a_report(one_ray, s3, bucket):
    odd = "train/é +%25 x.tar"
    put_tar(s3, bucket, "train/a.tar", ["n1/n1_1.JPEG", "n1/n1_2.JPEG", "n1/sub/n1_3.JPEG"])
    put_tar(s3, bucket, odd, ["n2_1.JPEG"], size=(100, 700))
    source = imagenet.source_of(bucket)
    tars, _ = imagenet.list_tars(source, "train/")
    loaded = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
    one, other = (ray.get(list(tar[:3])) for tar in loaded)
    images, *rest = one
    assert images.shape == (3, 256, 256, 3) and images.dtype == np.uint8
    report = {"images": 3, "left_out": 0, "named": [], "rest": None}
    assert rest == [["n1/n1_1.JPEG", "n1/n1_2.JPEG", "sub/n1_3.JPEG"], report]
    images, *rest = other
    assert images.shape == (1, 256, 256, 3)
    assert rest == [
        ["é +%25 x/n2_1.JPEG"],
        {"images": 1, "left_out": 0, "named": [], "rest": None},
    ]


def test_images_lie_in_the_order_of_their_names():
    blue = draw_image(1, np.random.default_rng(1), (300, 260))
    tar = make_tar({"grey": jpeg(blue.convert("L")), "blue": jpeg(blue)})
    images, names, _ = decode_tar(tar, SIZE)
    grey, colour = (np.ptp(image, axis=-1).max() for image in images)
    assert names == ["grey", "blue"] and grey == 0 and colour > 50


def test_drivers_endpoint_and_region_reach_the_tasks(one_ray, s3, bucket, monkeypatch):
    put_tar(s3, bucket, "a.tar", ["a.JPEG"])
    elsewhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_DEFAULT_REGION": "eu-north-1"}
    source = imagenet.source_of(bucket)
    tars, _ = imagenet.list_tars(source, "")
    there = {"runtime_env": {"env_vars": elsewhere}}
    monkeypatch.setattr(tasks, "start", partial(tasks.start, **there))
    [loaded] = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
    assert ray.get(loaded.filenames) == ["a/a.JPEG"]


def test_location_is_endpoint_and_region_and_no_credentials(s3, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9999")
    where = {"region_name": "eu-central-1", "endpoint_url": "http://127.0.0.1:9999"}
    ours = {"anonymous": False, "requester_pays": False}
    assert s3_location() == where | ours
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert s3_location() == where | ours | {"endpoint_url": None}


def test_region_of_aws_region(s3, monkeypatch):
    """All of AWS's tools read it, but boto3."""
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert s3_location()["region_name"] == "eu-west-3"


@pytest.mark.parametrize(
    "setting, header, value",
    [
        ({"AWS_NO_SIGN_REQUEST": "YES"}, "Authorization", None),
        ({"AWS_REQUEST_PAYER": "requester"}, "x-amz-request-payer", "requester"),
    ],
)
def test_every_request_for_data_is_anonymous_or_paid(
    s3, bucket, proxy, monkeypatch, setting, header, value
):
    tar = make_tar({"a.JPEG": jpeg(picture())})
    for key, body in ("a.tar", tar), ("train.txt", b"a.JPEG 1"):
        s3.put_object(Bucket=bucket, Key=key, Body=body, ACL="public-read")
    for name, text in setting.items():
        monkeypatch.setenv(name, text)
    source = imagenet.source_of(bucket)
    [tar], _ = imagenet.list_tars(source, "")
    assert imagenet.estimate_images(source, [tar]) > 0
    assert imagenet.read_labels(source, "train.txt", 10) == {"a.JPEG": 1}
    images, *_ = imagenet.load_tarfile(source, tar, 0, SIZE, "pixels")
    assert len(images) == 1
    headers = [request.headers.get(header) for request in proxy.requests]
    assert len(headers) >= 4 and set(headers) == {value}


def test_changed_object_is_noticed_by_its_etag(one_ray, s3, bucket):
    put_tar(s3, bucket, "a.tar", ["a.JPEG"])
    data = imagenet.find(imagenet.source_of(bucket), "", "train.txt")
    put_tar(s3, bucket, "a.tar", ["b.JPEG"])
    loaded = imagenet.load_tarfiles_from_s3(data.source, data.tars, SIZE)
    changed = f"^s3://{bucket}/a.tar: has changed since"
    with pytest.raises(InputError, match=changed) as caught, ending.Stop():
        imagenet.report_loading(data, loaded)
    assert "\n" not in str(caught.value)


def report_all(reports):
    """What is said of a load, in which only the reports of its tasks matter."""
    whole = {"images": 3, "left_out": 0, "named": [], "rest": None}
    loaded = [imagenet.Loaded(None, None, ray.put(whole | report), None) for report in reports]
    tars = [Tar(f"{number:02}\n.tar", None, 0) for number in range(len(loaded))]
    with results.Report().lines():
        imagenet.report_loading(imagenet.DataSet(Bucket("b", {}), "", None, tars), loaded)


@pytest.mark.parametrize("left_out", [0, 7])
def test_report_counts_and_names_what_is_left_out(one_ray, capsys, left_out):
    report_all([{"left_out": left_out, "named": ["x: cut", "y: no image"]}] * 20)
    lines = capsys.readouterr().out.splitlines()
    progress = [line for line in lines if line.startswith("Loading")]
    assert len(progress) == 10 and progress[-1] == "Loading: 20 of 20 tars, 60 images"
    named = [f"s3://b/{i:02} .tar: 7 left out: x: cut; y: no image" for i in range(5)]
    assert lines[10:] == ([*named, "105 left out of 15 more tars"] if left_out else [])


def test_a_terminal_gets_a_bar_instead_of_lines(one_ray):
    with contextlib.redirect_stdout(Screen()) as terminal:
        report_all([{}] * 4)
    shown = terminal.getvalue()
    assert "tars," not in shown and "4/4" in shown and "images=12" in shown


# ---- decoding


def adobe_ycck():
    """A YCCK JPEG with an Adobe marker, in which ink is inverted, as Photoshop writes it."""
    inverted = np.asarray(ImageChops.invert(picture().convert("CMYK")))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(inverted), 95, "CMYK")
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    return data


def plain_cmyk():
    """A CMYK JPEG without an Adobe marker, in which ink is not inverted."""
    data = encode(ImageChops.invert(picture().convert("CMYK")), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    assert b"Adobe" in data[start:end]
    return data[:start] + data[end:]


def deep(image):
    """A picture of 8 bits a channel as a PNG of 16."""
    pixels = np.asarray(image).astype(np.uint16) * 257
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


GREY = picture().convert("L")
FORMATS = {
    "colour JPEG": (encode(picture(), "JPEG", quality=95), picture()),
    "progressive JPEG": (encode(picture(), "JPEG", quality=95, progressive=True), picture()),
    "JPEG without subsampling": (encode(picture(), "JPEG", quality=95, subsampling=0), picture()),
    "RGB JPEG": (encode(picture(), "JPEG", quality=95, keep_rgb=True), picture()),
    "grey JPEG": (encode(GREY, "JPEG", quality=95), GREY),
    "CMYK JPEG of Adobe": (encode(picture().convert("CMYK"), "JPEG", quality=95), picture()),
    "YCCK JPEG of Adobe": (adobe_ycck(), picture()),
    "CMYK JPEG": (plain_cmyk(), picture()),
    "PNG": (encode(picture(), "PNG"), picture()),
    "grey PNG": (encode(GREY, "PNG"), GREY),
    "grey PNG with alpha": (encode(GREY.convert("LA"), "PNG"), GREY),
    "16-bit grey PNG": (deep(GREY), GREY),
    "16-bit colour PNG": (deep(picture()), picture()),
    "palette PNG": (encode(picture().quantize(), "PNG"), picture().quantize()),
    "black and white PNG": (encode(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "RGBA PNG": (encode(picture().convert("RGBA"), "PNG"), picture()),
    "GIF": (encode(picture().quantize(), "GIF"), picture().quantize()),
    "BMP": (encode(picture(), "BMP"), picture()),
    "WEBP": (encode(picture(), "WEBP", quality=95), picture()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_rgb(name):
    data, wanted = FORMATS[name]
    assert difference(data, wanted) < 1.5


def test_16_bit_grey_keeps_its_bright_half():
    """Clipped at 255, as Pillow's own conversion does it, every pixel but black would be white."""
    ramp = np.linspace(0, 65535, 256 * 256).reshape(256, 256).astype(np.uint16)
    decoded = decode_image(cv2.imencode(".png", ramp)[1].tobytes(), SIZE)
    assert np.abs(decoded - (ramp / 257)[..., None]).max() <= 1


SIZES = [
    (1, 1),
    (100, 80),
    (255, 256),
    (256, 256),
    (257, 256),
    (40, 700),
    (700, 40),
    (300, 1500),
    (2000, 1500),
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("width, height", SIZES)
def test_every_size_and_aspect_comes_out_as_lanczos_does(width, height, kind):
    image = picture(width, height)
    options = {"quality": 95} if kind == "JPEG" else {}
    assert difference(encode(image, kind, **options), image) < 1.5


@pytest.mark.parametrize("size", [[64, 96], [300, 200], [700, 600]])
def test_size_is_height_and_width(size):
    assert difference(jpeg(picture(), 95), picture(), size) < 1.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [400, 700, 900, 1500])
@pytest.mark.parametrize("axis", [0, 1])
def test_fine_stripes_do_not_alias(side, axis, kind):
    """Stripes too fine for the result fade to grey; mere sampling would make new, wider ones."""
    stripes = np.zeros((side, side, 3), np.uint8)
    stripes.swapaxes(0, axis)[::2] = 255
    sampled = cv2.resize(stripes, tuple(SIZE), interpolation=cv2.INTER_LINEAR)
    options = {"quality": 95} if kind == "JPEG" else {}
    decoded = decode_image(encode(Image.fromarray(stripes), kind, **options), SIZE)
    assert sampled.std() > 50
    assert decoded.std() < sampled.std() / 2 and abs(decoded.mean() - 127.5) < 3


def test_jpegs_are_near_the_pixels_and_those_of_the_size_stay_as_they_are():
    rng = np.random.default_rng(0)
    small = [jpeg(draw_image(i, rng, (256, 256)), quality=70) for i in range(2)]
    grey, large = jpeg(draw_image(2, rng, (256, 256)).convert("L")), jpeg(picture())
    for_pillow = encode(picture(256, 256).convert("CMYK"), "JPEG")
    files = dict(zip("abcde", [large, small[0], grey, for_pillow, small[1]], strict=True))
    tar = make_tar({"text": b"no image"} | files | {"cut": small[0][:900]})
    pixels, names, left_out = decode_tar(tar, SIZE)
    jpegs, *others = decode_tar(tar, SIZE, "jpeg")
    assert others == [names, left_out] and names == list("abcde")
    assert jpegs.shape == pixels.shape == (5, 256, 256, 3)
    kept = [jpegs.jpeg(i).tobytes() == data for i, data in enumerate(files.values())]
    assert kept == [False, True, True, False, True]
    for image, wanted, same in zip(jpegs, pixels, kept, strict=True):
        difference = np.abs(image.astype(int) - wanted).mean()
        assert difference == 0 if same else 0 < difference < 2


def test_png_by_the_name_of_a_jpeg_is_kept():
    """ILSVRC-2012 has one: n02105855_2933.JPEG."""
    tar = make_tar({"n02105855_2933.JPEG": encode(picture(), "PNG")})
    images, names, left_out = decode_tar(tar, SIZE)
    assert len(images) == 1 and names == ["n02105855_2933.JPEG"] and left_out == []


@contextlib.contextmanager
def recorded_writes():
    """The paths of files that this process opens to write or makes meanwhile."""
    paths, active = [], True

    def hook(event, arguments):
        if active and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths.append(arguments[0])

    sys.addaudithook(hook)  # for good: hooks cannot be taken away
    yield paths
    active = False


def test_the_disk_is_not_touched(s3, bucket, tmp_path):
    put_tar(s3, bucket, "a.tar", [f"{i}.JPEG" for i in range(50)], size=(1000, 800))
    files = {"png.JPEG": encode(picture(), "PNG"), "cut.JPEG": jpeg(picture())[:2000]}
    s3.put_object(Bucket=bucket, Key="b.tar", Body=make_tar(files))

    source = imagenet.source_of(bucket)
    tars, _ = imagenet.list_tars(source, "")

    def load(tar):
        images, *_ = imagenet.load_tarfile(source, tar, 0, SIZE, "pixels")
        return len(images)

    load(tars[1])  # the first time, Python caches the modules that it imports
    with recorded_writes() as paths:
        counts = list(map(load, tars))
        (tmp_path / "seen").touch()
    assert counts == [50, 1]
    assert paths == [str(tmp_path / "seen")]


def test_the_array_is_allocated_once():
    rng = np.random.default_rng(0)
    good = {f"{i}.JPEG": jpeg(draw_image(i, rng)) for i in range(40)}
    tar = make_tar({"first": b"no image", **good, "last": b"no image"})
    tracemalloc.start()
    try:
        images, names, left_out = decode_tar(tar, SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(images) == len(names) == 40 and len(left_out) == 2
    assert images.flags.c_contiguous
    assert images.base.nbytes < peak < images.base.nbytes + len(tar) + 2 * 2**20


# ---- labels


def test_labels_are_one_dict_of_base_names():
    text = "n01/a.JPEG 0\r\nn02/b.JPEG 999\n\n  n03/deep/er/c.JPEG   07  \nd.JPEG 3\nn01/a.JPEG 0"
    labels = imagenet.parse_labels(text.encode(), 1000, "s3://b/train.txt")
    assert labels == {"a.JPEG": 0, "b.JPEG": 999, "c.JPEG": 7, "d.JPEG": 3}


def test_labels_are_read_from_s3(s3, bucket):
    lines = [f"n{i // 1300:08}/n{i}.JPEG {i % 1000}" for i in range(50_000)]
    s3.put_object(Bucket=bucket, Key="train.txt", Body="\n".join(lines).encode())
    labels = imagenet.read_labels(imagenet.source_of(bucket), "train.txt", 1000)
    assert labels == {f"n{i}.JPEG": i % 1000 for i in range(50_000)}


def test_labels_of_names_as_people_have_them():
    """Spaces, backslashes, a byte order mark, accents as Macs write them, a name in two directories."""
    lines = ["n1/n1_1 (1).JPEG 5", "n1\\b c.JPEG\t6", "n2/e\u0301.JPEG 7", "n1/x.JPEG 1", "n2/x.JPEG 2"]
    labels = imagenet.parse_labels("\r\n".join(lines).encode("utf-8-sig"), 10, "s3://b/train.txt")
    several = {"x.JPEG": imagenet.SEVERAL, "n1/x.JPEG": 1, "n2/x.JPEG": 2}
    assert labels == {"n1_1 (1).JPEG": 5, "b c.JPEG": 6, "é.JPEG": 7} | several


LABEL_ERRORS = {
    "too many fields": (b"a/a.JPEG 1 2", 1, "not `directory/name.JPEG label`"),
    "no label": (b"a/a.JPEG", 1, "not `directory/name.JPEG label`: 'a/a.JPEG'"),
    "tab without label": (b"a/a.JPEG\t", 1, "not `directory/name.JPEG label`"),
    "no name": (b"a/ 1", 1, "not `directory/name.JPEG label`"),
    "a word": (b"a/a.JPEG cat", 1, "label 'cat' is no integer in 0..9"),
    "a fraction": (b"a/a.JPEG 1.0", 1, "label '1.0' is no integer in 0..9"),
    "negative": (b"a/a.JPEG -1", 1, "label '-1' is no integer in 0..9"),
    "signed": (b"a/a.JPEG +1", 1, "label '+1' is no integer in 0..9"),
    "another alphabet's digit": ("a/a.JPEG ٣".encode(), 1, "is no integer in 0..9"),
    "too large": (b"a/a.JPEG 10", 1, "label '10' is no integer in 0..9"),
    "too long for int()": (b"a/a.JPEG " + b"1" * 5000, 1, "label '111"),
    "two labels": (b"a/a.JPEG 1\nb/a.JPEG 1\nx/a/a.JPEG 2", 3, "'a/a.JPEG' already has label 1"),
    "two labels, no directory": (b"a.JPEG 1\nb.JPEG 1\na.JPEG 2", 3, "'a.JPEG' already has label 1"),
    "line after good and blank ones": (b"a/a.JPEG 1\r\n\r\nb/b.JPEG 2\r\nc\r\n", 4, "not `directory"),
    "Latin-1": (b"a/a.JPEG 1\nb/\xe9.JPEG 2", 2, "not text"),
    "an image": (jpeg(picture()), 1, "not text"),
    "UTF-16": ("a/a.JPEG 1\n".encode("utf-16"), 1, "not text"),
    "escape codes": (b"a/a.JPEG 1\n\x1b[2J", 2, "not `directory"),
}


@pytest.mark.parametrize("data, line, why", LABEL_ERRORS.values(), ids=LABEL_ERRORS)
def test_label_errors_name_the_line(data, line, why):
    with pytest.raises(InputError) as caught:
        imagenet.parse_labels(data, 10, "s3://b/train.txt")
    message = str(caught.value)
    assert message.startswith(f"s3://b/train.txt, line {line}: ") and why in message
    assert message.isprintable() and len(message) < 200


@pytest.mark.parametrize("data", [b"", b"\n \r\n\n"])
def test_label_file_without_labels(data):
    with pytest.raises(InputError, match="^s3://b/train.txt: holds no label"):
        imagenet.parse_labels(data, 10, "s3://b/train.txt")
