"""Wrong input raises ValueError with what was wrong and what to do, never a silent broadcast.

Files have their errors tested with them: test_fashion_mnist, test_training, test_setup, test_plots.
"""

import pytest
import torch

from helpers import (
    MLP,
    FashionClassifier,
    GaussianMixture,
    GaussianPath,
    LinearScheduler,
    NoiseScore,
    PolynomialScheduler,
    UNet,
    adams_bashforth2,
    check_like,
    euler_maruyama,
    flow_matching_loss,
    frechet_distance,
    guided_velocity,
    heun,
    load_fashion_mnist,
    mmd2,
    reschedule,
    residual_noise,
    sde_drift,
    silhouette,
    sliced_wasserstein,
    time_grid,
)

LINEAR = LinearScheduler()
PATH = GaussianPath(LINEAR)
MIXTURE = GaussianMixture([[0.0, 0.0], [1.0, 1.0]], [0.1, 0.2])
UNET = UNet((16, 16, 16))
LABELLED = UNet((16, 16, 16), num_classes=3)
NAN, INF = float("nan"), float("inf")
X = torch.zeros(3, 2)
IMAGES = torch.zeros(2, 1, 8, 8)
T2, T3 = torch.full((2,), 0.5), torch.full((3,), 0.5)
TS = time_grid(2)


def still(x, t):
    return torch.zeros_like(x)


def first(x, t):
    """One coordinate of two: it would broadcast."""
    return x[:, :1]


def narrow(x, t, labels):
    return x[..., :1]


narrow.num_classes = 3


def simulate(drift=still, diffusion=1.0, x0=X, ts=TS):
    return euler_maruyama(drift, diffusion, x0, ts)


SOLVERS = {
    "x0 must be float32 or float64, got torch.int64; use x0.float": {"x0": torch.tensor([1, 2])},
    "x0 must have a batch axis": {"x0": torch.tensor(1.0)},
    "x0 has entries that are not finite": {"x0": torch.tensor([0.0, NAN])},
    "x0 has entries that are not": {"x0": torch.tensor([INF])},
    r"ts must be \(N\+1,\) .* got \(1,\)": {"ts": torch.zeros(1)},
    r"ts must be \(N\+1,\) .* got \(\)": {"ts": 0.5},
    r"ts must be \(N\+1,\) .* got \(2, 2\)": {"ts": torch.zeros(2, 2)},
    "ts must be strictly increasing": {"ts": torch.tensor([0.0, 0.5, 0.5])},
    "strictly increasing .*in torch.float32": {
        "ts": torch.tensor([0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64)
    },
    "ts must be strictly": {"ts": torch.tensor([0.0, NAN])},
    "strictly increasing": {"ts": torch.tensor([0.0, 1.0, 0.5])},
    r"must return shape \(3, 2\), got \(3,\)": {"drift": lambda x, t: t},
    r"must return shape \(3, 2\), got \(1, 2\)": {"drift": lambda x, t: x[:1]},
    r"must return shape \(3, 2\), got float": {"drift": lambda x, t: 0.0},
    r"must return shape \(3, 2\), got NoneType": {"drift": lambda x, t: None},
    "x0 must be float32 or float64, got torch.bfloat16; use x0.float.*autocast": {
        "x0": X.bfloat16()
    },
    "x0 must be float32 or float64, got torch.float16": {"x0": X.half()},
}


def solve(drift=still, x0=X, ts=TS):
    return heun(drift, x0, ts)


def solve_by_two_steps(drift=still, x0=X, ts=TS):
    return adams_bashforth2(drift, x0, ts)


@pytest.mark.parametrize("message", SOLVERS)
@pytest.mark.parametrize("solver", [simulate, solve, solve_by_two_steps])
def test_solvers_refuse(solver, message):
    with pytest.raises(ValueError, match=message):
        solver(**SOLVERS[message])


ERRORS = [
    # solvers
    (lambda: time_grid(0), r"need steps >= 1, start != end; got \(0, "),
    (lambda: time_grid(5, 1.0, 1.0), r"start != end; got \(5, 1.0, 1.0\)"),
    (lambda: simulate(ts=TS.flip(0)), "ts must be strictly increasing in"),
    (lambda: simulate(diffusion=lambda t: 0.5), r"diffusion must return shape \(3,\), got float"),
    (lambda: simulate(diffusion=lambda t: t[:1]), r"diffusion must return .* got \(1,\)"),
    (lambda: simulate(diffusion=lambda t: t[:, None]), r"diffusion must .* got \(3, 1\)"),
    (lambda: sde_drift(still, still, lambda t: 0.5)(X, T3), "diffusion must return shape"),
    (lambda: sde_drift(still, first, 1.0)(X, T3), r"score must return .* got \(3, 1\)"),
    (lambda: sde_drift(first, still, 1.0)(X, T3), r"velocity must return .* got \(3, 1\)"),
    (lambda: sde_drift(still, first, lambda t: t)(X, T3), r"score must return .* got \(3, 1\)"),
    (
        lambda: sde_drift(still, still, T3),
        r"diffusion must be a number or a function .* got tensor",
    ),
    (lambda: simulate(diffusion=T3), "diffusion must be a number or a function"),
    (lambda: simulate(diffusion="large"), "diffusion must be a number .* got 'large'"),
    (lambda: simulate(diffusion=None), "diffusion must be a number .* got None"),
    (lambda: check_like(X, X[:1], "net"), r"net must return shape \(1, 2\), got \(3, 2\)"),
    # data
    (lambda: GaussianMixture([0.0, 1.0], [1.0, 1.0]), r"means must be \(K, D\).*got \(2,\)"),
    (lambda: GaussianMixture([[0.0]], [1.0, 1.0]), r"stds and weights \(K,\); got \(1, 1\), \(2,"),
    (lambda: GaussianMixture([[0.0]], 1.0), r"got \(1, 1\), \(\)"),
    (lambda: GaussianMixture([[0.0]], [1.0], [1.0, 2.0]), r"\(1,\), \(2,\)"),
    (lambda: GaussianMixture([[0.0]], [0.0]), "stds and weights must be positive"),
    (lambda: GaussianMixture([[0.0]], [NAN]), "must be positive"),
    (lambda: GaussianMixture([[0.0]], [1.0], [-1.0]), "must be positive"),
    (lambda: MIXTURE.log_prob(torch.zeros(3)), r"x must be \(B, 2\), got \(3,\)"),
    (lambda: MIXTURE.score(torch.zeros(3, 1)), r"x must be \(B, 2\), got \(3, 1\)"),
    (lambda: MIXTURE.velocity(torch.zeros(3, 1), T3, LINEAR), r"x must be \(B, 2\), got \(3, 1"),
    (lambda: MIXTURE.velocity_variance(torch.zeros(3), T3, LINEAR), r"x must be \(B, 2\), got"),
    (lambda: MIXTURE.velocity(X, T2, LINEAR), r"t must have shape \(3,\), got \(2,\)"),
    (lambda: MIXTURE.velocity(X, torch.tensor(0.5), LINEAR), r"t must have shape .* got \(\)"),
    (lambda: silhouette("bird", 5), r"unknown silhouette 'bird'; choose one of \['cat', 'dog'\]"),
    (lambda: load_fashion_mnist("val"), 'split must be "train" or "test", got \'val\''),
    (lambda: GaussianMixture(X.half(), T3), "means must be float32 or float64, got torch.float16"),
    (lambda: MIXTURE.score(X.bfloat16()), "x must be float32 or float64, got torch.bfloat16"),
    # schedules and paths
    (
        lambda: PATH.sample(X.half(), T3, X.half()),
        "x must be float32 or float64, got torch.float16",
    ),
    (lambda: PATH.noise_to_score(X.bfloat16(), T3), "float32 or float64, got torch.bfloat16"),
    (
        lambda: reschedule(first, LINEAR)(X, T3),
        r"velocity must return shape \(3, 2\), got \(3, 1\)",
    ),
    (lambda: PolynomialScheduler(0.5), "power must be at least 1, got 0.5: .* infinite at t = 0"),
    (lambda: PolynomialScheduler(NAN), "power must be at least 1"),
    (lambda: PATH.sample(X, T3, X[:1]), r"shapes differ: \(3, 2\) and \(1, 2\)"),
    (lambda: PATH.conditional_velocity(X, X.T, T3), r"shapes differ: \(3, 2\) and \(2, 3\)"),
    (lambda: PATH.sample(X, T2, X), r"t must have shape \(3,\), got \(2,\)"),
    (lambda: PATH.velocity_target(X, torch.tensor(0.5), X), r"t must have shape .* got \(\)"),
    (lambda: PATH.conditional_score(X, X, T3[:, None]), r"t must have shape .* got \(3, 1\)"),
    (lambda: PATH.sample(X, T3 + 1, X), r"t must lie in \[0, 1\]"),
    (lambda: PATH.noise_to_score(X, T3 - 1), r"t must lie in \[0, 1\]"),
    (lambda: PATH.velocity_to_data(X, X, T3 * NAN), r"t must lie in \[0, 1\]"),
    (lambda: PATH.sample(X.byte(), T3, X), "got torch.uint8; use .*for images to_model_range"),
    # networks
    (lambda: MLP()(torch.zeros(3, 3), T3), r"x must be \(B, 2\), got \(3, 3\)"),
    (lambda: MLP()(X, T2), r"t must have shape \(3,\), got \(2,\)"),
    (lambda: UNet((16, 16)), "channels must be three multiples of 16"),
    (lambda: UNet((16, 24, 32)), r"channels must be three multiples of 16, got \(16, 24, 32\)"),
    (lambda: UNet((16, 16, 16), embedding=10), "embedding must be a multiple of 4, got 10"),
    (lambda: UNET(IMAGES[0], T2), r"x must be \(B, 1, H, W\) .* got \(1, 8, 8\)"),
    (lambda: UNET(IMAGES.expand(2, 3, 8, 8), T2), r"got \(2, 3, 8, 8\)"),
    (lambda: UNET(torch.zeros(2, 1, 8, 6), T2), r"multiples of 4, got \(2, 1, 8, 6\)"),
    (lambda: UNET(IMAGES, T3), r"t must have shape \(2,\), got \(3,\)"),
    (lambda: UNET(IMAGES, T2[:1]), r"t must have shape \(2,\), got \(1,\)"),
    (lambda: UNET(IMAGES, T2, torch.zeros(2).long()), "UNet built with num_classes=0"),
    (lambda: LABELLED(IMAGES, T2, torch.tensor([1])), r"labels must have shape \(2,\), got \(1,"),
    (lambda: LABELLED(IMAGES, T2, torch.tensor([0, 4])), r"labels must lie in 0 \.\. 3"),
    (lambda: LABELLED(IMAGES, T2, torch.tensor([-1, 0])), r"labels must lie in 0 \.\. 3"),
    (lambda: NoiseScore(still, PATH)(X, T2), r"t must have shape \(3,\), got \(2,\)"),
    (lambda: NoiseScore(first, PATH)(X, T3), r"net must return shape \(3, 2\), got \(3, 1\)"),
    (
        lambda: MLP(time_input=lambda t: 0.5)(X, T3),
        r"time_input must return shape \(3,\), got float",
    ),
    (
        lambda: guided_velocity(narrow, torch.zeros(2).long(), 2.0)(IMAGES, T2),
        r"model must return shape \(4, 1, 8, 8\), got \(4, 1, 8, 1\)",
    ),
    # losses and metrics
    (lambda: flow_matching_loss(still, X, PATH, source=X[:2]), "shapes differ"),
    (lambda: mmd2(X, X, 0), "bandwidth must be positive, got 0"),
    (lambda: mmd2(X, X, NAN), "bandwidth must be positive"),
    (lambda: mmd2(X, X[:1], 1.0), r"N, M >= 2, got \(3, 2\) and \(1, 2\)"),
    (lambda: mmd2(X, torch.zeros(3, 4), 1.0), r"got \(3, 2\) and \(3, 4\)"),
    (lambda: sliced_wasserstein(IMAGES, IMAGES), r"images need flatten\(1\)"),
    (lambda: sliced_wasserstein(X, X[:2]), "samples must have equal size, got 3 and 2"),
    (lambda: frechet_distance(X[:, 0], X[:, 0]), "need two samples"),
    (lambda: residual_noise(torch.zeros(5, 28, 28)), r"must be images .* got \(5, 28, 28\)"),
    (lambda: residual_noise(IMAGES.byte()), "x must be .* got torch.uint8; .*to_model_range"),
    (
        lambda: FashionClassifier(pretrained=False)(torch.zeros(2, 1, 28, 28).byte()),
        "x must be float32 or float64, got torch.uint8; .*to_model_range",
    ),
    (
        lambda: FashionClassifier(pretrained=False)(torch.zeros(2, 1, 32, 32)),
        r"x must be \(N, 1, 28, 28\), got \(2, 1, 32, 32\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
