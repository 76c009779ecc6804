"""Fixtures that several test files share."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import helpers

matplotlib.use("Agg")
torch.set_num_threads(1)  # the tensors are small


@pytest.fixture(autouse=True)
def seeded():
    """Networks start with the same weights, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return helpers.make_generator(0)


@pytest.fixture
def mixture():
    """Three unequal components in the plane, in float64."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64)
    return helpers.GaussianMixture(means, [0.3, 0.5, 0.2], [1.0, 2.0, 3.0])


@pytest.fixture(params=helpers.SCHEDULERS)
def scheduler(request):
    return helpers.SCHEDULERS[request.param]


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)
