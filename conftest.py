"""The environment of every test and of every notebook kernel that nbval starts.

It lies at the root, so that `pytest notebooks` and `pytest tests` both find it, and so that
the tests can import helpers.
"""

import os
import tempfile


def pytest_configure(config):
    figures = tempfile.TemporaryDirectory(prefix="figures-")
    config.add_cleanup(figures.cleanup)
    os.environ.update(FLOW_DEVICE="cpu", FLOW_PROGRESS="0", FLOW_FIGURES=figures.name)
    for variable in ("FLOW_RETRAIN", "FLOW_WEIGHTS"):
        os.environ.pop(variable, None)
