"""Section 2: divergence and likelihood of a flow, against closed forms."""

import gc
import itertools
import math

import pytest
import torch
from checks import assert_mean, normal

from helpers import (
    GaussianMixture,
    LinearScheduler,
    divergence,
    log_likelihood,
    make_generator,
    optimal_transport_pairing,
    time_grid,
)

MIXTURE = GaussianMixture([[1.5, 0.0], [-1.0, 1.0]], [0.4, 0.7], [1.0, 2.0])


def signs(*shape, seed=0):
    return normal(*shape, seed=seed).sign()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 1, 2, 2)])
def test_divergence_of_a_linear_field_is_its_trace(shape):
    size = int(torch.tensor(shape[1:]).prod())
    matrix, x, t = normal(size, size, seed=1), normal(*shape), torch.rand(4)

    def field(x, t):
        rates = 1 + t.double()
        return (rates[:, None] * x.reshape(4, size) @ matrix.T).reshape(shape)

    torch.testing.assert_close(divergence(field, x, t), (1 + t.double()) * matrix.trace())


def test_divergence_of_a_nonlinear_field():
    x = normal(50, 2)

    def field(x, t):
        return torch.stack([x[:, 0] ** 2 * x[:, 1], x[:, 1].sin() + x[:, 0]], dim=1)

    expected = 2 * x[:, 0] * x[:, 1] + x[:, 1].cos()
    torch.testing.assert_close(divergence(field, x, torch.zeros(50)), expected)


def test_hutchinsons_estimate_is_unbiased():
    x, t, matrix = normal(1, 5), torch.zeros(1), normal(5, 5, seed=2)
    probes = signs(4000, 1, 1, 5, seed=3)
    values = torch.stack([divergence(lambda x, t: x @ matrix.T, x, t, v) for v in probes])
    assert values.std() > 0
    assert_mean(values[:, 0], matrix.trace())
    mean = divergence(lambda x, t: x @ matrix.T, x, t, probes[:10, 0])
    torch.testing.assert_close(mean, values[:10].mean(dim=0))


def test_divergence_leaves_no_gradients_behind():
    layer, x = torch.nn.Linear(2, 2), torch.randn(3, 2)
    with torch.no_grad():
        value = divergence(lambda x, t: layer(x), x, torch.zeros(3))
    assert layer.weight.grad is None
    assert not x.requires_grad
    torch.testing.assert_close(value, layer.weight.diagonal().sum().expand(3).detach())


def exact_velocity(x, t):
    return MIXTURE.velocity(x, t, LinearScheduler())


def test_likelihood_of_the_exact_flow_is_the_density():
    x = MIXTURE.sample(200, generator=make_generator(0)).double()
    exact = MIXTURE.log_prob(x)
    coarse, fine = (log_likelihood(exact_velocity, x, time_grid(n)) for n in (100, 200))
    assert (fine - exact).abs().max() < 2e-3
    assert (fine - exact).abs().max() < (coarse - exact).abs().max() / 3  # second order


def test_hutchinsons_likelihood_is_near_the_exact_one():
    x, ts = MIXTURE.sample(50, generator=make_generator(0)).double(), time_grid(50)
    exact = log_likelihood(exact_velocity, x, ts)
    values = [
        log_likelihood(exact_velocity, x, ts, probes=signs(1, 50, 2, seed=seed))
        for seed in range(60)
    ]
    assert_mean(torch.stack(values), exact)


@pytest.mark.parametrize("shape", [(6,), (6, 1, 2, 2)])
def test_likelihood_of_a_scaling(shape):
    """dx/dt = a x maps N(0, I) to N(0, exp(2a) I)."""
    x = normal(*shape)
    expected = torch.distributions.Normal(0, math.exp(0.7)).log_prob(x).reshape(6, -1).sum(dim=1)
    found = log_likelihood(lambda x, t: 0.7 * x, x, time_grid(200))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 2), (5, 1, 2, 2), (1, 3)])
def test_pairing_is_the_best_of_all_permutations(shape):
    x, y = normal(*shape), normal(*shape, seed=1)
    pairing = optimal_transport_pairing(x, y)

    def cost(permutation):
        return (x - y[list(permutation)]).square().sum().item()

    assert sorted(pairing.tolist()) == list(range(len(x)))
    best = min(cost(p) for p in itertools.permutations(range(len(x))))
    assert cost(pairing.tolist()) == pytest.approx(best)


def test_pairing_refuses_different_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        optimal_transport_pairing(torch.zeros(3, 2), torch.zeros(4, 2))


# Fields without x, modes, shapes


@pytest.mark.parametrize("probes", [None, signs(3, 4, 2)], ids=["exact", "probes"])
def test_divergence_of_a_field_without_x_is_zero(probes):
    layer, x, t = torch.nn.Linear(1, 2).double(), normal(4, 2), torch.zeros(4).double()
    for field in (lambda x, t: torch.ones_like(x), lambda x, t: layer(t[:, None])):
        assert torch.equal(divergence(field, x, t, probes), torch.zeros(4).double())


def test_divergence_refuses_a_field_that_hides_its_x():
    """Taken for a field without x, it would give 0 in silence."""
    layer, x, t = torch.nn.Linear(2, 2).double(), normal(4, 2), torch.zeros(4)
    hidden = (torch.no_grad()(lambda x, t: layer(x)), lambda x, t: layer(x.detach()))
    for field in hidden:
        with pytest.raises(ValueError, match="autograd follows; take no_grad"):
            divergence(field, x, t)


def test_divergence_and_likelihood_under_inference_mode():
    x, ts, layer = normal(4, 2), time_grid(4), torch.nn.Linear(2, 2).double()
    layer.requires_grad_(False)
    expected = (
        divergence(lambda x, t: layer(x), x, x[:, 0]),
        log_likelihood(exact_velocity, x, ts),
    )
    with torch.inference_mode():
        inside = x + 0  # made here: a tensor that autograd refuses
        found = divergence(lambda x, t: layer(x), inside, inside[:, 0])
        likelihood = log_likelihood(exact_velocity, inside, ts)
    torch.testing.assert_close((found, likelihood), expected)


def test_divergence_adds_each_term_as_it_comes(monkeypatch):
    """784 gradients of a batch of images are 604 MiB: none of them is kept."""
    x, alive, grad = normal(3, 1, 5, 5), [], torch.autograd.grad

    def counted(*args, **kwargs):
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        alive.append(sum(item.shape == x.shape for item in tensors))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    divergence(lambda x, t: x.sin(), x, torch.zeros(3))
    assert len(alive) == 25
    assert alive[-1] <= alive[0] + 2


def test_likelihood_asks_the_velocity_once_a_point():
    calls = []

    def field(x, t):
        calls.append(t)
        return -x

    log_likelihood(field, normal(3, 2), time_grid(5))
    assert len(calls) == 10


def test_likelihood_takes_lists_and_gradients_and_batches_of_none():
    x = normal(3, 2).requires_grad_()
    expected = log_likelihood(exact_velocity, x, torch.tensor([0.0, 0.5, 1.0]))
    assert not expected.requires_grad
    assert torch.equal(log_likelihood(exact_velocity, x, [0, 0.5, 1]), expected)
    for shape in ((0, 2), (0,)):
        assert log_likelihood(lambda x, t: -x, torch.zeros(shape), [0, 1]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: log_likelihood(exact_velocity, x, time_grid(5).flip(0)), "strictly increasing"),
        (lambda x: log_likelihood(lambda x, t: x[:, :1], x, time_grid(5)), "velocity must return"),
        (lambda x: divergence(lambda x, t: t, x, x[:, 0]), r"velocity must return shape \(4, 2\)"),
        (lambda x: divergence(exact_velocity, x, x[:, 0], signs(4, 2)), r"probes must be \(K, "),
        (lambda x: divergence(exact_velocity, x, x[:, 0], signs(0, 4, 2)), "probes must be"),
        (lambda x: divergence(exact_velocity, x.half(), x[:, 0]), "x must be float32 or float64"),
    ],
)
def test_likelihood_and_divergence_refuse(call, message):
    """A decreasing grid was taken, and the result off by 10 nats."""
    with pytest.raises(ValueError, match=message):
        call(normal(4, 2))


def test_pairing_of_scalars_of_none_and_of_tensors_with_gradients():
    x, y = normal(5), normal(5, seed=1).requires_grad_()
    pairing = optimal_transport_pairing(x, y)  # on the line: in the order of both
    assert torch.equal(pairing[x.argsort()], y.argsort())
    for shape in ((0,), (0, 2)):
        assert optimal_transport_pairing(torch.zeros(shape), torch.zeros(shape)).shape == (0,)
