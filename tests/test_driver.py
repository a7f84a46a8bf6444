"""driver.py from end to end: real S3, Ray, TensorFlow and JPEGs, with a thin network."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import tensorflow
from conftest import THIN, checksums, thin_constants, train

import alexnet
import demo
import driver
import functions
import imagenet
from alexnet import tf


def two_workers():
    """Two workers with the thin network, which are up."""
    network = {"layers": THIN, "num_classes": 10, "threads": 1}
    workers = functions.Workers(2, {"cpus": 1, "gpus": 0}, network, functions.Helpers(), timeout=100)
    workers.wait(60)
    return workers


def test_the_whole_story(thin, cluster, photos, capsys):
    assert train(photos, "--iterations", 5) == 0
    out = capsys.readouterr().out
    assert "s3://photos/ILSVRC2012_img_train/n015*: 10 tars, 0 other keys left out" in out
    assert "Loading: 10 of 10 tars, 120 images" in out
    assert "120 images in 10 batches" in out
    assert re.findall(r"Shuffle round (\d) of 5 done", out) == list("12345")
    assert "2 workers; an iteration is 2 mini-batches of 20 images" in out
    assert "The trained weights end with this run" in out
    assert out.endswith("Stopped at iteration 5: nothing is saved\n")
    lines = re.findall(r"^Iteration (\d): loss = [\d.]+, [\d.]+ images/s, [\d.]+ s$", out, re.M)
    assert lines == list("01234")
    assert re.findall(r"^Iteration (\d): accuracy = [\d.]+%$", out, re.M) == list("024")


def test_it_learns(thin, cluster, photos, capsys, monkeypatch):
    monkeypatch.setattr(thin, "ACCURACY_EVERY", 1000)
    monkeypatch.setattr(thin, "KEEP_PROBABILITY", 1.0)
    assert train(photos, "--iterations", 150) == 0
    losses = [float(loss) for loss in re.findall(r"loss = ([\d.]+)", capsys.readouterr().out)]
    assert np.mean(losses[:3]) > 2
    assert np.mean(losses[-50:]) < 0.75 * np.mean(losses[:3])


def test_two_runs_with_a_seed_give_the_same_bits(thin, cluster, photos, tmp_path):
    for name in "ab":
        assert train(photos, "--iterations", 4, "--checkpoint-dir", tmp_path / name) == 0
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    thin.SEED, seed = 1, thin.SEED
    try:
        assert train(photos, "--iterations", 4, "--checkpoint-dir", tmp_path / "c") == 0
    finally:
        thin.SEED = seed
    assert checksums(tmp_path / "a") != checksums(tmp_path / "c")


def test_every_image_is_there_once_after_loading_and_shuffling(thin, cluster, s3, bucket, monkeypatch):
    """Each image has a label of its own: labels are file identities; its colour proves the pixels."""
    files = {
        f"n{i}.JPEG": demo.jpeg(demo.Image.new("RGB", (300, 260), (i, 255 - i, 2 * i)))
        for i in range(35)
    }
    names = sorted(files)
    for tar in range(5):
        some = {name: files[name] for name in names[tar::5]}
        s3.put_object(Bucket=bucket, Key=f"{tar}.tar", Body=demo.make_tar(some))
    lines = [f"x/n{i}.JPEG {i}" for i in range(35)]
    s3.put_object(Bucket=bucket, Key="train.txt", Body="\n".join(lines).encode())
    monkeypatch.setattr(thin, "NUM_CLASSES", 35)
    seen = []
    start = functions.Helpers.draw_minibatches

    def spy(self, batches, *arguments):
        if not seen:
            seen.extend(ray.get([(b.images, b.labels)[part] for b in batches]) for part in (0, 1))
        return start(self, batches, *arguments)

    monkeypatch.setattr(functions.Helpers, "draw_minibatches", spy)
    assert train(bucket, "--key-prefix", "", "--iterations", 1) == 0
    images, labels = map(np.concatenate, seen)
    assert sorted(labels.tolist()) == list(range(35))
    for image, label in zip(images, labels, strict=True):
        assert np.abs(image.mean(axis=(0, 1)) - [label, 255 - label, 2 * label]).max() < 4


def test_distributed_mean_gradient_is_that_of_one_session_on_the_union(thin, cluster, monkeypatch):
    rng = np.random.default_rng(0)
    minibatches = [
        (
            rng.integers(0, 256, (20, 224, 224, 3), np.uint8),
            rng.integers(0, 10, 20),
            np.zeros((20, 3), int),
        )
        for _ in range(3)
    ]
    mean = rng.normal(120, 10, (256, 256, 3)).astype(np.float32)
    weights = alexnet.initial_weights(THIN, 10, "he", rng)
    network = {"layers": THIN, "num_classes": 10}
    workers = two_workers()
    workers.update_weights(0, ray.put(weights))
    losses = workers.compute_grad([ray.put(m) for m in minibatches], ray.put(mean), 1.0, 0)
    got, norm = workers.mean_gradients(0.0)

    local = alexnet.AlexNet(**network)
    local.initialize(weights)
    pixels, labels, crops = (np.concatenate(part) for part in zip(*minibatches, strict=True))
    centred = functions.subtract_mean(pixels, crops, mean)
    union, loss = local.compute_grad(centred, functions.one_hot(labels, 10), 1.0, [0, 0])
    assert np.mean(losses) == pytest.approx(loss, rel=1e-5)
    for a, b in zip(got, union, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    assert norm == pytest.approx(np.sqrt(sum(np.vdot(b, b) for b in union)), rel=1e-5)


def test_a_longer_mean_gradient_is_shortened(thin, cluster, photos, monkeypatch):
    """The first step is as long as LEARNING_RATE times CLIP_NORM, or times the norm if that is less."""
    steps = []
    for clip in (0.1, 1e9):
        weights, norms = [], []
        apply, mean = alexnet.AlexNet.apply, functions.Workers.mean_gradients

        def noted_apply(self, *arguments, weights=weights, apply=apply):
            weights.append(self.weights())
            apply(self, *arguments)
            weights.append(self.weights())

        def noted_mean(self, *arguments, norms=norms, mean=mean):
            means, norm = mean(self, *arguments)
            norms.append(norm)
            return means, norm

        with monkeypatch.context() as patch:
            patch.setattr(alexnet.AlexNet, "apply", noted_apply)
            patch.setattr(functions.Workers, "mean_gradients", noted_mean)
            patch.setattr(thin, "CLIP_NORM", clip)
            assert train(photos, "--iterations", 1) == 0
        before, after = weights
        step = np.sqrt(sum(np.square(b - a).sum() for a, b in zip(before, after, strict=True)))
        steps.append((step, thin.LEARNING_RATE * min(clip, norms[0])))
    for step, expected in steps:
        assert step == pytest.approx(expected, rel=0.01)


def test_each_worker_is_a_process_with_weights_from_one_object(thin, cluster):
    workers = two_workers()
    below = psutil.Process().children(recursive=True)
    processes = [process for process in below if process.cmdline()[:1] == ["ray::Worker"]]
    assert len(processes) == workers.count == 2
    # Data tasks find room beside workers that hold both CPUs.
    data = functions.data_task_options()
    labels, _ = functions.convert.options(**data).remote(["a"], {"a": 1})
    assert ray.get(labels, timeout=30).tolist() == [1]


@pytest.fixture(scope="module")
def finished(cluster, photos, tmp_path_factory):
    """Output and folder of a run of three iterations that leaves all it can behind."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--val-prefix", "ILSVRC2012_img_train/n0150000", "--val-label-file", "train.txt"]
    flags += ["--checkpoint-dir", folder / "saved", "--log-dir", folder / "curves"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        thin_constants(patch)
        patch.setattr(driver, "VALIDATE_EVERY", 2)
        patch.setattr(functions, "VALIDATION_PIECE", 7)
        assert train(photos, "--iterations", 3, "--export-dir", folder / "network", *flags) == 0
    return out.getvalue(), folder


@pytest.fixture(scope="module")
def held_out(photos, finished):
    """All images of that run uint8 [120, 256, 256, 3], which were held out too, and their labels."""
    labels, images, y_true = imagenet.read_labels(photos, "train.txt", 10), [], []
    for key in imagenet.list_tars(photos, "")[0]:
        decoded, names, _ = imagenet.decode_tar(imagenet.download(photos, key), (256, 256))
        images.append(decoded)
        y_true += [labels[name] for name in names]
    return np.concatenate(images), np.array(y_true)


@pytest.fixture(scope="module")
def session(finished, held_out):
    """One session with the weights of that run, and all images as it takes them."""
    network = alexnet.AlexNet(THIN, num_classes=10)
    network.restore(alexnet.Checkpoints(str(finished[1] / "saved")).newest()[0])
    images, _ = held_out
    return network, (images - images.mean(axis=0).astype(np.float32))[:, 16:240, 16:240]


def test_validation_counts_every_held_out_image(finished, held_out, session):
    """Against one session that takes all images at once."""
    lines = re.findall(
        r"^Iteration (\d): validation top-1 = (.*%), top-5 = (.*%)$", finished[0], re.MULTILINE
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
    every = {"loss", "gradient norm", "learning rate", "images a second"}
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
    assert f"Iteration 3: validation top-1 = {points['validation top-1', 3]:.1%}" in out


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
        alexnet.SavedModel(place).write(network, mean + 100)
        alexnet.SavedModel(place).write(network, mean)
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


def test_a_gpu_a_worker_changes_no_bit(thin, cluster, photos, finished, tmp_path, monkeypatch):
    """The session's Ray counts GPUs that are none: TensorFlow goes on with the CPU."""
    monkeypatch.setattr(thin, "GPUS_PER_WORKER", 1)
    assert train(photos, "--iterations", 3, "--checkpoint-dir", tmp_path) == 0
    assert checksums(tmp_path) == checksums(finished[1] / "saved")


def test_learning_rate_drops(thin, cluster, photos, monkeypatch):
    monkeypatch.setattr(thin, "LEARNING_RATE", 0.5)
    monkeypatch.setattr(thin, "LEARNING_RATE_DROPS", (1, 3))
    rates, apply = [], alexnet.AlexNet.apply

    def spy(self, gradients, learning_rate):
        rates.append(learning_rate)
        apply(self, gradients, 0.001)

    monkeypatch.setattr(alexnet.AlexNet, "apply", spy)
    assert train(photos, "--iterations", 5) == 0
    assert rates == pytest.approx([0.5, 0.05, 0.05, 0.005, 0.005])


BEHIND_THE_CHECKOUT = """
import sys
from pathlib import Path
import ray
import driver, functions

functions.connect(num_cpus=1)
checkout = Path(driver.__file__).resolve().parent
checkout.rename(checkout.with_name("gone"))  # from here on, no node can see it

@ray.remote
def carried():
    import alexnet, functions, imagenet
    return sorted({str(file) for module in (alexnet, functions, imagenet)
                   for file in Path(module.__file__).parent.iterdir() if file.name != "__pycache__"})

print(*ray.get(carried.remote()), sep="\\n")
"""


def test_modules_and_nothing_else_reach_nodes_without_the_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for module in Path(driver.__file__).resolve().parent.glob("*.py"):
        shutil.copy(module, checkout)
    for folder in (".git", ".venv", "checkpoints", "data"):
        (checkout / folder).mkdir()
        (checkout / folder / "ballast").write_text("x")
    output = subprocess.run(
        [sys.executable, "-c", BEHIND_THE_CHECKOUT],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=120,
    )
    files = [Path(line) for line in output.stdout.split()]
    assert {file.name for file in files} == {"alexnet.py", "functions.py", "imagenet.py"}, output.stderr
    assert not any(tmp_path in file.parents for file in files)


def test_accuracy_does_not_keep_other_workers_waiting(thin, cluster, tmp_path, monkeypatch):
    """While one worker is busy with an accuracy, another one computes all the mini-batches."""
    workers = two_workers()
    minibatch = ray.put((np.zeros((2, 224, 224, 3), np.uint8), np.zeros(2, int), np.zeros((2, 3), int)))
    mean = ray.put(np.zeros((256, 256, 3), np.float32))
    weights = alexnet.initial_weights(THIN, 10, "he", np.random.default_rng(0))
    workers.update_weights(0, ray.put(weights))

    @ray.remote(num_cpus=0)
    def behind(gate, value):
        while not gate.exists():
            time.sleep(0.05)
        return value

    done, wait = set(), ray.wait

    def watch(*arguments, **options):
        ready, rest = wait(*arguments, **options)
        done.update(ready)
        if len(done) == 2:
            (tmp_path / "gate").touch()
        return ready, rest

    monkeypatch.setattr(ray, "wait", watch)
    workers.print_accuracy(behind.remote(tmp_path / "gate", minibatch), mean)
    losses = workers.compute_grad([minibatch, minibatch], mean, 1.0, 0)
    assert len(losses) == 2 and len(done) == 3
