"""Divergence and likelihood of a flow, against closed forms."""

import itertools

import pytest
import torch
from checks import assert_mean

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


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


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
        for seed in range(200)
    ]
    assert_mean(torch.stack(values), exact)


def test_likelihood_of_a_scaling_in_several_shapes():
    """dx/dt = a x maps N(0, I) to N(0, exp(2a) I)."""
    x, rate = normal(6, 1, 2, 2), 0.7
    expected = torch.distributions.Normal(0, torch.tensor(rate, dtype=x.dtype).exp())
    result = log_likelihood(lambda x, t: rate * x, x, time_grid(200))
    torch.testing.assert_close(
        result, expected.log_prob(x).flatten(1).sum(dim=1), rtol=0, atol=1e-4
    )


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
    with pytest.raises(ValueError, match="one shape"):
        optimal_transport_pairing(torch.zeros(3, 2), torch.zeros(4, 2))
