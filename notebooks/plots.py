"""The looks of the notebooks: style, drawing functions, saved figures and tables, sliders.

Tensors in, a Figure or its axes out; nothing here simulates, seeds or trains. A figure of width
FULL or HALF is a printed page's or column's, saved at its natural size.
"""

import base64
import html
import inspect
import io
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from PIL import Image, PngImagePlugin

import helpers

plt.rcdefaults()  # whatever the user's own settings are
plt.style.use(helpers.ROOT / "notebooks" / "plots.mplstyle")

FULL, HALF = 6.5, 3.2  # inches: a printed page's text, and a column
DPI = 200

# One colour each through all notebooks; distinguishable in the common colour blindnesses.
COLORS = {"noise": "#0072B2", "data": "#D55E00", "model": "#009E73", "exact": "#000000"}


# ---------------------------------------------------------------------------------------
# Figures, tables, animations: saved and shown
# ---------------------------------------------------------------------------------------


def save_figure(fig, name, caption):
    """Write <name>.png and .pdf to the folder of figures and show exactly those PNG bytes.

    Below it stands the caption, whose mathematics is between dollar signs. Where the committed
    figure of that name shows something else, a line says what. Closes fig. Raises ValueError
    if the folder is not writable.
    """
    png, difference = _save(fig, name)
    _show(png, caption, difference)


def save_animation(frames, name, *, milliseconds):
    """Write <name>.gif to the folder of figures, repeating for ever; nothing is displayed.

    frames: grey images (H, W), or (H, W, 3), in [0, 1], each shown for `milliseconds`.
    """
    images = [Image.fromarray((255 * frame).round().byte().cpu().numpy()) for frame in frames]
    gif = io.BytesIO()
    options = {"duration": milliseconds, "loop": 0, "optimize": True}
    images[0].save(gif, format="GIF", save_all=True, append_images=images[1:], **options)
    _write_figures({f"{name}.gif": gif.getvalue()})


def save_table(rows, name, caption):
    """Print a table, and write it as <name>.tex (booktabs) and <name>.csv beside the figures.

    rows: dicts of one set of keys, the titles of the columns; cells are text or numbers.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("rows must be dicts, at least one, all with the same keys")
    lines = [list(rows[0])] + [[str(cell) for cell in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    head, *body = [" & ".join(re.sub(r"([%&#_])", r"\\\1", c) for c in line) for line in lines]
    tex = ["% " + caption, rf"\begin{{tabular}}{{{'r' * len(widths)}}}", r"\toprule"]
    tex += [rf"{head} \\", r"\midrule", *(rf"{line} \\" for line in body), r"\bottomrule"]
    text = "\n".join([*tex, r"\end{tabular}", ""])
    csv = "".join(",".join(line) + "\n" for line in lines)
    _write_figures({f"{name}.tex": text.encode(), f"{name}.csv": csv.encode()})


def _save(fig, name):
    """Write a figure, close it; its PNG bytes, and how it differs from the committed one."""
    natural = any(math.isclose(fig.get_figwidth(), width) for width in (FULL, HALF))
    # other widths go when the last notebook is rewritten
    size = {} if natural else {"bbox_inches": "tight"}
    drawn, png, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    no_dates = {"CreationDate": None, "Creator": None, "Producer": None}
    fig.savefig(drawn, format="png", dpi=DPI if natural else 100, **size)
    fig.savefig(pdf, format="pdf", dpi=DPI if natural else 150, metadata=no_dates, **size)
    contents = describe(fig)
    plt.close(fig)
    # 256 colours: no visible difference, and less than half the size
    palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("drawn", json.dumps(contents), zip=True)
    dpi = {"dpi": (DPI, DPI)} if natural else {}
    palette.save(png, format="PNG", optimize=True, pnginfo=chunk, **dpi)
    difference = _difference(name, contents)
    _write_figures({f"{name}.png": png.getvalue(), f"{name}.pdf": pdf.getvalue()})
    return png.getvalue(), difference


def _show(png, caption, difference, extra=()):
    """Display a picture, with its width on the page and its text, and the caption below it."""
    from IPython.display import Markdown, display

    image = Image.open(io.BytesIO(png))
    meta = {"alt": re.sub(r"\$([^$]*)\$", r"\1", caption)}
    if "dpi" in image.info:  # of natural size
        meta["width"] = round(image.width * 96 / DPI)
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": caption, **dict(extra)}
    display(data, metadata={"image/png": meta}, raw=True)
    display(Markdown(f"*{caption}*" + (f"\n\n{difference}" if difference else "")))


def _write_figures(files):
    """Write {name: bytes} to the folder of figures; ValueError if it is not writable."""
    folder = helpers.output_folder("figures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            helpers._write_atomically(folder / name, content)
    except OSError as error:
        raise ValueError(
            f"cannot write figures to {folder} ({error}); make it writable or set FLOW_OUTPUT"
        ) from error


# ---------------------------------------------------------------------------------------
# What is drawn, for comparison: pixels cannot tell a rounding from a changed label
# ---------------------------------------------------------------------------------------


def describe(fig):
    """What a figure shows, as plain values: texts, and of each axes its limits and artists.

    An artist is its kind, its colours, and five quantiles of its data in each coordinate, in
    units of the axis.
    """
    return {
        "texts": sorted(t for ax in fig.axes for t in _texts(ax)),
        "axes": [_describe_axes(ax) for ax in fig.axes],
    }


def _texts(ax):
    legend = ax.get_legend()
    found = [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts)]
    found += [t.get_text() for t in legend.texts] if legend else []
    return [t for t in found if t]


def _describe_axes(ax):
    limits = [*ax.get_xlim(), *ax.get_ylim()]
    artists = []
    for line in ax.lines:
        artists.append(["line", [to_hex(line.get_color())], _quantiles(ax, line.get_xydata())])
    for cloud in ax.collections:
        colors = sorted({to_hex(c) for c in [*cloud.get_facecolor(), *cloud.get_edgecolor()]})
        values = cloud.get_array()
        places = cloud.get_offsets() if isinstance(cloud, PathCollection) else None
        numbers = _quantiles(ax, places) if places is not None else []
        if values is not None and np.size(values):
            numbers = [*numbers, _levels(np.asarray(values, dtype=float), *cloud.get_clim())]
            colors = [cloud.get_cmap().name]
        artists.append([type(cloud).__name__, colors[:8], numbers])
    for patch in ax.patches:
        box = patch.get_path().transformed(patch.get_patch_transform()).vertices
        artists.append(["patch", [to_hex(patch.get_facecolor())], _quantiles(ax, box)])
    for image in ax.images:
        values = np.asarray(image.get_array(), dtype=float)
        artists.append(["image", [image.get_cmap().name], [_levels(values, *image.get_clim())]])
    return {"limits": [float(f"{v:.6g}") for v in limits], "artists": artists}


def _quantiles(ax, points):
    """Five quantiles of the x and of the y of points (N, 2), in units of the axes."""
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    with np.errstate(all="ignore"):  # a logarithmic axis has no place for 0
        places = ax.transAxes.inverted().transform(ax.transData.transform(points))
    return [_levels(column[np.isfinite(column)], 0, 1) for column in places.T]


def _levels(values, low, high):
    values = values[np.isfinite(values)]
    if not values.size or low is None or high == low:
        return []
    return [round(float(q - low) / (high - low), 4) for q in np.quantile(values, np.arange(5) / 4)]


def _difference(name, contents):
    """How contents differ from those of the committed figure, in a line; "" if not."""
    committed = helpers.ROOT / "figures" / f"{name}.png"
    if committed.parent == helpers.output_folder("figures") or not committed.exists():
        return ""
    with Image.open(committed) as image:
        old = image.info.get("drawn")
    found = old and _first_difference(json.loads(old), json.loads(json.dumps(contents)), "")
    return f"Not as in figures/{name}.png: {found}." if found else ""


def _first_difference(old, new, where):
    """The place of the first difference of two nested values, numbers by more than 1/200."""
    if isinstance(old, dict) and old.keys() == getattr(new, "keys", list)():
        return next(filter(None, (_first_difference(old[k], new[k], k) for k in old)), "")
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: {len(new)} for {len(old)}"
        scale = max([abs(v) for v in old if isinstance(v, float)] + [1]) if "limit" in where else 1
        pairs = (
            (a / scale, b / scale) if isinstance(a, float) and isinstance(b, float) else (a, b)
            for a, b in zip(old, new, strict=True)
        )
        return next(filter(None, (_first_difference(a, b, where) for a, b in pairs)), "")
    if isinstance(old, int | float) and isinstance(new, int | float):
        return f"{where}: {new:g} for {old:g}" if abs(old - new) > 1 / 200 else ""
    return "" if old == new else f"{where}: {new!r} for {old!r}"


# ---------------------------------------------------------------------------------------
# Play: a figure with sliders, where someone can move them
# ---------------------------------------------------------------------------------------


def _live():
    """Whether a reader sits before a front end: only there a cell may ask for input."""
    from IPython import get_ipython

    shell = get_ipython()
    parent = getattr(shell, "get_parent", dict)() if shell else {}
    return bool(parent.get("content", {}).get("allow_stdin"))


def play(draw, name, caption, **controls):
    """Save and show draw(**start values) as save_figure does; with sliders for a live reader.

    draw(**values) -> Figure. controls: name=(start, low, high, step), or name=[first, second,
    ...] for a choice that starts with the first. Raises ValueError for another control.
    """
    for key, control in controls.items():
        choice = isinstance(control, list) and control
        numbers = isinstance(control, tuple) and len(control) == 4
        if not choice and not (numbers and control[1] <= control[0] <= control[2]):
            raise ValueError(
                f"{key} must be (start, low, high, step) with low <= start <= high, or a list of "
                f"choices, got {control!r}"
            )
    unknown = controls.keys() - inspect.signature(draw).parameters.keys()
    if unknown:
        raise ValueError(f"draw has no parameter {', '.join(sorted(unknown))}")
    png, difference = _save(draw(**{key: control[0] for key, control in controls.items()}), name)
    _show(png, caption, difference, _sliders(draw, caption, png, controls) if _live() else {})


def _sliders(draw, caption, png, controls):
    """The widget of a play: sliders over a picture that they redraw; {} without ipywidgets."""
    try:
        import ipywidgets as widgets
    except ImportError:
        return {}

    def embedded(png):
        encoded = base64.b64encode(png).decode()
        width = round(Image.open(io.BytesIO(png)).width * 96 / DPI)
        source = f"data:image/png;base64,{encoded}"
        return f'<img alt="{html.escape(caption)}" width="{width}" src="{source}">'

    def redraw(change):
        try:
            fig, drawn = draw(**{key: box.value for key, box in boxes.items()}), io.BytesIO()
            fig.savefig(drawn, format="png", dpi=DPI)
            plt.close(fig)
            picture.value = embedded(drawn.getvalue())
        except Exception as error:  # a callback's error would be silent
            picture.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"

    boxes, picture = {}, widgets.HTML(embedded(png))
    for key, control in controls.items():
        if isinstance(control, list):
            boxes[key] = widgets.Dropdown(options=control, description=key)
        else:
            start, low, high, step = control
            whole = all(isinstance(v, int) for v in control)
            kind = widgets.IntSlider if whole else widgets.FloatSlider
            boxes[key] = kind(start, min=low, max=high, step=step, description=key)
        boxes[key].observe(redraw, "value")
    view = widgets.VBox([*boxes.values(), picture])
    reference = {"version_major": 2, "version_minor": 0, "model_id": view.model_id}
    return {"application/vnd.jupyter.widget-view+json": reference}


def watch(draw, every):
    """An on_step for helpers.train: shows draw(step, losses, model) every so many steps.

    For a live reader only, in one place that is redrawn; elsewhere it does nothing.
    """
    from IPython.display import display

    if not _live():
        return lambda step, losses, model: None
    handle = display({"text/plain": "training"}, raw=True, display_id=True)

    def on_step(step, losses, model):
        if step % every == 0:
            fig, drawn = draw(step, losses, model), io.BytesIO()
            fig.savefig(drawn, format="png", dpi=100)
            plt.close(fig)
            png = base64.b64encode(drawn.getvalue()).decode()
            handle.update({"image/png": png, "text/plain": f"step {step}"}, raw=True)

    return on_step


# ---------------------------------------------------------------------------------------
# Building blocks: draw on ax and return it
# ---------------------------------------------------------------------------------------


def plot_paths(ts, xs, ax, **style):
    """Draw scalar trajectories xs (N+1, B) against ts (N+1,)."""
    style = {"color": COLORS["model"], "linewidth": 0.8, "alpha": 0.8} | style
    ax.plot(ts.cpu(), xs.cpu(), rasterized=xs.shape[1] > 20, **style)
    ax.set_xlabel("$t$")
    return ax


def plot_points(x, ax, *, limit=None, **style):
    """Scatter points x (N, 2) in the plane with equal aspect; limit: half-width of the axes."""
    style = {"color": COLORS["data"], "s": 5, "linewidths": 0, "alpha": 0.7} | style
    ax.scatter(*x.detach().cpu().T, rasterized=True, **style)
    return _frame_plane(ax, limit)


def plot_histogram(x, ax, *, limit, bins=40, vmax=None):
    """Two-dimensional histogram of points x (N, 2) on [-limit, limit]^2, as a density.

    Returns ax; the mesh, for a colour bar, is ax.collections[-1].
    """
    ax.hist2d(
        *x.detach().cpu().T.numpy(),
        bins=bins,
        range=[(-limit, limit)] * 2,
        density=True,
        cmap="magma",
        vmin=0,
        vmax=vmax,
        rasterized=True,
    )
    return _frame_plane(ax, limit)


def plot_density(mixture, ax, *, limit, levels=6, **style):
    """Contours of the density of a GaussianMixture in the plane on [-limit, limit]^2."""
    side = torch.linspace(-limit, limit, 150, dtype=mixture.means.dtype)
    xx, yy = torch.meshgrid(side, side, indexing="xy")
    density = mixture.log_prob(torch.stack([xx, yy], dim=-1).reshape(-1, 2)).exp()
    style = {"colors": COLORS["exact"], "linewidths": 0.7} | style
    ax.contour(xx, yy, density.reshape(xx.shape), levels=levels, **style)
    return _frame_plane(ax, limit)


def plot_flow(xs, ax, *, limit=None, **style):
    """Draw trajectories xs (N+1, B, 2) in the plane, starts in the noise's colour."""
    style = {"color": "0.55", "linewidth": 0.4, "alpha": 0.6} | style
    ax.plot(*xs.detach().cpu().unbind(dim=2), rasterized=True, zorder=0, **style)
    plot_points(xs[0], ax, color=COLORS["noise"])
    return plot_points(xs[-1], ax, limit=limit, color=COLORS["model"])


def plot_field(x, u, ax, *, limit=None, **style):
    """Draw a velocity or score field: arrows u (N, 2) at points x (N, 2)."""
    ax.quiver(*x.detach().cpu().T, *u.detach().cpu().T, angles="xy", **style)
    return _frame_plane(ax, limit)


def plot_loss(losses, ax, *, window=100, floor=None, label=None, **style):
    """Running mean of losses (steps,) over `window` steps; floor: a level drawn dashed."""
    mean = losses.float().cpu().unfold(0, min(window, len(losses)), 1).mean(dim=1)
    style = {"color": COLORS["model"]} | style
    ax.plot(torch.arange(len(mean)) + len(losses) - len(mean), mean, label=label, **style)
    if floor is not None:
        ax.axhline(floor, color=COLORS["exact"], linestyle="--", label=f"floor {floor:.3f}")
    ax.set(xlabel="step", ylabel=f"loss, mean of {window} steps")
    return ax


def mosaic(x, columns):
    """Images x (N, C, H, W) in [-1, 1], C = 1 or 3, as one, (H', W') or (H', W', 3)."""
    x = helpers.to_image_range(x.detach().cpu())
    rows = math.ceil(len(x) / columns)
    x = F.pad(x, (1, 1, 1, 1), value=1.0)  # a white line between the images
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(x)), value=1.0)
    c, h, w = x.shape[1:]
    x = x.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2)
    return x.reshape(rows * h, columns * w, c).squeeze(2)


def plot_images(x, ax, *, columns):
    """Draw images x (N, 1, H, W) in [-1, 1] as one mosaic with `columns` columns."""
    ax.imshow(mosaic(x, columns).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def _frame_plane(ax, limit):
    ax.set_aspect("equal")
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    if limit is not None:
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit))
    return ax
