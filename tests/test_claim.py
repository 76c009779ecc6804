"""Section 1: claims, the source as it was imported, devices that are not there."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import helpers
from helpers import claim, pick_device

TRUE = [True, np.True_, torch.tensor(True), torch.tensor([True]), lambda: True]
TRUE += [lambda: torch.tensor(3.0) > 2, lambda: np.float64(3) > 2]
FALSE = [False, np.False_, torch.tensor(False), lambda: torch.tensor(1.0) > 2, lambda: 1 / 0]
FALSE += [None, ..., 1.0, "yes", lambda: None, lambda: ..., lambda missing: True]  # no bools
FALSE += [torch.tensor([True, True]), torch.tensor(float("nan"))]


@pytest.mark.parametrize("check", TRUE)
def test_a_claim_that_holds(check, capsys):
    claim("the variance grows", check)
    assert capsys.readouterr().out == "✓ the variance grows\n"


@pytest.mark.parametrize("check", FALSE)
def test_a_claim_that_does_not_hold_never_raises(check, capsys):
    claim("the variance grows", check)
    assert capsys.readouterr() == ("✗ the variance grows: not with these values\n", "")


def test_a_claim_can_be_interrupted():
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        claim("a long computation", check)


@pytest.mark.parametrize("again", ["", "importlib.reload(helpers)"], ids=["edited", "reloaded"])
def test_show_source_after_the_file_was_edited(again, tmp_path):
    """Lines added above heun while the kernel lives: they are not heun; nor after a reload."""
    shutil.copy(helpers.__file__, tmp_path)
    program = f"""
import importlib, pathlib, IPython.display, helpers
file = pathlib.Path(helpers.__file__)
file.write_text("# a line\\n" * 18 + file.read_text(encoding="utf-8"), encoding="utf-8")
{again}
IPython.display.display = lambda item: print(item.data)
helpers.show_source(helpers.heun, helpers.GaussianPath)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("```python\n@torch.no_grad()\ndef heun(")
    assert "return _march(step, x0, ts, trajectory)\n\n\nclass GaussianPath:" in shown
    source = Path(helpers.__file__).read_text(encoding="utf-8")
    assert all(line in source for line in shown.splitlines()[1:-1])


@pytest.mark.parametrize(
    ("name", "there"), [("cuda:9", False), ("cuda:x", False), ("cuda:1", True)]
)
def test_a_gpu_of_a_number_that_is_not_there(name, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("FLOW_DEVICE", name)
    if there:
        assert pick_device() == torch.device(name)
    else:
        with pytest.raises(
            ValueError, match=f"FLOW_DEVICE='{name}', but .*'cuda:0', 'cuda:1'.*unset"
        ):
            pick_device()
