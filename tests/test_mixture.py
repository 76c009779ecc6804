"""Section 3: the mixture with exact answers, given data, silhouettes and letters."""

import pytest
import torch
from checks import assert_mean, mixture_pvalue
from torch import distributions

from helpers import (
    GaussianMixture,
    GaussianPath,
    LinearScheduler,
    adams_bashforth2,
    empirical_velocity,
    inside_silhouette,
    lettering,
    make_generator,
    sampling_grid,
    silhouette,
)

TIMES = [0.0, 0.3, 0.7, 1.0]


def noisy_batch(mixture, scheduler, t, n=20_000):
    """Times, path, z, eps for n draws at the time t."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_have_the_type_of_the_means(dtype):
    """Given as a list they lost precision; in float64 they turned a float32 score into float64."""
    exact = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    for weights in (exact.tolist(), exact):
        mixture = GaussianMixture(torch.zeros(3, 2, dtype=dtype), [1.0, 2.0, 3.0], weights)
        torch.testing.assert_close(
            mixture.weights, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0
        )
        x, t = torch.ones(4, 2, dtype=dtype), torch.full((4,), 0.5, dtype=torch.float64)
        assert mixture.score(x).dtype == mixture.log_prob(x).dtype == dtype
        assert mixture.velocity(x, t, LinearScheduler()).dtype == dtype
        assert mixture.sample(2).dtype == dtype


def test_none_of_a_mixture(mixture):
    x = mixture.sample(0)
    assert x.shape == mixture.score(x).shape == (0, 2)
    assert mixture.velocity(x, x[:, 0], LinearScheduler()).shape == (0, 2)


@pytest.mark.parametrize("t", [torch.tensor([0.2, 0.8]), [0.5], 1.5, -0.1, float("nan")])
def test_a_marginal_is_at_one_time(scheduler, t):
    """Two times for K = D = 2 gave a wrong mixture, 1.5 a negative beta."""
    mixture = GaussianMixture([[0.0, 0.0], [1.0, 1.0]], [0.1, 0.2])
    with pytest.raises(ValueError, match=r"t must (be one number|lie in \[0, 1\])"):
        mixture.at_time(scheduler, t)


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


# Data that are given points


def nearly_points(data):
    """Almost the data themselves: a mixture of very narrow Gaussians about them."""
    return GaussianMixture(data, torch.full((len(data),), 1e-6))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_empirical_velocity_is_the_limit_of_narrow_mixtures(scheduler, t, generator):
    data, x = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    times = torch.full((40,), t, dtype=torch.float64)
    expected = nearly_points(data[:30]).velocity(x, times, scheduler)
    torch.testing.assert_close(empirical_velocity(data[:30], x, times, scheduler), expected)


@pytest.mark.parametrize("shape", [(), (2,), (1, 4, 4)])
def test_empirical_velocity_of_a_batch_is_that_of_its_members(shape, scheduler, generator):
    data = torch.randn(9, *shape, generator=generator, dtype=torch.float64)
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.99], dtype=torch.float64)
    together = empirical_velocity(data, x, t, scheduler)
    single = [
        empirical_velocity(data, *p, scheduler) for p in zip(x.split(1), t.split(1), strict=True)
    ]
    assert together.shape == x.shape
    assert together.isfinite().all()
    torch.testing.assert_close(together, torch.cat(single))
    assert empirical_velocity(data, x[:0], t[:0], scheduler).shape == x[:0].shape


def test_empirical_velocity_minimises_the_loss(generator):
    """The error of the target has mean zero against functions of x_t; that of a field half as
    large has not."""
    data = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    path, n = GaussianPath(LinearScheduler()), 20_000
    z = data[torch.randint(20, (n,), generator=generator)]
    eps = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    times = torch.full((n,), 0.6, dtype=torch.float64)
    x = path.sample(z, times, eps)
    u = empirical_velocity(data, x, times, path.scheduler)
    error, wrong = (path.velocity_target(z, times, eps) - v for v in (u, u / 2))
    assert_mean(torch.cat([error, error * x, error * torch.sin(3 * x.flip(1)), error * u], dim=1))
    with pytest.raises(AssertionError):
        assert_mean(wrong * u)


def test_the_flow_of_the_empirical_velocity_ends_on_the_data(generator):
    """All mass moves to the points; the last step lands on E[z | x], which is one of them."""
    data = torch.randn(10, 2, generator=generator)
    x0 = torch.randn(200, 2, generator=generator)
    x = adams_bashforth2(
        lambda x, t: empirical_velocity(data, x, t, LinearScheduler()), x0, sampling_grid(60)
    )
    assert (torch.cdist(x, data).amin(dim=1) < 0.02).float().mean() > 0.95


def test_empirical_velocity_at_the_end_has_no_value():
    data = torch.randn(4, 2)
    assert empirical_velocity(data, data, torch.ones(4), LinearScheduler()).isnan().all()


def test_empirical_velocity_works_in_chunks(monkeypatch):
    """40 000 points and 1000 places: a table of them all would have 160 MB."""
    most, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: most.append(x.numel()) or softmax(x, dim)
    )
    data, x = torch.randn(40_000, 2), torch.randn(1000, 2)
    whole = empirical_velocity(data, x, torch.rand(1000), LinearScheduler())
    assert whole.isfinite().all()
    assert max(most) <= 2**22
    assert sum(most) == 40_000 * 1000


@pytest.mark.parametrize(
    ("data", "x", "t", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 3), torch.zeros(4), r"got \(3, 2\) and \(4, 3\)"),
        (torch.zeros(0, 2), torch.zeros(4, 2), torch.zeros(4), r"data must be \(N, \*D\)"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3), r"t must have shape \(4,\)"),
        (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4) + 2, r"t must lie in \[0, 1\]"),
        (torch.zeros(3, 2).byte(), torch.zeros(4, 2), torch.zeros(4), "data must be float32"),
        (torch.zeros(3, 2), torch.zeros(4, 2).half(), torch.zeros(4), "x must be float32"),
    ],
)
def test_empirical_velocity_refuses(data, x, t, message):
    with pytest.raises(ValueError, match=message):
        empirical_velocity(data, x, t, LinearScheduler())


# Letters


def test_lettering_is_a_word_in_the_frame():
    x = lettering("flow", 4000, generator=make_generator(0))
    assert (x.shape, x.dtype) == ((4000, 2), torch.float32)
    assert torch.equal(x, lettering("flow", 4000, generator=make_generator(0)))
    assert 1.25 < x[:, 0].max() <= 1.3
    assert -1.3 <= x[:, 0].min() < -1.25
    assert x[:, 1].max() == pytest.approx(-x[:, 1].min().item(), abs=0.05)
    assert lettering("flow", 0).shape == (0, 2)
    assert lettering("I", 100).abs().max() <= 1.3  # higher than wide


def test_lettering_leaves_the_holes_out():
    """An o is empty in its middle, and uniform round it."""
    x = lettering("o", 4000, generator=make_generator(0))
    assert x.norm(dim=1).min() > 0.3
    assert_mean(x, bias=0.01)
    quarters = ((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()).bincount(minlength=4)
    assert (quarters - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.parametrize("text", ["", " ", "  "])
def test_lettering_refuses_a_blank_word(text):
    with pytest.raises(ValueError, match="text must have letters to draw"):
        lettering(text, 10)


def test_silhouettes_of_none():
    assert silhouette("cat", 0).shape == (0, 2)
    assert inside_silhouette("dog", torch.zeros(0, 2)).shape == (0,)


SUMS = {"cat": [12911.8594, 19621.9564], "dog": [6390.7423, 32466.8639]}


def test_silhouettes_are_where_they_were():
    """A fixed draw: the drawings are data, and these are the points they gave from the start."""
    for name, expected in SUMS.items():
        x = silhouette(name, 1000, generator=make_generator(0)).double()
        assert (x * torch.arange(1, 1001)[:, None]).sum(dim=0).tolist() == pytest.approx(
            expected, rel=1e-6
        )
