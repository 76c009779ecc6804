"""Shared module of the five notebooks (placeholder docstring, replaced below)."""

import functools
import gzip
import hashlib
import math
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


# ---------------------------------------------------------------------------------------
# 1  Setup
# ---------------------------------------------------------------------------------------


def pick_device():
    """Return the device named by FLOW_DEVICE, else cuda, else mps, else cpu.

    Raises ValueError if FLOW_DEVICE names a device that this machine does not have.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    wanted = os.environ.get("FLOW_DEVICE") or available[0]
    if wanted.split(":")[0] not in available:
        raise ValueError(
            f"FLOW_DEVICE={wanted!r}, but this machine has only {available}; "
            "unset FLOW_DEVICE or choose one of these"
        )
    return torch.device(wanted)


def make_generator(seed):
    """Return a CPU generator seeded with seed: the same draws on every device."""
    return torch.Generator().manual_seed(seed)


def _randn_like(x, generator=None):
    """Standard normal noise like x, drawn on the generator's device and moved to x."""
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return noise.to(x.device)


def _uniform_times(z, generator=None):
    """Draw t ~ U[0, 1) of shape (B,) for a batch z (B, *D)."""
    device = z.device if generator is None else generator.device
    return torch.rand(len(z), generator=generator, device=device, dtype=z.dtype).to(z.device)


# ---------------------------------------------------------------------------------------
# 3  Data
# ---------------------------------------------------------------------------------------

# SHA-256 of the decompressed IDX files, as published by Zalando Research.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def _unpack(name):
    """Unpack data/<name>.gz to data/FashionMNIST/raw/<name> once, atomically and verified."""
    packed, raw = DATA / f"{name}.gz", DATA / "FashionMNIST" / "raw" / name
    remedy = f"restore it with `git checkout -- {packed.relative_to(ROOT)}`"
    if raw.exists() and _sha256(raw.read_bytes()) == FASHION_SHA256[name]:
        return
    if not packed.exists():
        raise FileNotFoundError(f"{packed} is missing; {remedy}")
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{packed} is truncated or not gzip ({error}); {remedy}") from error
    if _sha256(content) != FASHION_SHA256[name]:
        raise ValueError(f"{packed} differs from the published file; {remedy}")
    raw.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(raw, content)


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _write_atomically(path, content):
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


def load_fashion_mnist(split="train"):
    """Load Fashion-MNIST from the IDX files committed under data/.

    Returns images uint8 (N, 1, 28, 28) and labels int64 (N,); N is 60 000 for "train" and
    10 000 for "test". The files are verified by SHA-256 and unpacked once.
    Raises FileNotFoundError if a file is missing, ValueError if one is damaged or the split
    is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    from torchvision.datasets import FashionMNIST  # slow import, needed for images only

    for name in FASHION_SHA256:  # torchvision looks for all four
        _unpack(name)
    dataset = FashionMNIST(DATA, train=split == "train")
    return dataset.data.unsqueeze(1), dataset.targets


def to_model_range(images):
    """Map grey levels 0 .. 255 to float32 in [-1, 1], the range of all image models."""
    return images.float() / 127.5 - 1


def to_image_range(x):
    """Map model values to grey levels in [0, 1] for display, clipping what lies outside."""
    return ((x.float() + 1) / 2).clamp(0, 1)


# ---------------------------------------------------------------------------------------
# 4  Schedules
# ---------------------------------------------------------------------------------------


class LinearScheduler:
    """alpha = t, beta = 1 - t (assignment, question 2a). All methods: t any shape -> like t."""

    def alpha(self, t):
        return t

    def beta(self, t):
        return 1 - t

    def alpha_dot(self, t):
        return torch.ones_like(t)

    def beta_dot(self, t):
        return -torch.ones_like(t)


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


class PolynomialScheduler:
    """alpha = t^p, beta = 1 - t^p with p >= 1; p = 1 is the linear schedule."""

    def __init__(self, power):
        if not power >= 1:
            raise ValueError(
                f"power must be at least 1, got {power}: below 1 the derivative of t^p is "
                "infinite at t = 0"
            )
        self.power = power

    def alpha(self, t):
        return t**self.power

    def beta(self, t):
        return 1 - t**self.power

    def alpha_dot(self, t):
        return self.power * t ** (self.power - 1)

    def beta_dot(self, t):
        return -self.power * t ** (self.power - 1)


# ---------------------------------------------------------------------------------------
# 5  Paths
# ---------------------------------------------------------------------------------------


def expand_like(t, x):
    """Reshape t (B,) to (B, 1, ..., 1) so that it broadcasts over x (B, *D)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


class GaussianPath:
    """The conditional path x_t = alpha_t z + beta_t eps (assignment, section 2).

    scheduler: an object with alpha, beta, alpha_dot and beta_dot. Throughout, x, z and eps
    are (B, *D) and t is (B,), in [0, 1]; results are like x. Raises ValueError for another
    shape of t, for shapes of x and z that differ, and for times outside [0, 1].
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def _coefficients(self, x, other, t):
        """alpha, beta, alpha_dot, beta_dot, each shaped to broadcast over x."""
        if x.shape != other.shape:
            raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(other.shape)}")
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():  # no GPU synchronisation
            raise ValueError("t must lie in [0, 1]")
        t, s = expand_like(t, x), self.scheduler
        return s.alpha(t), s.beta(t), s.alpha_dot(t), s.beta_dot(t)

    def sample(self, z, t, eps):
        """x_t = alpha z + beta eps, a draw of p_t(. | z) for standard normal eps."""
        alpha, beta, _, _ = self._coefficients(z, eps, t)
        return alpha * z + beta * eps

    def velocity_target(self, z, t, eps):
        """u_t(x_t | z) = alpha_dot z + beta_dot eps, finite on all of [0, 1] (question 3a)."""
        _, _, alpha_dot, beta_dot = self._coefficients(z, eps, t)
        return alpha_dot * z + beta_dot * eps


# ---------------------------------------------------------------------------------------
# 6  Networks
# ---------------------------------------------------------------------------------------


class ResidualLayer(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) with the time in the second norm (figure 1).

    The time embedding becomes a scale and a shift of the second norm. The last convolution
    starts at zero, so that a fresh layer is the identity. x (B, C, H, W), embedding (B, E).
    """

    def __init__(self, channels, embedding):
        super().__init__()
        # 16 channels a group: the size at which bf16 GroupNorm is fast on the CPU
        groups = max(1, channels // 16)
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
        self.mlp = nn.Sequential(
            nn.Linear(size // 2, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU()
        )

    def forward(self, t):
        angles = t[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class UNet(nn.Module):
    """The UNet of figure 1: model(x, t, labels=None), x (B, C, H, W), t (B,) -> like x.

    Encoder: two residual layers, then downsampling. Bottleneck: three residual layers.
    Decoder: upsampling, the skip concatenated and mixed by a 1x1 convolution, then two
    residual layers. Resolution 28 -> 14 -> 7; H and W must be multiples of 4. With
    num_classes > 0, labels (B,) are integers below num_classes; num_classes itself is the
    null label, which also stands for labels=None.
    """

    def __init__(self, channels=(32, 64, 128), in_channels=1, num_classes=0, embedding=128):
        super().__init__()
        if len(channels) != 3 or any(c % 16 for c in channels):
            raise ValueError(f"channels must be three multiples of 16, got {channels}")
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
        self.head = nn.Sequential(
            nn.GroupNorm(c1 // 16, c1), nn.SiLU(), nn.Conv2d(c1, in_channels, 3, padding=1)
        )
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, labels=None):
        self._check(x, t, labels)
        emb = self.embed_time(t)
        if self.embed_label is not None:
            if labels is None:
                labels = torch.full(t.shape, self.num_classes, device=t.device)
            emb = emb + self.embed_label(labels)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        for layer in self.encoder1:
            h = layer(h, emb)
        skip1, h = h, self.down1(h)  # (B, c2, H/2, W/2)
        for layer in self.encoder2:
            h = layer(h, emb)
        skip2, h = h, self.down2(h)  # (B, c3, H/4, W/4)
        for layer in self.bottleneck:
            h = layer(h, emb)
        h = F.interpolate(self.up2(h), scale_factor=2.0, mode="nearest")
        h = self.mix2(torch.cat([h, skip2], dim=1))  # (B, c2, H/2, W/2)
        for layer in self.decoder2:
            h = layer(h, emb)
        h = F.interpolate(self.up1(h), scale_factor=2.0, mode="nearest")
        h = self.mix1(torch.cat([h, skip1], dim=1))  # (B, c1, H, W)
        for layer in self.decoder1:
            h = layer(h, emb)
        return self.head(h).to(x.dtype)

    def _check(self, x, t, labels):
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(
                f"x must be (B, {self.in_channels}, H, W) with H and W multiples of 4, "
                f"got {tuple(x.shape)}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
        if labels is not None and self.embed_label is None:
            raise ValueError("labels were given to a UNet built with num_classes=0")


class NoiseScore(nn.Module):
    """Score model s = -eps_hat / beta around a network that predicts the noise.

    From s_t(x) = -E[eps | x_t = x] / beta_t (question 5a). Infinite at t = 1, where beta = 0.
    """

    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, x, t):
        return -self.net(x, t) / self.path.scheduler.beta(expand_like(t, x))


# ---------------------------------------------------------------------------------------
# 7  Training
# ---------------------------------------------------------------------------------------


def flow_matching_loss(model, path, z, *, source=None, generator=None):
    """Conditional flow matching loss: mean of |u(x_t, t) - (alpha_dot z + beta_dot eps)|^2.

    One draw of t ~ U[0, 1] and eps ~ N(0, I) for each z (B, *D) (algorithm 1; Lipman et al.
    2023, eq. 9). source (B, *D) replaces eps: a flow from data to data. Returns a scalar, the
    mean over the batch of the squared error per dimension.
    """
    t = _uniform_times(z, generator)
    eps = _randn_like(z, generator) if source is None else source
    target = path.velocity_target(z, t, eps)
    return (model(path.sample(z, t, eps), t) - target).square().mean()


def score_matching_loss(model, path, z, *, weighted=True, generator=None):
    """Denoising score matching: mean of w |s(x_t, t) + eps / beta|^2 for a score model.

    weighted: w = beta^2, so that the loss is |beta s + eps|^2, finite, with the minimiser of
    the assignment's w = 1, whose expectation is infinite (question 5a). z: (B, *D). Returns a
    scalar, the mean over the batch of the squared error per dimension.
    """
    t, eps = _uniform_times(z, generator), _randn_like(z, generator)
    beta = path.scheduler.beta(expand_like(t, z))
    residual = beta * model(path.sample(z, t, eps), t) + eps
    return (residual if weighted else residual / beta).square().mean()


def image_batches(images, size):
    """Return sample_batch(generator) -> (size, 1, 28, 28) in [-1, 1], drawn with replacement.

    images: uint8 (N, 1, 28, 28), on the generator's device.
    """

    def sample_batch(generator):
        index = torch.randint(len(images), (size,), generator=generator, device=images.device)
        return to_model_range(images[index])

    return sample_batch


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def choose_precision(model, device):
    """The fastest safe autocast dtype for training: a name, "float32", "bfloat16" or "float16".

    Only convolutions are worth it. bfloat16 where the hardware has units for it (CPU:
    AVX512-BF16 or AMX; CUDA: compute capability 8.0), float16 on older CUDA devices.
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "float32"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if any(getattr(torch.cpu, probe, bool)() for probe in probes):
            return "bfloat16"
    return "float32"


def _progress(steps, start=0, label="training"):
    """A progress bar for whoever waits; none with FLOW_PROGRESS=0 (tests, regeneration)."""
    from tqdm import tqdm

    hidden = os.environ.get("FLOW_PROGRESS") == "0"
    return tqdm(total=steps, initial=start, desc=label, disable=hidden, leave=False)


def _check_losses(losses, step, checkpoint):
    """Raise FloatingPointError at the first loss among the first `step` that is not finite."""
    bad = (~torch.isfinite(losses[:step])).nonzero()
    if len(bad):
        kept = f"the last good state is in {checkpoint}" if checkpoint else "nothing was saved"
        raise FloatingPointError(
            f"the loss is {losses[bad[0, 0]].item()} at step {bad[0, 0].item()}; {kept}. "
            "Lower lr and start again"
        )


def _load_checkpoint(path, config):
    """Read a checkpoint, refusing one that was written with another configuration."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for field, value in config.items():
        if state["config"].get(field) != value:
            raise ValueError(
                f"{path} was written with {field} = {state['config'].get(field)!r}, now "
                f"{value!r}; delete it to start again, or restore the configuration"
            )
    return state


def _save_checkpoint(path, state):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def train(
    model,
    loss,
    sample_batch,
    *,
    steps,
    lr=1e-3,
    seed=0,
    ema=0.999,
    warmup=200,
    clip=1.0,
    precision=None,
    checkpoint=None,
    checkpoint_every=250,
    log=None,
):
    """Train with Adam and return the losses, float32 (steps,) on the CPU.

    loss(model, batch, *, generator) -> scalar; sample_batch(generator) -> batch. The
    generator is on the model's device, seeded with seed. The rate warms up and decays
    (learning_rate), gradients are clipped at norm `clip`, and afterwards the model holds the
    exponential moving average of its weights (decay min(ema, (1 + n) / (10 + n))) in eval
    mode. precision: autocast dtype, chosen by choose_precision if None.
    checkpoint: a file, written every checkpoint_every steps and on interruption; a run that
    finds it resumes there, with bit-identical results on the CPU. log: a dict that receives
    "seconds" and "precision". Raises FloatingPointError if the loss diverges, ValueError if
    the checkpoint is of another configuration.
    """
    run = _TrainingRun(model, seed=seed, lr=lr, precision=precision)
    parameters = sum(p.numel() for p in run.parameters)
    config = dict(steps=steps, lr=lr, seed=seed, ema=ema, warmup=warmup, clip=clip)
    config["parameters"] = parameters
    losses = torch.zeros(steps, device=run.device)
    if checkpoint is not None and Path(checkpoint).exists():
        run.restore(_load_checkpoint(checkpoint, config), losses)
    model.train()
    threads = torch.get_num_threads()
    if run.device.type == "cpu" and run.precision == "float32" and parameters < 100_000:
        torch.set_num_threads(1)  # two threads on a small network wait for each other
    save = functools.partial(run.save, checkpoint, config, losses)
    bar = _progress(steps, run.step)
    try:
        while run.step < steps:
            rate = learning_rate(run.step, steps, lr, min(warmup, steps // 10))
            step = run.step
            losses[step] = run.update(loss, sample_batch, rate, clip, ema)
            if run.step % 50 == 0 or run.step == steps:  # the only host synchronisation
                _check_losses(losses, run.step, checkpoint)
                bar.set_postfix_str(f"loss {losses[max(0, run.step - 50) : run.step].mean():.4f}")
            if run.step % checkpoint_every == 0 or run.step == steps:
                _check_losses(losses, run.step, checkpoint)
                save()
            bar.update()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        bar.close()
        torch.set_num_threads(threads)
    run.finish()
    if log is not None:
        log.update(seconds=run.seconds, precision=run.precision)
    return losses.cpu()


class _TrainingRun:
    """The state that train advances, saves and restores."""

    def __init__(self, model, *, seed, lr, precision):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.precision = precision or choose_precision(model, self.device)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=self.device.type != "mps")
        enabled = self.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=True) if enabled else None
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step, self.seconds = 0, 0.0

    def update(self, loss, sample_batch, rate, clip, ema):
        """One optimisation step; returns the loss, still on the device."""
        start = time.perf_counter()
        batch = sample_batch(self.generator)
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            value = loss(self.model, batch, generator=self.generator)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        if self.scaler is None:
            value.backward()
            nn.utils.clip_grad_norm_(self.parameters, clip)
            self.optimizer.step()
        else:
            self.scaler.scale(value).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        decay = min(ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        self.step += 1
        self.seconds += time.perf_counter() - start
        return value.detach()

    def save(self, path, config, losses):
        if path is None:
            return
        state = {
            "config": config,
            "precision": self.precision,
            "step": self.step,
            "seconds": self.seconds,
            "losses": losses,
            "weights": [p.detach() for p in self.parameters],
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        _save_checkpoint(path, state)

    def restore(self, state, losses):
        self.precision, self.step = state["precision"], state["step"]
        self.seconds = state["seconds"]
        losses.copy_(state["losses"])
        with torch.no_grad():
            for target, saved in zip(self.parameters, state["weights"], strict=True):
                target.copy_(saved)
            for target, saved in zip(self.averages, state["averages"], strict=True):
                target.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])

    def finish(self):
        """Put the averaged weights into the model."""
        with torch.no_grad():
            for target, average in zip(self.parameters, self.averages, strict=True):
                target.copy_(average)
        self.model.eval()


def _weights_folder():
    """Where new weights and checkpoints go: FLOW_WEIGHTS (set on Colab), else data/weights."""
    return Path(os.environ.get("FLOW_WEIGHTS") or DATA / "weights")


def _read_weights(name):
    candidates = [_weights_folder() / f"{name}.pt", DATA / "weights" / f"{name}.pt"]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"{candidates[0]} does not exist; make it by running the notebook that trains "
            f"{name} with FLOW_RETRAIN=1"
        )
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable weights file ({type(error).__name__}); restore it with "
            "git checkout, or train it again with FLOW_RETRAIN=1"
        ) from error


def save_weights(model, name, record):
    """Write a model's weights in float16, and the record of their run, as <name>.pt.

    record: a dict of plain Python values and tensors, with the configuration under "config".
    Written to data/weights, or to the folder that FLOW_WEIGHTS names; atomically.
    """
    halves = {
        key: value.half().cpu().contiguous() if value.is_floating_point() else value.cpu()
        for key, value in model.state_dict().items()
    }
    _save_checkpoint(_weights_folder() / f"{name}.pt", {"weights": halves, "record": record})


def load_weights(model, name, *, expect=None):
    """Load <name>.pt into the model; returns the model in eval mode, float32.

    expect: a dict, compared with the configuration in the file. Raises FileNotFoundError if
    there is no such file, ValueError if it is damaged, if a field of the configuration
    differs (naming it), or if the weights do not fit the model.
    """
    path, content = _read_weights(name)
    for field, value in (expect or {}).items():
        found = content["record"]["config"].get(field)
        if found != value:
            raise ValueError(f"{path} was trained with {field} = {found!r}, expected {value!r}")
    try:
        model.load_state_dict({k: v.float() for k, v in content["weights"].items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    return model.float().eval()


def load_record(name):
    """Return the record of the run that made <name>.pt: config, losses, seconds, device ..."""
    return _read_weights(name)[1]["record"]


def train_or_load(name, build, loss, sample_batch, *, config, device, retrain=False):
    """Load the network <name>, after training it from scratch if retrain; returns model, record.

    build() -> model, called with a generator state fixed by config["seed"]. config: what is
    recorded and checked; its steps, lr, seed and ema go to train. Training writes a
    checkpoint beside the weights and resumes from it after an interruption. Either way the
    weights are those of the file, so both ways give the same network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model = build().to(device)
    if retrain:
        checkpoint, log = _weights_folder() / f"{name}.checkpoint", {}
        options = {field: config[field] for field in ("steps", "lr", "seed", "ema")}
        losses = train(model, loss, sample_batch, **options, checkpoint=checkpoint, log=log)
        record = {"config": config, "losses": losses, **log, **describe_machine(device)}
        save_weights(model, name, record)
        checkpoint.unlink()
    return load_weights(model, name, expect=config).to(device), load_record(name)


def describe_machine(device):
    """What a run record says about where it was made: device, processor and versions."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
    return {"device": device.type, "processor": processor, "versions": versions}
