"""Statistical comparisons, and what several files draw and solve. Seeds are fixed, so that a test
gives one verdict for ever; the error rates say how often a right program would fail if the seed
were drawn anew."""

import math

import torch
from scipy import stats

from helpers import make_generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def swirl(x, t):
    """A field that depends on each entry of x and on t, for any shape."""
    return torch.sin(x) + t.reshape(-1, *[1] * (x.ndim - 1)) * torch.cos(2 * x)


def assert_mean(samples, expected=0.0, bias=0.0):
    """Samples (N, ...) have this mean: within 5 standard errors, 6e-7 for each number."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    distance = (samples.mean(dim=0) - torch.as_tensor(expected)).abs()
    assert (distance <= 5 * error + bias).all(), f"{distance} against {error}"


def assert_standard_normal(samples):
    """By distribution, not only by variance: Kolmogorov-Smirnov at 1e-4, kurtosis at 5 errors.

    A product of two normals has variance 1 too, but kurtosis 9.
    """
    samples = samples.flatten().double().numpy()
    assert stats.kstest(samples, "norm").pvalue > 1e-4
    assert abs(stats.kurtosis(samples)) < 5 * math.sqrt(24 / len(samples))


def projected_cdf(mixture, direction):
    """Distribution function of x . direction for x from an isotropic mixture."""
    centres = (mixture.means @ direction).numpy()
    weights, stds = mixture.weights.numpy(), mixture.stds.numpy()
    return lambda values: stats.norm.cdf(values[:, None], centres, stds) @ weights


def mixture_pvalue(samples, mixture):
    """Kolmogorov-Smirnov p-value that samples (N, D) come from the mixture: the least of
    eight projections, times eight (Bonferroni)."""
    angles = torch.arange(8) * (math.pi / 8)
    directions = torch.stack([angles.cos(), angles.sin()], dim=1).to(mixture.means.dtype)
    values = [
        stats.kstest((samples.double() @ d).numpy(), projected_cdf(mixture, d)).pvalue
        for d in directions
    ]
    return 8 * min(values)


def order(steps, errors):
    """Order of convergence: minus the slope of log error against log steps."""
    steps, errors = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -stats.linregress(steps, errors).slope
