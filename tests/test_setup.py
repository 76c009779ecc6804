"""Section 1: environment, device, generator, sources, files."""

import os
from pathlib import Path

import pytest
import torch

import helpers
from helpers import make_generator, pick_device, show_source

# Environment, device and generator


def test_environment_of_the_tests():
    """Set by the conftest at the root, for the notebook kernels too."""
    names = ("FLOW_DEVICE", "FLOW_PROGRESS", "FLOW_RETRAIN")
    assert [os.environ.get(name) for name in names] == ["cpu", "0", None]
    folder = Path(os.environ["FLOW_OUTPUT"])
    assert folder.is_dir()
    assert helpers.ROOT not in folder.parents


def test_pick_device(monkeypatch):
    monkeypatch.setenv("FLOW_DEVICE", "cpu")
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("FLOW_DEVICE", "")
    assert pick_device().type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_preferred_device(cuda, mps, expected, monkeypatch):
    monkeypatch.delenv("FLOW_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "tpu"])
def test_an_unavailable_device_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FLOW_DEVICE", name)
    with pytest.raises(ValueError, match=f"FLOW_DEVICE='{name}', but this machine.*unset"):
        pick_device()


def test_make_generator():
    generator = make_generator(5)
    assert generator.device.type == "cpu"
    assert torch.equal(
        torch.rand(3, generator=generator), torch.rand(3, generator=make_generator(5))
    )


# show_source


@pytest.mark.parametrize(
    "objects",
    [
        (helpers.euler_maruyama,),
        (helpers.GaussianPath, helpers.heun),
        (helpers.GaussianMixture.velocity,),
    ],
)
def test_show_source_is_the_text_of_the_file(objects, shown):
    """A fenced block, whose every definition stands in helpers.py, up to its indentation."""
    show_source(*objects)
    (text,) = shown
    assert text.startswith("```python\n")
    assert text.endswith("\n```")
    lines = Path(helpers.__file__).read_text().splitlines()
    kept = {line.strip() for line in lines}
    body = text.splitlines()[1:-1]
    assert {line.strip() for line in body} <= kept
    for item in objects:
        keyword = "class" if isinstance(item, type) else "def"
        assert any(line.startswith(f"{keyword} {item.__name__}") for line in body)


# Files


def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        helpers.write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_bytes() == b"old"


def test_output_folder(tmp_path, monkeypatch):
    """build/ by default, ~ and relative names made absolute; in place, the committed folders."""
    monkeypatch.delenv("FLOW_OUTPUT")
    assert helpers.output_folder("figures") == helpers.ROOT / "build" / "figures"
    monkeypatch.setenv("FLOW_OUTPUT", "~/new")
    assert helpers.output_folder("weights") == Path.home() / "new" / "weights"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOW_OUTPUT", "new")
    assert helpers.output_folder("records") == tmp_path / "new" / "records"
    monkeypatch.setenv("FLOW_OUTPUT", str(helpers.ROOT))
    assert helpers.output_folder("figures") == helpers.ROOT / "figures"
    assert helpers.output_folder("weights") == helpers.DATA / "weights"
