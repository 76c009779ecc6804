"""Everything also runs on a device other than the CPU: a pretended one, or with FLOW_DEVICE=cuda
or mps in the environment of pytest the real one."""

import contextlib
import os
from itertools import pairwise

import pytest
import torch
from fake_device import PretendedDevice
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import helpers
import plots

PATH = helpers.GaussianPath(helpers.LinearScheduler())
PHOTOS = torch.arange(20 * 64, dtype=torch.int64).remainder(256).byte().view(20, 1, 8, 8)
SMALL = (16, 16, 16)  # channels


@pytest.fixture(params=["cuda", "mps"])
def device(request, monkeypatch):
    if os.environ["FLOW_DEVICE"].startswith(request.param):  # asked for: the real one
        yield helpers.pick_device()
        return
    monkeypatch.setenv("FLOW_DEVICE", request.param)
    with PretendedDevice(request.param):
        yield helpers.pick_device()


def flow_loss(model, batch, *, generator):
    return helpers.flow_matching_loss(model, batch, PATH, generator=generator)


# The pretended device refuses what a real one refuses


def test_tensors_of_two_devices_do_not_mix(device):
    here, there, number = torch.ones(3), torch.ones(3, device=device), torch.tensor(2.0)
    for operation in (torch.add, torch.dot, torch.maximum):
        with pytest.raises(RuntimeError, match="on the CPU, others on"):
            operation(here, there)
    with pytest.raises(RuntimeError, match="on the CPU, others on"):
        here[there > 0]
    for result in (there * number, there + 1, there[here > 0], here.to(device)):
        assert result.device.type == device.type
    there[1:] = here[1:]  # a copy
    assert there.cpu().device.type == here.device.type == "cpu"
    there.cpu().zero_()
    assert (there + 1).tolist() == [2, 2, 2]


def test_numpy_generators_and_float64_are_refused(device):
    x = torch.ones(3, device=device)
    with pytest.raises(TypeError, match="use cpu"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator and tensor on different devices"):
        torch.randn(3, device=device, generator=helpers.make_generator(0))
    assert torch.randn(3, device=device, generator=torch.Generator(device)).device == x.device
    if device.type == "mps":
        with pytest.raises(TypeError, match="no float64"):
            x.double()


# Training


def fit(device, steps=6, **options):
    """A small UNet and its losses after training on images of bytes on the device."""
    torch.manual_seed(0)
    model = helpers.UNet(SMALL).to(device)
    sample_batch = options.pop("sample_batch", helpers.image_batches(PHOTOS.to(device), 4))
    return model, helpers.train(model, flow_loss, sample_batch, steps=steps, **options)


@pytest.mark.parametrize(
    ("kind", "capability", "dtype"),
    [("cuda", (8, 0), "bfloat16"), ("cuda", (7, 5), "float16"), ("mps", None, "float32")],
)
def test_training_and_resuming_on_a_device(kind, capability, dtype, tmp_path):
    stops = iter([False, False, False, True])
    log, checkpoint = {}, tmp_path / "run"
    with PretendedDevice(kind, capability):
        device = torch.device(kind)
        batches = helpers.image_batches(PHOTOS.to(device), 4)

        def stopping(generator):
            if next(stops):
                raise KeyboardInterrupt
            return batches(generator)

        whole, losses = fit(device, log=log)
        with pytest.raises(KeyboardInterrupt):
            fit(device, sample_batch=stopping, checkpoint=checkpoint)
        resumed, losses_of_both = fit(device, checkpoint=checkpoint)
        assert {p.device.type for p in whole.parameters()} == {kind}
        weights = [[p.cpu() for p in model.parameters()] for model in (whole, resumed)]
    assert losses.device.type == "cpu"
    assert log["dtype"] == dtype
    assert torch.equal(losses, losses_of_both)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


DEVICES = {
    "cpu": ("cpu", "float32", contextlib.nullcontext),
    "cuda, bfloat16": ("cuda", "bfloat16", lambda: PretendedDevice("cuda", (8, 0))),
    "cuda, float16": ("cuda", "float16", lambda: PretendedDevice("cuda", (7, 5))),
    "mps": ("mps", "float32", lambda: PretendedDevice("mps")),
}


@pytest.mark.parametrize("second", DEVICES)
@pytest.mark.parametrize("first", DEVICES)
def test_a_checkpoint_goes_on_anywhere(first, second, tmp_path, monkeypatch):
    """A run interrupted on one device ends on another, in the precision of that one, and its
    record says so. Its random numbers go on on the same kind of device only: a generator does
    not take the state of another kind's."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    options, parts, log = {"checkpoint": tmp_path / "run", "muon_lr": 0.02}, [], {}
    states = []  # of the generator, at every step
    for name, stop in ((first, 3), (second, None)):
        kind, dtype, enter = DEVICES[name]
        parts.append({"step": 3 * len(parts), "device": kind, "dtype": dtype})
        with enter():
            batches = helpers.image_batches(PHOTOS.to(kind), 4)
            count = iter(range(99))

            def stopping(generator, batches=batches, count=count, stop=stop):
                states.append(generator.get_state())
                if next(count) == stop:
                    raise KeyboardInterrupt
                return batches(generator)

            with contextlib.suppress(KeyboardInterrupt):
                model, losses = fit(kind, sample_batch=stopping, log=log, **options)
            weights = [p.cpu() for p in model.parameters()] if stop is None else []
    assert log["runs"] == (parts[:1] if first == second else parts)
    assert torch.equal(states[3], states[4]) == (DEVICES[first][0] == DEVICES[second][0])
    assert losses.isfinite().all()
    assert all(w.isfinite().all() for w in weights)


def test_batches_noise_and_times_are_drawn_on_the_device(device):
    seen = []

    def watched_loss(model, batch, *, generator):
        seen.extend([batch.device.type, generator.device.type])
        return flow_loss(model, batch, generator=generator)

    model = helpers.UNet(SMALL).to(device)
    batches = helpers.image_batches(PHOTOS.to(device), 4)
    helpers.train(model, watched_loss, batches, steps=2)
    assert seen == 4 * [device.type]


class HostReads(TorchDispatchMode):
    """Counts the operations for whose result the host has to wait for the device."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket.__name__ in {
            "_local_scalar_dense",
            "nonzero",
            "equal",
        }
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_the_host_waits_for_cuda_only_every_50_steps(kind):
    reads, waited = HostReads(), []

    def loss(model, batch, *, generator):
        z, y = batch
        if kind == "mlp":
            return flow_loss(model, z.flatten(1), generator=generator)
        return flow_loss(lambda x, t: model(x, t, y), z, generator=generator)

    with PretendedDevice("cuda"), reads:
        model = helpers.MLP(64, hidden=16) if kind == "mlp" else helpers.UNet(SMALL, num_classes=3)
        labels = torch.arange(20, device="cuda") % 3
        batches = helpers.image_batches(PHOTOS.to("cuda"), 4, labels)

        def watched_batch(generator):
            waited.append(reads.count)
            return batches(generator)

        steps = 149 if kind == "mlp" else 70
        helpers.train(model.to("cuda"), loss, watched_batch, steps=steps)
        waited.append(reads.count)
    found = [n for n, (before, after) in enumerate(pairwise(waited), start=1) if after > before]
    assert found == ([50, 100, 149] if kind == "mlp" else [50, 70])


def test_a_trained_network_is_saved_and_loaded(device, weights_folder):
    batches = helpers.image_batches(PHOTOS.to(device), 4)
    config = {"steps": 2, "lr": 1e-3, "seed": 0, "ema": 0.9, "batch": 4}
    results = []
    for retrain in (True, False):
        model, record = helpers.train_or_load(
            "small",
            lambda: helpers.UNet(SMALL),
            flow_loss,
            batches,
            config=config,
            device=device,
            retrain=retrain,
        )
        assert record["device"] == device.type
        results.append([p.cpu() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Everything else gives on the device what it gives on the CPU


def swirl(x, t):
    return x.flip(1) * helpers.expand_like(t, x).to(x.dtype)


def network(build, x):
    torch.manual_seed(0)
    return build().to(x.device).eval()


def mixture_answers(mixture, x, t, generator):
    scheduler = PATH.scheduler
    later = mixture.at_time(scheduler, 0.5)
    return [
        *(mixture.sample(5, generator=generator), mixture.log_prob(x), mixture.score(x)),
        *(mixture.velocity(x, t, scheduler), mixture.velocity_variance(x, t, scheduler)),
        *(later.score(x), later.weights),
    ]


CASES = {
    "euler_maruyama": lambda x, y, t, g: helpers.euler_maruyama(
        swirl, lambda t: 1 - t, x, helpers.time_grid(4), generator=g, trajectory=True
    ),
    "heun": lambda x, y, t, g: helpers.heun(swirl, x, helpers.time_grid(4), trajectory=True),
    "divergence": lambda x, y, t, g: helpers.divergence(swirl, x, t),
    "log_likelihood": lambda x, y, t, g: helpers.log_likelihood(swirl, x, helpers.time_grid(4)),
    "sde_drift": lambda x, y, t, g: helpers.sde_drift(swirl, swirl, lambda t: 1 - t)(x, t),
    "reschedule": lambda x, y, t, g: helpers.reschedule(swirl, helpers.CosineScheduler())(x, t),
    "path": lambda x, y, t, g: [
        PATH.sample(x, t, y),
        PATH.velocity_target(x, t, y),
        PATH.conditional_score(x, y, t),
    ],
    "GaussianMixture": lambda x, y, t, g: mixture_answers(
        helpers.GaussianMixture(y[:3], [0.5, 0.4, 0.3], [1, 2, 3]), x, t, g
    ),
    "inside_silhouette": lambda x, y, t, g: helpers.inside_silhouette("cat", x),
    "schedules": lambda x, y, t, g: [
        coefficient(t)
        for s in helpers.SCHEDULERS.values()
        for coefficient in (s.alpha, s.beta, s.alpha_dot, s.beta_dot)
    ],
    "flow_matching_loss": lambda x, y, t, g: helpers.flow_matching_loss(
        network(helpers.MLP, x), x, PATH, source=y, generator=g
    ),
    "score_matching_loss": lambda x, y, t, g: helpers.score_matching_loss(
        network(helpers.MLP, x), x, PATH, generator=g
    ),
    "NoiseScore": lambda x, y, t, g: helpers.NoiseScore(network(helpers.MLP, x), PATH)(x, t),
    "guided_velocity": lambda x, y, t, g: helpers.guided_velocity(
        network(lambda: helpers.UNet(SMALL, num_classes=3), x),
        (torch.arange(len(x), device=x.device) % 3),
        2.0,
    )(x[:, :1, None, None].expand(-1, 1, 8, 8), t),
    "FashionClassifier": lambda x, y, t, g: network(helpers.FashionClassifier, x)(
        x[:, :1, None, None].expand(-1, 1, 28, 28)
    ),
    "ranges": lambda x, y, t, g: helpers.to_image_range(x),
    "ou_moments": lambda x, y, t, g: helpers.ou_moments(x[:, 0], t, 1.0, 1.0),
    "optimal_transport_pairing": lambda x, y, t, g: helpers.optimal_transport_pairing(x, y),
    "mmd2": lambda x, y, t, g: helpers.mmd2(x, y, 1.0),
    "sliced_wasserstein": lambda x, y, t, g: helpers.sliced_wasserstein(x, y, generator=g),
    "frechet_distance": lambda x, y, t, g: helpers.frechet_distance(x, y),
    "precision_recall": lambda x, y, t, g: evaluate.precision_recall(x, y),
    "residual_noise": lambda x, y, t, g: helpers.residual_noise(x.view(2, 1, -1, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_the_cpu(case, device):
    results = []
    for place in ("cpu", device):
        generator = helpers.make_generator(0)  # the same numbers on every device
        x, y = (torch.randn(16, 2, generator=generator).to(place) for _ in range(2))
        t = torch.rand(16, generator=generator).to(place)
        result = CASES[case](x, y, t, generator)
        results.append(result if isinstance(result, list | tuple) else [result])
        tensors = [part for part in results[-1] if torch.is_tensor(part)]
        assert {part.device.type for part in tensors} <= {torch.device(place).type}
    for expected, found in zip(*results, strict=True):
        if torch.is_tensor(expected):
            assert torch.equal(expected, found.cpu())
        else:
            assert found == expected


def test_plots_take_tensors_of_the_device(device, ax):
    x = torch.randn(3, 16, 2, device=device)
    plots.plot_points(x[0], ax)
    plots.plot_histogram(x[0], ax, limit=2)
    plots.plot_field(x[0], x[1], ax)
    plots.plot_loss(x.flatten().square(), ax, window=10)
    plots.plot_images(torch.rand(4, 1, 8, 8, device=device), ax, columns=2)
