"""The environment of every test and of every notebook kernel that nbval starts.

It lies at the root, so that `pytest notebooks` and `pytest tests` both find it, and so that
the tests can import helpers.
"""

import os
import tempfile
import time
from queue import Empty

from nbval.kernel import RunningKernel


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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as run.py sets it: a core a notebook
    import matplotlib.pyplot  # noqa: F401  (its first scan of fonts writes to stderr)


def pytest_collection_modifyitems(config, items):
    """With -n: the notebooks first, the longest, which are the last, before all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        files = list(dict.fromkeys(item.path for item in items))
        files.sort(key=lambda path: (path.suffix == ".ipynb", path.name), reverse=True)
        items.sort(key=lambda item: files.index(item.path))


ask = RunningKernel.get_message


def get_message(self, stream, timeout=None):
    """nbval's, which would wait for a dead kernel, out of memory for instance, to the timeout."""
    begin = time.monotonic()
    while True:
        try:
            return ask(self, stream, timeout=min(5, timeout or 5))
        except Empty:
            if not self.is_alive():
                raise RuntimeError("the kernel died, perhaps for lack of memory") from None
            if timeout is not None and time.monotonic() > begin + timeout:
                raise


RunningKernel.get_message = get_message
