"""Section 8: metrics against independent implementations."""

import math

import numpy as np
import pytest
import torch
from checks import assert_mean
from scipy import linalg, spatial

import evaluate
import helpers
from evaluate import precision_recall
from helpers import (
    FashionClassifier,
    frechet_distance,
    make_generator,
    mmd2,
    residual_noise,
    save_weights,
    sliced_wasserstein,
)


def samples(n, m, features, shift=0.0, seed=0):
    generator = make_generator(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x, shift + 1.5 * torch.randn(m, features, generator=generator, dtype=torch.float64)


# Maximum mean discrepancy


@pytest.mark.parametrize(("n", "m"), [(2, 2), (7, 4), (40, 60)])
@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_mmd2_is_the_mean_over_pairs(n, m, bandwidth):
    """Pairs of different members within a sample, all pairs across; kernels by SciPy."""
    x, y = samples(n, m, 3, shift=0.5)

    def kernel(squares):
        return np.exp(-squares / (2 * bandwidth**2))

    expected = (
        kernel(spatial.distance.pdist(x, "sqeuclidean")).mean()
        + kernel(spatial.distance.pdist(y, "sqeuclidean")).mean()
        - 2 * kernel(spatial.distance.cdist(x, y, "sqeuclidean")).mean()
    )
    assert mmd2(x, y, bandwidth) == pytest.approx(expected, abs=1e-7)
    assert mmd2(y, x, bandwidth) == pytest.approx(expected, abs=1e-7)


def test_mmd2_has_mean_zero_for_one_distribution():
    generator = make_generator(1)
    values = [mmd2(*torch.randn(2, 6, 2, generator=generator), 1.0) for _ in range(2000)]
    values = torch.tensor(values)
    assert_mean(values)
    assert values.min() < 0 < values.max()


def test_mmd2_grows_with_the_distance():
    x, y = samples(300, 300, 2)
    values = [mmd2(x, y + shift, 1.0) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)


# Sliced Wasserstein distance


@pytest.mark.parametrize("shift", [0.0, 0.7, -3.0])
def test_sliced_wasserstein_of_a_shift_in_one_dimension(shift, generator):
    """Every direction of the line gives the shift itself, whatever the order of the points."""
    x = torch.randn(100, 1, generator=generator, dtype=torch.float64)
    y = x[torch.randperm(100, generator=generator)] + shift
    assert sliced_wasserstein(x, y, generator=generator) == pytest.approx(abs(shift), abs=1e-9)


@pytest.mark.parametrize("dimension", [2, 5])
def test_sliced_wasserstein_of_a_shift(dimension):
    """The mean of (shift . direction)^2 is |shift|^2 / D; five errors over 20 000 directions."""
    x, _ = samples(3, 2, dimension)
    shift = torch.arange(1.0, dimension + 1).double()
    found = sliced_wasserstein(x, x + shift, projections=20_000, generator=make_generator(2))
    assert found**2 * dimension == pytest.approx(shift.square().sum().item(), rel=0.05)


def test_sliced_wasserstein_of_a_scale_in_one_dimension():
    """From x to 3 x, the sorted points move by 2 |x|."""
    x = torch.linspace(-1, 1, 51, dtype=torch.float64)[:, None]
    expected = (2 * x).square().mean().sqrt().item()
    assert sliced_wasserstein(x, 3 * x) == pytest.approx(expected)


def test_sliced_wasserstein_follows_the_generator():
    x, y = samples(20, 20, 4)
    values = [sliced_wasserstein(x, y, generator=make_generator(seed)) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


# Frechet distance


@pytest.mark.parametrize("features", [1, 2, 16])
@pytest.mark.parametrize("n", [12, 200])
def test_frechet_distance_with_the_square_root_of_scipy(features, n):
    """Also where the covariance has not full rank: 12 samples of 16 features."""
    x, y = (v.numpy() for v in samples(n, n + 3, features, shift=0.4))
    cov_x, cov_y = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (x, y))
    jitter = 1e-10 * np.eye(features)
    root = linalg.sqrtm((cov_x + jitter) @ (cov_y + jitter)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root)
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_is_that_of_two_gaussians():
    """Isotropic: |shift|^2 + D (s - 1)^2, and 0 for a sample and itself."""
    x, _ = samples(50, 2, 4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(16)
    scaled = x.mean(dim=0) + 3 * (x - x.mean(dim=0))
    assert frechet_distance(x, scaled) == pytest.approx(4 * torch.cov(x.T).trace().item())
    assert frechet_distance(scaled, x.float()) == pytest.approx(frechet_distance(x, scaled))


# Precision and recall


def test_precision_and_recall_by_hand():
    """Real points 0, 1, 2 on a line with k = 1: balls of radius 1 about each, so [-1, 3]."""
    real = torch.tensor([[0.0], [1.0], [2.0]])
    generated = torch.tensor([[-0.5], [2.9], [3.5], [9.0]])
    # balls about generated points: radii 3.4, 0.6, 0.6, 5.5
    assert precision_recall(real, generated, k=1) == (0.5, 1.0)
    assert precision_recall(generated, real, k=1) == (1.0, 0.5)


def test_precision_and_recall_see_different_faults():
    x, _ = samples(2000, 2, 3)
    y, _ = samples(2000, 2, 3, seed=1)
    precision, recall = precision_recall(x, y)
    assert precision > 0.8
    assert recall > 0.8
    narrow_precision, narrow_recall = precision_recall(x, 0.3 * y)
    assert narrow_precision > precision
    assert narrow_recall < recall / 2
    far_precision, _ = precision_recall(x, 3 * y)
    assert far_precision < precision / 2


# What no metric may depend on


METRICS = {
    "mmd2": lambda x, y: mmd2(x, y, 1.0),
    "sliced_wasserstein": lambda x, y: sliced_wasserstein(x, y, generator=make_generator(0)),
    "frechet_distance": frechet_distance,
    "precision": lambda x, y: precision_recall(x, y)[0],
    "recall": lambda x, y: precision_recall(x, y)[1],
}


@pytest.mark.parametrize("name", METRICS)
def test_a_common_shift_changes_no_metric(name):
    """Float32 features about 1e4 had precision and recall 1.0; their values here are 1/1024."""
    x, y = ((1024 * v).round().div(1024).float() for v in samples(300, 300, 8, shift=0.5))
    expected = METRICS[name](x, y)
    assert METRICS[name](x + 1e4, y + 1e4) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_metrics_take_any_number_and_compute_in_float64(name, dtype):
    """Half precision overflowed; bytes are no type of a projection."""
    x, y = (120 + 30 * v for v in samples(200, 200, 4))
    x, y = (v.clamp(0, 255).to(dtype).requires_grad_(dtype.is_floating_point) for v in (x, y))
    expected = METRICS[name](x.detach().float(), y.detach().float())
    assert METRICS[name](x, y) == pytest.approx(expected)


def test_sliced_wasserstein_of_large_half_precision():
    x = torch.full((4, 3), 6e4).half()
    assert sliced_wasserstein(x, -x) == pytest.approx(1.2e5, rel=0.2)


def test_frechet_distance_is_never_negative():
    """1000 x against itself was -73; what is not a number stays so."""
    for seed in range(5):
        x, _ = samples(2000, 2, 64, seed=seed)
        assert frechet_distance(1000 * x, 1000 * x) >= 0
        assert frechet_distance(1000 * x, 1000 * x) < 1


@pytest.mark.parametrize("k", [0, -1, 5, 7])
def test_a_neighbour_that_is_not_there_is_refused(k):
    x, _ = samples(5, 2, 2)
    with pytest.raises(ValueError, match=rf"need 1 <= k < N and M, got {k}, 5 and 9"):
        precision_recall(x, samples(9, 2, 2)[0], k)


# Images


def test_residual_noise_is_read_in_the_corners():
    """0 for black corners, whatever the middle; the median of |noise| is 0.674 of its std."""
    x = -torch.ones(2000, 1, 28, 28)
    x[:, :, 2:-2, 2:-2] = 1.0
    assert residual_noise(x) == 0
    noise = 0.1 * torch.randn(x.shape, generator=make_generator(3))
    median = 0.1 * math.sqrt(2) * torch.erfinv(torch.tensor(0.5)).item()
    assert residual_noise(x + noise) == pytest.approx(median, rel=0.03)
    brighter = x.clone()
    brighter[:, :, :2, :2] = brighter[:, :, -2:, :2] = 0.5  # two corners of four, and one more
    brighter[:, :, :2, -2:] = 0.5
    assert residual_noise(brighter) == 1.5


def test_classifier_shapes():
    model = FashionClassifier(pretrained=False).eval()
    x = torch.rand(3, 1, 28, 28, generator=make_generator(0)) * 2 - 1
    assert model(x).shape == (3, 10)
    assert model.features(x).shape == (3, 64)
    torch.testing.assert_close(model(x[:1]), model(x)[:1], atol=1e-6, rtol=1e-5)
    assert not torch.equal(model.features(x)[0], model.features(x)[1])


def test_classifier_loads_its_weights(weights_folder, monkeypatch):
    monkeypatch.setattr("helpers.DATA", weights_folder / "none")
    with pytest.raises(FileNotFoundError, match="classifier"):
        FashionClassifier()
    saved = FashionClassifier(pretrained=False)
    save_weights(saved, "classifier", {"config": {}})
    loaded = FashionClassifier()
    assert not loaded.training
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.half(), b.half())


def test_a_record_of_other_weights_is_made_anew(monkeypatch):
    """In the notebook's own process, so that it is written where the notebook reads."""
    made = []

    def load(name):
        if not made:
            raise ValueError("made with other weights")
        return made

    monkeypatch.setattr(helpers, "load_record", load)
    monkeypatch.setattr(evaluate, "main", made.append)
    assert evaluate.record("fit") == [["fit"]]
