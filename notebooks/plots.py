"""The looks of the notebooks: style, drawing functions, saved figures and tables, sliders.

Tensors in, a Figure or its axes out; nothing here simulates, seeds or trains. A figure of width
FULL or HALF is a printed page's or column's, saved at its natural size.
"""

import base64
import csv
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

    rows: dicts of one set of keys, the titles of the columns; cells are text or numbers, and
    mathematics is between dollar signs.
    """
    named = rows and all(isinstance(row, dict) for row in rows)
    if not named or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("rows must be dicts, at least one, all with the same keys")
    lines = [list(rows[0])] + [[str(cell) for cell in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    head, *body = [" & ".join(_escape(cell) for cell in line) for line in lines]
    tex = ["% " + caption, rf"\begin{{tabular}}{{{'r' * len(widths)}}}", r"\toprule"]
    tex += [rf"{head} \\", r"\midrule", *(rf"{line} \\" for line in body), r"\bottomrule"]
    text = "\n".join([*tex, r"\end{tabular}", ""])
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows(lines)
    _write_figures({f"{name}.tex": text.encode(), f"{name}.csv": sheet.getvalue().encode()})


def _escape(text):
    """Text for LaTeX: its special characters outside of dollar signs escaped."""
    parts = text.split("$")
    parts[::2] = [re.sub(r"([%&#_])", r"\\\1", part) for part in parts[::2]]
    return "$".join(parts)


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


def _plain(caption):
    """A caption without its dollar signs, for whoever hears it read."""
    return re.sub(r"\$([^$]*)\$", r"\1", caption)


def _show(png, caption, difference, extra=()):
    """Display a picture, with its width on the page and its text, and the caption below it."""
    from IPython.display import Markdown, display

    image = Image.open(io.BytesIO(png))
    meta = {"alt": _plain(caption)}
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
    if where == "limits":  # in units of the axes
        units = [abs(old[1] - old[0])] * 2 + [abs(old[3] - old[2])] * 2
        old, new = ([v / unit for v, unit in zip(vs, units, strict=True)] for vs in (old, new))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: {len(new)} for {len(old)}"
        inside = "limit" if where == "limits" else where
        pairs = zip(old, new, strict=True)
        return next(filter(None, (_first_difference(a, b, inside) for a, b in pairs)), "")
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
        numbers = numbers and all(isinstance(v, int | float) for v in control) and control[3] > 0
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


def _png(fig, dpi):
    """The PNG bytes of a figure that is shown and not saved; closes it, whatever happens."""
    drawn = io.BytesIO()
    try:
        fig.savefig(drawn, format="png", dpi=dpi)
    finally:
        plt.close(fig)
    return drawn.getvalue()


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
        return f'<img alt="{html.escape(_plain(caption))}" width="{width}" src="{source}">'

    def redraw(change):
        try:
            fig = draw(**{key: box.value for key, box in boxes.items()})
            picture.value = embedded(_png(fig, DPI))
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
            png = base64.b64encode(_png(draw(step, losses, model), 100)).decode()
            handle.update({"image/png": png, "text/plain": f"step {step}"}, raw=True)

    return on_step


# ---------------------------------------------------------------------------------------
# Building blocks: draw on ax and return it
# ---------------------------------------------------------------------------------------


def plot_paths(ts, xs, ax, **style):
    """Draw scalar trajectories xs (N+1, B) against ts (N+1,)."""
    style = {"color": COLORS["model"], "linewidth": 0.8, "alpha": 0.8} | style
    ax.plot(ts.detach().cpu(), xs.detach().cpu(), rasterized=xs.shape[1] > 20, **style)
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


# ---------------------------------------------------------------------------------------
# Notebook 01
# ---------------------------------------------------------------------------------------

_GREY = "#888888"
_WRONG = "#CC3377"  # what a wrong program or a misprint gives


def _normal(x, variance):
    """The density of N(0, variance) at x, for drawing."""
    return torch.exp(-(x**2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def ou_shared_noise(ts, xs, theta, sigma):
    """1(d): paths xs (N+1, B) driven by one noise, over the band of +-2 stationary std."""
    std = sigma / math.sqrt(2 * theta)
    fig, ax = plt.subplots(figsize=(FULL, 2.5), layout="constrained")
    ax.axhspan(-2 * std, 2 * std, color=_GREY, alpha=0.2, linewidth=0)
    ax.plot(ts, xs, color=COLORS["model"], linewidth=0.9)
    ax.plot(torch.zeros(xs.shape[1]), xs[0], "o", color=COLORS["model"], markersize=4)
    ax.text(0.7, 4.6, f"{xs.shape[1]} starting points, the same shakes", color=COLORS["model"])
    ax.text(
        ts[-1] - 0.1,
        2 * std + 0.2,
        "one path: the start is forgotten",
        ha="right",
        color=COLORS["model"],
    )
    ax.text(
        ts[-1] - 0.1,
        -2 * std - 0.2,
        r"grey: $\pm2$ standard deviations, in the long run",
        ha="right",
        va="top",
        color="#555555",
    )
    ax.set(xlabel="$t$", ylabel="$X_t$", xlim=(-0.1, float(ts[-1])), ylim=(-6.6, 6.6))
    return fig


def langevin_factor(ts, right, printed, exact):
    """1(a): paths (N+1, B) under the right and the printed drift; exact: the latter's variance."""
    fig, (left, ax) = plt.subplots(1, 2, figsize=(FULL, 2.5), layout="constrained")
    names = r"factor $\sigma^2/2$", r"as printed, $1/(2\sigma^2)$"
    x = torch.linspace(-7, 7, 300)
    looks = (right, COLORS["model"]), (printed, _WRONG)
    for (xs, color), name, curve in zip(looks, names, (exact[0] + 0 * exact, exact), strict=True):
        left.plot(ts, curve, color=COLORS["exact"], linewidth=0.9)
        left.plot(ts[::25], xs[::25].var(dim=1), "o", color=color, markersize=3.5, label=name)
        ax.hist(xs[-1], bins=50, range=(-7, 7), density=True, histtype="step", color=color)
        ax.plot(x, _normal(x, curve[-1]), color=COLORS["exact"], linewidth=0.9)
    left.plot([], [], color=COLORS["exact"], linewidth=0.9, label="exact")
    left.set(xlabel="$t$", ylabel="variance of $X_t$", ylim=(0, 9 * float(exact[0])))
    left.legend(loc="upper left")
    ax.text(
        0.97,
        0.9,
        "right factor:\nkeeps $p$",
        transform=ax.transAxes,
        ha="right",
        va="top",
        color=COLORS["model"],
    )
    ax.text(0.03, 0.9, "as printed", transform=ax.transAxes, va="top", color=_WRONG)
    ax.set(
        xlabel="$x$",
        ylabel="density at the end",
        xlim=(-7, 7),
        ylim=(0, 1.6 * float(_normal(torch.zeros(()), exact[[0, -1]].min()))),
    )
    return fig


def solver_steps(fine_ts, fine, ts, xs):
    """1(b): a coarse path xs (n+1,) over a fine one, on the same Brownian motion."""
    fig, ax = plt.subplots(figsize=(FULL, 2.2), layout="constrained")
    ax.plot(fine_ts, fine, color=COLORS["exact"], linewidth=0.8, label=f"{len(fine) - 1} steps")
    ax.plot(ts, xs, "o-", color=COLORS["model"], markersize=4, label=f"{len(xs) - 1} steps")
    ax.legend(loc="upper right", title="Euler–Maruyama, same noise")
    ax.set(xlabel="$t$", ylabel="$X_t$", xlim=(0, 1), ylim=(-2.5, 4.5))
    return fig


def brownian_paths(ts, runs):
    """1(c): runs {sigma: paths (N+1, B)}, with the band +-2 sigma sqrt(t)."""
    fig, axes = plt.subplots(1, len(runs), figsize=(FULL, 2.3), sharey=True, layout="constrained")
    for ax, (sigma, xs) in zip(axes, runs.items(), strict=True):
        edge = 2 * sigma * ts.sqrt()
        ax.fill_between(ts, -edge, edge, color=_GREY, alpha=0.2, linewidth=0)
        ax.plot(ts, xs, color=COLORS["model"], linewidth=0.7)
        ax.set(xlabel="$t$", title=rf"$\sigma = {sigma:g}$", xlim=(0, 1), ylim=(-6.2, 6.2))
    axes[0].set_ylabel("$X_t$")
    axes[0].text(0.05, -5.8, r"grey: $\pm2\sigma\sqrt{t}$", color="#555555")
    return fig


def brownian_refined(ts, x):
    """1(c): one path x (n+1,) on the grid ts; its length and its sum of squared steps up to t."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(FULL, 2.3), layout="constrained")
    left.plot(ts, x, ".-", color=COLORS["model"], markersize=3, linewidth=0.7)
    left.set(
        xlabel="$t$", ylabel="$W_t$", title=f"{len(x) - 1} steps", xlim=(0, 1), ylim=(-1.2, 1.2)
    )
    step = x.diff()
    for sums, color, name, at in (
        (step.abs().cumsum(0), COLORS["noise"], "length of the path", "bottom"),
        (step.square().cumsum(0), COLORS["data"], "sum of squared steps", "top"),
    ):
        right.semilogy(ts[1:], sums, color=color)
        y = sums[-1] * 1.3 if at == "bottom" else 0.03
        right.text(0.98, y, name, color=color, ha="right", va="bottom")
    right.semilogy((0, 1), (1, 1), "--", color=COLORS["exact"], linewidth=0.8)
    right.text(0.02, 1.1, "1", va="bottom")
    right.set(xlabel="$t$", title="what the steps add up to", xlim=(0, 1), ylim=(0.02, 200))
    return fig


def ou_paths(ts, runs, moments):
    """1(d): {(theta, sigma): paths (N+1, B)}, a row a theta, with mean and variance alike."""
    fig, axes = plt.subplots(
        2, 3, figsize=(FULL, 3.7), sharex=True, sharey=True, layout="constrained"
    )
    for ax, ((theta, sigma), xs) in zip(axes.flat, runs.items(), strict=True):
        mean, variance = moments[theta, sigma]
        low, high = mean[:, 0] - 2 * variance[:, 0].sqrt(), mean[:, -1] + 2 * variance[:, 0].sqrt()
        ax.fill_between(ts, low, high, color=_GREY, alpha=0.2, linewidth=0)
        ax.plot(ts, xs, color=COLORS["model"], linewidth=0.7)
        ax.plot(ts, mean, color=COLORS["exact"], linestyle=":", linewidth=0.8)
        ratio = sigma**2 / (2 * theta)
        ax.set_title(
            rf"$\theta = {theta:g},\ \sigma = {sigma:g}$: "
            rf"$\sigma^2\!/(2\theta) = {ratio:g}$"
        )
        ax.set(xlim=(0, float(ts[-1])), ylim=(-7, 7))
        end = "a point" if sigma == 0 else "a distribution"
        ax.text(0.97, 0.04, end, transform=ax.transAxes, ha="right")
    axes[0, 0].text(
        0.97, 0.93, "dotted: exact mean", transform=axes[0, 0].transAxes, ha="right", va="top"
    )
    axes[0, 1].text(
        0.97,
        0.93,
        "grey: mean ± 2 std",
        transform=axes[0, 1].transAxes,
        ha="right",
        va="top",
        color="#555555",
    )
    for ax in axes[1]:
        ax.set_xlabel("$t$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$X_t$")
    return fig


def ou_convergence(points):
    """1(d): {theta: (times, mean left, error, variance missing, error)}, with e^(-rate t)."""
    fig, axes = plt.subplots(1, 2, figsize=(FULL, 2.6), sharey=True, layout="constrained")
    t = torch.linspace(0, 2.3, 50)
    for (theta, (times, *rows)), color in zip(
        points.items(), (COLORS["noise"], COLORS["data"]), strict=True
    ):
        for k, ax in enumerate(axes):
            value, error = rows[2 * k], rows[2 * k + 1]
            ax.semilogy(t, torch.exp(-(k + 1) * theta * t), color=color, linewidth=0.8)
            ax.errorbar(times, value, 2 * error, fmt="o", color=color, markersize=3, capsize=2)
            rate = r"\theta " if k == 0 else r"2\theta "
            ax.plot(
                [],
                [],
                "o-",
                color=color,
                markersize=3,
                label=rf"$\theta = {theta:g}$, line $e^{{-{rate}t}}$",
            )
    for ax in axes:
        ax.legend(loc="upper right")
        ax.set(xlabel="$t$", xlim=(0, 2.2), ylim=(0.05, 2.5))
    axes[0].set_ylabel("what is left")
    axes[0].set_title("of the starting point: $m_t / X_0$")
    axes[1].set_title(r"of the missing variance: $1 - s_t^2/v$")
    return fig


def ou_laboratory(ts, xs, limit, solver):
    """1(d): paths (N+1, B), twenty of them drawn, and their end histogram over the limit law.

    limit: variance of the exact limit; solver: of the solver's own, inf beyond its stability.
    """
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(FULL, 2.6), sharey=True, layout="constrained", width_ratios=(3, 1.4)
    )
    xs = xs.nan_to_num(99.0).clamp(-99, 99)
    left.plot(ts, xs[:, :20], color=COLORS["model"], linewidth=0.7)
    left.set(xlabel="$t$", ylabel="$X_t$", xlim=(0, float(ts[-1])), ylim=(-8, 8))
    left.set_title(
        f"20 paths, $h$ = {ts[1]:.2g}"
        if math.isfinite(solver)
        else f"$h$ = {ts[1]:.2g}: the solver is unstable"
    )
    y = torch.linspace(-8, 8, 300)
    right.hist(
        xs[-1],
        bins=64,
        range=(-8, 8),
        weights=torch.full_like(xs[-1], 4 / xs.shape[1]),
        orientation="horizontal",
        color=COLORS["model"],
        alpha=0.5,
        label="end points",
    )
    if limit > 0:
        right.plot(_normal(y, limit), y, color=COLORS["exact"], label="exact limit")
        if math.isfinite(solver):
            right.plot(_normal(y, solver), y, "--", color=_WRONG, label="solver's limit")
    right.set(xlabel="density", xlim=(0, 0.8))
    right.legend(loc="upper right")
    return fig


def ou_collapse(paths):
    """1(d): {(theta, sigma): (ts, x)}, as they are and in units of 1/theta and sqrt(v)."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(FULL, 2.6), layout="constrained")
    looks = zip(
        paths.items(),
        (COLORS["noise"], COLORS["data"], COLORS["model"], "#000000"),
        (5.5, 3.8, 2.2, 0.8),
        strict=True,
    )
    for ((theta, sigma), (ts, x)), color, width in looks:
        unit = sigma / math.sqrt(2 * theta)
        name = rf"$\theta = {theta:g},\ \sigma = {sigma:g}$"
        left.plot(ts, x, color=color, linewidth=0.9, label=name)
        right.plot(theta * ts, x / unit, color=color, linewidth=width)
    left.set(xlabel="$t$", ylabel="$X_t$", title="four processes, the same noise")
    left.legend()
    right.set(
        xlabel=r"$\theta t$",
        ylabel=r"$X_t / \sqrt{v}$",
        title=r"rescaled, $v = \sigma^2\!/(2\theta)$: four curves in one",
    )
    return fig


def convergence_orders(steps, errors):
    """1(b), deeper: {name: (errors (K,), standard errors, order)} against the step sizes."""
    fig, ax = plt.subplots(figsize=(FULL, 2.8), layout="constrained")
    colors = COLORS["data"], COLORS["model"], COLORS["noise"]
    for (name, (error, bar, order)), color, marker in zip(
        errors.items(), colors, "s^o", strict=True
    ):
        ax.errorbar(steps, error, 2 * bar, fmt=marker, color=color, markersize=4, capsize=2)
        ax.loglog(steps, error[-1] * (steps / steps[-1]) ** order, color=color, linewidth=0.8)
        slope = {0.5: "½"}.get(order, f"{order:g}")
        lift, side = (1.9, "right") if order == 0.5 else (0.45, "left")
        ax.text(
            steps[3], lift * error[3], f"{name}: slope {slope}", color=color, ha=side, va="center"
        )
    ax.set(xlabel="step $h$", ylabel="effect of halving $h$", xscale="log", yscale="log")
    ax.set_xticks(steps.tolist(), [f"1/{round(1 / h)}" for h in steps.tolist()])
    ax.minorticks_off()
    return fig


def langevin(mixture, clouds, start):
    """Beyond: clouds {t: points (N, 2)} over the contours of a mixture; start: the first point."""
    fig, axes = plt.subplots(1, len(clouds), figsize=(FULL, 2.8), sharey=True, layout="constrained")
    side = torch.linspace(-3, 3, 81)
    height = mixture.log_prob(torch.cartesian_prod(side, side)).exp().reshape(81, 81).T
    for ax, (t, points) in zip(axes, clouds.items(), strict=True):
        ax.scatter(*points.T, s=2, color=COLORS["model"], rasterized=True)
        ax.contour(
            side, side, height, levels=(0.02, 0.08, 0.2), colors=COLORS["exact"], linewidths=0.7
        )
        ax.plot(*start, "*", color=COLORS["data"], markersize=9)
        ax.set(title=f"$t = {t:g}$", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    axes[0].text(-2.8, 2.3, "star: all start here", color=COLORS["data"])
    axes[1].text(-2.8, 2.3, "dots: particles", color=COLORS["model"])
    axes[2].text(-2.8, 2.3, "lines: target density")
    for ax in axes:
        ax.set_xlabel("$x_1$")
    axes[0].set_ylabel("$x_2$")
    return fig


def fokker_planck(laws, snapshots):
    """Beyond: snapshots {t: points (N,)} as histograms with error bars, laws {t: mixture} exact."""
    fig, axes = plt.subplots(1, len(laws), figsize=(FULL, 2.2), sharey=True, layout="constrained")
    grid, edges = torch.linspace(-3.5, 3.5, 300), torch.linspace(-3, 3, 25)
    for ax, (t, law) in zip(axes, laws.items(), strict=True):
        x = snapshots[t]
        counts, width = torch.histc(x, 24, -3, 3), 0.25
        bar = 2 * (counts * (1 - counts / len(x))).sqrt() / (len(x) * width)
        ax.errorbar(
            (edges[1:] + edges[:-1]) / 2,
            counts / (len(x) * width),
            bar,
            fmt=".",
            color=COLORS["model"],
            label="simulated paths",
        )
        ax.plot(
            grid,
            law.log_prob(grid[:, None]).exp(),
            color=COLORS["exact"],
            linewidth=0.9,
            label="equation's density",
        )
        ax.set(xlabel="$x$", title=f"$t = {t:g}$", ylim=(0, 0.6))
    axes[0].set_ylabel("density of $X_t$")
    axes[0].legend(loc="upper left")
    return fig


def time_reversal(density, returned):
    """Beyond: returned {name: points (N,)} against the density of the data, a function of x."""
    fig, axes = plt.subplots(
        1, len(returned), figsize=(FULL, 2.2), sharey=True, layout="constrained"
    )
    grid = torch.linspace(-6, 6, 400)
    for ax, (name, x) in zip(axes, returned.items(), strict=True):
        weights = torch.full((len(x),), 1 / (len(x) * 0.24))
        ax.hist(
            x,
            bins=50,
            range=(-6, 6),
            weights=weights,
            color=COLORS["model"],
            alpha=0.5,
            label="came back",
        )
        ax.plot(grid, density(grid), color=COLORS["data"], linewidth=1, label="the data")
        ax.set(title=name, xlabel="$x$", ylim=(0, 0.75))
    axes[0].set_ylabel("density")
    axes[0].legend(loc="upper right")
    return fig


def broken_programs(first, second):
    """Test yourself: paths (N+1, B) of two wrong programs, over the bands that are right.

    first: {N: (ts, xs)}; second: (ts, xs, std that it should have).
    """
    fig, axes = plt.subplots(1, 3, figsize=(FULL, 2.3), layout="constrained")
    for ax, (n, (grid, xs)) in zip(axes[:2], first.items(), strict=True):
        ax.plot(grid, xs, color=_WRONG, linewidth=0.7)
        for sign in (-2, 2):
            ax.plot(grid, sign * grid.sqrt(), color=COLORS["exact"], linewidth=1)
        ax.set(title=f"program A, {n} steps", xlabel="$t$", xlim=(0, 1), ylim=(-70, 70))
    grid, xs, std = second
    axes[2].plot(grid, xs, color=_WRONG, linewidth=0.7)
    axes[2].hlines((-2 * std, 2 * std), 0, grid[-1], color=COLORS["exact"], linewidth=1)
    axes[2].set(
        title=r"program B, $\theta = 1$, $\sigma = 2$", xlabel="$t$", xlim=(0, float(grid[-1]))
    )
    axes[0].text(0.03, -65, "black: 95 % should\nstay between")
    axes[0].set_ylabel("$X_t$")
    return fig


# ---------------------------------------------------------------------------------------
# Notebook 05
# ---------------------------------------------------------------------------------------


def _page(height, columns=1, rows=1, **options):
    """A figure as wide as a page, and its axes."""
    return plt.subplots(rows, columns, figsize=(FULL, height), layout="constrained", **options)


def _dots(ax, x, y, bar, color, label=None, marker="o"):
    style = {"fmt": marker, "color": color, "markersize": 4, "label": label}
    ax.errorbar(x, y, bar, **style)


def image_rows(rows):
    """5: {name: images (N, 1, H, W)}, a named row each."""
    count, left = len(next(iter(rows.values()))), 1.05
    height = (FULL - left) / max(count, 5) * len(rows)
    place = {"left": left / FULL, "right": 1, "bottom": 0, "top": 1}
    fig, ax = plt.subplots(figsize=(FULL, height), layout="none", gridspec_kw=place)
    ax.set_anchor("W")
    plot_images(torch.cat(list(rows.values())), ax, columns=count)
    ax.set_yticks([15 + 30 * row for row in range(len(rows))], list(rows))
    ax.tick_params(length=0)
    return fig


def infinite_loss(means, weighted, delta):
    """5(a): {seed: running means (N,)} of the printed loss on t <= 1 - delta, and weighted."""
    fig, ax = _page(2.5)
    shown = torch.logspace(0, math.log10(len(weighted)), 500).long().clamp(max=len(weighted))
    for seed, values in means.items():
        name = None if seed else "as printed, three runs"
        ax.loglog(shown, values[shown - 1], color=_WRONG, label=name)
    ax.loglog(shown, weighted[shown - 1], color=COLORS["model"], label=r"times $\beta_t^2$: 1")
    if delta:
        ax.axhline(1 / delta - 1, color=COLORS["exact"], linestyle="--", linewidth=0.8)
        ax.text(1.2, 1.3 / delta, r"$1/\delta - 1$, the mean on $t \leq 1 - \delta$")
    ax.set(xlabel="draws", ylabel="mean so far", ylim=(0.1, 1e8), xlim=(1, len(weighted)))
    ax.legend(loc="upper left")
    return fig


def sigma_sweep(names, rows, floor):
    """5(b): {steps: ([squared Frechet distances of the sets], [noise])} over the sigma_t."""
    fig, axes = _page(2.8, 2)
    for steps, color, shift in zip(
        rows, (COLORS["data"], COLORS["noise"]), (-0.1, 0.1), strict=True
    ):
        places, (sets, noise) = torch.arange(len(names)) + shift, rows[steps]
        bars = [2 * v.std() / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in sets]
        _dots(axes[0], places, [v.mean() for v in sets], bars, color, f"{steps} steps")
        axes[1].plot(places, noise, "o", color=color, markersize=4)
    axes[0].axhspan(*floor, color=_GREY, alpha=0.3, linewidth=0)
    axes[0].text(6.4, floor[0], "grey: real images", ha="right", va="top", color="#555555")
    for ax, name in zip(axes, ("squared Fréchet distance", "noise in the corners"), strict=True):
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel=r"$\sigma_t$", ylabel=name, yscale="log")
    axes[0].set_ylim(0.05, 400)
    axes[0].legend(loc="upper left")
    return fig


def last_steps(cases, results, predicted):
    """5(b): {sigma: {number of last steps: (values, bars)}} for the cases; {sigma: one kick}."""
    fig, axes = _page(2.7, len(results), sharey=True)
    for ax, (sigma, groups) in zip(axes, results.items(), strict=True):
        looks = zip(groups.items(), (COLORS["noise"], COLORS["data"]), (0.12, -0.12), strict=True)
        for (count, (values, bars)), color, shift in looks:
            name = f"last {count} steps" if count > 1 else "last step"
            _dots(ax, torch.arange(4) + shift, values, 2 * bars, color, name)
        ax.axhline(predicted[sigma], color=COLORS["exact"], linestyle="--", linewidth=0.8)
        ax.text(-0.4, 0.85 * predicted[sigma], "one kick", va="top")
        ax.set(title=rf"$\sigma = {sigma:g}$", yscale="log", xlim=(-0.5, 3.5))
        ax.set_xticks(range(4), cases)
    axes[0].set_ylabel("noise in the corners")
    axes[0].legend(loc="lower left")
    return fig


def stability_map(sigmas, counts, final, images):
    """Deeper: noise left of a point mass, (counts, sigmas), and of images {(sigma, n): noise}."""
    fig, ax = _page(3.2)
    limits = {"norm": "log", "vmin": 1e-2, "vmax": 1e2, "cmap": "viridis"}
    mesh = ax.pcolormesh(sigmas, counts, final.clamp(1e-2, 1e2), rasterized=True, **limits)
    ax.plot(sigmas, 2 / sigmas**2, color="white", linestyle="--")
    ax.text(0.11, 14, "what is left: the noise\nof the last step", color="white")
    ax.text(0.11, 240, r"dashed: $n = 2/\sigma^2$", color="white")
    ax.text(0.75, 600, "the last steps amplify", color="black")
    (s, n), noise = zip(*images, strict=True), list(images.values())
    ax.scatter(s, n, c=noise, s=70, edgecolors="white", **limits)
    ax.set(xscale="log", yscale="log", xlabel=r"$\sigma$", ylabel="steps $n$")
    ax.set(xlim=(sigmas[0].item(), sigmas[-1].item()), ylim=(counts[0].item(), counts[-1].item()))
    ax.set_xticks([0.1, 0.25, 0.5, 1, 2], ["0.1", "0.25", "0.5", "1", "2"])
    ax.minorticks_off()
    fig.colorbar(mesh, ax=ax, label="noise left\n(circles: the UNet's corners)")
    return fig


def invariance(names, short):
    """Deeper: {program: standard errors by which the mean log p falls short (K,)}."""
    fig, ax = _page(2.4)
    ax.axhspan(-5, 5, color=_GREY, alpha=0.3, linewidth=0)
    looks = zip(short.items(), (COLORS["model"], "#E69F00", _WRONG), strict=True)
    for (name, values), color in looks:
        ax.plot(range(len(names)), values, "o", color=color, markersize=5, label=name)
    ax.set_xticks(range(len(names)), names)
    ax.set_yscale("symlog", linthresh=5)
    ax.set_yticks([-5, 0, 5, 10, 100], ["−5", "0", "5", "10", "100"])
    ax.set(xlabel=r"$\sigma_t$", ylabel="falls short by\n(standard errors)", ylim=(-8, 900))
    ax.text(len(names) - 0.9, -4, "grey: as exact draws", color="#555555", ha="right")
    ax.legend(loc="upper left", ncols=3)
    return fig


def which_sigma(t, curves, factors):
    """Deeper: {name: sigma_t (N,)} over t, and of each the factor of an error in the bound."""
    fig, (left, right) = _page(2.6, 2)
    colors = COLORS["model"], COLORS["data"], COLORS["noise"], "#CC79A7"
    for (name, curve), color in zip(curves.items(), colors, strict=True):
        left.plot(t, curve, color=color, label=name)
        right.semilogy(t, factors[name], color=color)
    left.set(xlabel="$t$", ylabel=r"$\sigma_t$", ylim=(0, 4), xlim=(0, 1))
    left.legend(loc="upper right")
    right.set(xlabel="$t$", ylabel="weight of an error,\nrelative to the best")
    right.set(ylim=(0.8, 30), xlim=(0, 1))
    return fig


def point_clouds(rows, colors, limit=1.45, mixture=None):
    """Rows {name: {title: points (N, 2)}}, a colour for each column; contours of a mixture."""
    count = len(next(iter(rows.values())))
    fig, axes = _page((FULL - 0.3) / count * len(rows) + 0.35, count, len(rows), squeeze=False)
    for i, (name, clouds) in enumerate(rows.items()):
        for ax, (title, x), color in zip(axes[i], clouds.items(), colors, strict=True):
            plot_points(x, ax, limit=limit, color=color, s=1.5, alpha=1)
            if mixture is not None:
                plot_density(mixture, ax, limit=limit, levels=(0.02, 0.15))
            ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
            ax.spines[:].set_visible(False)
            ax.set_title("" if i else title)
        axes[i, 0].set_ylabel(name)
    return fig


def point_image(x, size=180, limit=1.7):
    """Points (N, 2) as an image (size, size, 3) in [0, 1], for an animation."""
    places = ((x / limit + 1) / 2 * size).long()
    places = places[((places >= 0) & (places < size)).all(dim=1)]
    image = torch.ones(size, size, 3)
    image[size - 1 - places[:, 1], places[:, 0]] = torch.tensor([0.0, 0.4, 0.27])
    return image
