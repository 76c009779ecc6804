"""Sections 1 and 9: devices, sources, figures, plots."""

import base64
import os
from pathlib import Path

import IPython.display
import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

import helpers
from helpers import make_generator, pick_device, save_animation, save_figure, show_source


@pytest.fixture
def shown(monkeypatch):
    """What would be displayed in a notebook."""
    displayed = []

    def display(item, raw=False):
        displayed.append(item if raw else item._repr_markdown_())

    monkeypatch.setattr(IPython.display, "display", display)
    return displayed


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_FIGURES", str(tmp_path / "new" / "figures"))
    return tmp_path / "new" / "figures"


def draw():
    """A figure with text, lines, rasterised points and an image."""
    fig, axes = plt.subplots(1, 3, figsize=(6, 2))
    axes[0].plot([0, 1, 4], label="$x^2$")
    axes[0].legend()
    helpers.plot_points(torch.rand(50, 2, generator=make_generator(0)), axes[1])
    axes[2].imshow([[0, 1], [1, 0]])
    return fig


# Environment, device and generator


def test_environment_of_the_tests():
    """Set by the conftest at the root, for the notebook kernels too."""
    names = ("FLOW_DEVICE", "FLOW_PROGRESS", "FLOW_RETRAIN", "FLOW_WEIGHTS")
    assert [os.environ.get(name) for name in names] == ["cpu", "0", None, None]
    folder = Path(os.environ["FLOW_FIGURES"])
    assert folder.is_dir()
    assert helpers.ROOT not in folder.parents


def test_pick_device(monkeypatch):
    monkeypatch.setenv("FLOW_DEVICE", "cpu")
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for unset in (lambda: monkeypatch.setenv("FLOW_DEVICE", ""), lambda: None):
        unset()
        assert pick_device().type == "cpu"
        monkeypatch.delenv("FLOW_DEVICE", raising=False)


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


# save_figure


def test_save_figure_writes_and_displays_the_same_bytes(figures, shown):
    fig = draw()
    save_figure(fig, "1a_test", "A caption.")
    assert sorted(path.name for path in figures.iterdir()) == ["1a_test.pdf", "1a_test.png"]
    item, caption = shown
    assert caption == "*A caption.*"  # front ends show no text/plain beside an image
    assert base64.b64decode(item["image/png"]) == (figures / "1a_test.png").read_bytes()
    assert item["text/plain"] == "A caption."
    assert not plt.fignum_exists(fig.number)
    assert (figures / "1a_test.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_figure_gives_the_same_bytes(figures, shown):
    contents = []
    for name in ("first", "second"):
        save_figure(draw(), name, "A caption.")
        contents.append([(figures / f"{name}.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
    for content in contents[0]:
        assert not any(word in content for word in (b"CreationDate", b"Software", b"Matplotlib"))


def test_a_figure_is_replaced(figures, shown):
    save_figure(plt.figure(), "same", "One.")
    before = (figures / "same.png").read_bytes()
    save_figure(draw(), "same", "Two.")
    assert (figures / "same.png").read_bytes() != before
    assert len(list(figures.iterdir())) == 2


def test_an_animation_holds_its_frames(figures, shown):
    frames = [torch.full((6, 8), level) for level in (0.0, 0.5, 1.0)]
    save_animation(frames, "moving", milliseconds=70)
    assert shown == []
    with Image.open(figures / "moving.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (
            3,
            (8, 6),
            70,
            0,
        )
        for number, level in enumerate((0, 128, 255)):
            gif.seek(number)
            assert gif.convert("L").getpixel((3, 3)) == level


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch, shown):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLOW_FIGURES", str(tmp_path / "file" / "figures"))
    with pytest.raises(ValueError, match=r"cannot write figures to .*file.*set FLOW_FIGURES"):
        save_figure(draw(), "any", "A caption.")
    assert shown == []


def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(helpers.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        helpers._write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_bytes() == b"old"


# Plots

POINTS = torch.linspace(-1, 1, 40).reshape(20, 2)
PLOTS = {
    "plot_paths": (torch.linspace(0, 1, 5), torch.rand(5, 3)),
    "plot_points": (POINTS,),
    "plot_histogram": (POINTS,),
    "plot_density": (helpers.GaussianMixture([[0.0, 0.0]], [0.5]),),
    "plot_flow": (POINTS.reshape(5, 4, 2),),
    "plot_field": (POINTS, -POINTS),
    "plot_loss": (torch.rand(300),),
    "plot_images": (torch.rand(7, 1, 8, 8) * 2 - 1,),
}
OPTIONS = {
    "plot_histogram": {"limit": 2.0},
    "plot_density": {"limit": 2.0},
    "plot_points": {"limit": 2.0},
    "plot_loss": {"floor": 0.4, "label": "loss"},
    "plot_images": {"columns": 4},
}


def test_every_plot_is_tested():
    assert {name for name in vars(helpers) if name.startswith("plot_")} == PLOTS.keys()


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_on_the_axes_only(name, ax):
    """They return their axes, change nothing that they were given, draw no random number and
    open no figure."""
    before = [v.clone() if torch.is_tensor(v) else v for v in PLOTS[name]]
    state, figures = torch.get_rng_state(), plt.get_fignums()
    assert getattr(helpers, name)(*PLOTS[name], ax, **OPTIONS.get(name, {})) is ax
    assert ax.has_data()
    assert torch.equal(torch.get_rng_state(), state)
    assert plt.get_fignums() == figures
    for value, kept in zip(PLOTS[name], before, strict=True):
        assert not torch.is_tensor(value) or torch.equal(value, kept)
    ax.figure.canvas.draw()


def test_the_plane_has_equal_aspect_and_limits(ax):
    helpers.plot_points(POINTS, ax, limit=2.0)
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == ax.get_ylim() == (-2, 2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_1$", "$x_2$")


def test_histogram_is_a_density(ax):
    x = torch.rand(2000, 2, generator=make_generator(0)) * 2 - 1
    helpers.plot_histogram(x, ax, limit=2.0, bins=20)
    heights = ax.collections[-1].get_array()
    assert heights.sum() * (4 / 20) ** 2 == pytest.approx(1)


def test_loss_curve_is_the_running_mean(ax):
    losses = torch.arange(10.0)
    helpers.plot_loss(losses, ax, window=4)
    steps, mean = ax.lines[0].get_data()
    assert list(mean) == [losses[i : i + 4].mean() for i in range(7)]
    assert list(steps) == list(range(3, 10))


def test_mosaic_places_the_images_row_by_row(ax):
    """Grey k in image k, a white line around each, white where no image is."""
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.9])
    helpers.plot_images(levels[:, None, None, None].expand(5, 1, 2, 2), ax, columns=3)
    mosaic = torch.as_tensor(ax.images[0].get_array().data)
    assert mosaic.shape == (8, 12)
    for i, level in enumerate(levels):
        row, column = 4 * (i // 3), 4 * (i % 3)
        tile = mosaic[row : row + 4, column : column + 4]
        torch.testing.assert_close(tile[1:3, 1:3], torch.full((2, 2), (level.item() + 1) / 2))
        assert (tile[0] == 1).all()
    assert (mosaic[4:, 8:] == 1).all()


def test_range_of_images():
    images = torch.tensor([[0, 127, 255]], dtype=torch.uint8)
    x = helpers.to_model_range(images)
    assert x.dtype == torch.float32
    assert x[0, ::2].tolist() == [-1, 1]
    torch.testing.assert_close(helpers.to_image_range(x), images / 255)
    assert helpers.to_image_range(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
