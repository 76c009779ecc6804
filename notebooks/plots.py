"""The looks of the notebooks: style, widths, colours, one function a figure.

Tensors in, a Figure or its axes out; nothing here simulates, seeds or trains. A figure of width
FULL or HALF is a printed page's or column's, saved at its natural size by show.py.
"""

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

import helpers
from show import play, save_animation, save_figure, save_table, watch  # noqa: F401  (passed on)

plt.rcdefaults()  # whatever the user's own settings are
plt.style.use(helpers.ROOT / "notebooks" / "plots.mplstyle")

FULL, HALF = 6.5, 3.2  # inches: a printed page's text, and a column

# One colour each through all notebooks; distinguishable in the common colour blindnesses.
COLORS = {"noise": "#0072B2", "data": "#D55E00", "model": "#009E73", "exact": "#000000"}
_GREY, _NOTE = "#888888", "#555555"  # bands and levels; words about them
_WRONG = "#CC3377"  # what a wrong program or a misprint gives
_BAND = {"color": _GREY, "alpha": 0.2, "linewidth": 0}
_EXACT = {"color": COLORS["exact"], "linewidth": 0.9}
_LEVEL = {"color": COLORS["exact"], "linestyle": "--"}


# Building blocks: draw on ax and return it


def plot_points(x, ax, *, limit=None, **style):
    """Scatter points x (N, 2) in the plane with equal aspect; limit: half-width of the axes."""
    style = {"color": COLORS["data"], "s": 5, "linewidths": 0, "alpha": 0.7} | style
    ax.scatter(*x.detach().cpu().T, rasterized=True, **style)
    return _frame_plane(ax, limit)


def plot_histogram(x, ax, *, limit, bins=40, vmax=None):
    """Two-dimensional histogram of points x (N, 2) on [-limit, limit]^2, as a density.

    Returns ax; the mesh, for a colour bar, is ax.collections[-1].
    """
    points, square = x.detach().cpu().T.numpy(), [(-limit, limit)] * 2
    style = {"density": True, "cmap": "magma", "vmin": 0, "vmax": vmax, "rasterized": True}
    ax.hist2d(*points, bins=bins, range=square, **style)
    return _frame_plane(ax, limit)


def plot_density(mixture, ax, *, limit, levels=6, **style):
    """Contours of the density of a GaussianMixture in the plane on [-limit, limit]^2."""
    side = torch.linspace(-limit, limit, 150, dtype=mixture.means.dtype)
    xx, yy = torch.meshgrid(side, side, indexing="xy")
    density = mixture.log_prob(torch.stack([xx, yy], dim=-1).reshape(-1, 2)).exp()
    style = {"colors": COLORS["exact"], "linewidths": 0.7} | style
    ax.contour(xx, yy, density.reshape(xx.shape), levels=levels, **style)
    return _frame_plane(ax, limit)


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
        ax.axhline(floor, **_LEVEL, label=f"floor {floor:.3f}")
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


def _bare(ax, limit):
    """A plane without ticks in a thin frame, its axes named at the margins of the figure."""
    _frame_plane(ax, limit).set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="#bbbbbb")
    ax.label_outer()
    return ax


def _page(height, columns=1, rows=1, **options):
    """A figure as wide as a page, and its axes."""
    return plt.subplots(rows, columns, figsize=(FULL, height), **options)


def _corner(ax, text, color="black", x=0.03, y=0.97):
    """Text in a corner of ax: the left one for x < 1/2, the upper one for y > 1/2."""
    sides = {"ha": "left" if x < 0.5 else "right", "va": "top" if y > 0.5 else "bottom"}
    ax.text(x, y, text, transform=ax.transAxes, color=color, **sides)


def _dots(ax, x, y, bar, color, **style):
    """Points with error bars; "o-" as fmt joins them."""
    ax.errorbar(x, y, bar, **{"fmt": "o", "color": color, "markersize": 4} | style)


# Notebook 01


def _normal(x, variance):
    """The density of N(0, variance) at x, for drawing."""
    return torch.exp(-(x**2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def ou_shared_noise(ts, xs, theta, sigma):
    """1(d): paths xs (N+1, B) driven by one noise, over the band of +-2 stationary std."""
    std = sigma / math.sqrt(2 * theta)
    fig, ax = _page(2.5)
    ax.axhspan(-2 * std, 2 * std, **_BAND)
    ax.plot(ts, xs, color=COLORS["model"], linewidth=0.9)
    ax.plot(torch.zeros(xs.shape[1]), xs[0], "o", color=COLORS["model"], markersize=4)
    ax.text(0.7, 4.6, f"{xs.shape[1]} starting points, the same shakes", color=COLORS["model"])
    end, text = ts[-1] - 0.1, "one path: the start is forgotten"
    ax.text(end, 2 * std + 0.2, text, color=COLORS["model"], ha="right")
    text = r"grey: $\pm2$ standard deviations, in the long run"
    ax.text(end, -2 * std - 0.2, text, color=_NOTE, ha="right", va="top")
    ax.set(xlabel="$t$", ylabel="$X_t$", xlim=(-0.1, float(ts[-1])), ylim=(-6.6, 6.6))
    return fig


def langevin_factor(ts, right, printed, exact):
    """1(a): paths (N+1, B) under the right and the printed drift; exact: the latter's variance."""
    fig, (left, ax) = _page(2.5, 2)
    names = "right factor", r"as printed, $1/(2\sigma^2)$"
    x = torch.linspace(-7, 7, 300)
    looks = (right, COLORS["model"], "o", "left"), (printed, _WRONG, "s", "right")
    words = " right factor:\n keeps $p$", "as printed "
    curves = exact[0] + 0 * exact, exact
    for (xs, color, mark, side), name, word, curve in zip(looks, names, words, curves, strict=True):
        left.plot(ts, curve, **_EXACT)
        left.plot(ts[::25], xs[::25].var(dim=1), mark, color=color, markersize=3.5, label=name)
        ax.hist(xs[-1], bins=50, range=(-7, 7), density=True, histtype="step", color=color)
        ax.plot(x, _normal(x, curve[-1]), **_EXACT)
        at = curve[-1].sqrt() * (1.2 if side == "left" else -1.2)
        ax.text(at, 1.3 * _normal(at, curve[-1]), word, color=color, ha=side)
    left.plot([], [], **_EXACT, label="exact")
    left.set(xlabel="$t$", ylabel="variance of $X_t$", ylim=(0, 9 * float(exact[0])))
    left.legend(loc="upper left")
    top = 1.6 * float(_normal(torch.zeros(()), exact[[0, -1]].min()))
    ax.set(xlabel="$x$", ylabel="density at the end", xlim=(-7, 7), ylim=(0, top))
    return fig


def solver_steps(fine_ts, fine, ts, xs):
    """1(b): a coarse path xs (n+1,) over a fine one, on the same Brownian motion."""
    fig, ax = _page(2.2)
    ax.plot(fine_ts, fine, color=COLORS["exact"], linewidth=0.8, label=f"{len(fine) - 1} steps")
    ax.plot(ts, xs, "o-", color=COLORS["model"], markersize=4, label=f"{len(xs) - 1} steps")
    ax.legend(loc="upper right", title="Euler–Maruyama, same noise")
    ax.set(xlabel="$t$", ylabel="$X_t$", xlim=(-0.02, 1.02), ylim=(0, 4.5))
    return fig


def brownian_paths(ts, runs):
    """1(c): runs {sigma: paths (N+1, B)}, with the band +-2 sigma sqrt(t)."""
    fig, axes = _page(2.3, len(runs), sharey=True)
    for ax, (sigma, xs) in zip(axes, runs.items(), strict=True):
        edge = 2 * sigma * ts.sqrt()
        ax.fill_between(ts, -edge, edge, **_BAND)
        ax.plot(ts, xs, color=COLORS["model"], linewidth=0.7)
        ax.set(xlabel="$t$", title=rf"$\sigma = {sigma:g}$", xlim=(0, 1), ylim=(-6.2, 6.2))
        ax.set(xticks=(0, 0.5, 1), yticks=(-6, -4, -2, 0, 2, 4, 6))
    axes[0].set_ylabel("$X_t$")
    axes[0].text(0.05, -5.8, r"grey: $\pm2\sigma$√$t$", color=_NOTE)
    return fig


def brownian_refined(ts, x):
    """1(c): one path x (n+1,) on the grid ts; its length and its sum of squared steps up to t."""
    fig, (left, right) = _page(2.3, 2)
    left.plot(ts, x, ".-", color=COLORS["model"], markersize=3, linewidth=0.7)
    left.set(xlabel="$t$", ylabel="$W_t$", title=f"{len(x) - 1} steps")
    left.set(xlim=(0, 1), ylim=(-1.2, 1.2))
    length, squares = x.diff().abs().cumsum(0), x.diff().square().cumsum(0)
    curves = [(length, "length of the path", "noise", length[-1] * 1.3)]
    curves += [(squares, "sum of squared steps", "data", 0.03)]
    for sums, name, kind, y in curves:
        right.semilogy(ts[1:], sums, color=COLORS[kind])
        right.text(0.98, y, name, color=COLORS[kind], ha="right", va="bottom")
    right.semilogy((0, 1), (1, 1), **_LEVEL, linewidth=0.8)
    right.text(0.98, 1.1, "limit of the squares at $t = 1$", ha="right", va="bottom")
    right.set(xlabel="$t$", ylabel="sum up to $t$", title="what the steps add up to")
    right.set(xlim=(0, 1), ylim=(0.02, 200))
    return fig


def ou_paths(ts, runs, moments):
    """1(d): {(theta, sigma): paths (N+1, B)}, a row a theta, with mean and variance alike."""
    fig, axes = _page(3.7, 3, 2, sharex=True, sharey=True)
    for ax, ((theta, sigma), xs) in zip(axes.flat, runs.items(), strict=True):
        mean, variance = moments[theta, sigma]
        low, high = mean[:, 0] - 2 * variance[:, 0].sqrt(), mean[:, -1] + 2 * variance[:, 0].sqrt()
        ax.fill_between(ts, low, high, **_BAND)
        ax.plot(ts, xs, color=COLORS["model"], linewidth=0.7)
        ax.plot(ts, mean, color=COLORS["exact"], linestyle=":", linewidth=0.8)
        ratio = rf"$\sigma^2\!/(2\theta) = {sigma**2 / (2 * theta):g}$"
        ax.set_title(rf"$\theta = {theta:g},\ \sigma = {sigma:g}$: {ratio}")
        ax.set(xlim=(0, float(ts[-1])), ylim=(-7, 7))
        end = "a point" if sigma == 0 else "a distribution"
        ax.text(0.97, 0.04, end, transform=ax.transAxes, ha="right")
    _corner(axes[0, 0], "dotted: exact mean", x=0.97, y=0.93)
    _corner(axes[0, 1], "grey: means ± 2 std", _NOTE, x=0.97, y=0.93)
    plt.setp(axes[1], xlabel="$t$")
    plt.setp(axes[:, 0], ylabel="$X_t$")
    return fig


def ou_convergence(points):
    """1(d): {theta: (times, mean left, error, variance missing, error)}, with e^(-rate t)."""
    fig, axes = _page(2.6, 2, sharey=True)
    t = torch.linspace(0, 2.3, 50)
    looks = zip(points.items(), (COLORS["noise"], COLORS["data"]), "os", strict=True)
    for (theta, (times, *rows)), color, mark in looks:
        for k, (ax, rate) in enumerate(zip(axes, (r"\theta ", r"2\theta "), strict=True)):
            value, error = rows[2 * k], rows[2 * k + 1]
            ax.semilogy(t, torch.exp(-(k + 1) * theta * t), color=color, linewidth=0.8)
            _dots(ax, times, value, 2 * error, color, fmt=mark, markersize=3, capsize=2)
            name = rf"$\theta = {theta:g}$, line $e^{{-{rate}t}}$"
            ax.plot([], [], mark + "-", color=color, markersize=3, label=name)
    for ax in axes:
        ax.legend(loc="upper right")
        ax.set(xlabel="$t$", xlim=(0, 2.2), ylim=(0.05, 2.5))
    axes[0].set(ylabel="what is left", title="of the starting point: $m_t / X_0$")
    axes[1].set_title(r"of the missing variance: $1 - s_t^2/v$")
    return fig


def ou_laboratory(ts, xs, limit, solver):
    """1(d): paths (N+1, B), twenty of them drawn, and their end histogram over the limit law.

    limit: variance of the exact limit; solver: of the solver's own, inf beyond its stability.
    """
    fig, (left, right) = _page(2.6, 2, sharey=True, width_ratios=(3, 1.4))
    xs, y = xs.nan_to_num(99.0).clamp(-99, 99), torch.linspace(-8, 8, 300)
    left.plot(ts, xs[:, :20], color=COLORS["model"], linewidth=0.7)
    left.set(xlabel="$t$", ylabel="$X_t$", xlim=(0, float(ts[-1])), ylim=(-8, 8))
    stable, step = math.isfinite(solver), f"$h$ = {ts[1]:.2g}"
    left.set_title(f"20 paths, {step}" if stable else f"{step}: the solver is unstable")
    bars = {"bins": 64, "range": (-8, 8), "weights": torch.full_like(xs[-1], 4 / xs.shape[1])}
    style = {"orientation": "horizontal", "color": COLORS["model"], "alpha": 0.5}
    right.hist(xs[-1], **bars, **style, label="end points")
    if limit > 0:
        right.plot(_normal(y, limit), y, color=COLORS["exact"], label="exact limit")
        if stable:
            right.plot(_normal(y, solver), y, "--", color=_WRONG, label="solver's limit")
    right.set(xlabel="density", xlim=(0, 0.8), yticks=(-8, -4, 0, 4, 8))
    right.legend(loc="upper right")
    return fig


def ou_collapse(paths):
    """1(d): {(theta, sigma): (ts, x)}, as they are and in units of 1/theta and sqrt(v)."""
    fig, (left, right) = _page(2.6, 2)
    colors, widths = [COLORS[k] for k in ("noise", "data", "model", "exact")], (5.5, 3.8, 2.2, 0.8)
    for ((theta, sigma), (ts, x)), color, width in zip(paths.items(), colors, widths, strict=True):
        unit = sigma / math.sqrt(2 * theta)
        name = rf"$\theta = {theta:g},\ \sigma = {sigma:g}$"
        left.plot(ts, x, color=color, linewidth=0.9, label=name)
        right.plot(theta * ts, x / unit, color=color, linewidth=width)
    left.set(xlabel="$t$", ylabel="$X_t$", title="four processes, the same noise")
    left.legend()
    right.set(xlabel=r"$\theta t$", ylabel=r"$X_t / \sqrt{v}$")
    right.set_title(r"rescaled, $v = \sigma^2\!/(2\theta)$: four curves in one")
    return fig


def convergence_orders(steps, errors):
    """1(b), deeper: {name: (errors (K,), standard errors, order)} against the step sizes."""
    fig, ax = _page(2.8)
    looks = zip(errors.items(), ("data", "model", "noise"), "s^o", strict=True)
    for (name, (error, bar, order)), kind, marker in looks:
        color = COLORS[kind]
        _dots(ax, steps, error, 2 * bar, color, fmt=marker, capsize=2)
        ax.loglog(steps, error[-1] * (steps / steps[-1]) ** order, color=color, linewidth=0.8)
        text = f"{name}: slope {'½' if order == 0.5 else f'{order:g}'}"
        lift, side = (1.9, "right") if order == 0.5 else (0.45, "left")
        ax.text(steps[3], lift * error[3], text, color=color, ha=side, va="center")
    ax.set(xlabel="step $h$", ylabel="effect of halving $h$", xscale="log", yscale="log")
    ax.set_xticks(steps.tolist(), [f"1/{round(1 / h)}" for h in steps.tolist()])
    ax.minorticks_off()
    return fig


def langevin(mixture, clouds, start):
    """Beyond: clouds {t: points (N, 2)} over the contours of a mixture; start: the first point."""
    fig, axes = _page(2.5, len(clouds), sharey=True)
    for ax, (t, points) in zip(axes, clouds.items(), strict=True):
        plot_points(points, ax, color=COLORS["model"], s=3, alpha=1)
        plot_density(mixture, ax, limit=3, levels=(0.015, 0.08, 0.2)).set_title(f"$t = {t:g}$")
        ax.plot(*start, "*", color=COLORS["data"], markersize=9)
        ax.label_outer()
    _corner(axes[0], "star: all start here", COLORS["data"])
    _corner(axes[1], "dots: particles", COLORS["model"])
    _corner(axes[2], "lines: target density")
    return fig


def fokker_planck(laws, snapshots):
    """Beyond: snapshots {t: points (N,)} as histograms with error bars, laws {t: mixture} exact."""
    fig, axes = _page(2.2, len(laws), sharey=True)
    grid, edges, width = torch.linspace(-3.5, 3.5, 300), torch.linspace(-3, 3, 25), 0.25
    middles, name = (edges[1:] + edges[:-1]) / 2, "equation's density"
    for ax, (t, law) in zip(axes, laws.items(), strict=True):
        x = snapshots[t]
        counts = torch.histc(x, 24, -3, 3)
        bar = 2 * (counts * (1 - counts / len(x))).sqrt() / (len(x) * width)
        style = {"fmt": ".", "markersize": None, "label": "simulated paths"}
        _dots(ax, middles, counts / (len(x) * width), bar, COLORS["model"], **style)
        ax.plot(grid, law.log_prob(grid[:, None]).exp(), **_EXACT, label=name)
        ax.set(xlabel="$x$", title=f"$t = {t:g}$", ylim=(0, 0.5))
    axes[0].set_ylabel("density of $X_t$")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def time_reversal(density, returned):
    """Beyond: returned {name: points (N,)} against the density of the data, a function of x."""
    fig, axes = _page(2.2, len(returned), sharey=True)
    grid = torch.linspace(-8, 8, 400)
    style = {"color": COLORS["model"], "alpha": 0.5, "label": "came back"}
    for ax, (name, x) in zip(axes, returned.items(), strict=True):
        weights = torch.full((len(x),), 1 / (len(x) * 0.25))
        ax.hist(x, bins=64, range=(-8, 8), weights=weights, **style)
        ax.plot(grid, density(grid), color=COLORS["data"], linewidth=1, label="the data")
        ax.set(title=name, xlabel="$x$", ylim=(0, 0.6), yticks=(0, 0.2, 0.4, 0.6))
    axes[0].set_ylabel("density")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def broken_programs(first, second):
    """Test yourself: paths (N+1, B) of two wrong programs, over the bands that are right.

    first: {N: (ts, xs)}; second: (ts, xs, std that it should have).
    """
    fig, axes = _page(2.3, 3)
    for ax, (n, (grid, xs)) in zip(axes[:2], first.items(), strict=True):
        ax.plot(grid, xs, color=_WRONG, linewidth=0.7)
        edges = grid.sqrt()[:, None] * torch.tensor([-2, 2])
        ax.plot(grid, edges, color=COLORS["exact"], linewidth=1)
        ax.set(title=f"program A, {n} steps", xlabel="$t$", xlim=(0, 1), ylim=(-70, 70))
        ax.set(xticks=(0, 0.5, 1), yticks=(-50, 0, 50))
    grid, xs, std = second
    axes[2].plot(grid, xs, color=_WRONG, linewidth=0.7)
    axes[2].hlines((-2 * std, 2 * std), 0, grid[-1], color=COLORS["exact"], linewidth=1)
    axes[2].set_title(r"program B, $\theta = 1$, $\sigma = 2$")
    axes[2].set(xlabel="$t$", xlim=(0, float(grid[-1])))
    axes[0].text(0.03, -65, "black: 95 % should\nstay between")
    axes[0].set_ylabel("$X_t$")
    return fig


# Notebook 02

_LOOKS = (("#000000", "-"), ("#AA4499", "--"), ("#CC9900", "-."), ("#33AADD", ":"))  # schedules


def _blend(t):
    """From the noise's colour, t = 0, to the data's, t = 1."""
    ends = zip(to_rgb(COLORS["noise"]), to_rgb(COLORS["data"]), strict=True)
    return tuple((1 - t) * noise + t * data for noise, data in ends)


def _pictures(rows, height, color=None):
    """rows {label: pairs (title, image (1, H, W) or cloud (B, 2))}; figure and axes."""
    rows = {label: list(pairs) for label, pairs in rows.items()}
    fig, axes = _page(height, max(map(len, rows.values())), len(rows))
    for row, (label, pairs) in zip(axes, rows.items(), strict=True):
        for k, (ax, (title, x)) in enumerate(zip(row, pairs, strict=True)):
            if x.ndim == 3:
                plot_images(x[None], ax, columns=1)
            else:
                look = color or _blend(k / (len(pairs) - 1))
                _bare(plot_points(x, ax, s=1.2, alpha=1, color=look), 3.2)
            ax.set_title(title)
        row[0].set_ylabel(f"{label}\n{row[0].get_ylabel()}".strip())
    return fig, axes


def dissolving(times, images, clouds):
    """2(b): images (T, 1, H, W) over clouds (T, B, 2), a column for each of the times."""
    ends = {0.0: ": noise", 1.0: ": data"}
    titles = [f"$t = {t:g}${ends.get(t, '')}" for t in times]
    rows = {"one image": zip(titles, images, strict=True)}
    rows |= {f"{clouds.shape[1]} points": (("", x) for x in clouds)}
    return _pictures(rows, 2.8)[0]


def two_schedules(ts, curves, times, strips):
    """2(a): curves {name: (alpha, beta)} on ts, and what they make of an image, (T, 1, H, W)."""
    ratios = [1.5] + [1] * len(times)
    fig, axes = _page(2.6, len(ratios), len(curves), width_ratios=ratios)
    for j, (name, (alpha, beta)) in enumerate(curves.items()):
        first, *others = axes[j]
        _weights(first, ts, alpha, beta).set(ylabel=name, xticks=(0, 1), yticks=(0, 1))
        first.set_xlabel("$t$", labelpad=-8)
        for ax, t, image in zip(others, times, strips[name], strict=True):
            plot_images(image[None], ax, columns=1).set_title(f"$t = {t:g}$" if j == 0 else "")
    return fig


def _weights(ax, ts, alpha, beta):
    """The two curves of a schedule, which name themselves."""
    ax.plot(ts, alpha, color=COLORS["data"])
    ax.plot(ts, beta, color=COLORS["noise"])
    ax.text(0.97, 0.62, r"$\alpha_t$", color=COLORS["data"], ha="right")
    ax.text(0.03, 0.62, r"$\beta_t$", color=COLORS["noise"])
    ax.set(xlim=(0, 1), ylim=(-0.05, 1.1))
    return ax


def conditional_path(z, eps, t, runs):
    """2(b): from noise eps to data z, (2,); runs {name: (path, x_t, draws, (mean, std))}."""
    fig, axes = _page(3.0, len(runs), sharey=True)
    for ax, (name, (line, x, draws, (mean, std))) in zip(axes, runs.items(), strict=True):
        plot_points(draws, ax, color=_GREY, s=4)
        ax.add_patch(plt.Circle(mean.tolist(), 2 * std, fill=False, linewidth=0.8))
        ax.plot(*line.T, color=COLORS["model"])
        marks = (eps, r"$\epsilon$", "noise"), (z, "$z$", "data"), (x, "$x_t$", "model")
        for point, text, kind in marks:
            away = F.normalize(point - mean + 1e-6, dim=0)  # words outside of the circle
            place = mean + away * torch.maximum((point - mean).norm(), 2 * std)
            ax.plot(*point, "o", color=COLORS[kind], markersize=6)
            style = {"color": COLORS[kind], "ha": "center", "va": "center"}
            style["bbox"] = {"fc": "white", "ec": "none", "pad": 2}
            ax.annotate(text, place, 10 * away, textcoords="offset points", **style)
        _frame_plane(ax, 4).set_title(f"{name}, $t = {t:g}$")
    axes[0].text(-3.8, -3.7, r"circle: radius $2\beta_t$ about $\alpha_tz$")
    axes[1].text(-3.8, -3.7, "grey: the same $z$, other noise", color=_NOTE)
    axes[1].set_ylabel("")
    return fig


def histograms(times, rows, laws, bins, top):
    """2(c), 2(d): rows {name: clouds (T, B, 2)} over their exact laws; all rows share the ends."""
    fig = plt.figure(figsize=(FULL, 1.5 * len(rows)))
    grid, inner = fig.add_gridspec(len(rows), len(times)), range(1, len(times) - 1)
    for j, (name, clouds) in enumerate(rows.items()):
        for k, (t, x, law) in enumerate(zip(times, clouds, laws[name], strict=True)):
            if k in inner or j == 0:
                ax = fig.add_subplot(grid[j if k in inner else slice(None), k])
                plot_histogram(x, ax, limit=3.5, bins=bins, vmax=top)
                ax.collections[0].set_cmap("OrRd")
                _bare(plot_density(law, ax, limit=3.5, levels=(0.02, 0.1, 0.3)), 3.5)
                schedule = f"{name}\n" if k in inner and len(rows) > 1 else ""
                ax.set_title(f"{schedule}$t = {t:g}$")
    bar = {"extend": "max", "pad": 0.01, "aspect": 25, "ticks": (0, 0.2, 0.4)}
    fig.colorbar(ax.collections[0], ax=fig.axes, **bar, label="density;\nlines: exact $p_t$")
    return fig


def laboratory(name, ts, weights, t, x, law, image, decibels):
    """2(d): a schedule's weights on ts; at t a cloud x (B, 2), its law, an image (1, H, W)."""
    fig, (left, middle, right) = _page(2.3, 3)
    _weights(left, ts, *weights).axvline(t, color=_GREY, linewidth=0.8)
    left.set(xlabel="$t$", title=f"{name}, $t = {t:g}$", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    plot_points(x, middle, s=2, color=_blend(t))
    plot_density(law, middle, limit=3.5, levels=(0.02, 0.1, 0.3))
    middle.set_title("points; lines: exact $p_t$")
    plot_images(image[None], right, columns=1).set_title(f"signal to noise {decibels:+.0f} dB")
    return fig


def measures(ts, curves):
    """2(d): curves {label: {schedule: values}} against ts, four panels with one key."""
    fig, axes = _page(4.0, 2, 2, sharex=True)
    for ax, (label, values) in zip(axes.flat, curves.items(), strict=True):
        for k, (name, curve) in enumerate(values.items()):
            color, line = _LOOKS[k % len(_LOOKS)]
            ax.plot(ts, curve, line, color=color, label=name)
        ax.set(title=label, xlim=(0, 1), xlabel="$t$" if ax in axes[1] else "")
    axes[0, 0].axhspan(-10, 10, **_BAND)
    axes[0, 0].set(ylim=(-40, 40))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def one_path(rows):
    """Beyond: rows {label: pairs (title, cloud (B, 2))}."""
    return _pictures(rows, 3.9, COLORS["data"])[0]


def marginalisation(side, maps):
    """Beyond: maps {title: values on the grid of side (n,) in each coordinate}, one scale."""
    fig, axes = _page(2.3, len(maps), sharey=True)
    top = max(float(values.abs().max()) for values in maps.values())
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        grid = values.reshape(len(side), -1).T
        mesh = ax.pcolormesh(side, side, grid, cmap="PuOr", vmin=-top, vmax=top, rasterized=True)
        ax.contour(side, side, grid, levels=(-0.3, 0.3), colors="black", linewidths=0.6)
        _frame_plane(ax, float(side[-1])).set_title(title)
        ax.label_outer()
    _corner(axes[0], "solid: more\ndashed: less", y=0.02)
    fig.colorbar(mesh, ax=axes, pad=0.01, shrink=0.8, label="per area and time")
    return fig


def broken_paths(rows, laws):
    """Test yourself: rows {label: pairs (title, image or cloud)}; laws: those of the last row."""
    fig, axes = _pictures(rows, 3.1, _WRONG)
    for ax, law in zip(axes[-1], laws, strict=True):
        label = ax.get_ylabel()
        plot_density(law, ax, limit=3.5, levels=(0.02, 0.1, 0.3)).set_ylabel(label)
    return fig


# Notebook 03


def flow_trajectories(ts, xs, t, limit=3.6):
    """3(d): trajectories xs (N+1, B, 2) from time 0 to t, coloured by time."""
    fig, ax = plt.subplots(figsize=(HALF, 2.9))
    last = max(1, int((ts <= t + 1e-6).sum()) - 1)
    shown = torch.linspace(0, last, min(last, 60) + 1).round().long()
    x, when = xs[shown], ts[shown]
    pieces = torch.stack([x[:-1], x[1:]], dim=2).flatten(0, 1)
    style = {"cmap": "plasma", "clim": (0, 1), "linewidths": 0.5, "rasterized": True}
    shades = when[1:].repeat_interleave(xs.shape[1]).numpy()
    lines = ax.add_collection(LineCollection(list(pieces), array=shades, **style))
    plot_points(xs[0], ax, color=COLORS["noise"], s=4, zorder=3)
    plot_points(x[-1], ax, limit=limit, color=COLORS["model"], s=4, zorder=4)
    _corner(ax, "noise", COLORS["noise"])
    _corner(ax, f"at $t = {when[-1]:.2f}$", COLORS["model"], x=0.97)
    fig.colorbar(lines, ax=ax, label="time $t$", shrink=0.8)
    return fig


def training_steps(losses, step, x, mixture, limit=3.4):
    """3(c): the losses up to a step, and points x (N, 2) that the network then generates."""
    fig, (ax, plane) = _page(2.6, 2, width_ratios=(1.6, 1))
    ax.loglog(1 + torch.arange(len(losses)), losses, color=_GREY, alpha=0.4, linewidth=0.6)
    ax.loglog(1 + torch.arange(step), losses[:step], color=COLORS["model"], linewidth=0.8)
    ax.plot(max(step, 1), losses[max(step - 1, 0)], "o", color=COLORS["model"])
    ax.set(xlabel="step of training", ylabel="loss of one batch", xlim=(0.9, 1.3 * len(losses)))
    ax.set_yticks((2, 3, 4), ("2", "3", "4"))
    ax.minorticks_off()
    plot_density(mixture, plane, limit=limit, levels=3, colors=COLORS["data"])
    plot_points(x, plane, limit=limit, color=COLORS["model"]).set_title(f"samples at step {step}")
    _corner(plane, "data", COLORS["data"])
    return fig


def conditional_average(mixture, x, ends, place, field):
    """3(a): arrows from x (N, 2) to their ends, and beside it a field (points, arrows)."""
    fig, axes = _page(3.2, 2, sharey=True)
    full = {"scale": 1, "scale_units": "xy"}
    for ax in axes:
        plot_density(mixture, ax, limit=2.9, levels=4, colors="0.7")
    plot_field(x, ends - x, axes[0], color=COLORS["data"], width=0.004, **full)
    plot_field(*place, axes[0], limit=2.9, color=COLORS["exact"], width=0.014, zorder=3, **full)
    plot_field(*field, axes[1], limit=2.9, color=COLORS["exact"], width=0.005, **full)
    axes[0].set_title("targets through one place, and their mean")
    axes[1].set_title("the mean everywhere, $t = 0.5$: the field")
    _corner(axes[0], "arrows end in\ntheir data point", COLORS["data"])
    _corner(axes[0], "black: mean; grey: density of the data", y=0.03)
    return fig


def cancellation(gaps, printed, simple):
    """3(a): errors of the printed and the simplified form against 1 - t."""
    fig, ax = _page(2.6)
    ax.loglog(gaps, 2.0**-23 / gaps, "--", **_EXACT)
    ax.loglog(gaps, printed, "o-", markersize=4, color=_WRONG)
    ax.loglog(gaps, simple, "s-", markersize=4, color=COLORS["model"])
    ax.text(gaps[13], 0.1 * printed[13], "as printed", color=_WRONG)
    ax.text(gaps[12], 3 * simple[12], "simplified", color=COLORS["model"])
    ax.text(gaps[12], 2.0**-21 / gaps[12], r"rounding times $1\,/\,(1-t)$", ha="right")
    ax.set(xlabel="$1 - t$ (the data are on the right)", ylabel="error of $u_t(x_t|z)$")
    ax.invert_xaxis()
    return fig


def loss_and_floor(steps, excess, times, loss, floor, ends):
    """3(c): excess over the floor by step; by time the loss of the network and the floor."""
    fig, (left, right) = _page(2.6, 2)
    left.loglog(steps, excess, "o-", color=COLORS["model"], markersize=4)
    left.text(0.8 * steps[-1], excess[-1], f"{excess[-1]:.1g}", ha="right", va="center")
    left.set(xlabel="step of training", ylabel="loss $-$ floor", title="what is above the floor")
    right.plot(times, floor, color=COLORS["exact"], label="floor, exact")
    right.plot(times, loss, "o", color=COLORS["model"], markersize=4, label="trained network")
    right.plot((0, 1), ends, "*", color=COLORS["exact"], markersize=9, clip_on=False)
    right.text(0.02, ends[0] - 0.45, r"Var$(z)$ / 2")
    right.text(0.98, ends[1] - 0.55, r"Var$(\epsilon)$ / 2", ha="right")
    right.set(xlabel="$t$", ylabel="loss at time $t$", xlim=(0, 1), ylim=(0, 3))
    right.legend(loc="lower left")
    return fig


def cloud_rows(rows, titles, limit, *, size=3, ticks=(-2, 0, 2), mixture=None):
    """Rows {name: (color or colors, clouds (N, 2))} under titles or times; no ticks: pictures."""
    height = 0.5 + len(rows) * (FULL - 0.5) / len(titles)
    fig, axes = _page(height, len(titles), len(rows), squeeze=False)
    for line, (name, (color, clouds)) in zip(axes, rows.items(), strict=True):
        colors = color if isinstance(color, list) else [color] * len(clouds)
        for ax, cloud, shade in zip(line, clouds, colors, strict=True):
            plot_points(cloud, ax, limit=limit, color=shade, s=size)
            if mixture is not None:
                plot_density(mixture, ax, limit=limit, levels=(0.02, 0.15))
            if not ticks:
                _bare(ax, limit)
            ax.set(xticks=ticks, yticks=ticks)
            ax.label_outer()
        line[0].set_ylabel(f"{name}\n$x_2$".strip())
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title if isinstance(title, str) else f"$t = {title:g}$")
    if mixture is not None:
        _corner(axes[0, 0], "lines: density of the data", y=0.02)
    return fig


def solver_paths(fine, coarse, name, limit=3.4):
    """3(d): trajectories (N+1, B, 2) of a fine and of a coarse solution from the same noise."""
    fig, axes = _page(3.1, 2, sharey=True)
    axes[0].plot(*fine[:, :12].unbind(dim=2), color=COLORS["exact"], linewidth=0.7)
    axes[0].plot(*coarse[:, :12].unbind(dim=2), ".-", color=COLORS["model"], markersize=4)
    axes[0].plot(*coarse[0, :12].T, "o", color=COLORS["noise"], ms=4, mfc="white", zorder=3)
    plot_points(fine[-1], axes[1], color=COLORS["exact"], s=2)
    plot_points(coarse[-1], axes[1], color=COLORS["model"], s=6)
    for ax, title in zip(axes, ("twelve starts", "where all end"), strict=True):
        _frame_plane(ax, limit).set_title(title)
    _corner(axes[0], name, COLORS["model"])
    _corner(axes[0], "circles: starts", COLORS["noise"], x=0.97)
    _corner(axes[0], f"black: {len(fine) - 1} steps", y=0.03)
    return fig


def step_count(clouds, excess, errors, network):
    """3(d): clouds {n: points (N, 2)}; excess {n: (mean, bar)}; errors {method: {n: value}}."""
    fig = plt.figure(figsize=(FULL, 4.3))
    top, bottom = fig.subfigures(2, 1, height_ratios=(1.85, 2.4))
    for ax, (n, x) in zip(top.subplots(1, len(clouds), sharey=True), clouds.items(), strict=True):
        plot_points(x, ax, limit=3.2, color=COLORS["model"], s=3)
        ax.set(title=f"$n_t = {n}$", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        ax.label_outer()
    left, right = bottom.subplots(1, 2)
    values, bars = torch.tensor(list(excess.values())).T
    _dots(left, list(excess), values, 2 * bars, COLORS["model"], fmt="o-", linewidth=1)
    left.axhline(0, **_LEVEL, linewidth=0.9)
    left.text(1, 0.001, "a perfect sample", va="bottom")
    left.set(xlabel="$n_t$, steps of Euler's method", ylabel="distance to the data, excess")
    left.set_yscale("symlog", linthresh=0.01)
    left.set(xscale="log", ylim=(-0.02, 2))
    style = {"markersize": 4, "linewidth": 1}
    for (name, row), kind, mark in zip(errors.items(), ("model", "noise"), "os", strict=True):
        right.plot(row.keys(), row.values(), f"{mark}-", color=COLORS[kind], label=name, **style)
    right.axhline(network, **_LEVEL, linewidth=0.9)
    right.text(1, 0.9 * network, "network's error", va="top")
    right.set(xlabel="evaluations of the network", ylabel="median error of an end point")
    right.set(xscale="log", yscale="log")
    right.legend(loc="lower left")
    return fig


def field_error(side, maps):
    """Beyond: maps {t: (errors (K, K), log densities, level)} on the grid side x side."""
    fig, axes = _page(1.85, len(maps), sharey=True)
    for ax, (t, (error, log_density, level)) in zip(axes, maps.items(), strict=True):
        mesh = ax.pcolormesh(side, side, error, norm="log", vmin=0.01, vmax=10, rasterized=True)
        ax.contour(side, side, log_density, levels=[level], colors="white", linestyles="solid")
        ax.set(xticks=(-3, 0, 3), yticks=(-3, 0, 3), aspect=1, xlabel="$x_1$", title=f"$t = {t:g}$")
    _corner(axes[0], "inside: 99 %", "white")
    axes[0].set_ylabel("$x_2$")
    fig.colorbar(mesh, ax=axes, label=r"$|u^\theta_t - u_t|$", pad=0.01)
    return fig


def likelihood(side, densities, log_p, difference):
    """Beyond: densities {name: (K, K)}; the difference of log densities at data points."""
    fig, axes = _page(2.3, 3, width_ratios=(1, 1, 1.3))
    colors = {"cmap": "magma", "vmin": 0, "vmax": max(d.max() for d in densities.values())}
    for ax, (name, density) in zip(axes, densities.items(), strict=False):
        mesh = ax.pcolormesh(side, side, density, **colors, rasterized=True)
        _frame_plane(ax, 2.8).set(title=name, xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        ax.label_outer()
    fig.colorbar(mesh, ax=axes[1], label="density", shrink=0.7)
    axes[2].plot(log_p, difference, ".", color=COLORS["model"], markersize=1.5, rasterized=True)
    axes[2].axhline(0, **_EXACT)
    axes[2].set(xlabel=r"$\log p_{\mathrm{data}}(x)$", xticks=(-10, -5, 0))
    axes[2].set_ylabel(r"$\log p^\theta - \log p_{\mathrm{data}}$")
    return fig


def straighter(flows, numbers, distances, floor):
    """Beyond: flows {name: xs (N+1, B, 2)}; distances {name: (mean, bar)} over the numbers."""
    fig, axes = _page(2.4, 3, width_ratios=(1, 1, 1.3))
    looks = zip(flows.items(), (COLORS["noise"], COLORS["model"]), strict=True)
    for ax, ((name, xs), color) in zip(axes, looks, strict=False):
        ax.plot(*xs.unbind(dim=2), color=color, linewidth=0.4, rasterized=True)
        plot_points(xs[-1], ax, limit=3.6, color=COLORS["exact"], s=2)
        ax.set(title=name, xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        ax.label_outer()
        _dots(axes[2], numbers, *distances[name], color, fmt="o-", markersize=3, capsize=2)
        axes[2].text(1.3, distances[name][0][0], name, color=color, va="bottom")
    axes[2].axhline(floor, **_LEVEL, linewidth=0.9)
    axes[2].text(numbers[0], 0.6 * floor, "dashed: a perfect sample", va="top")
    _corner(axes[0], "dots: ends", x=0.97, y=0.02)
    axes[2].set(xscale="log", yscale="log", xlabel="Euler steps", ylabel="distance to the data")
    axes[2].set_ylim(0.4 * floor, 2)
    axes[2].set_xticks(numbers, [str(n) for n in numbers])
    axes[2].minorticks_off()
    return fig


# Notebook 04

_PIXELS = "(black to white: 2)"  # the unit of images in [-1, 1]
_CORNERS = f"noise in the corners\n{_PIXELS}"


def image_rows(rows, *, top=(), title="", width=FULL, labels=True):
    """Rows of images {label: (N, 1, H, W)} in [-1, 1]; top: a label for each column.

    They are as wide as the labels at the left leave room for.
    """
    columns, _, _, size = next(iter(rows.values())).shape
    fig, ax = plt.subplots(figsize=(width, width))
    plot_images(torch.cat([x[:columns] for x in rows.values()]), ax, columns=columns)
    ax.set_aspect("auto")  # square by the height of the figure, at the end
    ax.set_title(title, loc="left", weight="bold", pad=4)
    ax.tick_params(length=0, pad=2)
    if labels:
        ax.set_yticks([(size + 2) * (k + 0.5) for k in range(len(rows))], list(rows))
    if len(top):
        ax.xaxis.tick_top()
        ax.set_xticks([(size + 2) * (k + 0.5) for k in range(columns)], list(top))
    fig.draw_without_rendering()
    room = ax.get_position()
    fig.set_figheight(width * (1 - room.height + room.width * len(rows) / columns))
    return fig


def image_grid(x, *, columns, title):
    """4(c): images (N, 1, H, W) in rows of so many columns, under a title."""
    whole = len(x) // columns * columns
    rows = x[:whole].reshape(-1, columns, *x.shape[1:])
    return image_rows(dict(enumerate(rows)), title=title, labels=False)


def _box(ax, x, y, width, text, color, height=0.42):
    ax.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, fc=color, ec="0.4"))
    ax.text(x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.05)


def _arrow(ax, start, end, **style):
    style = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0, "lw": 0.9} | style
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def unet():
    """4(b): the UNet as built, the time in all eleven residual layers, and one such layer."""
    fig, ax = _page(4.1)
    ax.set(xlim=(0, 6.5), ylim=(0, 4.1))
    ax.axis("off")
    blue, sand, green, grey, time = "#cfe3f3", "#f6dfc3", "#cfeadd", "#f2f2f2", COLORS["noise"]
    xs, ys = (0.68, 1.96, 3.25, 4.54, 5.82), (3.15, 2.6, 2.05, 2.6, 3.15)
    texts = ("2 residual layers\n32 at 28×28", "2 residual layers\n64 at 14×14")
    texts += ("3 residual layers\n128 at 7×7", "1×1 conv 128 → 64\n2 residual layers")
    texts += ("1×1 conv 64 → 32\n2 residual layers",)
    for x, y, text, color in zip(xs, ys, texts, (blue, blue, sand, green, green), strict=True):
        _box(ax, x, y, 1.14, text, color)
        x += -0.46 if x < 3 else 0.1 if x < 4 else 0.44
        _arrow(ax, (x, 1.5), (x, y - 0.21), color=time, ls="dotted")
    for k, text in enumerate(("conv, stride 2", "conv, stride 2", "conv, up ×2", "conv, up ×2")):
        low, high = (xs[k], ys[k]), (xs[k + 1], ys[k + 1])
        if k < 2:
            _arrow(ax, (low[0] + 0.25, low[1] - 0.21), (high[0] - 0.57, high[1]))
            ax.text(high[0] - 0.86, high[1] - 0.02, text, ha="right", va="center", fontsize=8)
        else:
            _arrow(ax, (low[0] + 0.57, low[1]), (high[0] - 0.25, high[1] - 0.21))
            ax.text(high[0] - 0.42, low[1] + 0.03, text, va="center", fontsize=8)
    _box(ax, 0.93, 3.8, 1.76, "noisy image: conv 3×3, 1 → 32", "white", 0.3)
    _box(ax, 5.57, 3.8, 1.76, "norm, SiLU, conv 3×3, 32 → 1", "white", 0.3)
    _arrow(ax, (xs[0], 3.65), (xs[0], 3.36))
    _arrow(ax, (xs[4], 3.36), (xs[4], 3.65))
    for k in (0, 1):
        _arrow(ax, (xs[k] + 0.57, ys[k]), (xs[4 - k] - 0.57, ys[k]), ls="dashed")
        ax.text(3.25, ys[k] + 0.05, "skip, concatenated", ha="center", fontsize=8.5)
    text = "time $t$ → sines, cosines → MLP: the embedding, into all eleven residual layers"
    _box(ax, 3.25, 1.36, 6.2, text, "#dcecf8", 0.28)
    chain = ("norm, SiLU,\nconv 3×3", "norm", "× (1 + scale)\n+ shift", "SiLU,\nconv 3×3")
    for k, text in enumerate(chain):
        _box(ax, 1.55 + 1.15 * k, 0.62, 0.9, text, grey)
        _arrow(ax, (1.55 + 1.15 * k - (0.7 if k else 1.0), 0.62), (1.1 + 1.15 * k, 0.62))
    _arrow(ax, (3.85, 1.22), (3.85, 0.83), color=time, ls="dotted")
    ax.text(0.45, 0.62, "$x$", ha="center", va="center")
    ax.text(5.72, 0.62, "+", ha="center", va="center", fontsize=12)
    _arrow(ax, (5.45, 0.62), (5.63, 0.62))
    _arrow(ax, (5.8, 0.62), (6.2, 0.62))
    ax.plot((0.45, 0.45, 5.72), (0.5, 0.22, 0.22), color="0.3", lw=0.9)
    _arrow(ax, (5.72, 0.22), (5.72, 0.52))
    text = "one residual layer: its input takes the bypass and is added"
    ax.text(3.25, 0.1, text, ha="center", fontsize=8.5)
    return fig


def exact_minimiser(losses, times, curves):
    """4(b): the loss by step, and by time {(field, images): (mean, error)}, with its minimiser."""
    fig, (left, right) = _page(2.7, 2)
    plot_loss(losses, left).set(ylim=(0.05, 1.2), title="training")
    looks = {"network": COLORS["model"], "minimiser": COLORS["exact"]}
    for (field, images), (mean, error) in curves.items():
        style = {"color": looks[field], "ls": "-" if images == "training" else "--"}
        right.errorbar(times, mean.clamp(min=1e-6), 2 * error, marker=".", **style)
    floor = curves["minimiser", "training"][0].mean()
    left.axhline(floor, color=looks["minimiser"])
    left.text(len(losses), floor * 0.9, "exact minimiser, training images", ha="right", va="top")
    left.text(len(losses), 0.26, "the network", color=COLORS["model"], ha="right")
    plt.setp((left, right), yscale="log", ylabel="loss per pixel")
    right.set(ylim=(1e-2, 60), xlabel="$t$", xlim=(0, 1), title="after training")
    right.text(0.62, 2.5, "exact minimiser,\ntest images", ha="right")
    right.text(0.44, 0.013, "exact minimiser,\ntraining images")
    right.text(1, 0.13, "the network, both", color=COLORS["model"], ha="right", va="top")
    return fig


def steps_or_geometry(places, errors, corners):
    """4(d): {way: (mean, error)} by the place of the steps; {solver: corner noise} likewise.

    errors are geometric means of the solver's errors, their bars two standard errors in the log.
    """
    fig, (left, right) = _page(2.7, 2)
    looks = zip(errors.items(), ("model", "noise", "data"), "o^s", (-0.16, 0, 0.16), strict=True)
    for (way, (mean, bar)), kind, marker, shift in looks:
        at = torch.arange(len(places)) + shift
        spread = mean * torch.stack([1 - (-2 * bar).exp(), (2 * bar).exp() - 1])
        _dots(left, at, mean, spread, COLORS[kind], fmt=marker, capsize=2, label=way)
    for (solver, noise), kind, look in zip(corners.items(), ("model", "noise"), "o^", strict=True):
        right.plot(noise, look, color=COLORS[kind], label=solver)
    right.axhline(2 / 255, color=_GREY, ls=":")
    right.text(3.4, 2 / 255, "one grey level", ha="right", va="bottom", color=_NOTE)
    left.set(title="Adams–Bashforth, by place, clock, bend", ylabel=f"r.m.s. error\n{_PIXELS}")
    right.set(title="by place and solver", ylabel=_CORNERS)
    for ax in (left, right):
        ax.set(yscale="log", xlabel="place of the steps", xlim=(-0.5, len(places) - 0.5))
        ax.set_xticks(range(len(places)), places)
        ax.legend(loc="upper left", ncols=2, columnspacing=1, handletextpad=0.2, handlelength=1)
        low, high = ax.get_ylim()
        marks = [m for m in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if low < m < high * 2]
        ax.set(yticks=marks, yticklabels=marks, ylim=(low, high * 2))
        ax.minorticks_off()
    return fig


def training_live(losses, x):
    """Train it yourself: the losses so far, and images (16, 1, H, W) that the network draws."""
    fig, (left, right) = _page(2.6, 2)
    plot_loss(losses, left, window=10)
    left.set(yscale="log", xlim=(0, None), title=f"step {len(losses)}")
    plot_images(x, right, columns=4).set_title("generated")
    return fig


# Notebook 05


def infinite_loss(means, weighted, delta):
    """5(a): {seed: running means (N,)} of the printed loss on t <= 1 - delta, and weighted."""
    fig, ax = _page(2.5)
    shown = torch.logspace(0, math.log10(len(weighted)), 500).long().clamp(max=len(weighted))
    for seed, values in means.items():
        name = None if seed else "as printed, three runs"
        ax.loglog(shown, values[shown - 1], color=_WRONG, label=name)
    ax.loglog(shown, weighted[shown - 1], color=COLORS["model"], label=r"times $\beta_t^2$")
    if delta:
        ax.axhline(1 / delta, **_LEVEL, linewidth=0.8)
        ax.text(1.2, 1.3 / delta, r"$1/\delta$, the mean on $t \leq 1 - \delta$")
    ax.set(xlabel="draws of $t$", ylabel="mean of the loss so far")
    ax.set(ylim=(0.1, 1e8), xlim=(1, len(weighted)))
    ax.legend(loc="upper left")
    return fig


def sigma_sweep(names, rows, floor):
    """5(b): {steps: ([squared Frechet distances of the sets], [noise])} over the sigma_t."""
    fig, axes = _page(2.8, 2)
    looks = zip(rows.items(), (COLORS["data"], COLORS["noise"]), "os", (-0.1, 0.1), strict=True)
    for (steps, (sets, noise)), color, mark, shift in looks:
        places, means = torch.arange(len(names)) + shift, [v.mean().item() for v in sets]
        bars = [2 * v.std().item() / len(v) ** 0.5 if len(v) > 1 else float("nan") for v in sets]
        axes[0].plot(places, means, mark, color=color, markersize=4, label=f"{steps} steps")
        axes[0].errorbar(places, means, bars, fmt="none", color=color)
        axes[1].plot(places, noise, mark, color=color, markersize=4)
    axes[0].axhspan(*floor, color=_GREY, alpha=0.3, linewidth=0)
    axes[0].text(6.2, 1.1 * floor[0], "grey: real images", ha="right", va="bottom", color=_NOTE)
    for ax, name in zip(axes, ("squared Fréchet distance", _CORNERS), strict=True):
        ax.set_xticks(range(len(names)), names)
        ax.set(xlabel=r"$\sigma_t$", ylabel=name, yscale="log")
    axes[0].set_ylim(0.05, 400)
    axes[0].legend(loc="upper left")
    return fig


def last_steps(cases, results, predicted):
    """5(b): {sigma: {number of last steps: (values, bars)}} for the cases; {sigma: one kick}."""
    fig, axes = _page(2.7, len(results), sharey=True)
    for ax, (sigma, groups) in zip(axes, results.items(), strict=True):
        looks = ("noise", "s", -0.12), ("data", "o", 0.12)
        for (count, (values, bars)), (kind, mark, shift) in zip(groups.items(), looks, strict=True):
            style = {"fmt": mark, "label": f"last {count} steps" if count > 1 else "last step"}
            _dots(ax, torch.arange(4) + shift, values, 2 * bars, COLORS[kind], **style)
        ax.axhline(predicted[sigma], **_LEVEL, linewidth=0.8)
        ax.text(-0.4, 0.85 * predicted[sigma], "one kick, $0.67\\,\\sigma$√$h$", va="top")
        ax.set(title=rf"$\sigma = {sigma:g}$", yscale="log", xlim=(-0.5, 3.5))
        ax.set_xlabel("what stays on in the last steps")
        ax.set_xticks(range(4), cases)
    axes[0].set_ylabel(_CORNERS)
    axes[0].legend(loc="lower left")
    return fig


def two_regimes(counts, left, seen):
    """Deeper: noise left by steps, of a point mass {sigma: (N,)}, of images {(sigma, n): noise}."""
    fig, ax = _page(2.9)
    colors = plt.get_cmap("viridis")(torch.linspace(0, 0.7, len(left)).tolist())
    for (sigma, values), color in zip(left.items(), colors, strict=True):
        ax.plot(counts, values, color=color)
        last = [i for i, value in enumerate(values) if value < 60][-1]
        name = rf"$\sigma = {sigma}$  "
        ax.text(counts[last], values[last], name, color=color, ha="right", va="center")
        dots = {n: noise for (s, n), noise in seen.items() if s == float(sigma)}
        ax.plot(list(dots), list(dots.values()), "o", color=color, markersize=5)
    ax.set(xscale="log", yscale="log", xlabel="steps $n$", ylim=(5e-3, 100))
    ax.set_ylabel(f"noise left\n{_PIXELS}")
    ax.text(5, 0.007, "lines: data in one point; dots: corners of the UNet's images")
    return fig


def invariance(names, short):
    """Deeper: {program: standard errors by which the mean log p falls short (K,)}."""
    fig, ax = _page(2.4)
    ax.axhspan(-5, 5, color=_GREY, alpha=0.3, linewidth=0)
    looks = zip(short.items(), (COLORS["model"], "#E69F00", _WRONG), "o^s", strict=True)
    for (name, values), color, mark in looks:
        ax.plot(range(len(names)), values, mark, color=color, markersize=5, label=name)
    ax.set_xticks(range(len(names)), names)
    ax.set_yscale("symlog", linthresh=5)
    ax.set_yticks([-5, 0, 5, 20, 100], ["−5", "0", "5", "20", "100"])
    ax.set(xlabel=r"$\sigma_t$", ylabel=r"mean $\log p_1$ falls short" + "\nby (standard errors)")
    ax.text(len(names) - 0.9, -4, "grey: as exact draws", color=_NOTE, ha="right")
    ax.set_ylim(-8, 900)
    ax.legend(loc="upper left", ncols=3)
    return fig


def which_sigma(t, curves, factors):
    """Deeper: {name: sigma_t (N,)} over t, and of each the factor of an error in the bound."""
    fig, (left, right) = _page(2.6, 2)
    colors = COLORS["model"], COLORS["data"], COLORS["noise"], "#CC79A7"
    looks = zip(curves.items(), colors, ("-", "--", "-.", ":"), strict=True)
    for (name, curve), color, line in looks:
        left.plot(t, curve, line, color=color, label=name)
        right.semilogy(t, factors[name], line, color=color)
    left.set(xlabel="$t$", ylabel=r"$\sigma_t$", ylim=(0, 4), xlim=(0, 1), yticks=range(5))
    left.legend(loc="upper right")
    right.set(xlabel="$t$", ylabel="weight of an error,\nrelative to the best")
    right.set(ylim=(0.8, 30), xlim=(0, 1))
    return fig


def point_image(x, size=180, limit=1.7):
    """Points (N, 2) as an image (size, size, 3) in [0, 1], for an animation."""
    places = ((x / limit + 1) / 2 * size).long()
    places = places[((places >= 0) & (places < size)).all(dim=1)]
    image = torch.ones(size, size, 3)
    image[size - 1 - places[:, 1], places[:, 0]] = torch.tensor([0.0, 0.4, 0.27])
    return image
