"""Fixtures that several test files share."""

import sys
from pathlib import Path

import IPython.display
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import helpers

matplotlib.use("Agg")
sys.path.append(str(Path(helpers.__file__).parent / "notebooks"))  # plots.py, run.py and the others
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


class Handle:
    """What display returns: a place that can be redrawn."""

    def __init__(self, displayed):
        self.update = lambda item, raw: displayed.append(item)


@pytest.fixture
def shown(monkeypatch):
    """What would be displayed in a notebook."""
    displayed = []

    def display(item, metadata=None, raw=False, display_id=None):
        displayed.append(item if raw else item._repr_markdown_())
        return Handle(displayed)

    monkeypatch.setattr(IPython.display, "display", display)
    return displayed
