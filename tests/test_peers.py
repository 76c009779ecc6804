"""The formulas and solvers of helpers.py against independent implementations.

Each test is skipped, with the reason, where its package is not installed; tests/requirements.txt
lists them, so that none is skipped in CI.
"""

import itertools
import warnings

import pytest
import torch
from checks import normal
from scipy import linalg

import helpers
from helpers import GaussianPath, euler_maruyama, heun, make_generator, time_grid

NEAR = {"rtol": 1e-10, "atol": 1e-10}


def peer(name):
    """Import a package, whose own warnings are not ours; skip the test if it is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(params=["linear", "cosine", "polynomial"])
def pair(request):
    """One schedule, ours and that of flow_matching."""
    peer("flow_matching.path.scheduler")
    from flow_matching.path import scheduler

    theirs = {
        "linear": scheduler.CondOTScheduler,
        "cosine": scheduler.CosineScheduler,
        "polynomial": lambda: scheduler.PolynomialConvexScheduler(2),
    }
    return helpers.SCHEDULERS[request.param], theirs[request.param]()


@pytest.fixture(params=[(6, 2), (2, 2), (3, 1, 4, 4)])
def points(request):
    """z, eps (B, *D) and t (B,) away from the ends."""
    t = 0.05 + 0.9 * torch.rand(request.param[0], generator=make_generator(2), dtype=torch.float64)
    return normal(*request.param), normal(*request.param, seed=1), t


# flow_matching (Meta)


def test_schedules(pair):
    ours, theirs = pair
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = theirs(t)
    torch.testing.assert_close(ours.alpha(t), expected.alpha_t, **NEAR)
    torch.testing.assert_close(ours.beta(t), expected.sigma_t, **NEAR)
    torch.testing.assert_close(ours.alpha_dot(t), expected.d_alpha_t, **NEAR)
    torch.testing.assert_close(ours.beta_dot(t), expected.d_sigma_t, **NEAR)


def test_paths_and_targets(pair, points):
    from flow_matching.path import AffineProbPath

    z, eps, t = points
    path = GaussianPath(pair[0])
    expected = AffineProbPath(pair[1]).sample(x_0=eps, x_1=z, t=t)
    torch.testing.assert_close(path.sample(z, t, eps), expected.x_t, **NEAR)
    torch.testing.assert_close(path.velocity_target(z, t, eps), expected.dx_t, **NEAR)


def test_conversions(pair, points):
    """Any x and u will do: the conversions are linear maps. A score is -eps / beta."""
    from flow_matching.path import AffineProbPath

    x, u, t = points
    path, theirs = GaussianPath(pair[0]), AffineProbPath(pair[1])
    wide = t.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    noise = theirs.velocity_to_epsilon(u, x, wide)
    torch.testing.assert_close(
        path.velocity_to_data(u, x, t), theirs.velocity_to_target(u, x, wide), **NEAR
    )
    score = -noise / theirs.scheduler(wide).sigma_t
    torch.testing.assert_close(path.velocity_to_score(u, x, t), score, **NEAR)
    torch.testing.assert_close(
        path.score_to_velocity(score, x, t), theirs.epsilon_to_velocity(noise, x, wide), **NEAR
    )
    torch.testing.assert_close(
        path.conditional_velocity(x, u, t), theirs.target_to_velocity(u, x, wide), **NEAR
    )


def test_reschedule(pair, points):
    from flow_matching.path.scheduler import CondOTScheduler, ScheduleTransformedModel
    from flow_matching.utils import ModelWrapper

    class Field(ModelWrapper):
        def forward(self, x, t, **extras):
            return torch.sin(x) + t.reshape(-1, *[1] * (x.ndim - 1)) * x

    x, _, t = points
    field = Field(model=torch.nn.Identity())
    theirs = ScheduleTransformedModel(
        velocity_model=field, original_scheduler=CondOTScheduler(), new_scheduler=pair[1]
    )
    expected = torch.cat([theirs(x[i : i + 1], t[i]) for i in range(len(x))])
    torch.testing.assert_close(helpers.reschedule(field, pair[0])(x, t), expected, **NEAR)


# torchcfm


@pytest.mark.parametrize(
    ("scheduler", "matcher"),
    [
        ("linear", "ConditionalFlowMatcher"),
        ("cosine", "VariancePreservingConditionalFlowMatcher"),
    ],
)
def test_paths_of_torchcfm(scheduler, matcher, points):
    torchcfm = peer("torchcfm")
    z, eps, t = points
    path = GaussianPath(helpers.SCHEDULERS[scheduler])
    matcher = getattr(torchcfm, matcher)(sigma=0.0)
    _, x, u = matcher.sample_location_and_conditional_flow(eps, z, t=t)
    torch.testing.assert_close(path.sample(z, t, eps), x, **NEAR)
    torch.testing.assert_close(path.velocity_target(z, t, eps), u, **NEAR)


# POT


def test_pairing_costs_what_the_optimal_plan_costs():
    ot = peer("ot")
    x, y = normal(40, 2), normal(40, 2, seed=1)
    pairing = helpers.optimal_transport_pairing(x, y)
    cost = (x - y[pairing]).square().sum(dim=1).mean().item()
    assert cost == pytest.approx(ot.emd2([], [], ot.dist(x.numpy(), y.numpy())), rel=1e-9)


def test_sliced_wasserstein_of_pot():
    ot = peer("ot")
    x, y = normal(60, 3), 0.5 + 2 * normal(60, 3, seed=1)
    directions = normal(3, 50, seed=2)
    directions = directions / directions.norm(dim=0)
    expected = ot.sliced_wasserstein_distance(
        x.numpy(), y.numpy(), projections=directions.numpy(), p=2
    )
    ours = helpers.sliced_wasserstein(x, y, projections=50, generator=make_generator(2))
    assert ours == pytest.approx(float(expected), rel=1e-9)


# torchsde


def brownian_path(torchsde, generator, size):
    """The increments that euler_maruyama would draw from this generator, in its order."""

    class Path(torchsde.BaseBrownian):
        shape, dtype, device = size, torch.float64, torch.device("cpu")
        levy_area_approximation = "none"

        def __call__(self, start, end, **_):
            noise = torch.randn(size, generator=generator, dtype=torch.float64)
            return noise * (end - start) ** 0.5

        def __repr__(self):
            return "recorded path"

    return Path()


class TimeDependent(torch.nn.Module):
    """dX = (sin X - t X) dt + (1 + t) dW, for torchsde."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return torch.sin(y) - t * y

    def g(self, t, y):
        return (1 + t) * torch.ones_like(y)


@pytest.mark.parametrize("steps", [1, 8, 32])
def test_euler_maruyama_of_torchsde_on_one_path(steps):
    """Step by step equal to rounding; the step is a power of 2, so that both grids are equal."""
    torchsde = peer("torchsde")
    sde, x0, ts = TimeDependent(), normal(5, 2), time_grid(steps).double()
    expected = torchsde.sdeint(
        sde,
        x0,
        ts,
        bm=brownian_path(torchsde, make_generator(3), x0.shape),
        method="euler",
        dt=1 / steps,
    )
    ours = euler_maruyama(
        lambda x, t: sde.f(t[:, None], x),
        lambda t: 1 + t,
        x0,
        ts,
        generator=make_generator(3),
        trajectory=True,
    )
    torch.testing.assert_close(ours, expected, **NEAR)


# torchdiffeq


def swirl(x, t):
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.sin(x.roll(1, dims=-1)) + t * torch.cos(2 * x)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_heun_of_torchdiffeq(ends, points):
    torchdiffeq = peer("torchdiffeq")
    x0, ts = points[0], time_grid(20, *ends).double()
    expected = torchdiffeq.odeint(lambda t, x: swirl(x, t.expand(len(x))), x0, ts, method="heun2")
    torch.testing.assert_close(heun(swirl, x0, ts, trajectory=True), expected, **NEAR)


def test_heun_converges_to_dopri5():
    """Second order towards an adaptive solution of order five."""
    torchdiffeq = peer("torchdiffeq")
    x0, ends = normal(20, 2), torch.tensor([0.0, 1.0], dtype=torch.float64)
    reference = torchdiffeq.odeint(
        lambda t, x: swirl(x, t.expand(len(x))), x0, ends, method="dopri5", rtol=1e-11, atol=1e-11
    )[-1]
    errors = [(heun(swirl, x0, time_grid(n)) - reference).abs().max() for n in (50, 100, 200)]
    assert errors[-1] < 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


# SciPy and torch.distributions


def test_frechet_distance_by_the_matrix_root_of_scipy():
    x, y = normal(300, 8), 1 + normal(200, 8, seed=1) @ normal(8, 8, seed=2)
    cov_x, cov_y = x.T.cov().numpy(), y.T.cov().numpy()
    root = linalg.sqrtm(cov_x @ cov_y).real.trace()
    mean = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item()
    expected = mean + cov_x.trace() + cov_y.trace() - 2 * root
    assert helpers.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_log_density_of_torch_distributions(mixture, pair):
    """The exact marginal of every schedule, as a mixture built from its formulas."""
    x, level = normal(100, 2), 0.3
    alpha, beta = (getattr(pair[1](torch.tensor(level)), n) for n in ("alpha_t", "sigma_t"))
    std = (alpha**2 * mixture.stds**2 + beta**2).sqrt()
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.Independent(
            torch.distributions.Normal(alpha * mixture.means, std[:, None]), 1
        ),
    ).log_prob(x)
    ours = mixture.at_time(pair[0], level).log_prob(x)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
