"""Section 6: networks. Shapes, what the output depends on, size of the committed file."""

import pytest
import torch
from torch import nn

from helpers import (
    MLP,
    GaussianPath,
    LinearScheduler,
    NoiseScore,
    ResidualLayer,
    UNet,
    guided_velocity,
    heun,
    time_grid,
)

SMALL = (16, 16, 16)


def shaken(model):
    """Move every weight a little: a fresh UNet starts at zero and would hide its inputs."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


MODELS = {
    "mlp": (lambda: shaken(MLP()), (5, 2)),
    "mlp, one dimension": (lambda: shaken(MLP(dim=1, hidden=8, layers=1)), (5, 1)),
    "mlp, octaves and a function of t": (
        lambda: shaken(MLP(dim=2, hidden=16, octaves=3, time_input=lambda t: (1 - t + 0.02).log())),
        (4, 2),
    ),
    "unet": (lambda: shaken(UNet(SMALL)), (3, 1, 28, 28)),
    "unet, colours": (lambda: shaken(UNet((16, 32, 48), in_channels=3)), (3, 3, 8, 12)),
    "unet, labels": (lambda: shaken(UNet(SMALL, num_classes=4)), (3, 1, 8, 8)),
}


@pytest.fixture(params=MODELS)
def model_and_x(request):
    build, shape = MODELS[request.param]
    return build().eval(), batch(*shape)


def test_output_is_like_the_input(model_and_x):
    model, x = model_and_x
    t = torch.linspace(0, 1, len(x))
    out = model(x, t)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()
    assert torch.equal(out, model(x, t))


def test_a_batch_is_its_members(model_and_x):
    """No statistics over the batch: B = 1 gives the same."""
    model, x = model_and_x
    t = torch.linspace(0, 1, len(x))
    single = [model(*pair) for pair in zip(x.split(1), t.split(1), strict=True)]
    torch.testing.assert_close(model(x, t), torch.cat(single), atol=1e-5, rtol=1e-5)


def test_time_and_points_matter(model_and_x):
    model, x = model_and_x
    t = torch.full((len(x),), 0.5)
    assert (model(x, t) - model(x, t + 0.01)).abs().amax(dim=tuple(range(1, x.ndim))).min() > 1e-5
    assert not torch.equal(model(x, t), model(x + 1, t))


def test_memory_layout_does_not_matter():
    model, x, t = shaken(UNet(SMALL)).eval(), batch(3, 1, 8, 12), torch.rand(3)
    expected = model(x, t)
    for layout in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        torch.testing.assert_close(model(layout, t), expected)


def test_every_parameter_receives_a_gradient(model_and_x):
    model, x = model_and_x
    model(x, torch.linspace(0, 1, len(x))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("layers", "hidden"), [(1, 8), (4, 64)])
def test_mlp_has_the_layers_it_is_asked_for(layers, hidden):
    linear = [m for m in MLP(2, hidden, layers).modules() if isinstance(m, nn.Linear)]
    widths = [(m.in_features, m.out_features) for m in linear]
    assert widths == [(3, hidden), *[(hidden, hidden)] * (layers - 1), (hidden, 2)]


def test_mlp_with_octaves_has_waves_of_x_among_its_inputs():
    """At pi 2^k: the input is 2-periodic in x but for x itself, and k = 1 is 1-periodic."""
    model, seen = MLP(dim=2, octaves=2), []
    model.net[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x, t = batch(5, 2), torch.rand(5)
    for shift in (0.0, 1.0, 2.0):
        model(x + shift, t)
    assert seen[0].shape == (5, 2 + 1 + 2 * 2 * 2)
    assert torch.equal(seen[0][:, :3], torch.cat([x, t[:, None]], dim=1))
    waves, after_one, after_two = (inputs[:, 3:].reshape(5, 2, 2, 2) for inputs in seen)
    torch.testing.assert_close(waves, after_two, atol=1e-5, rtol=0)
    torch.testing.assert_close(waves[..., 1], after_one[..., 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(waves[..., 0], -after_one[..., 0], atol=1e-5, rtol=0)
    sines, cosines = waves[:, 0], waves[:, 1]
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones(5, 2, 2))


def test_mlp_takes_a_function_of_t_in_its_place():
    plain, other = MLP(), MLP(time_input=lambda t: 1 - t)
    other.load_state_dict(plain.state_dict())
    x, t = batch(5, 2), torch.rand(5)
    assert torch.equal(other(x, t), plain(x, 1 - t))


def test_default_mlp_is_that_of_the_committed_weights():
    """No new tensor in its state, and none of its draws moved."""
    names = [f"net.{i}.{kind}" for i in range(0, 10, 2) for kind in ("weight", "bias")]
    assert list(MLP().state_dict()) == names
    torch.manual_seed(0)
    layers = [nn.Linear(3, 64), *[nn.Linear(64, 64) for _ in range(3)], nn.Linear(64, 2)]
    torch.manual_seed(0)
    model = MLP()
    for ours, linear in zip(model.net[::2], layers, strict=True):
        assert torch.equal(ours.weight, linear.weight)
    x, t = batch(5, 2), torch.rand(5)
    assert torch.equal(model(x, t), model.net(torch.cat([x, t[:, None]], dim=1)))


# The UNet


def test_the_default_unet_is_that_of_the_committed_weights():
    """Every tensor of figure 1 by shape, and at most 4 MB in half precision."""
    model = UNet()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["stem.weight"] == (32, 1, 3, 3)
    assert shapes["head.2.weight"] == (1, 32, 3, 3)
    for stage, width, count in [
        ("encoder1", 32, 2),
        ("encoder2", 64, 2),
        ("bottleneck", 128, 3),
        ("decoder2", 64, 2),
        ("decoder1", 32, 2),
    ]:
        assert len(getattr(model, stage)) == count
        for i in range(count):
            for convolution in ("conv1", "conv2"):
                assert shapes[f"{stage}.{i}.{convolution}.weight"] == (width, width, 3, 3)
    assert sum(p.numel() for p in model.parameters()) * 2 < 4e6
    assert model.embed_label is None


def test_resolutions_of_the_unet():
    """28 -> 14 -> 7 and back."""
    model, seen = UNet(SMALL), []
    for name in ("encoder1", "encoder2", "bottleneck", "decoder2", "decoder1"):
        getattr(model, name)[0].register_forward_hook(
            lambda module, inputs, output: seen.append(output.shape[-1])
        )
    model(batch(1, 1, 28, 28), torch.zeros(1))
    assert seen == [28, 14, 7, 14, 28]


def test_skip_connections():
    """Each decoder sees what the encoder of its resolution put out, beside what comes up."""
    model, seen = shaken(UNet((16, 32, 48))), {}
    for name in ("encoder1", "encoder2"):
        getattr(model, name)[-1].register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    for name in ("mix1", "mix2"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0]})
        )
    model(batch(2, 1, 8, 8), torch.rand(2))
    for width, level in ((16, "1"), (32, "2")):
        from_below, skip = seen[f"mix{level}"].split(width, dim=1)
        assert torch.equal(skip, seen[f"encoder{level}"])
        assert not torch.equal(from_below, skip)


def test_a_fresh_unet_is_zero_and_its_layers_the_identity():
    model, x = UNet(SMALL), batch(2, 1, 8, 8)
    assert torch.equal(model(x, torch.rand(2)), torch.zeros_like(x))
    h, embedding = batch(2, 16, 8, 8), batch(2, 128)
    assert torch.equal(model.bottleneck[0](h, embedding), h)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (1.0, 0.0), (0.0, 3.0)])
def test_the_time_scales_and_shifts_the_second_norm(scale, shift):
    """With scale 0 and shift 0 the norm passes unchanged; 1 doubles it; a shift is added."""
    layer, seen = shaken(ResidualLayer(16, 8)), {}
    with torch.no_grad():
        layer.time.weight.zero_()
        layer.time.bias.copy_(torch.cat([torch.full((16,), scale), torch.full((16,), shift)]))
    layer.norm2.register_forward_hook(lambda module, inputs, output: seen.update(norm=output))
    layer.conv2.register_forward_hook(lambda module, inputs, output: seen.update(last=inputs[0]))
    layer(batch(2, 16, 4, 4), batch(2, 8))
    expected = nn.functional.silu((2 if scale else 1) * seen["norm"] + shift)
    torch.testing.assert_close(seen["last"], expected)


def test_labels():
    """Each label has a field of its own; no labels means the null label."""
    model, x, t = shaken(UNet(SMALL, num_classes=3)).eval(), batch(2, 1, 8, 8), torch.rand(2)
    fields = [model(x, t, torch.full((2,), label)) for label in range(4)]
    assert torch.equal(model(x, t), fields[3])
    for first in range(4):
        for second in range(first):
            assert not torch.equal(fields[first], fields[second])
    mixed = model(x, t, torch.tensor([0, 3]))
    torch.testing.assert_close(mixed, torch.stack([fields[0][0], fields[3][1]]))


@pytest.mark.parametrize("training", [True, False])
def test_solvers_leave_the_mode_of_a_network(training):
    model = UNet(SMALL).train(training)
    heun(model, batch(2, 1, 8, 8), time_grid(1))
    assert all(module.training is training for module in model.modules())


def test_guidance_extrapolates_from_the_unconditional_field():
    model, x, t = shaken(UNet(SMALL, num_classes=3)).eval(), batch(2, 1, 8, 8), torch.rand(2)
    labels = torch.tensor([2, 0])
    with_label, without = model(x, t, labels), model(x, t)
    for guidance, expected in (
        (0, without),
        (1, with_label),
        (3, 3 * with_label - 2 * without),
    ):
        found = guided_velocity(model, labels, guidance)(x, t)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_guidance_may_differ_from_sample_to_sample():
    """One scale a sample, also where B is the width of the image."""
    model, x, t = shaken(UNet(SMALL, num_classes=3)).eval(), batch(8, 1, 8, 8), torch.rand(8)
    labels, scales = torch.arange(8) % 3, torch.linspace(0, 4, 8)
    found = guided_velocity(model, labels, scales)(x, t)
    single = [
        guided_velocity(model, labels[i : i + 1], scales[i].item())(x[i : i + 1], t[i : i + 1])
        for i in range(8)
    ]
    torch.testing.assert_close(found, torch.cat(single), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"must have shape \(8,\), got \(7,\)"):
        guided_velocity(model, labels, scales[:7])(x, t)


@pytest.mark.parametrize("build", [MLP, lambda: UNet(SMALL)])
def test_a_batch_of_none(build):
    shape = (0, 2) if build is MLP else (0, 1, 8, 8)
    assert build()(torch.zeros(shape), torch.zeros(0)).shape == shape


# NoiseScore


def test_noise_score_contains_the_network():
    """Its weights are those of the network, and its score times -beta is the noise."""
    net, path = MLP(), GaussianPath(LinearScheduler())
    model, x = NoiseScore(net, path), batch(4, 2)
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    t = torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(model(x, t), path.noise_to_score(net(x, t), t))
