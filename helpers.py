"""The shared module of the five notebooks: everything that two cells need.

Contents
    1 setup      pick_device, make_generator, show_source, claim
    2 solvers    time_grid, sampling_grid, euler_maruyama, heun, adams_bashforth2, sde_drift,
                 divergence, log_likelihood, ou_moments
    3 data       GaussianMixture, empirical_velocity, silhouette, lettering, load_fashion_mnist
    4 schedules  Linear-, Cosine-, Polynomial-, FunctionScheduler, check_scheduler
    5 paths      GaussianPath: the conditional path, its targets, conversions; reschedule
    6 networks   MLP, UNet, guided_velocity, NoiseScore
    7 training   the two losses, Muon, train, train_or_load; weights files and records
    8 metrics    mmd2, sliced_wasserstein, frechet_distance, residual_noise, FashionClassifier

Notation: time runs from noise, t = 0, to data, t = 1; x_t = alpha_t z + beta_t eps.
    maths                            code                        shape
    z, eps, x                        z, eps, x                   (B, *D)
    t                                t                           (B,), in [0, 1]
    time grid                        ts                          (N+1,), increasing
    trajectory                       xs                          (N+1, B, *D)
    alpha_t, beta_t, derivatives     alpha, beta, alpha_dot, beta_dot       like t
    u_t(x | z), u_t(x)               conditional_velocity, a model `velocity`   like x
    grad log p_t(x | z), of p_t      conditional_score, a model `score`     like x
    u_t(x) and sigma_t in an SDE     drift, diffusion            like x; number or (t) -> like t
D is (2,) in the plane, (1, 28, 28) for images and () for a scalar process. Images are in
[-1, 1]. Symbols of other texts: there sigma is sometimes our beta, and beta a rate.

Environment: FLOW_DEVICE picks the device; FLOW_RETRAIN, "1" or names of networks, trains instead
of loading; FLOW_PROGRESS=0 hides progress bars; new files go to FLOW_OUTPUT, build/ by default."""

import contextlib
import functools
import gzip
import hashlib
import inspect
import io
import json
import linecache
import math
import os
import platform
import signal
import sys
import tempfile
import textwrap
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.path import Path as Polygon
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


# 1  Setup ------------------------------------------------------------------------------
def pick_device():
    """Return the device named by FLOW_DEVICE, else cuda, else mps, else cpu.
    Raises ValueError if FLOW_DEVICE names a device that this machine does not have."""
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    cuda = ["cuda", *numbered] if torch.cuda.is_available() else []
    available = [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    wanted = os.environ.get("FLOW_DEVICE") or available[0]
    remedy = f"this machine has only {available}; unset FLOW_DEVICE or choose one of these"
    require(wanted in available, f"FLOW_DEVICE={wanted!r}, but {remedy}")
    return torch.device(wanted)


def make_generator(seed):
    """Return a CPU generator seeded with seed: the same draws on every device."""
    return torch.Generator().manual_seed(seed)


# The lines as they are imported: show_source stays right when the file is edited afterwards.
linecache.cache[__file__] = (0, None, linecache.updatecache(__file__), __file__)


def show_source(*objects):
    """Display the source of imported functions or classes, as Markdown."""
    from IPython.display import Markdown, display

    sources = [textwrap.dedent(inspect.getsource(item)).rstrip() for item in objects]
    display(Markdown("```python\n" + "\n\n\n".join(sources) + "\n```"))


def claim(text, check):
    """Print the text with a tick, or with a cross and "not with these values". Never raises.
    check: a bool, a tensor of one or a function of no arguments; an exception, too, is a cross."""
    try:
        value = check() if callable(check) else check
        holds = getattr(value, "item", lambda: value)() is True
    except Exception:
        holds = False
    print(f"✓ {text}" if holds else f"✗ {text}: not with these values")


def require(condition, message):
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def write_atomically(path, content):
    """Write bytes to path so that a crash leaves the old file whole, never half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def output_folder(kind):
    """Where new files of a kind, "figures", "weights" or "records", go: below FLOW_OUTPUT, if unset
    build/, on Colab outside the clone; the root of the repository means the committed folders."""
    default = Path("/content") if "google.colab" in sys.modules else ROOT
    base = Path(os.environ.get("FLOW_OUTPUT") or default / "build").expanduser().absolute()
    return (base if kind == "figures" or base != ROOT else DATA) / kind


def _randn_like(x, generator=None):
    """Standard normal noise like x, drawn on the generator's device and moved to x."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


# 2  Solvers ----------------------------------------------------------------------------
def time_grid(steps, start=0.0, end=1.0):
    """Equally spaced times from start to end, (steps + 1,); decreasing if end < start."""
    require(steps >= 1 and start != end, f"need steps >= 1, start != end; got {steps, start, end}")
    return torch.linspace(start, end, steps + 1)


def sampling_grid(n):
    """The grid 1 - (1 - s)^1.5 that images are sampled on, (n + 1,): finer towards the data."""
    return 1 - (1 - time_grid(n)) ** 1.5


def check_like(value, target, what):
    """Return value, what the function or network named `what` gave, if it is shaped as target.
    Raises ValueError for any other shape, which would broadcast, and for no tensor at all."""
    shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
    if shape != tuple(target.shape):
        raise ValueError(f"{what} must return shape {tuple(target.shape)}, got {shape}")
    return value


def _check_floats(x, name):
    """Half precision would lose the increments, and integers the times."""
    if x.dtype not in (torch.float32, torch.float64):
        remedy = f"use {name}.float(), for images to_model_range, in a network autocast"
        raise ValueError(f"{name} must be float32 or float64, got {x.dtype}; {remedy}")


def _rows(x):
    """x (B, *D) as (B, D), also for B = 0 and for scalars (B,)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _check_simulation(x0, ts, decreasing_too=False):
    """Check x0 and the grid; return x0 detached and ts in its dtype and on its device."""
    _check_floats(x0, "x0")
    require(x0.ndim > 0, "x0 must have a batch axis, got a scalar; use x0[None]")
    require(torch.isfinite(x0).all(), "x0 has entries that are not finite")
    ts = torch.as_tensor(ts).to(device=x0.device, dtype=x0.dtype)
    require(ts.ndim == 1 and len(ts) > 1, f"ts must be (N+1,) with N >= 1, got {tuple(ts.shape)}")
    steps = ts.diff()
    ordered = (steps > 0).all() or (decreasing_too and (steps < 0).all())
    order = "increasing or strictly decreasing" if decreasing_too else "increasing"
    require(ordered, f"ts must be strictly {order} in {x0.dtype}")
    return x0.detach(), ts


def _march(step, x, ts, trajectory):
    """Apply x = step(x, t, t_next, h) along ts; return the last x, or all, (N+1, B, *D)."""
    xs = x.new_empty(len(ts), *x.shape) if trajectory else [x]  # a list of all fragments the heap
    xs[0] = x
    times = ts[:, None].expand(len(ts), len(x))
    for n, h in enumerate(ts.diff().tolist()):
        x = step(x, times[n], times[n + 1], h)
        if trajectory:
            xs[n + 1] = x
    return xs if trajectory else x


def _diffusion_at(diffusion, x, t):
    """sigma as a float, or sigma(t) of a function, shaped to broadcast over x."""
    if callable(diffusion):
        return expand_like(check_like(diffusion(t), t, "diffusion"), x)
    try:
        return float(diffusion)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"diffusion must be a number or a function t (B,) -> (B,), got {diffusion!r}"
        raise ValueError(message) from error


@torch.no_grad()
def euler_maruyama(drift, diffusion, x0, ts, *, generator=None, trajectory=False):
    """Simulate dX = u(X, t) dt + sigma(t) dW on the grid ts (assignment, eq. 2).
    x0: (B, *D), float32 or float64. ts: (N+1,), increasing. drift: (x, t) -> like x, t (B,).
    diffusion: a number, or t (B,) -> (B,); the number 0 gives Euler's method.
    Returns X at ts[-1], (B, *D); with trajectory=True all of X, (N+1, B, *D). Strong order 1/2;
    order 1 here, where the noise is additive (sigma depends on t only). Raises ValueError if ts
    does not increase, x0 is not finite or of another type, or drift or diffusion is misshapen."""
    x0, ts = _check_simulation(x0, ts)

    def step(x, t, t_next, h):
        sigma = _diffusion_at(diffusion, x, t)
        x_next = torch.add(x, check_like(drift(x, t), x, "drift").to(x.dtype), alpha=h)
        if torch.is_tensor(sigma):
            x_next.addcmul_(_randn_like(x, generator), sigma, value=math.sqrt(h))
        elif sigma != 0:
            x_next.add_(_randn_like(x, generator), alpha=math.sqrt(h) * sigma)
        return x_next

    return _march(step, x0, ts, trajectory)


@torch.no_grad()
def heun(velocity, x0, ts, *, trajectory=False):
    """Solve dX/dt = u(X, t) by Heun's method, the explicit trapezoidal rule: order 2.
    velocity: (x, t) -> like x, with t (B,); evaluated twice a step, at ts[-1] too. ts: (N+1,),
    strictly increasing or strictly decreasing. x0, result and errors as for euler_maruyama."""
    x0, ts = _check_simulation(x0, ts, decreasing_too=True)

    def step(x, t, t_next, h):
        slope = check_like(velocity(x, t), x, "velocity").to(x.dtype)
        guess = torch.add(x, slope, alpha=h)
        slope_next = check_like(velocity(guess, t_next), x, "velocity").to(x.dtype)
        return torch.add(x, slope + slope_next, alpha=h / 2)

    return _march(step, x0, ts, trajectory)


@torch.no_grad()
def adams_bashforth2(velocity, x0, ts, *, trajectory=False):
    """Solve dX/dt = u(X, t) by the two-step Adams-Bashforth method: order 2.
    x + h (u + (u - u_before) h / (2 h_before)), after a first step of Euler's method (Hairer,
    Norsett & Wanner 1993, section III.5). Arguments, result and errors as for heun, but the
    velocity is evaluated once a step, and not at ts[-1]."""
    x0, ts = _check_simulation(x0, ts, decreasing_too=True)
    before = None  # the slope and the length of the step before

    def step(x, t, t_next, h):
        nonlocal before
        slope = check_like(velocity(x, t), x, "velocity").to(x.dtype).clone()
        x_next = torch.add(x, slope, alpha=h)
        if before is not None:
            x_next.add_(slope - before[0], alpha=h * h / (2 * before[1]))
        before = slope, h
        return x_next

    return _march(step, x0, ts, trajectory)


def divergence(velocity, x, t, probes=None):
    """The divergence sum_i du_i/dx_i of a field at x (B, *D) and t (B,); returns (B,).
    Exact, by one gradient for each dimension, if probes is None. With probes (K, B, *D) of mean 0
    and unit covariance, +-1 for instance: the mean of v . (du/dx) v over the K probes v,
    Hutchinson's unbiased estimate, at the cost of K gradients. Also in torch.inference_mode. Raises
    ValueError for wrong shapes and for a field that autograd cannot see through."""
    return _with_divergence(velocity, x, t, probes)[1]


def _with_divergence(velocity, x, t, probes):
    """The field and its divergence at x, each term added as it comes; one evaluation."""
    _check_floats(x, "x")
    count = 1 if probes is None else len(probes)
    if probes is None:
        size = math.prod(x.shape[1:])
        probes = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    elif probes.shape[1:] != x.shape or not count:
        raise ValueError(f"probes must be (K, *{tuple(x.shape)}), got {tuple(probes.shape)}")
    with torch.inference_mode(False), torch.enable_grad():
        x, t = x.detach().clone().requires_grad_(), t.clone()
        u = check_like(velocity(x, t), x, "velocity").to(x.dtype)
        total = x.new_zeros(len(x))
        for v in probes.expand(-1, *x.shape):
            options = {"retain_graph": True, "allow_unused": True}
            slope = torch.autograd.grad(u, x, v, **options)[0] if u.requires_grad else None
            if slope is None:  # no dependence on x, or one that no_grad or detach hides
                if not torch.equal(velocity(x + 1, t).to(x.dtype), u):
                    hidden = "depends on x, but not by operations that autograd follows"
                    raise ValueError(f"velocity {hidden}; take no_grad, detach or numpy out of it")
                break
            total += _rows(slope * v).sum(dim=1)
    return u.detach(), total / count


def log_likelihood(velocity, x, ts, *, probes=None):
    """log p(x) under the flow of N(0, I) along ts, (B,), by the change of variables.
    log p(x) = log N(X_0; 0, I) - int div u_t(X_t) dt along the trajectory that ends in x, by
    Heun's method backwards (Chen et al. 2018, eq. 8). x (B, *D); ts increasing, (N+1,);
    probes: as for divergence, the same at all times (Grathwohl et al. 2019)."""
    x, ts = _check_simulation(x, ts)  # increasing: the way back is taken here

    def augmented(state, t):
        u, change = _with_divergence(velocity, state[:, :-1].reshape(x.shape), t, probes)
        return torch.cat([_rows(u), change[:, None]], dim=1)

    end = heun(augmented, torch.cat([_rows(x), x.new_zeros(len(x), 1)], dim=1), ts.flip(0))
    z, change = end[:, :-1], end[:, -1]  # change: the integral from 1 to 0
    return change - (z.square() + math.log(2 * math.pi)).sum(dim=1) / 2


def sde_drift(velocity, score, diffusion):
    """The drift u + (sigma^2 / 2) s of the SDE that keeps the marginals p_t (eq. 3).
    velocity, score: (x, t) -> like x. diffusion: a number (0: velocity alone) or t (B,) -> (B,)."""
    if not callable(diffusion) and _diffusion_at(diffusion, None, None) == 0:
        return velocity

    def drift(x, t):
        half = _diffusion_at(diffusion, x, t) ** 2 / 2
        u = check_like(velocity(x, t), x, "velocity")
        return u + half * check_like(score(x, t), x, "score")

    return drift


def ou_moments(x0, t, theta, sigma):
    """Mean and variance of the Ornstein-Uhlenbeck process dX = -theta X dt + sigma dW, X_0 = x0.
    mean = x0 exp(-theta t); variance = sigma^2 (1 - exp(-2 theta t)) / (2 theta), which is
    sigma^2 t for theta = 0. Numbers or tensors; everything broadcasts."""
    values = (x0, t, theta, sigma)
    dtypes = [v.dtype for v in values if torch.is_tensor(v) and v.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes or [torch.get_default_dtype()])
    x0, t, theta, sigma = (torch.as_tensor(value, dtype=dtype) for value in values)
    rate = torch.where(theta == 0, torch.ones_like(theta), 2 * theta)
    elapsed = torch.where(theta == 0, t, -torch.expm1(-2 * theta * t) / rate)
    return torch.broadcast_tensors(x0 * torch.exp(-theta * t), sigma**2 * elapsed, x0)[:2]


# 3  Data -------------------------------------------------------------------------------
class GaussianMixture:
    """A mixture of K isotropic Gaussians in R^D: the data distribution with exact answers.
    means (K, D); stds (K,), positive; weights (K,), positive, default equal (normalised).
    With z from the mixture, x_t = alpha z + beta eps is a mixture too, so that p_t, its score
    and its velocity have closed forms. Points x are (B, D)."""

    def __init__(self, means, stds, weights=None):
        means = torch.as_tensor(means)
        self.means = means if means.is_floating_point() else means.float()
        _check_floats(self.means, "means")
        like = {"dtype": self.means.dtype, "device": self.means.device}
        self.stds = torch.as_tensor(stds, **like)
        weights = torch.ones_like(self.stds) if weights is None else weights
        weights = torch.as_tensor(weights, **like)
        if self.means.ndim != 2 or not self.stds.shape == weights.shape == self.means.shape[:1]:
            shapes = ", ".join(str(tuple(p.shape)) for p in (self.means, self.stds, weights))
            raise ValueError(f"means must be (K, D), stds and weights (K,); got {shapes}")
        require((self.stds > 0).all() and (weights > 0).all(), "stds and weights must be positive")
        self.weights = weights / weights.sum()

    def sample(self, n, *, generator=None):
        """Draw n points, (n, D)."""
        weights = self.weights if generator is None else self.weights.to(generator.device)
        index = torch.multinomial(weights, max(n, 1), replacement=True, generator=generator)
        index = index[:n].to(self.means.device)
        means = self.means[index]
        return means + self.stds[index, None] * _randn_like(means, generator)

    def _check_points(self, x):
        _check_floats(x, "x")
        size = self.means.shape[1]
        require(x.shape[1:] == (size,), f"x must be (B, {size}), got {tuple(x.shape)}")

    def _log_joint(self, x):
        """log(w_k N(x; m_k, s_k^2 I)), (B, K)."""
        self._check_points(x)
        squares = (x[:, None, :] - self.means).square().sum(dim=2)
        log_norm = x.shape[1] * torch.log(self.stds * math.sqrt(2 * math.pi))
        return torch.log(self.weights) - squares / (2 * self.stds**2) - log_norm

    def log_prob(self, x):
        """log p(x), (B,)."""
        return torch.logsumexp(self._log_joint(x), dim=1)

    def score(self, x):
        """grad log p(x) = sum_k P(k | x) (m_k - x) / s_k^2, (B, D)."""
        posterior = self._log_joint(x).softmax(dim=1)[:, :, None]
        return (posterior * (self.means - x[:, None, :]) / self.stds[:, None] ** 2).sum(dim=1)

    def at_time(self, scheduler, t):
        """The exact marginal p_t of x_t = alpha z + beta eps; t one number in [0, 1]."""
        t = torch.as_tensor(t, dtype=self.means.dtype, device=self.means.device)
        require(t.ndim == 0, f"t must be one number, got shape {tuple(t.shape)}")
        alpha, beta = scheduler.alpha(t), scheduler.beta(t)
        if t.device.type == "cpu" and not 0 <= t <= 1:
            raise ValueError(f"t must lie in [0, 1], got {t.item():g}")
        stds = torch.sqrt(alpha**2 * self.stds**2 + beta**2)
        return GaussianMixture(alpha * self.means, stds, self.weights)

    def _velocity_moments(self, x, t, scheduler):
        """For each x and k: P(k | x_t = x) (B, K, 1), and mean (B, K, D) and variance (B, K)
        per dimension of alpha_dot z + beta_dot eps given x_t = x and the component k."""
        self._check_points(x)
        t = expand_like(t, x).to(x.dtype)
        alpha, beta = scheduler.alpha(t), scheduler.beta(t)
        alpha_dot, beta_dot = scheduler.alpha_dot(t), scheduler.beta_dot(t)
        variance = alpha**2 * self.stds**2 + beta**2  # (B, K)
        offset = x[:, None, :] - alpha[:, :, None] * self.means  # (B, K, D)
        log_joint = torch.log(self.weights) - offset.square().sum(dim=2) / (2 * variance)
        log_joint = log_joint - x.shape[1] / 2 * torch.log(variance)
        gain = (alpha_dot * alpha * self.stds**2 + beta_dot * beta) / variance
        mean = alpha_dot[:, :, None] * self.means + gain[:, :, None] * offset
        spread = self.stds**2 * (alpha_dot * beta - alpha * beta_dot) ** 2 / variance
        return log_joint.softmax(dim=1)[:, :, None], mean, spread

    def velocity(self, x, t, scheduler):
        """The exact marginal velocity u_t(x) = E[alpha_dot z + beta_dot eps | x_t = x], (B, D).
        t: (B,), in [0, 1]; finite at both ends."""
        posterior, mean, _ = self._velocity_moments(x, t, scheduler)
        return (posterior * mean).sum(dim=1)

    def velocity_variance(self, x, t, scheduler):
        """Var(u_t(x | z) | x_t = x), summed over the D dimensions, (B,).
        Its mean over t and x_t, divided by D, is the least value of flow_matching_loss."""
        posterior, mean, spread = self._velocity_moments(x, t, scheduler)
        average = (posterior * mean).sum(dim=1, keepdim=True)
        between = (posterior * (mean - average).square()).sum(dim=(1, 2))
        return between + x.shape[1] * (posterior[:, :, 0] * spread).sum(dim=1)


def empirical_velocity(data, x, t, scheduler):
    """The exact marginal velocity u_t(x), like x, where p_data is the given data themselves.
    It is u_t(x | z) at z = E[z | x_t = x], the mean of the data weighted by the softmax of
    -|x - alpha z|^2 / (2 beta^2): what flow_matching_loss on these data is minimised by.
    data (N, *D), points or images in [-1, 1]; x (B, *D); t (B,), in [0, 1): the weights are 0/0,
    and the result NaN, where beta = 0. Raises ValueError for wrong shapes."""
    if not len(data) or data.shape[1:] != x.shape[1:]:
        shapes = f"{tuple(data.shape)} and {tuple(x.shape)}"
        raise ValueError(f"data must be (N, *D) and x (B, *D), got {shapes}")
    _check_floats(data, "data")
    path = GaussianPath(scheduler)
    z, points = _rows(data).to(x.dtype), _rows(x)
    alpha, beta, _, _ = path._coefficients(points, points, t)
    half_squares, means = z.square().sum(dim=1) / 2, []
    rows = max(1, 2**22 // len(z))  # 16 MB of weights at a time
    for p, a, b in zip(*(v.split(rows) for v in (points, alpha, beta)), strict=True):
        weights = ((a * p) @ z.T - a**2 * half_squares).div_(b**2).softmax(dim=1)
        means.append(weights @ z)
    return path.conditional_velocity(x, torch.cat(means).reshape(x.shape), t)


def _covers(polygons, x):
    """How many of the polygons (corners (K, 2) each) contain each of the points x (N, 2)."""
    points = x.detach().cpu()
    return sum(torch.from_numpy(Polygon(p).contains_points(points)) for p in polygons).to(x.device)


def inside_silhouette(name, x):
    """Whether points x (N, 2) lie in a drawing, "cat" or "dog", whose filled polygons and those
    cut out of them are in data/silhouettes.json: bool (N,)."""
    drawings = json.loads((DATA / "silhouettes.json").read_text())
    require(name in drawings, f"unknown silhouette {name!r}; choose one of {sorted(drawings)}")
    return (_covers(drawings[name]["filled"], x) > 0) & (_covers(drawings[name]["cut"], x) == 0)


def _sample_inside(inside, n, generator):
    """Draw n points, (n, 2), uniformly from where inside(points) holds in [-1.3, 1.3]^2."""
    device = "cpu" if generator is None else generator.device
    found = torch.empty(0, 2, device=device)
    while len(found) < n:
        points = 2.6 * torch.rand(4 * n + 64, 2, generator=generator, device=device) - 1.3
        found = torch.cat([found, points[inside(points)]])
    return found[:n]


def silhouette(name, n, *, generator=None):
    """Draw n points, (n, 2), uniformly from a drawing in [-1.3, 1.3]^2: "cat", "dog", no other."""
    return _sample_inside(functools.partial(inside_silhouette, name), n, generator)


def lettering(text, n, *, generator=None):
    """Draw n points, (n, 2), uniformly from a word in bold letters, as wide as [-1.3, 1.3].
    The letters are matplotlib's TextPath, centred, their holes left out by the even-odd rule;
    one that would be higher than wide is as high as that. Raises ValueError for a blank text."""
    from matplotlib.textpath import TextPath

    require(text.strip(), f"text must have letters to draw, got {text!r}")
    outlines = TextPath((0, 0), text, prop={"family": "DejaVu Sans", "weight": "bold"})
    low, high = outlines.get_extents().get_points()
    centre, scale = torch.tensor((low + high) / 2), (high - low).max() / 2.6

    def inside(points):
        crossings = _covers(outlines.to_polygons(), points.cpu() * scale + centre)
        return (crossings % 2 == 1).to(points.device)

    return _sample_inside(inside, n, generator)


FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat")
FASHION_CLASSES += ("sandal", "shirt", "sneaker", "bag", "ankle boot")

FASHION_SHA256 = {  # of the decompressed IDX files, as published by Zalando Research
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def _unpack(name):
    """The content of data/<name>.gz, verified."""
    packed = DATA / f"{name}.gz"
    remedy = f"restore it with `git checkout -- {packed.relative_to(ROOT)}`"
    if not packed.exists():
        raise FileNotFoundError(f"{packed} is missing; {remedy}")
    try:
        content = gzip.decompress(packed.read_bytes())
    except Exception:  # OSError, EOFError or zlib.error
        content = b""
    if hashlib.sha256(content).hexdigest() != FASHION_SHA256[name]:
        raise ValueError(f"{packed} is damaged, or not the published file; {remedy}")
    return content


def load_fashion_mnist(split="train"):
    """Load Fashion-MNIST from data/: images uint8 (N, 1, 28, 28) and labels int64 (N,), N = 60 000;
    of "test" 10 000. Raises FileNotFoundError if a file is missing, ValueError if one is damaged
    (its SHA-256 tells) or the split unknown."""
    from torchvision.datasets import FashionMNIST  # a slow import, for images only

    require(split in ("train", "test"), f'split must be "train" or "test", got {split!r}')
    prefix = "train" if split == "train" else "t10k"
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name in FASHION_SHA256:  # torchvision looks for all four, and reads two
            (raw / name).write_bytes(_unpack(name) if name.startswith(prefix) else b"")
        dataset = FashionMNIST(folder, train=split == "train")
    return dataset.data.unsqueeze(1), dataset.targets


def to_model_range(images):
    """Map grey levels 0 .. 255, integers, to float32 in [-1, 1], the range of image models."""
    seen = images.dtype != torch.uint8 and images.device.type == "cpu"  # no GPU synchronisation
    outside = seen and ((images < 0) | (images > 255)).any()
    wrong = outside or images.is_floating_point() or images.dtype == torch.bool
    kind = f"{images.dtype}; floats x in [0, 1] need 2 * x - 1"
    require(not wrong, f"images must be integers, and 0 .. 255, got {kind}")
    return images.float() / 127.5 - 1


def to_image_range(x):
    """Map model values, floats, to grey levels in [0, 1] for display, clipping what is outside."""
    require(x.is_floating_point(), f"x must be floats of [-1, 1], got {x.dtype} (to_model_range)")
    return ((x.float() + 1) / 2).clamp(0, 1)


# 4  Schedules --------------------------------------------------------------------------
class PolynomialScheduler:
    """alpha = t^p, beta = 1 - t^p with p >= 1. Methods of all schedulers: t any shape -> like t."""

    def __init__(self, power):
        require(power >= 1, f"power must be at least 1, got {power}: alpha_dot infinite at t = 0")
        self.power = power

    def alpha(self, t):
        return t**self.power

    def beta(self, t):
        return 1 - t**self.power

    def alpha_dot(self, t):
        return self.power * t ** (self.power - 1)

    def beta_dot(self, t):
        return -self.power * t ** (self.power - 1)


class LinearScheduler(PolynomialScheduler):
    """alpha = t, beta = 1 - t (assignment, question 2a): the polynomial schedule of power 1."""

    def __init__(self):
        super().__init__(1)


class CosineScheduler:
    """alpha = sin(pi t / 2), beta = sin(pi (1 - t) / 2): variance preserving, exact ends."""

    def alpha(self, t):
        return torch.sin(math.pi / 2 * t)

    def beta(self, t):
        return torch.sin(math.pi / 2 * (1 - t))

    def alpha_dot(self, t):
        return math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def beta_dot(self, t):
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)


class FunctionScheduler:
    """A schedule made of two functions of t, (t) -> like t, of torch operations: for experiments.
    The derivatives are autograd's. Not checked; see check_scheduler."""

    def __init__(self, alpha, beta):
        self.alpha, self.alpha_dot = alpha, functools.partial(self._derivative, alpha)
        self.beta, self.beta_dot = beta, functools.partial(self._derivative, beta)

    @staticmethod
    def _derivative(function, t):
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            return torch.autograd.grad((function(t) + 0 * t).sum(), t)[0]  # constants have one, too


SCHEDULERS = dict(  # compared in question 4(d)
    linear=LinearScheduler(), cosine=CosineScheduler(), polynomial=PolynomialScheduler(2)
)


def check_scheduler(scheduler):
    """Check the requirements on (alpha, beta) of section 2 of the assignment, in float64.
    alpha rises from 0 to 1, beta falls from 1 to 0, and alpha_dot and beta_dot are the derivatives,
    finite on [0, 1]. Returns the scheduler; raises ValueError naming the property that fails."""
    grid, h = torch.linspace(0, 1, 2001, dtype=torch.float64), 1e-6
    for name, ends, sign in (("alpha", [0.0, 1.0], 1), ("beta", [1.0, 0.0], -1)):
        value, slope = getattr(scheduler, name), getattr(scheduler, f"{name}_dot")
        found = [round(v, 6) for v in value(grid[[0, -1]]).tolist()]
        require(found == ends, f"endpoints: {name} is {found} at t = 0, 1, not {ends}")
        if not (sign * value(grid).diff() >= 0).all():
            raise ValueError(f"monotone: {name} must be {'in' if sign > 0 else 'de'}creasing")
        if len(wrong := grid[~torch.isfinite(slope(grid))]):
            raise ValueError(f"finite derivative: {name}_dot is not finite at t = {wrong[0]:g}")
        difference = (value(grid[1:-1] + h) - value(grid[1:-1] - h)) / (2 * h)
        if not torch.allclose(slope(grid)[1:-1], difference, rtol=1e-4, atol=1e-4):
            raise ValueError(f"finite derivative: {name}_dot is not the derivative of {name}")
    return scheduler


# 5  Paths ------------------------------------------------------------------------------
def expand_like(t, x):
    """Reshape t (B,) to (B, 1, ..., 1) so that it broadcasts over x (B, *D)."""
    require(t.shape == x.shape[:1], f"t must have shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


class GaussianPath:
    """The conditional path x_t = alpha_t z + beta_t eps (assignment, section 2).
    scheduler: an object with alpha, beta, alpha_dot and beta_dot. Throughout, x, z and eps are
    (B, *D), t is (B,), in [0, 1], and results are like x. Raises ValueError for anything else."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def _coefficients(self, x, other, t):
        """alpha, beta, alpha_dot, beta_dot, to broadcast over x; no check makes a GPU wait."""
        require(x.shape == other.shape, f"shapes differ: {tuple(x.shape)} and {tuple(other.shape)}")
        _check_floats(x, "x")
        require(t.device.type != "cpu" or ((t >= 0) & (t <= 1)).all(), "t must lie in [0, 1]")
        t, s = expand_like(t, x).to(x.dtype), self.scheduler
        return s.alpha(t), s.beta(t), s.alpha_dot(t), s.beta_dot(t)

    def sample(self, z, t, eps):
        """x_t = alpha z + beta eps, a draw of p_t(. | z) for standard normal eps."""
        alpha, beta, _, _ = self._coefficients(z, eps, t)
        return alpha * z + beta * eps

    def velocity_target(self, z, t, eps):
        """u_t(x_t | z) = alpha_dot z + beta_dot eps, finite on all of [0, 1] (question 3a)."""
        _, _, alpha_dot, beta_dot = self._coefficients(z, eps, t)
        return alpha_dot * z + beta_dot * eps

    def conditional_velocity(self, x, z, t):
        """u_t(x | z) = (alpha_dot - beta_dot alpha / beta) z + (beta_dot / beta) x, t < 1."""
        alpha, beta, alpha_dot, beta_dot = self._coefficients(x, z, t)
        return (alpha_dot - beta_dot / beta * alpha) * z + beta_dot / beta * x

    def conditional_score(self, x, z, t):
        """grad log p_t(x | z) = -(x - alpha z) / beta^2, t < 1 (question 5a)."""
        alpha, beta, _, _ = self._coefficients(x, z, t)
        return -(x - alpha * z) / beta**2

    def velocity_to_score(self, u, x, t):
        """s = (alpha u - alpha_dot x) / (beta (alpha_dot beta - alpha beta_dot)), t < 1.
        For the linear schedule (t u - x) / (1 - t). 0/0 where alpha_dot = 0 at t = 0."""
        alpha, beta, alpha_dot, beta_dot = self._coefficients(x, u, t)
        return (alpha * u - alpha_dot * x) / (beta * (alpha_dot * beta - alpha * beta_dot))

    def score_to_velocity(self, s, x, t):
        """u = (beta (alpha_dot beta - alpha beta_dot) s + alpha_dot x) / alpha, t > 0."""
        alpha, beta, alpha_dot, beta_dot = self._coefficients(x, s, t)
        return (beta * (alpha_dot * beta - alpha * beta_dot) * s + alpha_dot * x) / alpha

    def noise_to_score(self, eps, t):
        """s = -eps / beta, t < 1."""
        _, beta, _, _ = self._coefficients(eps, eps, t)
        return -eps / beta

    def velocity_to_data(self, u, x, t):
        """E[z | x_t = x] = (beta u - beta_dot x) / (alpha_dot beta - alpha beta_dot)."""
        alpha, beta, alpha_dot, beta_dot = self._coefficients(x, u, t)
        return (beta * u - beta_dot * x) / (alpha_dot * beta - alpha * beta_dot)


def reschedule(velocity, scheduler):
    """The velocity of another scheduler from one of the linear path, without retraining.
    With c = alpha + beta and s = alpha / c, x_t = c x'_s, where x' is the linear path; so
    u_t(x) = c_dot x / c + c s_dot u'_s(x / c). Any path of the form alpha z + beta eps."""

    def rescheduled(x, t):
        alpha, beta = scheduler.alpha(t), scheduler.beta(t)
        alpha_dot, beta_dot = scheduler.alpha_dot(t), scheduler.beta_dot(t)
        scale = alpha + beta
        stretch = (alpha_dot * beta - alpha * beta_dot) / scale  # c s_dot
        linear_x = x / expand_like(scale, x)
        growth = expand_like(alpha_dot + beta_dot, x) * linear_x
        u = check_like(velocity(linear_x, alpha / scale), x, "velocity")
        return growth + expand_like(stretch, x) * u

    return rescheduled


# 6  Networks ---------------------------------------------------------------------------
class MLP(nn.Module):
    """Multilayer perceptron on (x, t): x (B, dim), t (B,) -> (B, dim).
    `layers` hidden layers of width `hidden`, with SiLU; for dim = 2 the input is in R^3. octaves:
    sines and cosines of x at pi, 2 pi, 4 pi, ..., so many frequencies, are inputs too. time_input:
    a function (B,) -> (B,), whose value is the input in place of t."""

    def __init__(self, dim=2, hidden=64, layers=4, octaves=0, time_input=None):
        super().__init__()
        self.dim, self.time_input = dim, time_input
        frequencies = math.pi * 2.0 ** torch.arange(octaves)
        self.register_buffer("frequencies", frequencies, persistent=False)
        widths = [dim * (1 + 2 * octaves) + 1, *layers * [hidden]]
        blocks = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.SiLU())]
        self.net = nn.Sequential(*blocks, nn.Linear(widths[-1], dim))

    def forward(self, x, t):
        require(x.shape[1:] == (self.dim,), f"x must be (B, {self.dim}), got {tuple(x.shape)}")
        if self.time_input is not None:
            t = check_like(self.time_input(t), t, "time_input")
        angles = (x[:, :, None] * self.frequencies).flatten(1)  # (B, dim octaves)
        return self.net(torch.cat([x, expand_like(t, x), angles.sin(), angles.cos()], dim=1))


class ResidualLayer(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) with the time in the second norm (figure 1).
    The time embedding becomes a scale and a shift of the second norm. The last convolution
    starts at zero, so that a fresh layer is the identity. x (B, C, H, W), embedding (B, E)."""

    def __init__(self, channels, embedding):
        super().__init__()
        groups = max(1, channels // 16)  # of 16: the size at which bf16 is fast on the CPU
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return x + self.conv2(F.silu(h))


class TimeEmbedding(nn.Module):
    """Embed t (B,) as (B, size): sines and cosines of 0.25 to 16 turns, then a small MLP."""

    def __init__(self, size):
        super().__init__()
        turns = torch.logspace(-2, 4, size // 4, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * turns, persistent=False)
        first, second = nn.Linear(size // 2, size), nn.Linear(size, size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())

    def forward(self, t):
        angles = t[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class UNet(nn.Module):
    """The UNet of figure 1: model(x, t, labels=None), x (B, C, H, W), t (B,) -> like x.
    Encoder: two residual layers, then downsampling. Bottleneck: three residual layers. Decoder:
    upsampling, the skip concatenated and mixed by a 1x1 convolution, then two residual layers.
    Resolution 28 -> 14 -> 7; H and W must be multiples of 4. With num_classes > 0, labels (B,) are
    integers below it; num_classes itself is the null label, for which labels=None stands too."""

    def __init__(self, channels=(32, 64, 128), in_channels=1, num_classes=0, embedding=128):
        super().__init__()
        if len(channels) != 3 or any(c % 16 for c in channels):
            raise ValueError(f"channels must be three multiples of 16, got {channels}")
        require(embedding % 4 == 0, f"embedding must be a multiple of 4, got {embedding}")
        c1, c2, c3 = channels
        self.in_channels, self.num_classes = in_channels, num_classes
        self.embed_time = TimeEmbedding(embedding)
        self.embed_label = nn.Embedding(num_classes + 1, embedding) if num_classes else None

        def layers(count, width):
            return nn.ModuleList([ResidualLayer(width, embedding) for _ in range(count)])

        self.stem = nn.Conv2d(in_channels, c1, 3, padding=1)
        self.encoder1, self.down1 = layers(2, c1), nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.encoder2, self.down2 = layers(2, c2), nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.bottleneck = layers(3, c3)
        # the convolution of an upsampling runs before it, at a quarter of the cost
        self.up2, self.mix2 = nn.Conv2d(c3, c2, 3, padding=1), nn.Conv2d(2 * c2, c2, 1)
        self.decoder2 = layers(2, c2)
        self.up1, self.mix1 = nn.Conv2d(c2, c1, 3, padding=1), nn.Conv2d(2 * c1, c1, 1)
        self.decoder1 = layers(2, c1)
        last = nn.Conv2d(c1, in_channels, 3, padding=1)
        self.head = nn.Sequential(nn.GroupNorm(c1 // 16, c1), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, labels=None):
        self._check(x, t, labels)
        emb = self.embed_time(t)
        if self.embed_label is not None:
            label = self.embed_label.weight[-1] if labels is None else self.embed_label(labels)
            emb = emb + label

        def through(layers, h):
            for layer in layers:
                h = layer(h, emb)
            return h

        skip1 = through(self.encoder1, self.stem(x.contiguous(memory_format=torch.channels_last)))
        skip2 = through(self.encoder2, self.down1(skip1))  # (B, c2, H/2, W/2)
        h = through(self.bottleneck, self.down2(skip2))  # (B, c3, H/4, W/4)
        h = F.interpolate(self.up2(h), scale_factor=2.0, mode="nearest")
        h = through(self.decoder2, self.mix2(torch.cat([h, skip2], dim=1)))
        h = F.interpolate(self.up1(h), scale_factor=2.0, mode="nearest")
        h = through(self.decoder1, self.mix1(torch.cat([h, skip1], dim=1)))
        return self.head(h).to(x.dtype)

    def _check(self, x, t, labels):
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % 4 or x.shape[3] % 4:
            wanted = f"(B, {self.in_channels}, H, W) with H and W multiples of 4"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        expand_like(t, x)  # refuses another shape of t; below, no check makes a GPU wait
        if labels is None:
            return
        require(self.embed_label is not None, "labels given to a UNet built with num_classes=0")
        if labels.shape != t.shape:
            raise ValueError(f"labels must have shape {tuple(t.shape)}, got {tuple(labels.shape)}")
        inside = labels.device.type != "cpu" or ((labels >= 0) & (labels <= self.num_classes)).all()
        require(inside, f"labels must lie in 0 .. {self.num_classes}, the null label")


def guided_velocity(model, labels, guidance):
    """Classifier-free guidance u(x) + w (u(x | y) - u(x)) as a velocity (Ho & Salimans 2022).
    model: a UNet, asked once for both; labels y (B,); w a number or (B,), 1: the conditional u."""

    def velocity(x, t):
        both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        twice = torch.cat([x, x])
        u = check_like(model(twice, torch.cat([t, t]), both), twice, "model")
        with_label, without = u.chunk(2)
        scale = torch.as_tensor(guidance, dtype=x.dtype, device=x.device)
        scale = expand_like(scale, x) if scale.ndim else scale
        return without + scale * (with_label - without)

    return velocity


class NoiseScore(nn.Module):
    """Score model s = -eps_hat / beta around a network that predicts the noise.
    From s_t(x) = -E[eps | x_t = x] / beta_t (question 5a). Infinite at t = 1, where beta = 0."""

    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, x, t):
        beta = self.path.scheduler.beta(expand_like(t, x).to(x.dtype))
        return -check_like(self.net(x, t), x, "net") / beta


# 7  Training ---------------------------------------------------------------------------
def _draw_times(z, times, generator):
    """Times (B,) for a batch z (B, *D): uniform on [0, 1), or those of times(n, generator)."""
    require(z.is_floating_point(), f"z must be floats, got {z.dtype}; images need to_model_range")
    require(len(z), "the batch is empty: its mean loss is undefined")
    if times is None:
        device = z.device if generator is None else generator.device
        return torch.rand(len(z), generator=generator, device=device, dtype=z.dtype).to(z.device)
    return check_like(times(len(z), generator).to(z), z.reshape(len(z), -1)[:, 0], "times")


def flow_matching_loss(model, z, path, *, source=None, times=None, generator=None):
    """Conditional flow matching loss: mean of |u(x_t, t) - (alpha_dot z + beta_dot eps)|^2.
    One draw of t and eps ~ N(0, I) for each z (B, *D) (algorithm 1; Lipman et al. 2023, eq. 9).
    source (B, *D) replaces eps: a flow from data to data. times: a sampler (n, generator) -> t (n,)
    in place of the uniform one on [0, 1). Returns a scalar, the mean over the batch of the squared
    error per dimension. ValueError if the model's output is not like x."""
    t = _draw_times(z, times, generator)
    eps = _randn_like(z, generator) if source is None else source
    target = path.velocity_target(z, t, eps)
    u = check_like(model(path.sample(z, t, eps), t), target, "the model")
    return (u - target).square().mean()


def score_matching_loss(model, z, path, *, weighted=True, times=None, generator=None):
    """Denoising score matching: mean of w |s(x_t, t) + eps / beta|^2 for a score model.
    weighted: w = beta^2, so that the loss is |beta s + eps|^2, finite, with the minimiser of the
    assignment's w = 1, whose expectation is infinite (question 5a). z (B, *D), times, result and
    errors as for flow_matching_loss."""
    t, eps = _draw_times(z, times, generator), _randn_like(z, generator)
    beta = path.scheduler.beta(expand_like(t, z))
    residual = beta * check_like(model(path.sample(z, t, eps), t), eps, "the score model") + eps
    return (residual if weighted else residual / beta).square().mean()


def image_batches(images, size, labels=None):
    """Return sample_batch(generator) -> (size, 1, 28, 28) in [-1, 1], drawn with replacement.
    images: uint8 (N, 1, 28, 28), on the generator's device; with labels (N,), batches are pairs."""

    def sample_batch(generator):
        index = torch.randint(len(images), (size,), generator=generator, device=images.device)
        z = to_model_range(images[index])
        return z if labels is None else (z, labels[index])

    return sample_batch


def learning_rate(step, steps, peak, warmup, decay=True):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at `steps`, if decay."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * decay * (step - warmup) / (steps - warmup))) / 2


def choose_dtype(model, device):
    """The fastest safe autocast dtype for training: "float32", "bfloat16" or "float16".
    Only convolutions are worth it. bfloat16 where the hardware has units for it (CPU:
    AVX512-BF16 or AMX; CUDA: compute capability 8.0), float16 on older CUDA devices."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bfloat16" if fast else "float32"


def orthogonalize(matrices, dtype=torch.float32):
    """Nearly the nearest semi-orthogonal matrices to (K, m, n), by five Newton-Schulz steps.
    U S V^T becomes U S' V^T, S' in about [0.7, 1.2] (Jordan et al. 2024); dtype: of products."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x.to(matrices.dtype)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps, for convolution kernels (Jordan et al. 2024).
    A kernel (out, in, k, k) is the matrix (out, in k k); its step is the Nesterov momentum,
    orthogonalised, times lr sqrt(max(1, rows / columns)). Kernels of one shape go together."""

    def __init__(self, parameters, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        with_gradient = [kernel for kernel in group["params"] if kernel.grad is not None]
        for shape in {kernel.shape for kernel in with_gradient}:
            kernels = [kernel for kernel in with_gradient if kernel.shape == shape]
            looks_ahead = []
            for kernel in kernels:
                velocity = self.state[kernel].setdefault("velocity", torch.zeros_like(kernel))
                velocity.lerp_(kernel.grad, 1 - group["momentum"])
                looks_ahead.append(kernel.grad.lerp(velocity, group["momentum"]).flatten(1))
            matrices = orthogonalize(torch.stack(looks_ahead), self.dtype)
            rate = group["lr"] * max(1, matrices.shape[1] / matrices.shape[2]) ** 0.5
            for kernel, matrix in zip(kernels, matrices, strict=True):
                kernel.sub_(matrix.reshape(shape), alpha=rate)


def _plain(value, name):
    """value in Python's own types and tensors, which weights_only=True reads back."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()  # a NumPy number, or a tensor without axes
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {_plain(k, name): _plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v, f"{name}[{i}]") for i, v in enumerate(value))
    if value is None or torch.is_tensor(value):
        return value
    kind = f"{type(value).__name__}, which a weights file cannot hold"
    raise ValueError(f"{name} is a {kind}; record it as numbers, text, lists or tensors")


def _write_tensors(path, state):
    """Write state to path by torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _read_tensors(path, kind, remedy):
    """What _write_tensors wrote; ValueError if the file is damaged or holds other objects."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fault = f"is not a readable {kind} ({type(error).__name__})"
        raise ValueError(f"{path} {fault}; {remedy}") from error


def train(
    model,
    loss,
    sample_batch,
    *,
    steps,
    lr=1e-3,
    muon_lr=None,
    seed=0,
    ema=0.999,
    warmup=200,
    decay=True,
    clip=1.0,
    dtype=None,
    checkpoint=None,
    checkpoint_every=250,
    config=None,
    log=None,
    on_step=None,
):
    """Train with Adam and return the losses, float32 (steps,) on the CPU.
    loss(model, batch, *, generator) -> scalar; sample_batch(generator) -> batch. The generator is
    on the model's device, seeded with seed, as is the global random state (dropout). The rate warms
    up, over at most a tenth of the steps, and decays (learning_rate); gradients are clipped at norm
    `clip`, if not None; in the end the model is in eval mode and holds the exponential moving
    average of its weights and buffers, of decay min(ema, (1 + n) / (10 + n)).
    muon_lr: rate of Muon for the inner convolutions, of at least 16 channels in and out. dtype: of
    the autocast, by default choose_dtype's. config: a dict, what else a checkpoint must share with
    the run. log: a dict that gets "seconds", "dtype" and "runs", where each part was made.
    checkpoint: a file, written every checkpoint_every steps, on Ctrl-C and on SIGTERM; a run that
    finds it goes on there: bit for bit on the same kind of device and dtype, with new random
    numbers from (seed, step) on another. on_step(step, losses, model) is called after every step.
    Raises FloatingPointError if the loss or its gradient is not finite, ValueError for a checkpoint
    that is damaged or of another run."""
    named = getattr(loss, "func", loss)  # a partial has the name of its function
    name = getattr(named, "__qualname__", type(named).__qualname__)
    options = dict(steps=steps, lr=lr, muon_lr=muon_lr, seed=seed, ema=ema, warmup=warmup)
    options |= dict(decay=decay, clip=clip, loss=name)
    run = _TrainingRun(model, _plain((config or {}) | options, "config"), dtype, checkpoint)
    hidden = os.environ.get("FLOW_PROGRESS") == "0"
    bar = tqdm(total=steps, initial=run.step, desc="training", disable=hidden, leave=False)
    with run.environment(), bar:
        try:
            while run.step < steps:
                start = time.perf_counter()
                model.train()  # on_step may have left it in eval mode
                run.update(loss, sample_batch)
                due = run.step % checkpoint_every == 0 or run.step == steps
                if due or run.step % 50 == 0:  # the only times that the host waits
                    if fault := run.fault():
                        raise FloatingPointError(fault)
                    recent = run.losses[max(0, run.step - 50) : run.step]
                    bar.set_postfix_str(f"loss {recent.mean():.4f}")
                run.seconds += time.perf_counter() - start
                if due:
                    run.save()
                bar.update()
                if on_step is not None:
                    on_step(run.step, run.losses[: run.step], model)
        except (KeyboardInterrupt, SystemExit):
            run.save()
            raise
    torch._foreach_copy_(run.tracked, run.averages)
    if log is not None:
        log.update(seconds=run.seconds, dtype=run.dtype, runs=run.parts)
    model.eval()
    return run.losses.cpu()


class _TrainingRun:
    """The state that train advances, saves and restores: config is all plain values."""

    def __init__(self, model, config, dtype, checkpoint=None):
        trained = [p for p in model.parameters() if p.requires_grad]
        require(trained, "the model has no parameter that requires a gradient")
        require(config["steps"] >= 1, f"steps must be at least 1, got {config['steps']}")
        self.model, self.trained, self.device = model, trained, trained[0].device
        self.config = config | {"parameters": sum(p.numel() for p in trained)}
        self.dtype = dtype or choose_dtype(model, self.device)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f'dtype must be "float32", "bfloat16" or "float16", got {dtype!r}')
        self.parameters, self.buffers = [p.detach() for p in model.parameters()], [*model.buffers()]
        self.tracked = [p.detach() for p in trained]
        self.tracked += [b for b in self.buffers if b.is_floating_point()]
        self.averages = [w.clone() for w in self.tracked]
        inner = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) >= 16]
        inner = [] if config["muon_lr"] is None else inner
        rest = [p for p in trained if all(p is not kernel for kernel in inner)]
        adam = functools.partial(torch.optim.Adam, lr=config["lr"], fused=self.device.type != "mps")
        products = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        muon = functools.partial(Muon, lr=config["muon_lr"], dtype=products)
        self.optimizers = [make(group) for make, group in ((adam, rest), (muon, inner)) if group]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")
        self.generator = torch.Generator(self.device).manual_seed(config["seed"])
        modules = (torch, torch.get_device_module(self.device))
        self.global_random = [module for module in modules if hasattr(module, "get_rng_state")]
        self.losses = torch.zeros(config["steps"], device=self.device)
        self.norms = torch.zeros_like(self.losses)
        self.step, self.seconds, self.saved_random = 0, 0.0, []
        self.parts = [{"step": 0, "device": self.device.type, "dtype": self.dtype}]
        self.path = None if checkpoint is None else Path(checkpoint)
        if self.path is not None and self.path.exists():
            self.restore()
            print(f"{self.path}: goes on at step {self.step} of {config['steps']}")

    @contextlib.contextmanager
    def environment(self):
        """Global random numbers from the seed, SIGTERM as SystemExit, one thread for a small
        network (two would wait for each other); all as before afterwards."""
        threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
        before = [module.get_rng_state() for module in self.global_random]
        with contextlib.suppress(ValueError):  # signals belong to the main thread
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        if self.device.type == "cpu" and self.config["parameters"] < 100_000:
            torch.set_num_threads(1 if self.dtype == "float32" else threads)
        torch.manual_seed(hash((self.config["seed"], self.step)) % 2**32)
        for module, state in zip(self.global_random, self.saved_random, strict=False):
            module.set_rng_state(state)
        self.remember()
        try:
            yield
        finally:
            for module, state in zip(self.global_random, before, strict=True):
                module.set_rng_state(state)
            torch.set_num_threads(threads)
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)

    def remember(self):
        """Keep what the next step changes before it is complete; from here it can be repeated."""
        self.kept_buffers = [b.clone() for b in self.buffers]
        self.random = [self.generator.get_state(), *(m.get_rng_state() for m in self.global_random)]

    def update(self, loss, sample_batch):
        """One optimisation step."""
        batch, config, dtype = sample_batch(self.generator), self.config, getattr(torch, self.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            value = loss(self.model, batch, generator=self.generator)
        warmup = min(config["warmup"], config["steps"] // 10)
        for optimizer in self.optimizers:
            group, peak = optimizer.param_groups[0], optimizer.defaults["lr"]
            group["lr"] = learning_rate(self.step, config["steps"], peak, warmup, config["decay"])
            optimizer.zero_grad()
        self.scaler.scale(value).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        clip = math.inf if config["clip"] is None else config["clip"]
        norm = nn.utils.clip_grad_norm_(self.trained, clip)
        self.losses[self.step] = value.detach()
        self.random = None  # until the step is complete, it cannot be repeated
        if not self.scaler.is_enabled():
            self.norms[self.step] = norm.detach()
        if not self.scaler.is_enabled() or torch.isfinite(norm):  # float16: skip an overflow
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        decay = min(config["ema"], (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.tracked, 1 - decay)
        self.step += 1
        self.remember()

    def fault(self):
        """What was not finite first, the loss or its gradient, and what to do; or None."""
        both = torch.stack([self.losses, self.norms], dim=1)[: self.step]
        faults = (~torch.isfinite(both)).nonzero().tolist()  # by step, the loss first
        if not faults:
            return None
        (n, i), names = faults[0], ("loss", "norm of the gradient")
        saved = self.path is not None and self.path.exists()
        kept = f"the last good state is in {self.path}" if saved else "nothing was saved"
        return f"the {names[i]} is {both[n, i]} at step {n}; {kept}. Lower lr and start again"

    def save(self):
        """Write a checkpoint, of the state before an interrupted step; of no half step or fault."""
        if self.path is None or self.random is None or self.fault():
            return
        state = {k: vars(self)[k] for k in ("config", "step", "seconds", "parts", "random")}
        state["tensors"] = [*self.parameters, *self.kept_buffers, *self.averages, self.losses]
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        _write_tensors(self.path, state | {"scaler": self.scaler.state_dict()})

    def restore(self):
        """Go on from the checkpoint, of any device; ValueError if damaged or of another run."""
        path, again = self.path, "delete it to start again"
        state = _read_tensors(path, "checkpoint", again)
        if not isinstance(state, dict) or not state.keys() >= {"config", "tensors", "random"}:
            raise ValueError(f"{path} is not a checkpoint of train; name another file, or {again}")
        for field, value in self.config.items():
            found = state["config"].get(field)
            change = f"{field} = {found!r}, now {value!r}"
            require(found == value, f"{path} was written with {change}; {again}, or restore it")
        tensors = [*self.parameters, *self.buffers, *self.averages, self.losses]
        if [own.shape for own in tensors] != [value.shape for value in state["tensors"]]:
            raise ValueError(f"{path} holds weights of other shapes, of another network; {again}")
        for own, value in zip(tensors, state["tensors"], strict=True):
            own.copy_(value)
        self.step, self.seconds = state["step"], state["seconds"]
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            value["param_groups"][0]["fused"] = optimizer.defaults.get("fused")  # of this device
            optimizer.load_state_dict(value)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        last, here = state["parts"][-1], self.parts[0] | {"step": self.step}
        if last["device"] == self.device.type:
            self.generator.set_state(state["random"][0])
            self.saved_random = state["random"][1:]
        else:  # generators of other devices have other states
            self.generator.manual_seed(hash((self.config["seed"], self.step)) % 2**32)
        changed = last | {"step": self.step} != here
        self.parts = state["parts"] + ([here] if changed else [])


def _existing_file(name, kind, remedy, announced=False):
    """Path of a file to read, one that was made here, said if announced, before a committed one."""
    for path in (output_folder(kind) / name, DATA / kind / name):
        if path.exists():
            if announced and DATA not in path.parents:
                print(f"using {path}")
            return path
    raise FileNotFoundError(f"{path} does not exist; {remedy}")


def _read_weights(name, announced=False):
    remedy = f"make it by running the notebook that trains {name} with FLOW_RETRAIN={name}"
    path = _existing_file(f"{name}.pt", "weights", remedy, announced)
    again = "restore it with git checkout, or train it again with FLOW_RETRAIN=1"
    return path, _read_tensors(path, "weights file", again)


def _halve(value):
    """A tensor in float16 on the CPU; as it is where float16 loses more than its rounding."""
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    require(torch.isfinite(value).all(), "the weights are not finite; nothing was written")
    half = value.half()
    lost = (half.to(value.dtype) - value).abs()
    return half if not (lost > 1e-3 * value.abs().amax()).any() else value.float()


def save_weights(model, name, record):
    """Write a model's weights, float16, and the record of their run to <name>.pt, atomically.
    record: a dict of plain Python values and tensors, with the configuration under "config". What
    float16 cannot hold stays float32. Raises ValueError for what could not be read back."""
    state = {k.replace("_orig_mod.", ""): _halve(v) for k, v in model.state_dict().items()}
    content = {"weights": state, "record": _plain(record, "record")}
    _write_tensors(output_folder("weights") / f"{name}.pt", content)


def load_weights(model, name, *, expect=None):
    """Load <name>.pt into the model; returns the model in eval mode, float32.
    expect: a dict, compared with the configuration in the file. Raises FileNotFoundError if there
    is no file, ValueError if it is damaged, does not fit, or differs in a field, which is named."""
    path, content = _read_weights(name, announced=True)
    for field, value in (expect or {}).items():
        found = content["record"]["config"].get(field)
        if found != value:
            raise ValueError(f"{path} was trained with {field} = {found!r}, expected {value!r}")
    plain = getattr(model.float(), "_orig_mod", model)  # torch.compile wraps the model
    try:
        plain.load_state_dict({k: v.float() for k, v in content["weights"].items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    return model.eval()


def load_training_log(name):
    """Return the record of the run that made <name>.pt: config, losses, seconds, device ..."""
    return _read_weights(name)[1]["record"]


def retrain_wanted(name):
    """Whether FLOW_RETRAIN asks for this network: "1" for all, or names with commas or spaces.
    Raises ValueError for a word that is neither, such as "true"."""
    wanted = os.environ.get("FLOW_RETRAIN", "").replace(",", " ").split()
    known = {f"flow_{s}" for s in SCHEDULERS} | {p.stem for p in DATA.glob("weights/*.pt")} | {name}
    if wanted not in ([], ["0"], ["1"]) and not known.issuperset(wanted):
        raise ValueError(f"FLOW_RETRAIN={' '.join(wanted)!r} must be 1, or some of {sorted(known)}")
    return wanted == ["1"] or name in wanted


def train_or_load(name, build, loss, sample_batch, *, config, device, retrain=False):
    """Load the network <name>, after training it from scratch if asked; returns model, record.
    build() -> model, called with a generator state fixed by config["seed"]. config: what is
    recorded and checked; its steps, lr, seed, ema and, if there, muon_lr go to train. It trains if
    retrain, or if FLOW_RETRAIN says so, with a checkpoint beside the weights, where a stopped run
    goes on. Either way the weights are those of the file."""
    config = _plain(config, "config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model = build().to(device)
    if retrain or retrain_wanted(name):
        log, path = {}, output_folder("weights") / f"{name}.checkpoint"
        options = {k: config[k] for k in ("steps", "lr", "muon_lr", "seed", "ema") if k in config}
        options |= {"checkpoint": path, "config": config, "log": log}
        losses = train(model, loss, sample_batch, **options)
        record = {"config": config, "losses": losses, **log, **describe_machine(device)}
        save_weights(model, name, record)
        load_weights(model, name, expect=config)  # before the checkpoint goes
        path.unlink()
    return load_weights(model, name, expect=config).to(device), load_training_log(name)


def fingerprint(name):
    """SHA-256 of the weights file <name>.pt."""
    return hashlib.sha256(_read_weights(name)[0].read_bytes()).hexdigest()


def load_record(name):
    """Read the evaluation <name>.json, made by `python notebooks/evaluate.py <name>`.
    Raises FileNotFoundError if it does not exist, ValueError if the weights have changed
    since it was made: the table would describe other networks."""
    remedy = f"make it with `python notebooks/evaluate.py {name}`"
    path = _existing_file(f"{name}.json", "records", remedy, announced=True)
    content = json.loads(path.read_text())
    others = [net for net, made_with in content["weights"].items() if fingerprint(net) != made_with]
    require(not others, f"{path} was made with other weights of {', '.join(others)}; {remedy}")
    return content


def describe_machine(device):
    """What a run record says about where it was made: device, processor and versions."""
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    versions = {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
    return {"device": device.type, "processor": processor, "versions": versions}


# 8  Metrics ----------------------------------------------------------------------------
def _check_samples(x, y):
    """x and y less the mean of x, in float64 on the CPU (MPS has none): no metric changes by the
    shift, and none cancels."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}; images need flatten(1)"
        raise ValueError(f"need two samples (N, F) and (M, F) with N, M >= 2, got {shapes}")
    x, y = (samples.detach().cpu().double() for samples in (x, y))
    mean = x.mean(dim=0)
    return x - mean, y - mean


def optimal_transport_pairing(x, y):
    """The permutation that minimises sum_i |x_i - y[permutation]_i|^2; returns (N,).
    x, y: (N, *D), for instance noise and data of one batch (Tong et al. 2024, section 3.2).
    Exact, by SciPy's solver of the assignment problem: about N^3 operations."""
    from scipy.optimize import linear_sum_assignment

    require(x.shape == y.shape, f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = (_rows(samples.detach()).cpu().double() for samples in (x, y))
    return torch.as_tensor(linear_sum_assignment(torch.cdist(a, b) ** 2)[1], device=y.device)


def mmd2(x, y, bandwidth):
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3), a number.
    x (N, F), y (M, F); Gaussian kernel exp(-|x - y|^2 / (2 bandwidth^2)). Its mean is 0 for
    samples of one distribution, so that it can be negative."""
    x, y = _check_samples(x, y)
    require(bandwidth > 0, f"bandwidth must be positive, got {bandwidth}")
    pairs, n, m = ((x, x), (y, y), (x, y)), len(x), len(y)
    xx, yy, xy = (torch.exp(-(torch.cdist(a, b) ** 2) / (2 * bandwidth**2)) for a, b in pairs)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()


def sliced_wasserstein(x, y, *, projections=256, generator=None):
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) of two equal-sized samples.
    x, y: (N, F). The root of the mean, over random directions, of the squared distance of
    the sorted projections. Returns a number, in the units of x."""
    precision = torch.promote_types(x.dtype, torch.float32)  # of the directions drawn
    x, y = _check_samples(x, y)
    require(len(x) == len(y), f"samples must have equal size, got {len(x)} and {len(y)}")
    like = x.new_empty(x.shape[1], projections, dtype=precision)
    directions = _randn_like(like, generator).double()
    directions = directions / directions.norm(dim=0)
    difference = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    return difference.square().mean().sqrt().item()


def frechet_distance(features_x, features_y):
    """Squared Frechet distance of two Gaussians fitted to features (N, F), (M, F), as in FID.
    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).
    Biased upwards by O(1/N): compare at equal N, beside the value for two real samples."""
    x, y = _check_samples(features_x, features_y)
    cov_x, cov_y = (torch.atleast_2d(torch.cov(f.T)) for f in (x, y))
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (S_x S_y)^(1/2) from the symmetric matrix S_x^(1/2) S_y S_x^(1/2), same eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    mean = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return (mean + values.sum() + cov_y.trace() - 2 * cross).clamp(min=0).item()


def residual_noise(x):
    """Median of |x + 1| over the 2x2 corners of images (N, C, H, W) in [-1, 1], before clipping.
    The corners of Fashion-MNIST are black, -1: the value is 0 for real images, and about
    0.67 times the standard deviation for Gaussian noise left in generated ones."""
    require(x.ndim == 4, f"x must be images (N, C, H, W), got {tuple(x.shape)}")
    _check_floats(x, "x")
    return (x[:, :, [0, 1, -2, -1]][..., [0, 1, -2, -1]] + 1).abs().median().item()


class FashionClassifier(nn.Module):
    """A small convolutional classifier of Fashion-MNIST, whose features measure samples.
    model(x) -> logits (N, 10) and .features(x) -> (N, 64), for images (N, 1, 28, 28) in
    [-1, 1]. pretrained loads data/weights/classifier.pt, made by notebooks/evaluate.py."""

    def __init__(self, pretrained=True):
        super().__init__()
        layers = []
        for width, channels in pairwise((1, 32, 64, 128)):  # 28 -> 14 -> 7 -> 4
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.GroupNorm(2, channels)]
            layers += [nn.SiLU(), nn.Conv2d(channels, channels, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(2, channels), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embed = nn.Sequential(nn.Linear(channels, 64), nn.SiLU())
        self.logits = nn.Linear(64, 10)
        self.to(memory_format=torch.channels_last)
        if pretrained:
            load_weights(self, "classifier")

    def features(self, x):
        require(x.shape[1:] == (1, 28, 28), f"x must be (N, 1, 28, 28), got {tuple(x.shape)}")
        _check_floats(x, "x")
        return self.embed(self.body(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, x):
        return self.logits(self.features(x))
