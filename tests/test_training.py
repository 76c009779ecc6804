"""Section 7: losses, training, resuming, weights files."""

import functools
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import assert_mean
from torch import nn

import helpers
from helpers import (
    MLP,
    GaussianPath,
    LinearScheduler,
    NoiseScore,
    UNet,
    choose_dtype,
    flow_matching_loss,
    image_batches,
    learning_rate,
    load_training_log,
    load_weights,
    make_generator,
    save_weights,
    score_matching_loss,
    train,
    train_or_load,
)

PATH = GaussianPath(LinearScheduler())


def flow_loss(model, batch, *, generator):
    return flow_matching_loss(model, batch, PATH, generator=generator)


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
    losses = torch.stack([flow_matching_loss(exact, z, path, generator=generator) for z in batches])
    assert_mean(losses - torch.stack([floor(z) for z in batches]))
    wrong = torch.stack(
        [
            flow_matching_loss(lambda x, t: exact(x, t) + 0.3, z, path, generator=generator)
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
    losses = [score_matching_loss(exact, z, PATH, generator=generator) for z in batches]
    assert_mean(torch.stack(losses) - torch.stack([floor(z) for z in batches]))


@pytest.mark.parametrize("shape", [(6,), (6, 2), (3, 3), (3, 1, 4, 4), (1, 2)])
def test_losses_ask_the_model_at_the_path(shape, generator):
    """The target of both losses is exact: a model that knows z has loss 0 at any shape."""
    z = torch.randn(shape, generator=generator, dtype=torch.float64)

    def velocity(x, t):
        return PATH.conditional_velocity(x, z, t)

    def score(x, t):
        return PATH.conditional_score(x, z, t)

    assert flow_matching_loss(velocity, z, PATH, generator=generator) < 1e-20
    assert score_matching_loss(score, z, PATH, generator=generator) < 1e-20
    assert score_matching_loss(score, z, PATH, weighted=False, generator=generator) < 1e-20


def test_source_replaces_the_noise(generator):
    z, source = torch.randn(2, 5, 2, generator=generator)
    loss = flow_matching_loss(lambda x, t: z - source, z, PATH, source=source, generator=generator)
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
        score_matching_loss(lambda x, t: x, z, path, weighted=w, generator=make_generator(5))
        for w in (True, False)
    )
    torch.testing.assert_close(weighted, plain / 4)


def test_losses_follow_the_generator_and_stay_on_the_graph(generator):
    model, z = MLP(hidden=8, layers=1), torch.randn(5, 2, generator=generator)
    for loss in (flow_matching_loss, score_matching_loss):
        first = loss(model, z, PATH, generator=make_generator(3))
        assert torch.equal(first, loss(model, z, PATH, generator=make_generator(3)))
        assert not torch.equal(first, loss(model, z, PATH, generator=make_generator(4)))
        assert first.shape == ()
        assert first.requires_grad


def test_times_of_both_losses(generator):
    z, seen = torch.zeros(4, 2), []

    def late(n, generator):
        return 0.9 + 0.1 * torch.rand(n, generator=generator)

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    flow_matching_loss(model, z, PATH, times=late, generator=generator)
    score_matching_loss(model, z, PATH, times=late, generator=generator)
    assert all((t >= 0.9).all() for t in seen)
    with pytest.raises(ValueError, match=r"times must return shape \(4,\), got \(3,\)"):
        flow_matching_loss(model, z, PATH, times=lambda n, generator: torch.rand(n - 1))


@pytest.mark.parametrize(
    ("shape", "returned"), [((5, 1), (5,)), ((5,), (5, 1)), ((5, 3, 4, 4), (5, 1, 4, 4))]
)
def test_losses_refuse_a_model_that_would_broadcast(shape, returned, generator):
    z = torch.randn(shape, generator=generator)
    for loss in (flow_matching_loss, score_matching_loss):
        with pytest.raises(ValueError, match="model must return shape"):
            loss(lambda x, t: torch.zeros(returned), z, PATH, generator=generator)
        with pytest.raises(ValueError, match="batch is empty"):
            loss(lambda x, t: x, z[:0], PATH, generator=generator)
        with pytest.raises(ValueError, match="to_model_range"):
            loss(lambda x, t: x, z.to(torch.uint8), PATH, generator=generator)


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
    assert log["dtype"] == "float32"
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
    assert choose_dtype(build("unet")[0], device) == expected
    assert choose_dtype(build("mlp")[0], device) == "float32"


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


def test_the_number_of_threads_is_restored(monkeypatch):
    """Three are pretended: these tests run with one, as a small network is trained."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    model, sample_batch = build("mlp")
    train(model, flow_loss, sample_batch, steps=2)
    assert asked == [1, 3]


# Interruption


class Stop:
    """A batch function or loss that is interrupted at its n-th call, before or after the work
    that draws random numbers."""

    def __init__(self, function, at, error, after):
        self.function, self.left, self.error, self.after = function, at, error, after
        functools.update_wrapper(self, function)  # a checkpoint knows its loss by name

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        value = self.function(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return value


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mlp", "float32"), ("unet", "float32"), ("unet", "bfloat16")]
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
def test_resuming_is_bit_exact(kind, dtype, where, error, tmp_path):
    """Interrupted in step 6 of 8, with a checkpoint every 2: the run ends as an undisturbed
    one. KeyboardInterrupt saves step 5; another error leaves step 4."""
    options = dict(steps=8, seed=5, dtype=dtype, checkpoint_every=2)
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
        assert all(tensor.isfinite().all() for tensor in state["tensors"])


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


@pytest.mark.parametrize("at", [4, 6])
def test_a_gradient_that_is_not_finite_is_never_saved(at, tmp_path):
    """sqrt at 0 has a finite value and an infinite slope: at a step whose checkpoint is due,
    and at the last one."""
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    left = iter(range(99))

    def loss(model, batch, *, generator):
        value = flow_loss(model, batch, generator=generator)
        return value + (value * 0).sqrt() if next(left) == at - 1 else value

    options = dict(steps=6, checkpoint=checkpoint, checkpoint_every=2)
    with pytest.raises(FloatingPointError, match=f"norm of the gradient is nan at step {at - 1}"):
        train(model, loss, sample_batch, **options)
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == at - 2
    assert all(tensor.isfinite().all() for tensor in state["tensors"])


class Restless(nn.Module):
    """Dropout and batch statistics: a network with a state beyond its weights."""

    def __init__(self):
        super().__init__()
        self.net = MLP(hidden=16, layers=2)
        self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.net(self.drop(self.norm(x)), t)


@pytest.mark.parametrize("where", ["batch", "loss"])
def test_resuming_keeps_buffers_and_the_global_random_state(where, tmp_path):
    def whole_state(model):
        return list(model.state_dict().values())

    def start():
        torch.manual_seed(1)
        return Restless()

    options = dict(steps=8, checkpoint_every=3)
    expected = [train(model := start(), flow_loss, points, **options)]
    expected += whole_state(model)
    options["checkpoint"] = tmp_path / "run.checkpoint"
    stopped_loss, stopped_batch = flow_loss, points
    if where == "loss":  # the batch statistics have moved, the weights have not
        stopped_loss = Stop(flow_loss, 6, KeyboardInterrupt, after=True)
    else:
        stopped_batch = Stop(points, 6, KeyboardInterrupt, after=False)
    with pytest.raises(KeyboardInterrupt):
        train(start(), stopped_loss, stopped_batch, **options)
    torch.manual_seed(7)  # the reader's own random numbers
    for _ in range(2):  # the run goes on; then a finished checkpoint is read
        model = start()
        assert same([train(model, flow_loss, points, **options), *whole_state(model)], expected)
    assert not torch.equal(model.norm.running_mean, torch.zeros(2))


def test_the_average_holds_the_batch_statistics():
    ends = {}
    for ema in (0.0, 0.999):
        torch.manual_seed(1)
        model = Restless()
        train(model, flow_loss, lambda generator: points(generator) + 3, steps=20, ema=ema)
        ends[ema] = model.norm.running_mean.norm()
    assert 0 < ends[0.999] < ends[0.0]


def test_plain_numbers_are_converted_and_others_refused(tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    config = {"batch": np.int64(64), "scale": torch.tensor(2.0), "name": np.str_("net")}
    options = dict(steps=2, lr=np.float64(1e-3), checkpoint=checkpoint)
    train(model, flow_loss, sample_batch, config=config, **options)
    saved = torch.load(checkpoint, weights_only=True)["config"]
    assert {type(saved[key]) for key in ("lr", "batch", "scale", "name")} == {float, int, str}

    def never(generator):
        raise AssertionError("a step was made")

    for wrong in (Path("data"), np.zeros(3), object()):
        with pytest.raises(ValueError, match=r"config\['where'\] is a .*weights file cannot hold"):
            train(model, flow_loss, never, steps=2, config={"where": wrong})


def test_sigterm_saves_as_an_interruption_does(tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    handler = signal.getsignal(signal.SIGTERM)
    left = iter(range(99))

    def preempted(generator):
        if next(left) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_batch(generator)

    with pytest.raises(SystemExit):
        train(model, flow_loss, preempted, steps=9, checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_in_another_dtype(first, second, tmp_path):
    checkpoint, log = tmp_path / "run.checkpoint", {}
    options = dict(steps=4, checkpoint=checkpoint, checkpoint_every=2)
    stopped = Stop(images, 4, RuntimeError, after=False)
    with pytest.raises(RuntimeError):
        train(build("unet")[0], flow_loss, stopped, dtype=first, **options)
    train(build("unet")[0], flow_loss, images, dtype=second, log=log, **options)
    parts = [(part["step"], part["dtype"]) for part in log["runs"]]
    assert parts == [(0, first), (2, second)]


def test_checkpoints_that_are_none(tmp_path):
    checkpoint, (model, sample_batch) = tmp_path / "run.checkpoint", build("mlp")
    options = dict(steps=4, checkpoint=checkpoint)
    train(model, flow_loss, sample_batch, **options)
    content = checkpoint.read_bytes()
    for damaged in (b"", b"something else", content[: len(content) // 2]):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a readable checkpoint.*delete it"):
            train(model, flow_loss, sample_batch, **options)
    for foreign in ({"weights": {}}, [1, 2]):
        torch.save(foreign, checkpoint)
        with pytest.raises(ValueError, match="not a checkpoint of train"):
            train(model, flow_loss, sample_batch, **options)
    checkpoint.write_bytes(content)
    turned = MLP(hidden=16, layers=2)
    turned.net[0], turned.net[2] = turned.net[2], turned.net[0]  # as many parameters
    with pytest.raises(ValueError, match="weights of other shapes, of another network"):
        train(turned, flow_loss, sample_batch, **options)

    def other_loss(model, batch, *, generator):
        return 2 * flow_loss(model, batch, generator=generator)

    with pytest.raises(ValueError, match=r"loss = 'flow_loss', now '.*other_loss'; delete it"):
        train(model, other_loss, sample_batch, **options)


def test_what_cannot_be_trained_is_refused():
    model, sample_batch = build("mlp")
    with pytest.raises(ValueError, match=r'dtype must be "float32".*got \'bf16\''):
        train(model, flow_loss, sample_batch, steps=2, dtype="bf16")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        train(model, flow_loss, sample_batch, steps=0)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        train(model.requires_grad_(False), flow_loss, sample_batch, steps=2)


def test_on_step_watches_and_disturbs_nothing():
    seen = []

    def watch(step, losses, model):
        seen.append((step, len(losses)))
        model.eval()

    (model, sample_batch), (other, _) = build("mlp"), build("mlp")
    losses = train(model, flow_loss, sample_batch, steps=3, on_step=watch)
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert torch.equal(losses, train(other, flow_loss, sample_batch, steps=3))


def test_everything_switched_off_is_the_plain_loop():
    """Adam as in a textbook: no warm-up, decay, clipping or averaging."""
    model, sample_batch = build("mlp")
    plain, _ = build("mlp")
    off = dict(warmup=0, decay=False, clip=None, ema=0)

    def loss(model, batch, *, generator):  # gradients that clipping at 1 would change
        return 30 * flow_loss(model, batch, generator=generator)

    losses = train(model, loss, sample_batch, steps=10, lr=1e-2, seed=3, **off)
    optimizer, generator = torch.optim.Adam(plain.parameters(), lr=1e-2), make_generator(3)
    for step in range(10):
        value = loss(plain, sample_batch(generator), generator=generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert value.item() == pytest.approx(losses[step].item(), rel=1e-5)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Muon


@pytest.mark.parametrize("shape", [(2, 16, 144), (3, 40, 20), (1, 16, 16)])
def test_orthogonalize_keeps_the_vectors_and_levels_the_singular_values(shape, generator):
    matrices = torch.randn(shape, generator=generator)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ helpers.orthogonalize(matrices) @ vh.mT
    levels = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(levels)).abs().max() < 1e-3
    assert levels.min() > 0.3
    assert levels.max() < 1.3


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 16, 1, 1)])  # a wide matrix, a tall one
def test_muon_agrees_with_torch(shape):
    """torch.optim.Muon on the same kernels, as matrices; it rounds its products to bfloat16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    generator = make_generator(2)
    kernel = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    muon = helpers.Muon([ours], lr=0.1)
    peer = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(kernel.shape, generator=generator)
        theirs.grad = ours.grad.flatten(1)
        muon.step()
        peer.step()
    step = (ours - kernel).flatten(1)
    assert (step - (theirs - kernel.flatten(1))).norm() < 0.02 * step.norm()


def test_muon_takes_the_inner_convolutions_alone(tmp_path):
    """Off by default; on, it moves the kernels of 16 channels and more, resumes bit for bit,
    and leaves a network without such kernels to Adam."""
    (model, sample_batch), (adam, _) = build("unet"), build("unet")
    for network in (model, adam):  # what starts at zero would stop the gradients
        generator = make_generator(3)
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    off = dict(ema=0.0, warmup=0, decay=False)
    train(model, flow_loss, sample_batch, steps=1, muon_lr=0.02, **off)
    train(adam, flow_loss, sample_batch, steps=1, **off)
    moved = {
        name
        for (name, a), b in zip(model.named_parameters(), adam.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    inner = {n for n, p in model.named_parameters() if p.ndim == 4 and min(p.shape[:2]) >= 16}
    assert moved == inner
    assert "stem.weight" not in inner

    options = dict(steps=6, muon_lr=0.02)
    expected = [train(model := build("unet")[0], flow_loss, images, **options)]
    expected += model.parameters()
    options["checkpoint"] = tmp_path / "run.checkpoint"
    stopped = Stop(images, 4, KeyboardInterrupt, after=True)
    with pytest.raises(KeyboardInterrupt):
        train(build("unet")[0], flow_loss, stopped, **options)
    model, _ = build("unet")
    assert same([train(model, flow_loss, images, **options), *model.parameters()], expected)

    ends = [build("mlp")[0] for _ in range(2)]
    for mlp, muon_lr in zip(ends, (None, 0.02), strict=True):
        train(mlp, flow_loss, points, steps=3, muon_lr=muon_lr)
    assert same(*(end.parameters() for end in ends))


# Files


KILLED = """
import os, pathlib, sys
sys.path[:0] = sys.argv[2:]
import torch
from test_training import build, flow_loss, train

replace, calls = os.replace, iter(range(9))

def die_in_the_third(source, target):
    if next(calls) == 2:
        os._exit(9)
    replace(source, target)

os.replace = die_in_the_third
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
    """No byte reaches the disk."""

    def fsync(handle):
        raise OSError(28, "No space left on device")

    def fill():
        monkeypatch.setattr(os, "fsync", fsync)

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
    found = load_training_log("net")
    assert found["config"] == record["config"]
    assert torch.equal(found["losses"], record["losses"])
    parameters = sum(p.numel() for p in model.parameters())
    assert (weights_folder / "net.pt").stat().st_size < 2 * parameters + 40_000
    assert [path.name for path in weights_folder.iterdir()] == ["net.pt"]


def test_new_files_hide_committed_ones_and_fall_back_to_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(helpers, "DATA", tmp_path / "data")
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path))  # in place
    save_weights(MLP(), "net", {"config": {"made": "in the clone"}})
    assert (tmp_path / "data" / "weights" / "net.pt").exists()
    load_weights(MLP(), "net")
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("FLOW_OUTPUT")  # build/ of the clone
    assert load_training_log("net") == {"config": {"made": "in the clone"}}
    save_weights(MLP(), "net", {"config": {"made": "by a reader"}})
    assert load_training_log("net") == {"config": {"made": "by a reader"}}
    load_weights(MLP(), "net")
    assert capsys.readouterr().out == f"using {tmp_path / 'build' / 'weights' / 'net.pt'}\n"


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
            load_training_log("net")
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
    with pytest.raises(FileNotFoundError, match=r"other\.pt does not exist.*FLOW_RETRAIN=other"):
        load_weights(MLP(), "other")


def test_what_float16_cannot_hold_stays_float32(weights_folder):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1e5)
        model.bias.fill_(1e-9)
    save_weights(model, "net", {"config": {}})
    loaded = load_weights(nn.Linear(3, 2), "net")
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded.bias, model.bias)
    with torch.no_grad():
        model.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite; nothing was written"):
        save_weights(model, "other", {"config": {}})
    with pytest.raises(ValueError, match=r"record\['file'\] is a PosixPath"):
        save_weights(nn.Linear(3, 2), "other", {"config": {}, "file": Path("x")})
    assert [path.name for path in weights_folder.iterdir()] == ["net.pt"]


def test_weights_of_a_compiled_model_load_into_a_plain_one(weights_folder):
    model = build("mlp")[0]
    save_weights(torch.compile(model), "net", {"config": {}})
    for target in (build("mlp")[0], torch.compile(build("mlp")[0])):
        with torch.no_grad():
            next(target.parameters()).zero_()
        load_weights(target, "net")
        for saved, read in zip(model.parameters(), target.parameters(), strict=True):
            assert torch.equal(read, saved.half().float())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", False), ("0", False), ("1", True), ("net, flow_linear", True), ("flow_linear", False)],
)
def test_retrain_wanted(value, expected, monkeypatch):
    monkeypatch.setenv("FLOW_RETRAIN", value)
    assert helpers.retrain_wanted("net") is expected


@pytest.mark.parametrize("value", ["true", "yes", "flow_linaer"])
def test_retrain_of_unknown_names_is_refused(value, monkeypatch):
    monkeypatch.setenv("FLOW_RETRAIN", value)
    with pytest.raises(ValueError, match=f"FLOW_RETRAIN='{value}' must be 1, or some of .*net"):
        helpers.retrain_wanted("net")


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
    assert {"seconds", "dtype", "device", "processor", "versions"} <= record.keys()
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


def test_the_checkpoint_goes_after_the_weights_were_read_back(weights_folder, monkeypatch):
    def unreadable(*args, **options):
        raise ValueError("damaged")

    monkeypatch.setattr(helpers, "load_weights", unreadable)
    with pytest.raises(ValueError, match="damaged"):
        run(retrain=True)
    assert (weights_folder / "net.checkpoint").exists()


def test_a_score_network_trains_through_its_wrapper():
    """The network inside NoiseScore is what is trained and saved."""
    model, sample_batch = build("mlp")
    before = [p.detach().clone() for p in model.parameters()]

    def loss(model, batch, *, generator):
        return score_matching_loss(NoiseScore(model, PATH), batch, PATH, generator=generator)

    losses = train(model, loss, sample_batch, steps=5)
    assert losses.isfinite().all()
    assert not same(before, model.parameters())


# Evaluations


def test_evaluations_belong_to_their_weights(weights_folder):
    import evaluate  # of notebooks/, which a process started by these tests does not see

    save_weights(MLP(), "net", {"config": {}})
    evaluate.save_record("table", ["net"], {"n": 5, "rows": [1.5, 2.5]})
    content = helpers.load_record("table")
    assert content["n"] == 5
    assert content["rows"] == [1.5, 2.5]
    assert list(content["weights"]) == ["net"]
    save_weights(MLP(), "net", {"config": {"other": 1}})
    with pytest.raises(ValueError, match="made with other weights of net; make it with"):
        helpers.load_record("table")
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist.*evaluate\.py"):
        helpers.load_record("missing")


def test_a_record_in_the_making_goes_on(weights_folder):
    import evaluate

    save_weights(MLP(), "net", {"config": {}})
    case = "table.part", ["net"]
    assert evaluate.kept_rows(*case, torch.device("cpu"), n=5) == []
    evaluate.save(*case, [{"sigma": 1, "value": 0.5}], torch.device("cpu"), n=5)
    assert evaluate.kept_rows(*case, torch.device("cpu"), n=5) == [{"sigma": 1, "value": 0.5}]
    assert evaluate.kept_rows(*case, torch.device("cpu"), n=6) == []
    save_weights(MLP(), "net", {"config": {"other": 1}})
    assert evaluate.kept_rows(*case, torch.device("cpu"), n=5) == []
