"""notebooks/plots.py and show.py: figures, tables, comparison with the committed, sliders."""

import base64
import json

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import helpers
import plots
import show
from helpers import make_generator
from plots import FULL, HALF, play, save_animation, save_figure, save_table, watch


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path / "new"))
    return tmp_path / "new" / "figures"


def draw():
    """A figure with text, lines, rasterised points and an image."""
    fig, axes = plt.subplots(1, 3, figsize=(6, 2))
    axes[0].plot([0, 1, 4], label="$x^2$")
    axes[0].legend()
    plots.plot_points(torch.rand(50, 2, generator=make_generator(0)), axes[1])
    axes[2].imshow([[0, 1], [1, 0]])
    return fig


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


def test_an_animation_of_figures(figures):
    save_animation((curve(shift=0.1 * k) for k in range(3)), "moving", milliseconds=70)
    with Image.open(figures / "moving.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (320, 200))
    assert not plt.get_fignums()


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch, shown):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write figures to .*file.*set FLOW_OUTPUT"):
        save_figure(draw(), "any", "A caption.")
    assert shown == []


# Plots

POINTS = torch.linspace(-1, 1, 40).reshape(20, 2)
PLOTS = {
    "plot_points": (POINTS,),
    "plot_histogram": (POINTS,),
    "plot_density": (helpers.GaussianMixture([[0.0, 0.0]], [0.5]),),
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
    assert {name for name in vars(plots) if name.startswith("plot_")} == PLOTS.keys()


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_on_the_axes_only(name, ax):
    """They return their axes, change nothing that they were given, draw no random number and
    open no figure."""
    before = [v.clone() if torch.is_tensor(v) else v for v in PLOTS[name]]
    state, figures = torch.get_rng_state(), plt.get_fignums()
    assert getattr(plots, name)(*PLOTS[name], ax, **OPTIONS.get(name, {})) is ax
    assert ax.has_data()
    assert torch.equal(torch.get_rng_state(), state)
    assert plt.get_fignums() == figures
    for value, kept in zip(PLOTS[name], before, strict=True):
        assert not torch.is_tensor(value) or torch.equal(value, kept)
    ax.figure.canvas.draw()


def test_the_plane_has_equal_aspect_and_limits(ax):
    plots.plot_points(POINTS, ax, limit=2.0)
    assert ax.get_aspect() == 1
    assert ax.get_xlim() == ax.get_ylim() == (-2, 2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_1$", "$x_2$")


def test_histogram_is_a_density(ax):
    x = torch.rand(2000, 2, generator=make_generator(0)) * 2 - 1
    plots.plot_histogram(x, ax, limit=2.0, bins=20)
    heights = ax.collections[-1].get_array()
    assert heights.sum() * (4 / 20) ** 2 == pytest.approx(1)


def test_loss_curve_is_the_running_mean(ax):
    losses = torch.arange(10.0)
    plots.plot_loss(losses, ax, window=4)
    steps, mean = ax.lines[0].get_data()
    assert list(mean) == [losses[i : i + 4].mean() for i in range(7)]
    assert list(steps) == list(range(3, 10))


def test_mosaic_places_the_images_row_by_row(ax):
    """Grey k in image k, a white line around each, white where no image is."""
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.9])
    plots.plot_images(levels[:, None, None, None].expand(5, 1, 2, 2), ax, columns=3)
    mosaic = torch.as_tensor(ax.images[0].get_array().data)
    assert mosaic.shape == (8, 12)
    for i, level in enumerate(levels):
        row, column = 4 * (i // 3), 4 * (i % 3)
        tile = mosaic[row : row + 4, column : column + 4]
        torch.testing.assert_close(tile[1:3, 1:3], torch.full((2, 2), (level.item() + 1) / 2))
        assert (tile[0] == 1).all()
    assert (mosaic[4:, 8:] == 1).all()


def test_mosaic_of_colours():
    """The red channel alone was shown once."""
    x = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 2, 2)
    image = plots.mosaic(x, 2)
    assert image.shape == (4, 8, 3)
    assert image[1, 1].tolist() == [1, 0, 0]


# Printed figures


@pytest.mark.parametrize("width", [FULL, HALF])
def test_a_printed_figure_has_its_natural_size(width, figures, shown):
    fig, ax = plt.subplots(figsize=(width, 2))
    ax.plot([0, 1])
    save_figure(fig, "1a_test", "A $x_t$.")
    with Image.open(figures / "1a_test.png") as image:
        assert image.size == (round(width * 200), 400)
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    pdf = (figures / "1a_test.pdf").read_bytes()
    assert f"/MediaBox [ 0 0 {width * 72:g} 144 ]".encode() in pdf


def test_the_style_is_ours_whatever_the_users_is():
    """A matplotlibrc with a dark face once gave black on black."""
    import importlib

    with plt.rc_context({"axes.facecolor": "black", "figure.facecolor": "black"}):
        importlib.reload(plots)
        assert plt.rcParams["axes.facecolor"] == "white"
        assert plt.rcParams["pdf.fonttype"] == 42


# Comparison with the committed figure


def curve(color="C0", label="x", shift=0.0, limit=1, **other):
    """A figure with everything that is compared; `other` changes one part of it."""
    fig, ax = plt.subplots(figsize=(HALF, 2))
    at, square = np.linspace(0, 1, 50), np.linspace(0, 1, 50) ** 2
    ax.plot(at, square + shift, color=color, linestyle=other.get("dashes", "-"))
    ax.scatter([0.1, 0.9], [0.5, 0.5], color="C1")
    ax.imshow([[0.0, 1.0]], extent=(0, 0.1, 0, 0.1))
    ax.fill_between(at, square + other.get("band", 0.1), square)
    ax.hlines(other.get("height", 0.3), 0, 1)
    ax.contour(at, at, square[:, None] + square, levels=[other.get("level", 0.5)])
    ax.quiver([0.5, 0.6], [0.5, 0.6], [1, 0.5], [0, other.get("arrow", 0.5)])
    ax.set_xticks([0, 1], ["start", other.get("end", "end")])
    ax.set_title(other.get("left", "left"), loc="left")
    fig.suptitle(other.get("over", "over all"))
    ax.set(xlabel=label, xlim=(0, limit), ylim=(0, 1))
    return fig


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ""),
        ({"shift": 1e-4}, ""),
        ({"shift": 0.02}, "artists: 0."),
        ({"color": "C3"}, "'#d62728' for '#1f77b4'"),
        ({"label": "y"}, "texts: 'y' for 'x'"),
        ({"limit": 1.1}, "limit: 1.1 for 1"),
        ({"dashes": "--"}, "'--' for '-'"),
        ({"band": 0.2}, "artists: 0."),
        ({"height": 0.32}, "artists: 0."),
        ({"level": 0.6}, "artists: 0."),
        ({"arrow": 0.7}, "artists: "),
        ({"end": "stop"}, "texts: "),
        ({"left": "a"}, "texts: "),
        ({"over": "all"}, "texts: "),
    ],
)
def test_another_figure_than_the_committed_one_is_named(
    change, named, tmp_path, monkeypatch, shown
):
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path))  # in place: this becomes the committed one
    save_figure(curve(), "1a_test", "A.")
    monkeypatch.setenv("FLOW_OUTPUT", str(tmp_path / "build"))
    shown.clear()
    save_figure(curve(**change), "1a_test", "A.")
    caption = shown[1]
    if named:
        assert caption.startswith("*A.*\n\nNot as in figures/1a_test.png: ")
        assert named in caption
    else:
        assert caption == "*A.*"


def test_a_figure_holds_what_it_draws(figures, shown):
    save_figure(curve(), "1a_test", "A.")
    with Image.open(figures / "1a_test.png") as image:
        drawn = json.loads(image.info["drawn"])
    assert drawn["texts"] == ["end", "left", "over all", "start", "x"]
    assert drawn["axes"][0]["limits"] == [0, 1, 0, 1]
    kinds = [artist[0] for artist in drawn["axes"][0]["artists"]]
    bands = ["PolyCollection", "LineCollection", "QuadContourSet", "Quiver"]
    assert kinds == ["line", "PathCollection", *bands, "image"]


# Tables


def test_a_table_is_printed_and_written(figures, capsys):
    save_table([{"n_t": 1, "error": "10%"}, {"n_t": 20, "error": "5%"}], "3d_table", "By steps.")
    assert capsys.readouterr().out == "n_t  error\n  1    10%\n 20     5%\n"
    tex = (figures / "3d_table.tex").read_text()
    assert "n\\_t & error \\\\\n\\midrule\n1 & 10\\% \\\\" in tex
    assert (figures / "3d_table.csv").read_text() == "n_t,error\n1,10%\n20,5%\n"
    for wrong in ([{"a": 1}, {"b": 1}], [[1, 2]], []):
        with pytest.raises(ValueError, match="same keys"):
            save_table(wrong, "3d_table", "")


def test_a_table_keeps_its_mathematics_and_its_commas(figures):
    save_table([{"$\\sigma_t$": "1,5", "n_t": 2}], "5b_table", "By sigma.")
    assert "$\\sigma_t$ & n\\_t" in (figures / "5b_table.tex").read_text()
    assert '"1,5",2' in (figures / "5b_table.csv").read_text()


# Sliders


def shifted(shift=0.0, color="C0"):
    return curve(color=color, shift=shift)


CONTROLS = {"shift": (0.0, -1.0, 1.0, 0.1), "color": ["C0", "C1"]}


def test_without_a_reader_a_play_is_a_figure(figures, shown):
    play(shifted, "1d_test", "A.", **CONTROLS)
    played = shown.copy()
    shown.clear()
    save_figure(shifted(), "1d_test", "A.")
    assert played == shown


def test_a_reader_moves_a_slider(figures, shown, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    made = []
    monkeypatch.setattr(show, "_live", lambda: True)
    box = widgets.VBox
    monkeypatch.setattr(widgets, "VBox", lambda children: made.append(children) or box(children))
    play(shifted, "1d_test", "A.", **CONTROLS)
    assert "application/vnd.jupyter.widget-view+json" in shown[0]
    (shift, color, picture), before = made[0], made[0][2].value
    assert before.count(base64.b64encode((figures / "1d_test.png").read_bytes()).decode()) == 1
    shift.value = 0.5
    moved = picture.value
    assert moved != before
    color.value = "C1"
    assert picture.value != moved
    monkeypatch.setattr(plt.Figure, "savefig", lambda *a, **k: 1 / 0)
    shift.value = 0.7
    assert "ZeroDivisionError" in picture.value


@pytest.mark.parametrize(
    "control", [(1, 2), (5, 0, 1, 1), (0, 0, 1, 0), ("0", "0", "1", "1"), [], 3]
)
def test_a_control_that_is_none_is_refused(control, figures, shown):
    with pytest.raises(ValueError, match="shift must be"):
        play(shifted, "1d_test", "A.", shift=control)
    with pytest.raises(ValueError, match="draw has no parameter other"):
        play(shifted, "1d_test", "A.", other=[1])


def test_a_live_reader_is_one_who_can_be_asked(monkeypatch):
    class Shell:
        def get_parent(self):
            return {"content": {"allow_stdin": asked}}

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    for asked in (True, False):
        assert show._live() is asked
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert show._live() is False


def test_watch_draws_for_a_live_reader_only(shown, monkeypatch):
    for live in (False, True):
        monkeypatch.setattr(show, "_live", lambda live=live: live)
        on_step = watch(lambda step, losses, model: curve(), every=2)
        for step in range(1, 5):
            on_step(step, torch.zeros(step), None)
        assert [item["text/plain"] for item in shown] == ["training", "step 2", "step 4"] * live
