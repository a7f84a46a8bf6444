"""The network, its session and the checkpoints."""

import contextlib
import dataclasses
import json

import alexnet
import driver
from machinery import ending, results
from machinery.cluster import adding
from machinery.errors import InputError, NotSaved
from machinery.storage.checkpoints import Checkpoints, Facts, Start
from tests.support import THIN, wait_until

import numpy as np
import pytest
import tensorflow as tf
from ml_dtypes import bfloat16

MEAN = np.ones((256, 256, 3), np.float32)


def random_input(n=4, num_classes=10, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(scale=58, size=(n, 224, 224, 3)).astype(np.float32)
    return images, np.eye(num_classes, dtype=np.float32)[rng.integers(0, num_classes, n)]


LONG = 1e9  # a norm that no gradient here has


def thin_network(momentum=0.0, clip_norm=LONG):
    """The thin network, which SGD trains."""
    rule = alexnet.Momentum(None, momentum, 0.0, clip_norm)
    network = alexnet.AlexNet(THIN, num_classes=10, rule=rule)
    network.restore(network.initial_state("he", np.random.default_rng(0)))
    return network


def test_full_size_has_16_variables_and_62_million_parameters():
    shapes = alexnet.weight_shapes(alexnet.LAYERS, 1000)
    assert len(shapes) == 16
    assert sum(int(np.prod(shape)) for shape in shapes) == 62_378_344
    assert shapes[::2] == [
        (11, 11, 3, 96),
        (5, 5, 96, 256),
        (3, 3, 256, 384),
        (3, 3, 384, 384),
        (3, 3, 384, 256),
        (9216, 4096),
        (4096, 4096),
        (4096, 1000),
    ]


def test_graph_agrees_with_weight_shapes_and_is_frozen():
    network = thin_network()
    assert [tuple(v.shape) for v in network.parameters] == alexnet.weight_shapes(THIN, 10)
    assert len(network.parameters) == len(network.placeholders) == len(network.compgrads) == 16
    with pytest.raises(RuntimeError, match="finalized"), network.sess.graph.as_default():
        tf.constant(0)


def test_forward_pass_is_the_papers_network_but_for_its_normalisation():
    """The graph's loss and gradient are those of the same layers written out in eager TensorFlow."""
    network = thin_network()
    weights, (images, y_true) = network.weights(), random_input()
    variables = [tf.Variable(w) for w in weights]
    with tf.GradientTape() as tape:
        x, kernels = tf.constant(images) / alexnet.PIXEL_STD, iter(variables)
        for i, stride in enumerate([4, 1, 1, 1, 1]):
            x = tf.nn.relu(tf.nn.conv2d(x, next(kernels), stride, "SAME") + next(kernels))
            if i in (0, 1, 4):
                x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        x = tf.reshape(x, [len(images), -1])
        for _ in range(2):
            x = tf.nn.relu(x @ next(kernels) + next(kernels))
        logits = x @ next(kernels) + next(kernels)
        loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(y_true, logits))
    expected = tape.gradient(loss, variables)
    gradients, got = network.compute_grad(images, y_true, 1.0, [0, 0])
    assert got == pytest.approx(float(loss), rel=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
        assert error < 1e-4
    order = np.argsort(-logits.numpy(), axis=1) == np.argmax(y_true, 1)[:, None]
    assert list(network.count_hits(images, y_true)) == [order[:, :k].sum() for k in (1, 5)]


def test_mean_gradient_of_parts_is_the_gradient_of_the_union():
    network = thin_network()
    images, y_true = random_input(20)
    parts = [network.compute_grad(images[i::2], y_true[i::2], 1.0, [0, 0])[0] for i in (0, 1)]
    union, _ = network.compute_grad(images, y_true, 1.0, [0, 0])
    for a, b, both in zip(*parts, union, strict=True):
        assert np.linalg.norm((a + b) / 2 - both) <= 1e-5 * np.linalg.norm(both)


def test_dropout_depends_on_the_fed_seed_alone():
    network = thin_network()
    images, y_true = random_input()
    losses = [network.compute_grad(images, y_true, 0.5, seed)[1] for seed in ([1, 2], [3, 4], [1, 2])]
    assert losses[0] == losses[2] != losses[1]


def test_dropout_keeps_the_mean():
    with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
        dropped = alexnet.seeded_dropout(tf.ones([100, 100]), tf.constant(0.5), tf.constant([5, 6]))
        values = sess.run(dropped)
    assert set(np.unique(values)) == {0.0, 2.0}
    assert values.mean() == pytest.approx(1, abs=0.05)


# ---- the update rule


@pytest.mark.parametrize(("power", "peak"), [(0, 0.1), (0.5, 0.4), (1, 1.6)])
def test_rate_follows_the_images_of_an_iteration(power, peak):
    rate = alexnet.Schedule(0.1, 40, power, 0, (), 640)
    assert rate(0) == rate(999) == rate.peak == pytest.approx(peak)
    assert alexnet.Schedule(0.1, 40, power, 5000, (), 40)(0) == 0.1  # exactly, from the first step on


def test_rate_rises_to_a_higher_peak_and_falls_to_a_tenth_from_each_drop_on():
    rate = alexnet.Schedule(0.1, 40, 1, 800, (1600, 2400), 160)
    rates = [rate(iteration) for iteration in (0, 1, 5, 9, 10, 14, 15, 999)]
    assert rates == pytest.approx([0.1, 0.16, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
    assert str(rate) == "0.4, up from 0.1 over 800 images, a tenth of it from 1600 and 2400 images on"
    lower = alexnet.Schedule(0.1, 40, 1, 800, (), 20)
    assert lower(0) == lower(999) == pytest.approx(0.05) and str(lower) == "0.05"


def test_kernels_decay_and_biases_do_not():
    rule = alexnet.Momentum(None, 0.9, 5e-4, LONG)
    assert rule.decays(alexnet.AlexNet(THIN, num_classes=10, rule=rule).parameters) == [5e-4, 0] * 8


def test_only_a_longer_gradient_is_shortened():
    rule = alexnet.Momentum(None, 0.9, 0.0, 10.0)
    assert [rule.clipped(0.5, norm) for norm in (0.0, 9.0, 10.0, 40.0)] == [0.5, 0.5, 0.5, 0.125]
    assert alexnet.Momentum(None, 0.9, 0.0, np.inf).clipped(0.5, 1e30) == 0.5


def test_apply_is_sgd_with_momentum():
    network = thin_network(momentum=0.9)
    w0 = network.weights()
    gradients = [np.ones_like(w) for w in w0]
    network.apply(gradients, 1.0, 0.1)
    w1 = network.weights()
    network.apply(gradients, 1.0, 0.1)
    for a, b, c in zip(w0, w1, network.weights(), strict=True):
        np.testing.assert_allclose(b, a - 0.1, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(c, b - 0.1 * 1.9, rtol=1e-5, atol=1e-7)
    network.apply(gradients, 1.0, 0.01)  # what momentum keeps are steps at the rate of their time
    for a, b in zip(w0, network.weights(), strict=True):
        np.testing.assert_allclose(b, a - 0.1 - 0.19 - (0.9 * 0.19 + 0.01), rtol=1e-5, atol=1e-6)


def test_apply_makes_the_step_of_the_shortened_gradient():
    network = thin_network(clip_norm=10.0)
    before = network.weights()
    network.apply([np.ones_like(w) for w in before], 40.0, 0.1)
    for a, b in zip(before, network.weights(), strict=True):
        np.testing.assert_allclose(b, a - 0.1 / 4, rtol=1e-5, atol=1e-7)


# ---- weights


@pytest.mark.smoke
def test_bfloat16_weights_travel_as_their_bits():
    """Rounded once, and then the same in every network and as float32."""
    local, worker = thin_network(), alexnet.AlexNet(THIN, num_classes=10, precision="bfloat16")
    bits = local.weights("bfloat16")
    worker.update_weights(bits)
    sets = local.weights(), bits, worker.weights("bfloat16"), worker.weights()
    for weight, sent, kept, wide in zip(*sets, strict=True):
        assert sent.dtype == kept.dtype == np.uint16
        np.testing.assert_array_equal(sent, kept)
        np.testing.assert_array_equal(adding.as_float32(sent), wide)
        np.testing.assert_array_equal(wide, weight.astype(bfloat16).astype(np.float32))
        assert adding.as_float32(weight) is weight


@pytest.mark.smoke
def test_bfloat16_is_near_float32_and_not_the_same():
    local, (images, y_true) = thin_network(), random_input(20)
    results = []
    for precision in ("float32", "bfloat16"):
        worker = alexnet.AlexNet(THIN, num_classes=10, precision=precision)
        worker.update_weights(local.weights(precision))
        gradients, loss = worker.compute_grad(images, y_true, 1.0, [0, 0])
        results.append(([adding.as_float32(gradient) for gradient in gradients], loss))
    (exact, loss), (rounded, near) = results
    assert near == pytest.approx(loss, rel=0.01)
    for a, b in zip(exact, rounded, strict=True):
        assert np.vdot(a, b) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
        assert (a != b).any()


def test_loss_falls_on_a_small_set():
    network = thin_network(momentum=0.9)
    images, y_true = random_input(20)
    losses = []
    for step in range(60):
        gradients, loss = network.compute_grad(images, y_true, 1.0, [0, step])
        network.apply(gradients, 1.0, 0.01)
        losses.append(loss)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_weights_are_used_in_place():
    """TensorFlow takes an aligned read-only array as it is: full weights are 250 MB."""
    network = thin_network()
    shape = network.parameters[-2].shape
    size = 4 * int(np.prod(shape))
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    view = buffer[start : start + size].view(np.float32).reshape(shape)
    view.flags.writeable = False
    weights = network.weights()
    weights[-2] = view
    network.update_weights(weights)
    buffer[start : start + size].view(np.float32)[:] = 7.0
    assert (network.weights()[-2] == 7.0).all()


def test_weights_are_views_and_stay_as_they_were():
    """No copy of 250 MB, unless someone still looks at a variable when it changes."""
    network = thin_network()
    gradients = [np.ones_like(w) for w in network.weights()]
    network.apply(gradients, 1.0, 0.1)  # moves those that still lie where they were restored from
    before = [w.ctypes.data for w in network.weights()]
    network.apply(gradients, 1.0, 0.1)
    assert [w.ctypes.data for w in network.weights()] == before  # TensorFlow has written in place
    held = network.weights()
    values = [w.copy() for w in held]
    network.apply(gradients, 1.0, 0.1)
    for view, value, new in zip(held, values, network.weights(), strict=True):
        assert not view.flags.writeable
        assert (view == value).all() and (new != value).all()


def test_initial_weights():
    rng = np.random.default_rng(0)
    he = alexnet.initial_weights(alexnet.LAYERS[:5], 1000, "he", rng)
    assert he[2].std() == pytest.approx(np.sqrt(2 / (5 * 5 * 96)), rel=0.01)
    assert he[-2].std() == pytest.approx(0.01, rel=0.01)
    assert not any(bias.any() for bias in he[1::2])
    assert all(w.dtype == np.float32 for w in he)
    assert alexnet.initial_weights(THIN, 10, 0.1, rng)[0].std() == pytest.approx(0.1, rel=0.1)


# ---- checkpoints

RUN, FIXED = {"SEED": "0", "LEARNING_RATE": "0.1"}, ["SEED"]


def save(checkpoints, iteration, network, top1=None):
    network.iteration = iteration
    facts = Facts(mini_batches=2, precision="float32", run=RUN, best=checkpoints.best)
    checkpoints.claim(facts)
    checkpoints.save(network, facts, MEAN, top1)
    checkpoints.wait()


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "new" / "checkpoints")
    return f"s3://{request.getfixturevalue('bucket')}/some/prefix"


def test_checkpoints_are_tensorflows_and_the_newest_three_are_kept(tmp_path):
    network, checkpoints = thin_network(), Checkpoints(str(tmp_path))
    for iteration in range(6):  # of which 0 needs none
        save(checkpoints, iteration, network)
    assert tf.train.latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-5")
    assert len(list(tmp_path.glob("*.index"))) == len(list(tmp_path.glob("*.data*"))) == 3
    reader = tf.train.load_checkpoint(tmp_path)
    assert (reader.get_tensor("conv1/kernel") == network.weights()[0]).all()
    assert json.loads(reader.get_tensor("facts"))["iteration"] == 5


def test_the_best_checkpoint_is_kept_beside_the_newest_three(place, said):
    """One that is validated and not the best so far is not saved by that alone."""
    network, checkpoints = thin_network(), Checkpoints(place)
    for iteration, top1 in (
        (1, 0.2),
        (2, 0.5),
        (3, 0.5),
        (4, None),
        (5, 0.3),
        (6, None),
        (7, None),
        (8, None),
    ):
        save(checkpoints, iteration, network, top1)
    assert checkpoints.best == [2, 0.5]
    del checkpoints
    kept = Checkpoints(place)
    for iteration in (2, 6, 7, 8):
        assert kept.start(iteration, wanted=True).facts.iteration == iteration
    assert kept.start(5, wanted=True).facts.iteration == 2
    with pytest.raises(
        InputError, match="no intact checkpoint up to iteration 1 is kept; there are 2, 6, 7, 8$"
    ):
        kept.start(1, wanted=True)
    newest = kept.start()
    assert newest.facts.best == [2, 0.5] and not newest.trained and (newest.mean == MEAN).all()
    before = newest.facts
    newest.validate_on(None)
    assert newest.facts == before and said() == []
    newest.validate_on({"tars": "others"})
    assert newest.facts.best is None and len(said()) == 1


@pytest.mark.parametrize("last, lost", [(0.3, ["the best: top-1 50.0% at iteration 2"]), (0.6, [])])
def test_a_best_checkpoint_whose_save_fails_is_told_until_there_is_a_better_one(
    tmp_path, said, last, lost
):
    there, away, network = tmp_path / "there", tmp_path / "away", thin_network()
    args = driver.read_flags(["--checkpoint-dir", str(there), "--iterations", "9"])
    outcome = results.Outcome(args, results.Report(), ending.Stop())
    outcome.begin(network, MEAN, Facts(mini_batches=2, precision="float32"))
    network.iteration = 1
    outcome.validation(0.1, 1)
    wait_until((there / "checkpoint").exists)
    there.rename(away)
    there.write_text("a file in its place")
    network.iteration = 2
    outcome.validation(0.5, 1)
    there.unlink()
    away.rename(there)
    network.iteration = 3
    outcome.validation(last, 1)
    with pytest.raises(NotSaved) if lost else contextlib.nullcontext(), outcome:
        pass
    failed, end = said()
    assert failed.startswith("The checkpoint of iteration 2 is not saved: ")
    kept = f"checkpoints in {there} (best: top-1 {last:.1%} at iteration 3)"
    assert end == "; not saved: ".join([f"Stopped at iteration 3: {kept}", *lost])


def test_old_checkpoints_that_s3_does_not_delete_do_not_spoil_a_save(proxy, bucket, said):
    network, place = thin_network(), f"s3://{bucket}/x"
    checkpoints = Checkpoints(place)
    proxy.always["DELETE"] = "403"
    for iteration in range(1, 6):
        save(checkpoints, iteration, network, iteration / 10)
    proxy.always.clear()
    assert Checkpoints(place).start().facts.best == [5, 0.5]
    assert (checkpoints.saved, checkpoints.best) == (5, [5, 0.5])
    assert len(said()) == 2 and all("than that of iteration" in line for line in said())


def test_an_iteration_that_is_saved_and_then_the_best_is_not_written_again(tmp_path):
    network, checkpoints = thin_network(), Checkpoints(str(tmp_path))
    save(checkpoints, 1, network)
    written = (tmp_path / "ckpt-1.index").stat().st_mtime_ns
    save(checkpoints, 1, network, 0.5)
    assert checkpoints.best == [1, 0.5]
    assert (tmp_path / "ckpt-1.index").stat().st_mtime_ns == written
    for iteration in range(2, 6):
        save(checkpoints, iteration, network)
    assert (tmp_path / "ckpt-1.index").exists() and not (tmp_path / "ckpt-2.index").exists()


def test_resume_restores_weights_and_momentum(place):
    network = thin_network(momentum=0.9)
    assert Checkpoints(place).start() == Start(place)
    gradients = [np.ones_like(w) for w in network.weights()]
    network.apply(gradients, 1.0, 0.1)
    save(Checkpoints(place), 1, network)
    network.apply(gradients, 1.0, 0.1)
    start = Checkpoints(place).start()
    facts = Facts(iteration=1, mini_batches=2, precision="float32", run=RUN)
    as_saved = Start(place, facts, reached=1)
    assert dataclasses.replace(start, state=None, mean=None) == as_saved
    other = thin_network(momentum=0.9)
    other.restore(start.state)
    other.apply(gradients, 1.0, 0.1)
    for a, b in zip(other.weights(), network.weights(), strict=True):
        assert (a == b).all()


def test_without_a_place_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Checkpoints(None), 1, thin_network())
    assert Checkpoints(None).start() == Start(None)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_named_and_the_newest_intact_one_is_used(tmp_path, said):
    network, checkpoints = thin_network(), Checkpoints(str(tmp_path))
    for iteration in (1, 2, 3):
        save(checkpoints, iteration, network)
    del checkpoints  # as long as they are open, the folder is theirs
    data = tmp_path / "ckpt-3.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-100] + bytes(100))
    index = tmp_path / "ckpt-2.index"
    index.write_bytes(index.read_bytes()[:50])
    (tmp_path / "checkpoint").write_text("nonsense")
    assert Checkpoints(str(tmp_path)).start().facts.iteration == 1
    assert ["ckpt-3" in said()[0], "ckpt-2" in said()[1]] == [True, True]
    data = tmp_path / "ckpt-1.data-00000-of-00001"
    data.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is intact"):
        Checkpoints(str(tmp_path)).start()


def test_a_checkpoint_of_another_run_is_refused_and_changed_rates_are_told(tmp_path, said):
    save(Checkpoints(str(tmp_path)), 1, thin_network())
    start = Checkpoints(str(tmp_path)).start()
    with pytest.raises(InputError, match=r"different are SEED \(was 0\)"):
        start.must_match(RUN | {"SEED": "1"}, FIXED)
    start.facts = dataclasses.replace(start.facts, run=RUN | {"tars": "a digest"})
    hint = "if the same tars were only uploaded again in another way, set CHECK_TARS = False"
    with pytest.raises(InputError, match=hint):
        start.must_match({"tars": "another"}, ["tars"])
    start.must_match(RUN, FIXED)
    assert said() == []
    start.must_match(RUN | {"LEARNING_RATE": "0.2"}, FIXED)
    assert said() == ["LEARNING_RATE is 0.2 from here on, was 0.1"]
    start.must_match({"WARM_UP": "5", "POWER": "1"}, FIXED)  # of a program that had none
    new = f"WARM_UP = 5 and POWER = 1: the checkpoints in {tmp_path} do not say it"
    assert said()[1:] == [f"From here on {new}"]
    Start(None).must_match(RUN | {"SEED": "1"}, FIXED)  # there is none to match
    assert len(said()) == 2


def test_a_save_that_fails_is_one_clear_line_and_the_next_one_is_tried(tmp_path, said):
    there, away, network = tmp_path / "there", tmp_path / "away", thin_network()
    checkpoints = Checkpoints(str(there))
    there.rename(away)
    there.write_text("a file in its place")
    save(checkpoints, 1, network)
    assert len(said()) == 1 and checkpoints.saved == 0
    assert said()[0].startswith("The checkpoint of iteration 1 is not saved: --checkpoint-dir ")
    with pytest.raises(InputError, match="--checkpoint-dir"):
        Checkpoints(str(there / "below"))
    there.unlink()
    away.rename(there)
    save(checkpoints, 2, network)
    assert len(said()) == 1 and checkpoints.saved == 2


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    first = Checkpoints(str(tmp_path))
    with pytest.raises(InputError, match=f"^--checkpoint-dir {tmp_path}: another run saves here$"):
        Checkpoints(str(tmp_path))
    del first
    Checkpoints(str(tmp_path))
