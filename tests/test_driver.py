"""driver.py from end to end: real S3, Ray, TensorFlow and JPEGs, with a thin network."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import alexnet
import driver
import functions
import imagenet
from machinery import results
from machinery.storage.checkpoints import Checkpoints, Facts
from machinery.storage.export import SavedModel
from machinery.storage.tf1 import tf
from tests.fault_proxy import fault_proxy
from tests.support import (
    ROOT,
    THIN,
    decode_tar,
    jpeg,
    make_tar,
    notes,
    noting_worker,
    thin_constants,
    train,
)

import numpy as np
import pytest
import ray
import tensorflow
from PIL import Image

VALIDATED = ["--val-prefix", "ILSVRC2012_img_train/n0150000", "--val-label-file", "train.txt"]


class Watcher(results.Report):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.batches, self.rates, self.norms = [], [], []

    def start(self, iteration, batches, mean):
        super().start(iteration, batches, mean)
        self.batches = [ray.get([batch.images, batch.labels]) for batch in batches]

    def iteration(self, iteration, losses, images, norm, rate):
        super().iteration(iteration, losses, images, norm, rate)
        self.norms.append(norm)
        self.rates.append(rate)


def test_every_image_is_there_once_after_loading_and_shuffling(
    thin, one_ray, s3, bucket, tmp_path, monkeypatch, capsys
):
    """Each image has a label of its own: labels are file identities; its colour proves the pixels."""
    files = {f"n{i}.JPEG": jpeg(Image.new("RGB", (300, 260), (i, 255 - i, 2 * i))) for i in range(35)}
    names = sorted(files)
    for tar in range(5):
        some = {name: files[name] for name in names[tar::5]}
        s3.put_object(Bucket=bucket, Key=f"{tar}.tar", Body=make_tar(some))
    lines = [f"x/n{i}.JPEG {i}" for i in range(35)]
    s3.put_object(Bucket=bucket, Key="train.txt", Body="\n".join(lines).encode())
    monkeypatch.setattr(thin, "NUM_CLASSES", 35)
    hooks = {"report": (report := Watcher()), "actor": noting_worker(tmp_path)}
    assert train(bucket, "--key-prefix", "", "--iterations", 1, **hooks) == 0
    images, labels = map(np.concatenate, zip(*report.batches, strict=True))
    assert sorted(labels.tolist()) == list(range(35))
    for image, label in zip(images, labels, strict=True):
        assert np.abs(image.mean(axis=(0, 1)) - [label, 255 - label, 2 * label]).max() < 4
    out = capsys.readouterr().out
    assert out.startswith("The trained weights end with this run: ")
    assert out.endswith("Stopped at iteration 1: nothing is saved\n")


def test_rates_drop_and_steps_are_as_long_as_rate_and_clip_norm_say(
    thin, one_ray, photos, tmp_path, monkeypatch
):
    for name, value in {
        "LEARNING_RATE": 0.5,
        "LEARNING_RATE_DROPS": (10, 30),
        "CLIP_NORM": 0.01,
        "MOMENTUM": 0.0,
    }.items():
        monkeypatch.setattr(thin, name, value)
    hooks = {"report": (report := Watcher()), "actor": noting_worker(tmp_path)}
    assert train(photos, "--iterations", 5, "--checkpoint-dir", tmp_path, **hooks) == 0
    assert report.rates == pytest.approx([0.5, 0.05, 0.05, 0.005, 0.005])
    assert min(report.norms) > 0.01  # each step was shortened
    state = Checkpoints(str(tmp_path)).start().state
    last_step = [value for name, value in state.items() if name.endswith("/Momentum")]
    length = np.sqrt(sum(np.vdot(part, part) for part in last_step))
    assert length == pytest.approx(0.005 * 0.01, rel=1e-3)


def test_weights_are_broadcast_once_an_iteration_and_a_bucket_is_listed_once(
    thin, one_ray, photos, tmp_path, monkeypatch
):
    """Also where an iteration is validated and where the run ends."""
    monkeypatch.setattr(thin, "VALIDATE_EVERY", 2)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        run = train(photos, "--iterations", 3, *VALIDATED, actor=noting_worker(tmp_path))
    assert run == 0
    listings = [request.path for request in proxy.requests if request.key == photos]
    assert len(listings) == len(set(listings)) == 2  # of the training and of the held-out set
    calls = notes(tmp_path)
    sent = {(call.iteration, call.weights) for call in calls}
    assert len(sent) == 4 and {iteration for iteration, _ in sent} == set("0123")
    times = Counter((call.pid, call.iteration) for call in calls if call.method == "update_weights")
    assert len(times) == 2 * 4 and set(times.values()) == {1}
    assert {call.iteration for call in calls if call.method == "count_hits"} == set("23")


@pytest.fixture(scope="module")
def finished(one_ray, photos, tmp_path_factory):
    """Output and folder of a run of three iterations that leaves all it can behind."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--checkpoint-dir", folder / "saved", "--log-dir", folder / "curves", *VALIDATED]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        thin_constants(patch)
        patch.setattr(driver, "VALIDATE_EVERY", 2)
        assert train(photos, "--iterations", 3, "--export-dir", folder / "network", *flags) == 0
    return out.getvalue(), folder


@pytest.mark.smoke
def test_the_whole_story(finished):
    out, folder = finished
    assert "s3://photos/ILSVRC2012_img_train/n015*: 10 tars, 0 other keys left out" in out
    assert "Loading: 10 of 10 tars, 120 images" in out
    assert "120 images in 10 batches" in out
    assert re.findall(r"Shuffle round (\d) of 5 done", out) == list("12345")
    assert "2 workers; an iteration is 2 mini-batches of 5 images" in out
    assert ", an epoch is 12 iterations\n" in out
    lines = re.findall(r"^Iteration (\d): loss = [\d.]+, [\d.]+ images/s, [\d.]+ s$", out, re.M)
    assert lines == list("012")
    accuracies = re.findall(r"^Iteration (\d): accuracy = [\d.]+%(.*)$", out, re.M)
    assert re.fullmatch(r"0 2, 0:00:0\d left", " ".join(map("".join, accuracies)))
    saved = rf"checkpoints in {folder}/saved \(best: top-1 [\d.]+% at iteration [23]\)"
    left = f"{saved}, network in {folder}/network, curves in {folder}/curves"
    assert re.fullmatch(f"Stopped at iteration 3: {left}", out.splitlines()[-1])


@pytest.fixture(scope="module")
def held_out(photos, finished):
    """All images of that run uint8 [120, 256, 256, 3], which were held out too, and their labels."""
    source, images, y_true = imagenet.source_of(photos), [], []
    labels = imagenet.read_labels(source, "train.txt", 10)
    for tar in imagenet.list_tars(source, "")[0]:
        decoded, names, _ = decode_tar(source.read(tar.key), (256, 256))
        images.append(decoded)
        y_true += [labels[name] for name in names]
    return np.concatenate(images), np.array(y_true)


@pytest.fixture(scope="module")
def session(finished, held_out):
    """One session with the weights of that run, and all images as it takes them."""
    network = alexnet.AlexNet(THIN, num_classes=10)
    state = Checkpoints(str(finished[1] / "saved")).start().state
    network.restore(state)
    images, _ = held_out
    return network, (images - images.mean(axis=0).astype(np.float32))[:, 16:240, 16:240]


def test_validation_counts_every_held_out_image(finished, held_out, session):
    """Against one session that takes all images at once."""
    lines = re.findall(
        r"^Iteration (\d) \(epoch 0.[23]\): validation top-1 = (.*%), top-5 = (.*%)$", finished[0], re.M
    )
    assert [number for number, *_ in lines] == ["2", "3"]
    network, centred = session
    hits = network.count_hits(centred, functions.one_hot(held_out[1], 10))
    assert lines[1][1:] == tuple(f"{count / 120:.1%}" for count in hits)
    assert 0 < hits[0] < hits[1] < 120


def test_curves_have_what_is_printed(finished):
    out, folder = finished
    (events,) = (folder / "curves").iterdir()
    points = {}
    for event in tf.train.summary_iterator(str(events)):
        points |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    every = {"loss", "gradient norm", "learning rate", "images a second", "epoch"}
    every |= {f"seconds/{phase}" for phase in ("broadcast", "compute", "gather", "apply")}
    assert set(points) == (
        {(tag, iteration) for tag in every for iteration in range(3)}
        | {("accuracy", iteration) for iteration in (0, 2)}
        | {(f"validation top-{k}", iteration) for k in (1, 5) for iteration in (2, 3)}
    )
    for iteration in range(3):
        loss, speed, seconds = re.search(
            f"Iteration {iteration}: loss = (.*), (.*) images/s, (.*) s", out
        ).groups()
        assert f"{points['loss', iteration]:.3f}" == loss
        assert f"{points['images a second', iteration]:.1f}" == speed
        phases = [value for (tag, step), value in points.items() if "/" in tag and step == iteration]
        assert f"{sum(phases):.2f}" == seconds
    assert f"Iteration 2: accuracy = {points['accuracy', 2]:.1%}" in out
    assert f"Iteration 3 (epoch 0.2): validation top-1 = {points['validation top-1', 3]:.1%}" in out
    assert points["epoch", 2] == pytest.approx(2 / 12)


@pytest.mark.smoke
def test_exported_network_gives_the_sessions_probabilities(finished, held_out, session):
    exported = tensorflow.saved_model.load(str(finished[1] / "network")).signatures["serving_default"]
    got = exported(tf.constant(held_out[0][:50]))["probabilities"].numpy()
    network, centred = session
    logits = network.sess.run(network.logits, {network.images: centred[:50]})
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(got, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)


def test_export_replaces_an_older_one_in_a_folder_and_in_s3(finished, s3, bucket, session, tmp_path):
    network, _ = session
    mean = np.zeros((256, 256, 3), np.float32)
    for place in (str(tmp_path / "network"), f"s3://{bucket}/deep/network"):
        SavedModel(place).write(network, mean + 100)
        SavedModel(place).write(network, mean)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]  # and no leftovers
    for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        path = tmp_path / "s3" / obj["Key"].removeprefix("deep/network/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, obj["Key"], str(path))
    photo = tf.constant(np.full((1, 256, 256, 3), 7, np.uint8))
    logits = network.sess.run(network.logits, {network.images: np.full((1, 224, 224, 3), 7.0)})
    for copy in ("network", "s3"):
        exported = tensorflow.saved_model.load(str(tmp_path / copy)).signatures["serving_default"]
        assert np.ptp(np.log(exported(photo)["probabilities"].numpy()) - logits) < 1e-4


def test_images_are_kept_as_pixels_if_these_fit(thin, one_ray, photos, caplog):
    """A checkpoint's form stays. The same few tars count many times: each of them is small."""
    caplog.set_level("INFO", "driver")
    source = imagenet.source_of(photos)
    few, _ = imagenet.list_tars(source, "")
    for some, before, stored, spilled in (
        (few, None, "pixels", False),
        (few * 30, None, "jpeg", False),
        (few * 10**4, None, "jpeg", True),
        (few, "jpeg", "jpeg", False),
        (few * 30, "pixels", "pixels", True),
    ):
        facts = Facts(mini_batches=2, precision="float32", stored=before)
        assert thin.plan_of(facts, source, some).stored == stored
        assert ("goes to disk" in caplog.messages[-1]) == spilled


def test_a_resume_stays_with_the_form_of_the_images(
    thin, one_ray, photos, tmp_path, monkeypatch, capsys
):
    """tests/test_nodes.py shows that a run on JPEGs is exact."""
    options = {"actor": noting_worker(tmp_path)}
    for iterations, stored in (1, "jpeg"), (2, None):  # pixels would fit
        monkeypatch.setattr(thin, "STORED", stored)
        flags = ["--iterations", iterations, "--checkpoint-dir", tmp_path / "saved"]
        assert train(photos, *flags, **options) == 0
        assert re.search("^About 123 images: 0.0 GB as JPEGs, ", capsys.readouterr().out, re.M)
    monkeypatch.setattr(thin, "STORED", "pixels")
    assert train(photos, *flags, "--iterations", 3, **options) == 2
    assert "different are STORED (was 'jpeg')" in capsys.readouterr().err


def test_another_seed_is_refused_before_anything_is_loaded(
    thin, one_ray, photos, finished, monkeypatch, capsys
):
    monkeypatch.setattr(thin, "SEED", 1)
    assert train(photos, "--iterations", 4, "--checkpoint-dir", finished[1] / "saved") == 2
    out, err = capsys.readouterr()
    assert "tars" not in out
    assert re.fullmatch(r"error: .*/saved is of another run: different are SEED \(was 0\); .*\n", err)


def test_a_resume_on_another_cpu_is_told(thin, one_ray, photos, finished, tmp_path, capsys):
    """The checkpoint is one of the run above, of which another CPU is said to have made it."""
    reader = tf.train.load_checkpoint(str(finished[1] / "saved"))
    state = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    facts = json.loads(state["facts"])
    here, facts["run"]["CPU"] = facts["run"]["CPU"], "Abacus"
    state["facts"] = json.dumps(facts).encode()
    with tf.Graph().as_default(), tf.Session() as session:
        there, names = str(tmp_path / "saved" / "ckpt-3"), list(state)
        tensors = {"tensor_names": names, "tensors": [tf.constant(state[name]) for name in names]}
        session.run(tf.raw_ops.SaveV2(prefix=there, shape_and_slices=[""] * len(names), **tensors))
    (tmp_path / "saved" / "checkpoint.lock").touch()
    flags = ["--iterations", 4, "--checkpoint-dir", tmp_path / "saved"]
    assert train(photos, *flags, actor=noting_worker(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "at iteration 3\n" in out and f"CPU is {here} from here on, was Abacus\n" in out


BEHIND_THE_CHECKOUT = """
import sys
from pathlib import Path
import ray
import os
import driver
from machinery.cluster import joining

joining.join(driver.runtime_env(), None)
checkout = Path(driver.__file__).resolve().parent
checkout.rename(checkout.with_name("gone"))  # from here on, no node can see it

@ray.remote
def carried():
    import alexnet, functions, imagenet, machinery
    files = alexnet.__file__, functions.__file__, imagenet.__file__, Path(machinery.__file__).parent
    return sorted({str(path) for file in files for path in Path(file).parent.rglob("*")
                   if path.suffix != ".pyc" and path.is_file()})

print(*ray.get(carried.remote()), sep="\\n")
"""


def test_modules_and_nothing_else_reach_nodes_without_the_checkout(one_ray, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, checkout)
    shutil.copytree(ROOT / "machinery", checkout / "machinery", ignore=lambda *_: ["__pycache__"])
    carried = [checkout / f"{name}.py" for name in ("alexnet", "functions", "imagenet")]
    carried += [path for path in (checkout / "machinery").rglob("*") if path.is_file()]
    for folder in (".git", ".venv", "checkpoints", "data", "machinery/__pycache__"):
        (checkout / folder).mkdir()
        (checkout / folder / "ballast").write_text("x")
    output = subprocess.run(
        [sys.executable, "-c", BEHIND_THE_CHECKOUT],
        cwd=checkout,
        env=os.environ | {"RAY_ADDRESS": one_ray},
        capture_output=True,
        text=True,
        timeout=120,
    )
    files = [Path(line) for line in output.stdout.split()]
    assert sorted(file.name for file in files) == sorted(path.name for path in carried), output.stderr
    assert not any({tmp_path, ROOT} & set(file.parents) for file in files)
