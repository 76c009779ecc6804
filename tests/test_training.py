"""Section 7: losses, training, resuming, weights files."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_mean

import helpers
from helpers import (
    MLP,
    GaussianPath,
    LinearScheduler,
    NoiseScore,
    UNet,
    choose_precision,
    flow_matching_loss,
    image_batches,
    learning_rate,
    load_record,
    load_weights,
    make_generator,
    save_weights,
    score_matching_loss,
    train,
    train_or_load,
)

PATH = GaussianPath(LinearScheduler())


def flow_loss(model, batch, *, generator):
    return flow_matching_loss(model, PATH, batch, generator=generator)


def points(generator):
    """A batch of 32 points on two lines."""
    z = torch.randn(32, 2, generator=generator)
    return torch.stack([z[:, 0].sign(), z[:, 1]], dim=1)


def images(generator):
    return torch.randn(4, 1, 8, 8, generator=generator).clamp(-1, 1)


def build(kind):
    """A model and its batches, from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mlp":
            return MLP(hidden=16, layers=2), points
        return UNet((16, 16, 16)), images


def same(first, second):
    """Equal bit for bit, entry by entry."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Losses


def test_flow_matching_loss_of_the_exact_field_is_the_floor(mixture, scheduler):
    """E[loss] = E[Var(u | x_t)] / D; both sides by 400 batches, five errors of the difference."""
    path, generator = GaussianPath(scheduler), make_generator(1)

    def exact(x, t):
        return mixture.velocity(x, t, scheduler)

    def floor(z):
        t = torch.rand(len(z), generator=generator, dtype=z.dtype)
        x = path.sample(z, t, torch.randn(z.shape, generator=generator, dtype=z.dtype))
        return mixture.velocity_variance(x, t, scheduler).mean() / 2

    batches = [mixture.sample(100, generator=generator) for _ in range(400)]
    losses = torch.stack([flow_matching_loss(exact, path, z, generator=generator) for z in batches])
    assert_mean(losses - torch.stack([floor(z) for z in batches]))
    wrong = torch.stack(
        [
            flow_matching_loss(lambda x, t: exact(x, t) + 0.3, path, z, generator=generator)
            for z in batches
        ]
    )
    assert_mean(wrong - losses, 0.3**2)


def test_score_matching_loss_of_the_exact_score_is_the_floor(mixture):
    """beta^2 Var(score of x given z) is the variance of the noise given x: the linear path has
    u = z - eps and x = t z + (1 - t) eps, so that eps = x - t u and Var(eps) = t^2 Var(u)."""
    generator = make_generator(2)

    def exact(x, t):
        return PATH.velocity_to_score(mixture.velocity(x, t, PATH.scheduler), x, t)

    def floor(z):
        t = torch.rand(len(z), generator=generator, dtype=z.dtype)
        x = PATH.sample(z, t, torch.randn(z.shape, generator=generator, dtype=z.dtype))
        return (t**2 * mixture.velocity_variance(x, t, PATH.scheduler)).mean() / 2

    batches = [mixture.sample(100, generator=generator) for _ in range(400)]
    losses = [score_matching_loss(exact, PATH, z, generator=generator) for z in batches]
    assert_mean(torch.stack(losses) - torch.stack([floor(z) for z in batches]))


@pytest.mark.parametrize("shape", [(6,), (6, 2), (3, 3), (3, 1, 4, 4), (1, 2)])
def test_losses_ask_the_model_at_the_path(shape, generator):
    """The target of both losses is exact: a model that knows z has loss 0 at any shape."""
    z = torch.randn(shape, generator=generator, dtype=torch.float64)

    def velocity(x, t):
        return PATH.conditional_velocity(x, z, t)

    def score(x, t):
        return PATH.conditional_score(x, z, t)

    assert flow_matching_loss(velocity, PATH, z, generator=generator) < 1e-20
    assert score_matching_loss(score, PATH, z, generator=generator) < 1e-20
    assert score_matching_loss(score, PATH, z, weighted=False, generator=generator) < 1e-20


def test_source_replaces_the_noise(generator):
    z, source = torch.randn(2, 5, 2, generator=generator)
    loss = flow_matching_loss(lambda x, t: z - source, PATH, z, source=source, generator=generator)
    assert loss < 1e-12


def test_weighting_of_the_score_loss(generator):
    """Both are means over the same draws: for one t the ratio is beta^2, here 1/4."""

    class AtHalf(LinearScheduler):
        """A path that stands still at t = 1/2."""

        def alpha(self, t):
            return torch.full_like(t, 0.5)

        beta = alpha

    path, z = GaussianPath(AtHalf()), torch.randn(50, 2, generator=generator)
    weighted, plain = (
        score_matching_loss(lambda x, t: x, path, z, weighted=w, generator=make_generator(5))
        for w in (True, False)
    )
    torch.testing.assert_close(weighted, plain / 4)


def test_losses_follow_the_generator_and_stay_on_the_graph(generator):
    model, z = MLP(hidden=8, layers=1), torch.randn(5, 2, generator=generator)
    for loss in (flow_matching_loss, score_matching_loss):
        first = loss(model, PATH, z, generator=make_generator(3))
        assert torch.equal(first, loss(model, PATH, z, generator=make_generator(3)))
        assert not torch.equal(first, loss(model, PATH, z, generator=make_generator(4)))
        assert first.shape == ()
        assert first.requires_grad


def test_image_batches():
    stored = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 1, 28, 28)
    sample_batch = image_batches(stored, 1000)
    batch = sample_batch(make_generator(0))
    assert batch.shape == (1000, 1, 28, 28)
    assert batch.dtype == torch.float32
    levels = ((batch[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert sorted(set(levels.tolist())) == list(range(10))
    assert torch.equal(batch, sample_batch(make_generator(0)))
    same, labels = image_batches(stored, 1000, labels=torch.arange(10))(make_generator(0))
    assert torch.equal(same, batch)
    assert torch.equal(labels, levels)


# The learning rate and the average


def test_learning_rate():
    rates = torch.tensor([learning_rate(step, 1000, 2.0, 100) for step in range(1001)])
    assert rates[:100].diff().min() > 0
    assert rates[99] == rates[100] == rates.max() == 2
    assert rates[100:].diff().max() <= 0
    assert rates[550] == pytest.approx(1)  # half-way between warm-up and the end
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 10, 2.0, 0) == 2


def test_the_model_ends_as_the_average_of_its_weights():
    """ema = 0 keeps the last weights and cannot change the losses; a large ema lags behind."""
    ends, losses = {}, {}
    for ema in (0.0, 0.5, 0.999):
        model, sample_batch = build("mlp")
        losses[ema] = train(model, flow_loss, sample_batch, steps=30, ema=ema, lr=1e-2)
        ends[ema] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in build("mlp")[0].parameters()])
    assert torch.equal(losses[0.0], losses[0.999])
    moved = [(ends[ema] - start).norm() for ema in (0.0, 0.5, 0.999)]
    assert moved[0] > moved[1] > moved[2] > 0


def test_decay_of_the_average():
    """The first decays are 1/10 and 2/11; the third would be 3/12 and is held at ema."""

    def weights(ema):
        """One matrix before every step, and at the end."""
        model, sample_batch = build("mlp")
        weight, seen = next(model.parameters()), []

        def loss(model, batch, *, generator):
            seen.append(weight.detach().clone())
            return flow_loss(model, batch, generator=generator)

        train(model, loss, sample_batch, steps=3, ema=ema, lr=0.1)
        return [*seen, weight.detach()]

    average, *stepped = weights(ema=0.0)  # without an average, the end is the last step
    for decay, value in zip((1 / 10, 2 / 11, 0.2), stepped, strict=True):
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(weights(ema=0.2)[-1], average)


# Training


def test_training_lowers_the_loss():
    """Data near one point: the floor is near 0 and the loss falls far below its start."""
    model, log = build("mlp")[0], {}

    def sample_batch(generator):
        return 2 + 0.1 * torch.randn(32, 2, generator=generator)

    losses = train(model, flow_loss, sample_batch, steps=300, lr=1e-2, log=log)
    assert losses.shape == (300,)
    assert losses.dtype == torch.float32
    assert losses[-50:].mean() < 0.3 * losses[:20].mean()
    assert not model.training
    assert log["precision"] == "float32"
    assert log["seconds"] > 0


@pytest.mark.parametrize(
    ("device", "units", "expected"),
    [
        ("cuda", (9, 0), "bfloat16"),
        ("cuda", (8, 0), "bfloat16"),
        ("cuda", (7, 5), "float16"),
        ("cpu", "_is_avx512_bf16_supported", "bfloat16"),
        ("cpu", "_is_amx_tile_supported", "bfloat16"),
        ("cpu", None, "float32"),
        ("mps", None, "float32"),
    ],
)
def test_precision_follows_the_units_of_the_device(device, units, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: units)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe == units, raising=False)
    device = torch.device(device)
    assert choose_precision(build("unet")[0], device) == expected
    assert choose_precision(build("mlp")[0], device) == "float32"


def test_training_is_reproducible_and_owns_its_generator():
    before = torch.get_rng_state()
    runs = []
    for seed in (3, 3, 4):
        model, sample_batch = build("mlp")
        runs.append([train(model, flow_loss, sample_batch, steps=20, seed=seed)])
        runs[-1] += [p.detach() for p in model.parameters()]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_clipped():
    """Adam ignores the scale of a gradient, but not a norm far below its epsilon."""
    model, sample_batch = build("mlp")
    start = [p.detach().clone() for p in model.parameters()]
    train(model, flow_loss, sample_batch, steps=3, clip=1e-14, ema=0.0)
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(start, model.parameters(), strict=True))


def test_frozen_parameters_stay():
    model, sample_batch = build("mlp")
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    train(model, flow_loss, sample_batch, steps=3)
    assert torch.equal(frozen, before)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    model, sample_batch = build("mlp")
    train(model, flow_loss, sample_batch, steps=2)
    assert torch.get_num_threads() == before


def test_a_network_without_convolutions_trains_in_float32():
    assert helpers.choose_precision(MLP(), torch.device("cpu")) == "float32"


# Interruption


class Stop:
    """A batch function or loss that is interrupted at its n-th call, before or after the work
    that draws random numbers."""

    def __init__(self, function, at, error, after):
        self.function, self.left, self.error, self.after = function, at, error, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        value = self.function(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return value


@pytest.mark.parametrize(
    ("kind", "precision"), [("mlp", "float32"), ("unet", "float32"), ("unet", "bfloat16")]
)
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("batch", KeyboardInterrupt),
        ("batch drawn", KeyboardInterrupt),
        ("loss drawn", KeyboardInterrupt),
        ("batch drawn", RuntimeError),
    ],
)
def test_resuming_is_bit_exact(kind, precision, where, error, tmp_path):
    """Interrupted in step 6 of 8, with a checkpoint every 2: the run ends as an undisturbed
    one. KeyboardInterrupt saves step 5; another error leaves step 4."""
    options = dict(steps=8, seed=5, precision=precision, checkpoint_every=2)
    model, sample_batch = build(kind)
    expected = [train(model, flow_loss, sample_batch, **options), *model.parameters()]

    options["checkpoint"] = tmp_path / "run.checkpoint"
    model, sample_batch = build(kind)
    stopped_batch, stopped_loss = sample_batch, flow_loss
    if where == "loss drawn":
        stopped_loss = Stop(flow_loss, 6, error, after=True)
    else:
        stopped_batch = Stop(sample_batch, 6, error, after=where == "batch drawn")
    with pytest.raises(error):
        train(model, stopped_loss, stopped_batch, **options)
    state = torch.load(options["checkpoint"], weights_only=True)
    assert state["step"] == (5 if error is KeyboardInterrupt else 4)

    model, _ = build(kind)
    with torch.no_grad():  # whatever the weights are, the checkpoint decides
        next(model.parameters()).zero_()
    resumed = [train(model, flow_loss, sample_batch, **options), *model.parameters()]
    assert same(resumed, expected)
    assert torch.load(options["checkpoint"], weights_only=True)["step"] == 8


def test_an_incomplete_step_is_not_saved(tmp_path, monkeypatch):
    """An interruption after the optimiser and before the average leaves the last checkpoint."""
    model, sample_batch = build("mlp")
    options = dict(steps=12, checkpoint_every=3)
    expected = [train(model, flow_loss, sample_batch, **options), *model.parameters()]
    options["checkpoint"] = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "_foreach_lerp_", Stop(torch._foreach_lerp_, 8, KeyboardInterrupt, after=False)
        )
        with pytest.raises(KeyboardInterrupt):
            train(build("mlp")[0], flow_loss, sample_batch, **options)
    model, _ = build("mlp")
    resumed = [train(model, flow_loss, sample_batch, **options), *model.parameters()]
    assert same(resumed, expected)


def test_a_finished_checkpoint_is_the_run(tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    losses = train(model, flow_loss, sample_batch, steps=5, checkpoint=checkpoint)
    again, _ = build("mlp")
    assert torch.equal(
        train(again, flow_loss, sample_batch, steps=5, checkpoint=checkpoint), losses
    )
    assert same(again.parameters(), model.parameters())
    assert not again.training


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 6), ("lr", 2e-3), ("seed", 1), ("ema", 0.9), ("warmup", 1), ("clip", 0.5)],
)
def test_a_checkpoint_of_another_configuration_is_refused(field, value, tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    train(model, flow_loss, sample_batch, steps=4, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"{field} = .*, now {value}.*delete it"):
        train(model, flow_loss, sample_batch, **{"steps": 4, field: value}, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="parameters = "):
        train(MLP(hidden=8), flow_loss, sample_batch, steps=4, checkpoint=checkpoint)


def diverging(at):
    """A loss that is NaN at the step `at`."""
    left = iter(range(10_000))

    def loss(model, batch, *, generator):
        value = flow_loss(model, batch, generator=generator)
        return value * math.nan if next(left) == at else value

    return loss


@pytest.mark.parametrize(
    ("at", "kept"), [(2, "nothing was saved"), (7, "the last good state is in .*run.checkpoint")]
)
def test_divergence_names_the_step_and_what_was_kept(at, kept, tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    options = dict(steps=20, checkpoint=checkpoint, checkpoint_every=5)
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {at}; {kept}.* Lower lr"):
        train(model, diverging(at), sample_batch, **options)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        assert state["step"] == 5
        assert all(weight.isfinite().all() for weight in state["weights"])


def test_divergence_without_a_checkpoint():
    model, sample_batch = build("mlp")
    with pytest.raises(FloatingPointError, match="at step 9; nothing was saved"):
        train(model, diverging(9), sample_batch, steps=10)


def test_interrupting_a_diverged_run_keeps_the_good_checkpoint(tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    stopped = Stop(sample_batch, 9, KeyboardInterrupt, after=False)
    with pytest.raises(KeyboardInterrupt):
        train(model, diverging(6), stopped, steps=20, checkpoint=checkpoint, checkpoint_every=5)
    assert torch.load(checkpoint, weights_only=True)["step"] == 5


# Files


KILLED = """
import os, pathlib, sys
sys.path[:0] = sys.argv[2:]
import torch
from test_training import build, flow_loss, train

save, calls = torch.save, iter(range(9))

def save_or_die(state, path):
    if next(calls) == 2:
        path.write_bytes(b"half")
        os._exit(9)
    save(state, path)

torch.save = save_or_die
model, sample_batch = build("mlp")
options = dict(steps=12, checkpoint_every=3, checkpoint=pathlib.Path(sys.argv[1]))
train(model, flow_loss, sample_batch, **options)
"""


def test_killed_while_writing_a_checkpoint(tmp_path):
    """A process that dies within the third write, without a chance to tidy up: the second
    checkpoint is whole, and the run ends as an undisturbed one."""
    checkpoint, folder = tmp_path / "run.checkpoint", Path(__file__).parent
    arguments = [checkpoint, folder, folder.parent]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == 9
    assert torch.load(checkpoint, weights_only=True)["step"] == 6
    model, sample_batch = build("mlp")
    expected = [train(model, flow_loss, sample_batch, steps=12), *model.parameters()]
    model, _ = build("mlp")
    options = dict(steps=12, checkpoint_every=3, checkpoint=checkpoint)
    resumed = [train(model, flow_loss, sample_batch, **options), *model.parameters()]
    assert same(resumed, expected)


@pytest.fixture
def full_disk(monkeypatch):
    """torch.save writes a part and fails."""

    def save(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def fill():
        monkeypatch.setattr(torch, "save", save)

    return fill


def test_a_full_disk_leaves_the_old_files_whole(weights_folder, full_disk):
    checkpoint, (model, sample_batch) = weights_folder / "run.checkpoint", build("mlp")
    save_weights(model, "net", {"config": {}})
    stopped = Stop(sample_batch, 5, KeyboardInterrupt, after=False)
    with pytest.raises(KeyboardInterrupt):
        train(model, flow_loss, stopped, steps=9, checkpoint=checkpoint)
    before = {path: path.read_bytes() for path in weights_folder.iterdir()}
    assert {path.name for path in before} == {"net.pt", "run.checkpoint"}
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        save_weights(model, "net", {"config": {}})
    with pytest.raises(OSError, match="No space left"):
        train(model, flow_loss, sample_batch, steps=9, checkpoint=checkpoint)
    assert {path: path.read_bytes() for path in weights_folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_weights_round_trip(kind, weights_folder):
    model, _ = build(kind)
    record = {"config": {"steps": 3, "channels": [16, 16]}, "losses": torch.ones(3)}
    save_weights(model.train(), "net", record)
    assert model.training
    loaded = load_weights(build(kind)[0].train(), "net", expect={"steps": 3, "channels": [16, 16]})
    assert not loaded.training
    for saved, read in zip(model.parameters(), loaded.parameters(), strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(read, saved.half().float())
    found = load_record("net")
    assert found["config"] == record["config"]
    assert torch.equal(found["losses"], record["losses"])
    parameters = sum(p.numel() for p in model.parameters())
    assert (weights_folder / "net.pt").stat().st_size < 2 * parameters + 40_000
    assert [path.name for path in weights_folder.iterdir()] == ["net.pt"]


def test_new_files_hide_committed_ones_and_fall_back_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "DATA", tmp_path / "data")
    monkeypatch.delenv("FLOW_WEIGHTS", raising=False)
    save_weights(MLP(), "net", {"made": "in the clone"})
    assert (tmp_path / "data" / "weights" / "net.pt").exists()
    monkeypatch.setenv("FLOW_WEIGHTS", str(tmp_path / "new"))
    assert load_record("net") == {"made": "in the clone"}
    save_weights(MLP(), "net", {"made": "outside"})
    assert load_record("net") == {"made": "outside"}


class Harmful:
    def __reduce__(self):
        return (print, ("this code was run",))


def test_a_file_with_code_is_refused(weights_folder, capsys):
    for content in (pickle.dumps(Harmful()), None):
        if content is None:
            torch.save({"weights": Harmful(), "record": {}}, weights_folder / "net.pt")
        else:
            (weights_folder / "net.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.pt is not a readable weights file.*git"):
            load_record("net")
    assert capsys.readouterr().out == ""


def test_a_truncated_file_is_refused(weights_folder):
    save_weights(MLP(), "net", {"config": {}})
    file = weights_folder / "net.pt"
    content = file.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"net\.pt is not a readable weights file.*RETRAIN"):
            load_weights(MLP(), "net")


def test_other_weights_are_refused(weights_folder):
    save_weights(MLP(hidden=8), "net", {"config": {"steps": 5, "seed": 0}})
    with pytest.raises(ValueError, match="trained with seed = 0, expected 1"):
        load_weights(MLP(hidden=8), "net", expect={"steps": 5, "seed": 1})
    with pytest.raises(ValueError, match="trained with width = None, expected 3"):
        load_weights(MLP(hidden=8), "net", expect={"width": 3})
    with pytest.raises(ValueError, match=r"does not fit this model: .*\n.*size mismatch"):
        load_weights(MLP(hidden=16), "net")
    with pytest.raises(FileNotFoundError, match=r"other\.pt does not exist.*FLOW_RETRAIN=1"):
        load_weights(MLP(), "other")


# train_or_load

CONFIG = dict(steps=6, lr=1e-3, seed=3, ema=0.9, hidden=8)


def run(**options):
    return train_or_load(
        "net",
        lambda: MLP(hidden=8),
        flow_loss,
        points,
        device=torch.device("cpu"),
        **{"config": CONFIG, **options},
    )


def test_train_or_load_both_ways_same_network(weights_folder):
    with pytest.raises(FileNotFoundError):
        run()
    before = torch.get_rng_state()
    trained, record = run(retrain=True)
    loaded, again = run()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(trained.parameters(), loaded.parameters())
    assert trained.training is loaded.training is False
    assert record.keys() == again.keys()
    assert record["config"] == CONFIG
    assert record["losses"].shape == (6,)
    assert {"seconds", "precision", "device", "processor", "versions"} <= record.keys()
    assert [path.name for path in weights_folder.iterdir()] == ["net.pt"]
    with pytest.raises(ValueError, match="trained with hidden = 8, expected 9"):
        run(config={**CONFIG, "hidden": 9})


def test_train_or_load_resumes(weights_folder, monkeypatch):
    expected, _ = run(retrain=True)
    (weights_folder / "net.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "points", Stop(points, 4, KeyboardInterrupt, after=True))
        with pytest.raises(KeyboardInterrupt):
            run(retrain=True)
    assert [path.name for path in weights_folder.iterdir()] == ["net.checkpoint"]
    with pytest.raises(ValueError, match="written with batch = None, now 9; delete it"):
        run(config={**CONFIG, "batch": 9}, retrain=True)
    resumed, record = run(retrain=True)
    assert same(resumed.parameters(), expected.parameters())
    assert (record["losses"] > 0).all()


def test_a_score_network_trains_through_its_wrapper():
    """The network inside NoiseScore is what is trained and saved."""
    model, sample_batch = build("mlp")
    before = [p.detach().clone() for p in model.parameters()]

    def loss(model, batch, *, generator):
        return score_matching_loss(NoiseScore(model, PATH), PATH, batch, generator=generator)

    losses = train(model, loss, sample_batch, steps=5)
    assert losses.isfinite().all()
    assert not same(before, model.parameters())


# Evaluations


def test_evaluations_belong_to_their_weights(weights_folder):
    save_weights(MLP(), "net", {"config": {}})
    helpers.save_evaluation("table", ["net"], {"n": 5, "rows": [1.5, 2.5]})
    content = helpers.load_evaluation("table")
    assert content["n"] == 5
    assert content["rows"] == [1.5, 2.5]
    assert list(content["weights"]) == ["net"]
    save_weights(MLP(), "net", {"config": {"other": 1}})
    with pytest.raises(ValueError, match="made with other weights of net; make it with"):
        helpers.load_evaluation("table")
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist.*evaluate\.py"):
        helpers.load_evaluation("missing")
