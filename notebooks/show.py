"""Figures, tables and animations of the notebooks: saved, compared with the committed, shown.

What is drawn is the business of plots.py, which passes these functions on.
"""

import base64
import csv
import html
import inspect
import io
import json
import os
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.quiver import Quiver
from matplotlib.ticker import LogFormatter, ScalarFormatter
from PIL import Image, PngImagePlugin

import helpers

DPI = 200  # a figure's size in inches is that on paper


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

    frames: grey images (H, W), or (H, W, 3), in [0, 1], or figures; each is shown for
    `milliseconds`.
    """
    images = []
    for frame in frames:
        if torch.is_tensor(frame):
            images.append(Image.fromarray((255 * frame).round().byte().cpu().numpy()))
        else:
            drawn = Image.open(io.BytesIO(_png(frame, 100))).convert("RGB")
            images.append(drawn.quantize(64, dither=Image.Dither.NONE))
    gif = io.BytesIO()
    options = {"duration": milliseconds, "loop": 0, "optimize": True}
    images[0].save(gif, format="GIF", save_all=True, append_images=images[1:], **options)
    _write_figures({f"{name}.gif": gif.getvalue()})


def save_table(rows, name, caption):
    """Print a table; write it beside the figures as <name>.csv, and as <name>.tex, a `table`
    environment (booktabs) with its caption and the label tab:<name>.

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
    head, *body = [" & ".join(to_latex(cell) for cell in line) for line in lines]
    tex = [r"\begin{table}", r"\centering", rf"\caption{{{to_latex(caption)}}}"]
    tex += [rf"\label{{tab:{name.replace('_', '-')}}}\vspace{{1ex}}"]
    tex += [rf"\begin{{tabular}}{{l{'r' * (len(widths) - 1)}}}", r"\toprule"]
    tex += [rf"{head} \\", r"\midrule", *(rf"{line} \\" for line in body), r"\bottomrule"]
    text = "\n".join([*tex, r"\end{tabular}", r"\end{table}", ""])
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows(lines)
    _write_figures({f"{name}.tex": text.encode(), f"{name}.csv": sheet.getvalue().encode()})


def to_latex(text):
    """Text for LaTeX: what is special there escaped, but the mathematics between dollar signs."""
    parts = text.split("$")
    for i in range(0, len(parts), 2):
        part = re.sub(r"([%&#_])", r"\\\1", parts[i].replace("\\", r"\textbackslash "))
        part = re.sub(r"\N{MINUS SIGN}|(?<!\S)-(?=\d)", "$-$", part)
        parts[i] = re.sub(r"`([^`]*)`", r"\\texttt{\1}", part)
    return "$".join(parts)


def _save(fig, name):
    """Write a figure, close it; its PNG bytes, and how it differs from the committed one."""
    drawn, png, pdf, svg = (io.BytesIO() for _ in range(4))
    no_dates = {"CreationDate": None, "Creator": None, "Producer": None}
    fig.savefig(drawn, format="png", dpi=DPI)
    fig.savefig(pdf, format="pdf", dpi=DPI, metadata=no_dates)
    if os.environ.get("FLOW_SVG"):  # run.py --figures
        fig.savefig(svg, format="svg", metadata={"Date": None})
    contents = describe(fig)
    plt.close(fig)
    # 256 colours: no visible difference, and less than half the size
    palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("drawn", json.dumps(contents), zip=True)
    palette.save(png, format="PNG", optimize=True, pnginfo=chunk, dpi=(DPI, DPI))
    difference = _difference(name, contents)
    files = {f"{name}.png": png, f"{name}.pdf": pdf, f"{name}.svg": svg}
    _write_figures({file: made.getvalue() for file, made in files.items() if made.tell()})
    return png.getvalue(), difference


def _plain(caption):
    """A caption without its dollar signs, for whoever hears it read."""
    return re.sub(r"\$([^$]*)\$", r"\1", caption)


def _show(png, caption, difference, extra=()):
    """Display a picture, with its width on the page and its text, and the caption below it."""
    from IPython.display import Markdown, display

    image = Image.open(io.BytesIO(png))
    meta = {"alt": _plain(caption), "width": round(image.width * 96 / DPI)}
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": caption, **dict(extra)}
    display(data, metadata={"image/png": meta}, raw=True)
    display(Markdown(f"*{caption}*" + (f"\n\n{difference}" if difference else "")))


def _write_figures(files):
    """Write {name: bytes} to the folder of figures; ValueError if it is not writable."""
    folder = helpers.output_folder("figures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            helpers.write_atomically(folder / name, content)
    except OSError as error:
        raise ValueError(
            f"cannot write figures to {folder} ({error}); make it writable or set FLOW_OUTPUT"
        ) from error


# ---------------------------------------------------------------------------------------
# What is drawn, for comparison: pixels cannot tell a rounding from a changed label
# ---------------------------------------------------------------------------------------


def describe(fig):
    """What a figure shows, as plain values: texts, and of each axes its limits and artists.

    An artist is its kind, its colours and style, and five quantiles of its data in each
    coordinate, in units of the axis.
    """
    whole = [*fig.texts, *(text for legend in fig.legends for text in legend.texts)]
    texts = [text.get_text() for text in whole] + [t for ax in fig.axes for t in _texts(ax)]
    return {"texts": sorted(texts), "axes": [_describe_axes(ax) for ax in fig.axes]}


def _texts(ax):
    legend = ax.get_legend()
    objects = [*ax.texts, *(legend.texts if legend else [])]
    for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
        objects.append(axis.label)
        if not isinstance(axis.get_major_formatter(), ScalarFormatter | LogFormatter):
            objects += axis.get_ticklabels()  # words; numbers follow from the limits
    found = [text.get_text() for text in objects if text.get_visible()]
    return [t for t in [*found, *map(ax.get_title, ("left", "center", "right"))] if t]


def _describe_axes(ax):
    limits = [*ax.get_xlim(), *ax.get_ylim()]
    artists = []
    for line in ax.lines:
        places = _quantiles(ax, line.get_xydata(), line.get_transform())
        artists.append(["line", [to_hex(line.get_color()), line.get_linestyle()], places])
    artists += [_describe_collection(ax, collection) for collection in ax.collections]
    for patch in ax.patches:
        places = _quantiles(ax, patch.get_path().vertices, patch.get_transform())
        artists.append(["patch", [to_hex(patch.get_facecolor())], places])
    for image in ax.images:
        values = np.asarray(image.get_array(), dtype=float)
        artists.append(["image", [image.get_cmap().name], [_levels(values, *image.get_clim())]])
    return {"limits": [float(f"{v:.6g}") for v in limits], "artists": artists}


def _describe_collection(ax, collection):
    """Points and arrows where they are, bands, contours and other paths by their vertices."""
    colors = sorted({to_hex(c) for c in [*collection.get_facecolor(), *collection.get_edgecolor()]})
    if isinstance(collection, PathCollection | Quiver):
        places = _quantiles(ax, collection.get_offsets(), collection.get_offset_transform())
    else:
        vertices = [path.vertices for path in collection.get_paths() if len(path.vertices)]
        vertices = np.concatenate(vertices) if vertices else []
        places = _quantiles(ax, vertices, collection.get_transform())
    if isinstance(collection, Quiver):
        arrows = np.stack([collection.U, collection.V])
        places += [_levels(row, -np.abs(arrows).max(), np.abs(arrows).max()) for row in arrows]
    values = collection.get_array()
    if values is not None and np.size(values):
        places.append(_levels(np.asarray(values, dtype=float), *collection.get_clim()))
        name = collection.get_cmap().name
        colors = [name] if name in mpl.colormaps else colors
    kind = type(collection).__name__.removeprefix("FillBetween")  # as older versions name it
    return [kind, colors[:8], places]


def _quantiles(ax, points, transform):
    """Five quantiles of the x and of the y of points (N, 2), in units of the axes."""
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    with np.errstate(all="ignore"):  # a logarithmic axis has no place for 0
        places = ax.transAxes.inverted().transform(transform.transform(points))
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
