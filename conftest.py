"""The environment of every test and of every notebook kernel that nbval starts.

It lies at the root, so that `pytest notebooks` and `pytest tests` both find it, and so that
the tests can import helpers.
"""

import os
import tempfile


def pytest_configure(config):
    output = tempfile.TemporaryDirectory(prefix="output-")
    profile = tempfile.TemporaryDirectory(prefix="ipython-")  # not the user's settings
    config.add_cleanup(output.cleanup)
    config.add_cleanup(profile.cleanup)
    os.environ.setdefault("FLOW_DEVICE", "cpu")  # FLOW_DEVICE=cuda pytest tests: a real GPU
    os.environ.update(FLOW_PROGRESS="0", FLOW_OUTPUT=output.name)
    os.environ.update(IPYTHONDIR=profile.name)
    os.environ.pop("FLOW_RETRAIN", None)
    if getattr(config.option, "dist", "no") == "load":  # -n: a notebook's cells need one worker
        config.option.dist = "loadfile"
    if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by the workers
        os.environ["OMP_NUM_THREADS"] = "1"
    import matplotlib.pyplot  # noqa: F401  (its first scan of fonts writes to stderr)
