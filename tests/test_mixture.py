"""Section 3: the mixture with exact answers, and the silhouettes."""

import pytest
import torch
from checks import assert_mean, mixture_pvalue
from torch import distributions

from helpers import GaussianMixture, GaussianPath, make_generator, silhouette

TIMES = [0.0, 0.3, 0.7, 1.0]


def noisy_batch(mixture, scheduler, t, n=20_000):
    """z, eps, x_t for n draws at the time t."""
    generator = make_generator(3)
    z = mixture.sample(n, generator=generator)
    eps = torch.randn(n, 2, generator=generator, dtype=z.dtype)
    times = torch.full((n,), t, dtype=z.dtype)
    return times, GaussianPath(scheduler), z, eps


# Density, score, samples


def test_log_prob_is_that_of_torch_distributions(mixture, generator):
    components = distributions.Independent(
        distributions.Normal(mixture.means, mixture.stds[:, None].expand(3, 2)), 1
    )
    reference = distributions.MixtureSameFamily(
        distributions.Categorical(torch.tensor([1.0, 2.0, 3.0]).double()), components
    )
    x = 3 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x))


def test_score_is_the_gradient_of_log_prob(mixture, generator):
    x = 3 * torch.randn(50, 2, generator=generator, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x), gradient)


def test_score_far_from_all_components_is_finite(mixture):
    x = torch.tensor([[1e3, -1e3]], dtype=torch.float64)
    assert mixture.score(x).isfinite().all()
    assert mixture.log_prob(x).isfinite().all()


def test_samples_have_the_distribution(mixture, generator):
    """5000 draws, eight projections, error rate 1e-3; another mixture is refused."""
    x = mixture.sample(5000, generator=generator)
    assert mixture_pvalue(x, mixture) > 1e-3
    assert mixture_pvalue(x, GaussianMixture(mixture.means, mixture.stds)) < 1e-6
    assert torch.equal(x, mixture.sample(5000, generator=make_generator(0)))


def test_numbers_may_be_integers():
    mixture = GaussianMixture([[0, 0], [3, 4]], [1, 2], [1, 3])
    assert mixture.sample(2).dtype == torch.float32
    assert mixture.weights.tolist() == [0.25, 0.75]


# The marginal p_t and its velocity


@pytest.mark.parametrize("t", TIMES)
def test_marginal_against_simulation(mixture, scheduler, t):
    """5000 draws of x_t, eight projections, error rate 1e-3 a case."""
    times, path, z, eps = noisy_batch(mixture, scheduler, t, n=5000)
    assert mixture_pvalue(path.sample(z, times, eps), mixture.at_time(scheduler, t)) > 1e-3


def test_marginals_at_the_ends(mixture, scheduler, generator):
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    noise = distributions.Normal(0, 1).log_prob(x).sum(dim=1)
    torch.testing.assert_close(mixture.at_time(scheduler, 0).log_prob(x), noise)
    torch.testing.assert_close(mixture.at_time(scheduler, 1).log_prob(x), mixture.log_prob(x))


@pytest.mark.parametrize("t", TIMES)
def test_velocity_solves_the_continuity_equation(mixture, scheduler, t, generator):
    """d/dt log p_t + div u + u . grad log p_t = 0, by autograd, to 1e-9."""
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64).requires_grad_()
    time = torch.tensor(t, dtype=torch.float64)
    velocity = mixture.velocity(x, time.expand(30), scheduler)
    divergence = sum(
        torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)
    )

    def log_prob_at(time):
        return mixture.at_time(scheduler, time).log_prob(x.detach())

    rate = torch.autograd.functional.jacobian(log_prob_at, time)
    score = mixture.at_time(scheduler, t).score(x)
    residual = rate + divergence + (velocity * score).sum(dim=1)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-9, rtol=0)


@pytest.mark.parametrize("t", TIMES)
def test_velocity_is_the_conditional_mean_of_the_target(mixture, scheduler, t):
    """The error of the target has mean 0 against any function of x_t; 20 000 draws."""
    times, path, z, eps = noisy_batch(mixture, scheduler, t)
    x = path.sample(z, times, eps)
    error = path.velocity_target(z, times, eps) - mixture.velocity(x, times, scheduler)
    assert_mean(torch.cat([error, error * x, error * torch.sin(3 * x.flip(1))], dim=1))


@pytest.mark.parametrize("t", TIMES)
def test_velocity_variance_is_that_of_the_target(mixture, scheduler, t):
    """Squared error less velocity_variance has mean 0 against functions of x_t."""
    times, path, z, eps = noisy_batch(mixture, scheduler, t)
    x = path.sample(z, times, eps)
    error = path.velocity_target(z, times, eps) - mixture.velocity(x, times, scheduler)
    rest = error.square().sum(dim=1) - mixture.velocity_variance(x, times, scheduler)
    assert_mean(torch.stack([rest, rest * x[:, 0], rest * torch.cos(2 * x[:, 1])], dim=1))


def test_velocity_of_a_batch_is_that_of_its_members(mixture, scheduler, generator):
    """Each member has its own time, the ends included; B equals the last axis and more."""
    for t in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.2, 1.0])):
        x = torch.randn(len(t), 2, generator=generator, dtype=torch.float64)
        t = t.double()
        for method in (mixture.velocity, mixture.velocity_variance):
            single = [method(*pair, scheduler) for pair in zip(x.split(1), t.split(1), strict=True)]
            torch.testing.assert_close(method(x, t, scheduler), torch.cat(single))
            assert method(x, t, scheduler).isfinite().all()


# Silhouettes


@pytest.mark.parametrize("name", ["cat", "dog"])
def test_silhouette(name):
    """Every point lies in the frame; both drawings are symmetric about the vertical axis."""
    x = silhouette(name, 4000, generator=make_generator(0))
    assert x.shape == (4000, 2)
    assert x.abs().max() <= 1.3
    assert_mean(x[:, 0])
    assert torch.equal(x, silhouette(name, 4000, generator=make_generator(0)))
    assert silhouette(name, 1).shape == (1, 2)


def test_silhouettes_have_eyes_and_cat_has_ears():
    cat, dog = (silhouette(name, 4000, generator=make_generator(1)) for name in ("cat", "dog"))

    def near(x, centre, radius):
        return ((x - torch.tensor(centre)).norm(dim=1) < radius).any()

    assert not near(cat, [0.42, 0.0], 0.1)
    assert not near(dog, [0.3, 0.3], 0.1)
    assert near(cat, [0.9, 1.1], 0.1)
    assert not near(dog, [0.9, 1.1], 0.1)
