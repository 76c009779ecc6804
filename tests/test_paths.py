"""Section 5: the conditional path, its targets and their conversions, in float64."""

import pytest
import torch

from helpers import CosineScheduler, GaussianPath, LinearScheduler, NoiseScore, reschedule

SHAPES = [(5,), (5, 2), (1, 2), (2, 2), (4, 1, 4, 4), (3, 1, 3, 3)]


@pytest.fixture
def path(scheduler):
    return GaussianPath(scheduler)


@pytest.fixture(params=SHAPES, ids=str)
def draw(request, generator):
    """z, t, eps of one shape; t away from the ends."""
    shape = request.param
    z, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return z, t, eps


def test_ends_of_the_path(path):
    z, eps = torch.ones(3, 2), torch.full((3, 2), -2.0)
    assert torch.equal(path.sample(z, torch.zeros(3), eps), eps)
    assert torch.equal(path.sample(z, torch.ones(3), eps), z)


def test_a_batch_is_its_members(path, draw):
    """No value leaks from one member to another, also where B equals the last axis."""
    methods = ["sample", "velocity_target"]
    for method in methods:
        function = getattr(path, method)
        single = [function(*m) for m in zip(*(v.split(1) for v in draw), strict=True)]
        torch.testing.assert_close(function(*draw), torch.cat(single))
    x, t, u = path.sample(*draw), draw[1], draw[2]
    for method in ("velocity_to_score", "score_to_velocity", "velocity_to_data"):
        function = getattr(path, method)
        single = [function(*m) for m in zip(u.split(1), x.split(1), t.split(1), strict=True)]
        torch.testing.assert_close(function(u, x, t), torch.cat(single))


def test_velocity_target_is_the_derivative_of_the_path(path, draw):
    """Central differences with step 1e-5: error below 1e-8."""
    z, t, eps = draw
    difference = (path.sample(z, t + 1e-5, eps) - path.sample(z, t - 1e-5, eps)) / 2e-5
    torch.testing.assert_close(path.velocity_target(z, t, eps), difference, atol=1e-8, rtol=0)


def test_velocity_target_is_finite_at_the_ends(path):
    z, eps = torch.randn(2, 2, 3)
    assert path.velocity_target(z, torch.tensor([0.0, 1.0]), eps).isfinite().all()


def test_conditional_velocity_on_the_path_is_the_target(path, draw):
    z, t, eps = draw
    conditional = path.conditional_velocity(path.sample(z, t, eps), z, t)
    torch.testing.assert_close(conditional, path.velocity_target(z, t, eps))


def test_conditional_velocity_transports_any_point(path, draw):
    """Off the path too: x' = u_t(x | z) keeps the noise that x holds given z."""
    z, t, _ = draw
    x = torch.full_like(z, 3.0)
    h = 1e-5
    moved = x + h * path.conditional_velocity(x, z, t)

    def noise(x, t):  # eps with x = alpha z + beta eps, from the path at eps = 0 and 1
        origin = path.sample(z, t, torch.zeros_like(z))
        return (x - origin) / (path.sample(z, t, torch.ones_like(z)) - origin)

    torch.testing.assert_close(noise(moved, t + h), noise(x, t), atol=1e-6, rtol=1e-6)


def test_conditional_score_is_the_gradient_of_the_conditional_density(path, draw):
    z, t, eps = draw
    x = path.sample(z, t, eps).requires_grad_()
    mean = path.sample(z, t, torch.zeros_like(z))
    std = path.sample(torch.zeros_like(z), t, torch.ones_like(z))
    log_prob = torch.distributions.Normal(mean, std).log_prob(x).sum()
    torch.testing.assert_close(path.conditional_score(x, z, t), torch.autograd.grad(log_prob, x)[0])


def test_noise_to_score_is_the_conditional_score(path, draw):
    z, t, eps = draw
    score = path.conditional_score(path.sample(z, t, eps), z, t)
    torch.testing.assert_close(path.noise_to_score(eps, t), score)


def test_a_perfect_noise_predictor_gives_the_conditional_score(path, draw):
    z, t, eps = draw
    x = path.sample(z, t, eps)
    model = NoiseScore(lambda x, t: eps, path)
    torch.testing.assert_close(model(x, t), path.conditional_score(x, z, t))


def test_conversions_of_the_conditional_fields(path, draw):
    """Given z, the velocity holds the score and the data, and the score the velocity."""
    z, t, eps = draw
    x, u = path.sample(z, t, eps), path.velocity_target(z, t, eps)
    torch.testing.assert_close(path.velocity_to_score(u, x, t), path.conditional_score(x, z, t))
    torch.testing.assert_close(path.velocity_to_data(u, x, t), z)


def test_conversions_are_inverse(path, draw):
    x, t, u = draw
    torch.testing.assert_close(path.score_to_velocity(path.velocity_to_score(u, x, t), x, t), u)
    torch.testing.assert_close(path.velocity_to_score(path.score_to_velocity(u, x, t), x, t), u)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_conversions_of_the_marginal_fields(path, mixture, t, generator):
    """Exact velocity to exact score, back, and to E[z | x] by Tweedie's formula."""
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    times = torch.full((40,), t, dtype=torch.float64)
    u = mixture.velocity(x, times, path.scheduler)
    s = mixture.at_time(path.scheduler, t).score(x)
    torch.testing.assert_close(path.velocity_to_score(u, x, times), s)
    torch.testing.assert_close(path.score_to_velocity(s, x, times), u)
    one = torch.ones_like(x)
    alpha, beta = path.sample(one, times, 0 * one), path.sample(0 * one, times, one)
    torch.testing.assert_close(path.velocity_to_data(u, x, times), (x + beta**2 * s) / alpha)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_reschedule_gives_the_exact_velocity_of_another_path(mixture, scheduler, t, generator):
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    times = torch.full((40,), t, dtype=torch.float64)
    linear = reschedule(lambda x, t: mixture.velocity(x, t, LinearScheduler()), scheduler)
    torch.testing.assert_close(linear(x, times), mixture.velocity(x, times, scheduler))


def test_times_take_the_type_of_the_points():
    path = GaussianPath(CosineScheduler())
    z = torch.ones(2, 3)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    assert path.sample(z, t, z).dtype == torch.float32
