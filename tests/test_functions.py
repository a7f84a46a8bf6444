"""Remote functions on batches, on a real Ray: labels, shuffle, mean image, mini-batches."""

import functions
import imagenet
from functions import NO_LABEL, Batch
from machinery.cluster import adding
from machinery.cluster.helpers import Helpers
from machinery.storage.jpegs import Jpegs
from machinery.storage.tars import PART
from tests.support import draw_image, jpeg, make_tar

import numpy as np
import pytest
import ray
import simplejpeg


def as_jpegs(images):
    """Images [n, height, width, 3] as Jpegs."""
    return Jpegs([simplejpeg.encode_jpeg(image) for image in images], images.shape[1:3])


STORED = pytest.mark.parametrize("stored", ["pixels", "jpeg"])


def put_batches(sizes, side=256, stored="pixels"):
    """Batches of images that each are filled with their own number, which is their label too.

    As JPEGs, too: an even grey comes back as it was.
    """
    batches, start = [], 0
    for size in sizes:
        labels = np.arange(start, start + size, dtype=np.int32)
        images = np.empty((size, side, side, 3), np.uint8)
        images[:] = labels[:, None, None, None]
        images = as_jpegs(images) if stored == "jpeg" else images
        batches.append(Batch(ray.put(images), ray.put(labels), size))
        start += size
    return batches


def test_convert_looks_names_up_and_reports_the_missing():
    pairs = functions.label_table({"a.JPEG": 3, "b.JPEG": 0})
    labels, report = functions.convert(["x/b.JPEG", "x/c.JPEG", "x/a.JPEG"], pairs)
    assert labels.dtype == np.int32
    assert labels.tolist() == [0, NO_LABEL, 3]
    assert report == {"images": 2, "unlabelled": 1, "named": ["'c.JPEG'"], "doubtful": []}


def test_a_name_in_two_directories_is_told_apart_by_the_directory_in_its_tar():
    """By the tar's own name where it has none: a tar of ImageNet is that of a class."""
    labels = imagenet.parse_labels(b"n1/x.JPEG 1\nn2/x.JPEG 2\nn3/y.JPEG 3", 10, "train.txt")
    table = functions.label_table(labels)
    paths = {
        "t.tar": ["./n2/x.JPEG", "n1\\x.JPEG", "n9/y.JPEG"],
        "n1.tar": ["x.JPEG"],
        "z.tar": ["x.JPEG"],
    }
    found = {}
    for tar, some in paths.items():
        names = [imagenet.in_directory(path, tar.removesuffix(".tar")) for path in some]
        labels, report = functions.convert(names, table)
        found[tar] = labels.tolist(), report["doubtful"]
    assert found == {
        "t.tar": ([2, 1, 3], []),
        "n1.tar": ([1], []),
        "z.tar": ([imagenet.SEVERAL], ["z/x.JPEG"]),
    }


def test_label_table_answers_as_the_dictionary_does():
    labels = {f"{'é' * (i % 7)}{i}": i for i in range(1000)}
    table = functions.label_table(labels)
    names = [*labels, "", "1000", "é", "\ufffd"]
    assert [functions.label_of(name, table, -1) for name in names] == [
        labels.get(name, -1) for name in names
    ]


def test_a_suffix_decides_only_between_names_that_are_the_same_without_it():
    """Tars of n01770393_0.jpg, and Caffe's train.txt of .JPEG names."""
    lines = (
        b"a/n1_0.JPEG 1\na/b.c.png 2\na/x.jpg 3\na/x.png 4\nn2/y.JPEG 5\nn3/y.JPEG 6\na/z 7\na/v.1 8\n"
    )
    table = functions.label_table(imagenet.parse_labels(lines, 10, "s3://b/train.txt"))
    names = "n1_0.jpg n1_0.JPEG n1_0.PNG n1_0 n1_0.tar b.c.jpg b.jpg x.jpg x.png x.JPEG z.jpg v.2"
    wanted = dict(zip(names.split(), [1, 1, 1, 1, -1, 2, -1, 3, 4, -1, 7, -1], strict=True))
    labels, report = functions.convert([f"t/{name}" for name in wanted], table)
    assert dict(zip(wanted, labels.tolist(), strict=True)) == wanted and report["unlabelled"] == 4
    labels, report = functions.convert(["n2/y.jpg", "n3/y.JPEG", "n4/y.jpg"], table)
    assert labels.tolist() == [5, 6, imagenet.SEVERAL] and report["doubtful"] == ["n4/y.jpg"]


@STORED
def test_match_drops_unlabelled_images_and_empty_batches(one_ray, said, stored):
    images = [batch.images for batch in put_batches((2, 3, 1, 0), 4, stored)]
    names = [["t/a", "t/b"], ["t/c", "t/x", "t/d"], ["t/y"], []]
    pairs = ray.put(functions.label_table({"a": 0, "b": 1, "c": 2, "d": 3}))
    report = {"images": 1, "left_out": 0, "named": [], "rest": None}
    loaded = [
        imagenet.Loaded(i, ray.put(some), ray.put(report), None)
        for i, some in zip(images, names, strict=True)
    ]
    data = imagenet.DataSet("b", "", "train.txt", ["a.tar"] * 4)
    batches = functions.match(functions.Loading(data, loaded, pairs, {}))
    assert [batch.count for batch in batches] == [2, 2]
    assert [ray.get(batch.labels).tolist() for batch in batches] == [[0, 1], [2, 3]]
    left = ray.get(batches[1].images)
    assert left.shape == (2, 4, 4, 3) and [image.mean() for image in left] == [2, 4]
    assert said()[-3:] == [
        "WARNING: 33% of the images have no label: is b/train.txt the label file of all these tars?",
        "2 images have no label and are left out: 'x', 'y'",
        "4 images in 2 batches",
    ]


@pytest.mark.parametrize("unlabelled, warned", [(1, False), (2, True)])
def test_more_than_a_few_unlabelled_images_are_a_warning(one_ray, said, unlabelled, warned):
    [batch] = put_batches((20,), 4, "pixels")
    pairs = ray.put(functions.label_table({str(number): 0 for number in range(20 - unlabelled)}))
    report = {"key": "a.tar", "images": 20, "left_out": 0, "named": [], "rest": None}
    names = ray.put([f"t/{number}" for number in range(20)])
    loaded = [imagenet.Loaded(batch.images, names, ray.put(report), None)]
    data = imagenet.DataSet("b", "", "train.txt", ["a.tar"])
    functions.match(functions.Loading(data, loaded, pairs, {}))
    assert any(line.startswith("WARNING: 10% of the images have no label") for line in said()) == warned


@STORED
def test_a_large_tar_is_several_batches(one_ray, s3, bucket, said, stored):
    """Ray's tasks load one part after the other, in the order of the tar."""
    image, (each, _) = jpeg(draw_image(0, np.random.default_rng(0), (60, 50))), PART
    names = [f"{number}.JPEG" for number in range(2 * each + 3)]
    files = {"first": b"no image"} | dict.fromkeys(names, image) | {"last": b"no image"}
    for key, some in ("a.tar", files), ("b.tar", {"b.JPEG": image}):
        s3.put_object(Bucket=bucket, Key=key, Body=make_tar(some))
    data = imagenet.find(imagenet.source_of(bucket), "", "train.txt")
    loaded = imagenet.load_tarfiles_from_s3(data.source, data.tars, [8, 8], stored)
    pairs = ray.put(functions.label_table({name: i % 7 for i, name in enumerate([*names, "b.JPEG"])}))
    batches = functions.match(functions.Loading(data, loaded, pairs, {}))
    assert [batch.count for batch in batches] == [each, each, 3, 1]
    labels = np.concatenate(ray.get([batch.labels for batch in batches]))
    assert labels.tolist() == [i % 7 for i in range(2 * each + 4)]
    assert [len(ray.get(batch.images)) for batch in batches] == [each, each, 3, 1]
    images, left_out = f"{2 * each + 4} images", "2 left out: first: no image; last: no image"
    assert said()[-3:-1] == [f"Loading: 2 of 2 tars, {images}", f"s3://{bucket}/a.tar: {left_out}"]
    assert said()[-1] == f"{images} in 4 batches"


@STORED
@pytest.mark.parametrize("sizes", [(5, 3, 4, 1), (3, 2, 4), (6,)])
def test_shuffle_keeps_every_image_once_with_its_label(one_ray, sizes, stored):
    batches = put_batches(sizes, 8, stored)
    for number in range(5):
        batches = functions.shuffle_round(batches, 0, number)
        images, labels = (ray.get([getattr(b, part) for b in batches]) for part in ("images", "labels"))
        assert sorted(np.concatenate(labels).tolist()) == list(range(sum(sizes)))
        for batch, some, label in zip(batches, images, labels, strict=True):
            assert len(some) == len(label) == batch.count
            assert all((image == number).all() for image, number in zip(some, label, strict=True))
    assert sorted(batch.count for batch in batches) == sorted(sizes)


def test_shuffle_pairs_are_disjoint_mixed_and_decided_by_the_seed(one_ray):
    def shuffled(seed):
        mixed = functions.shuffle_round(put_batches([50] * 4, side=2), seed, 0)
        return [ray.get(batch.labels).tolist() for batch in mixed]

    first = shuffled(1)
    assert first == shuffled(1) != shuffled(2)
    for a, b in (first[:2], first[2:]):  # each pair holds the images of exactly two batches
        assert len({image // 50 for image in a + b}) == 2
        assert len({image // 50 for image in a}) == 2


def test_rounds_that_do_not_mix_all_are_told(one_ray, said, caplog):
    for rounds, told in (2, True), (3, False):
        batches = put_batches([2] * 5, side=1)
        caplog.clear()
        functions.shuffle(batches, rounds, 0)
        hint = "2 shuffle rounds mix the images of 4 tars: SHUFFLE_ROUNDS = 3 would mix all 5"
        assert (hint in said()) == told and len(batches) == 5


def test_after_three_rounds_a_batch_has_images_of_eight(one_ray):
    batches = put_batches([160] * 8, side=1)
    for number in range(3):
        batches = functions.shuffle_round(batches, 0, number)
    for labels in ray.get([batch.labels for batch in batches]):
        counts = np.bincount(labels // 160, minlength=8)
        assert counts.min() >= 8 and counts.max() <= 34  # 20 are due


def test_an_odd_batch_out_takes_part_in_another_round(one_ray):
    batches = put_batches([40] * 3, side=2)
    for number in range(5):
        batches = functions.shuffle_round(batches, 0, number)
    for batch in batches:
        assert len({image // 40 for image in ray.get(batch.labels).tolist()}) == 3


def test_mean_image_is_exact(one_ray):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (n, 6, 5, 3), np.uint8) for n in (4, 1, 7)]
    for form in np.asarray, as_jpegs:
        images = [form(array) for array in arrays]
        batches = [Batch(ray.put(some), None, len(some)) for some in images]
        mean = functions.mean_image(batches)
        assert mean.dtype == np.float32
        all_pixels = np.array([image for some in images for image in some])
        np.testing.assert_array_equal(mean, all_pixels.mean(axis=0).astype(np.float32))


def test_one_hot():
    assert functions.one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_image_crops_and_mirrors(dtype):
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(dtype)
    image.flags.writeable = False  # as from the object store
    assert (functions.crop_image(image, 3, 32, 0) == image[3:227, 32:256]).all()
    assert (functions.crop_image(image, 0, 1, 1) == image[:224, 1:225][:, ::-1]).all()


def draw(batches, **changes):
    arguments = {"size": 20, "count": 2, "seed": 0, "iteration": 3} | changes
    drawn = functions.draw_minibatches(Helpers(functions.Helper), batches, **arguments)
    return ray.get([minibatch.ref() for minibatch in drawn])


@STORED
def test_minibatches_are_random_crops_decided_by_seed_iteration_and_index(one_ray, stored):
    batches = put_batches([30, 60], stored=stored)
    minibatches = draw(batches)
    for pixels, labels, crops in minibatches:
        assert pixels.shape == (20, 224, 224, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == labels[:, None, None, None]).all()
        assert crops[:, :2].min() >= 0 and crops[:, :2].max() <= 32
        assert len(np.unique(crops[:, 0])) > 5 and set(crops[:, 2]) == {0, 1}
    assert minibatches[0].labels.tolist() != minibatches[1].labels.tolist()
    again, other = draw(batches), draw(batches, iteration=4)
    assert all((a.crops == b.crops).all() for a, b in zip(minibatches, again, strict=True))
    assert not all((a.crops == b.crops).all() for a, b in zip(minibatches, other, strict=True))
    # Index 0 is the same mini-batch however many there are.
    assert (draw(batches, count=5)[0].crops == minibatches[0].crops).all()


def test_every_crop_can_occur_at_the_edges(one_ray):
    crops = np.concatenate([m.crops for m in draw(put_batches([5]), count=20)])
    assert crops[:, 0].min() == crops[:, 1].min() == 0
    assert crops[:, 0].max() == crops[:, 1].max() == 32


def test_random_batch_is_as_likely_as_it_is_large():
    batches = [Batch(None, None, 10), Batch(None, None, 90)]
    keys = [(0, "batch", i) for i in range(1000)]
    drawn = [batch.count for batch in functions.random_batches(batches, keys)]
    assert 70 < drawn.count(10) < 130


def test_an_accuracys_sample_is_bounded_and_cropped_at_the_centre(one_ray):
    helpers = Helpers(functions.Helper)

    def sample(images, parts):
        arguments = {"size": 100, "parts": parts, "seed": 0, "iteration": 0}
        drawn = functions.draw_sample(helpers, put_batches([images]), **arguments)
        return ray.get([part.ref() for part in drawn])

    parts = sample(250, 3)
    assert [len(part.pixels) for part in parts] == [34, 33, 33]
    assert len({label for part in parts for label in part.labels.tolist()}) == 100
    assert {tuple(crop) for part in parts for crop in part.crops} == {(16, 16, 0)}
    assert [len(part.labels) for part in sample(7, 80)] == [1] * 7


def test_the_mean_is_subtracted_under_the_same_crop():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 256, 3), np.uint8)
    crops = np.array([[0, 32, 0], [5, 9, 1]])
    pixels = np.stack([functions.crop_image(image, *crop) for crop in crops])
    minibatch = functions.MiniBatch(pixels, np.zeros(2, int), crops)
    assert not functions.subtract_mean(minibatch, image.astype(np.float32)).any()


@pytest.mark.parametrize("shape", [(), (5,), (3, 7, 11), (1000, 1001)])
def test_aligned_arrays_start_at_a_multiple_of_64_bytes(shape):
    arrays = [adding.aligned_empty(shape) for _ in range(10)]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert all(array.shape == shape and array.dtype == np.float32 for array in arrays)
    for i, array in enumerate(arrays):
        array[...] = i
    assert [array.sum() for array in arrays] == [i * array.size for i, array in enumerate(arrays)]
