"""What does each ingredient of the recipe give? Short trainings with one ingredient changed.

Usage: python tests/ablations.py [--steps 500] [--json FILE] [name ...]
Every run is the task of question 4(b) with the batches and noises of one seed. Prints, for
each, the seconds, the loss on 2000 test images with fixed times and noises, and the Frechet
and sliced Wasserstein distances and the residual noise of 1000 samples (32 evaluations).
Nothing is written to data/. Without a name, all.
"""

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
import evaluate
import helpers

BATCH, SEED = 250, 0
RECIPE = {"lr": 2e-3, "ema": 0.999, "warmup": 200, "clip": 1.0}
PATH = helpers.GaussianPath(helpers.LinearScheduler())


# Changes of the network


class AddedSkip(nn.Module):
    """In place of the 1 x 1 convolution over both: their sum."""

    def forward(self, x):
        h, skip = x.chunk(2, dim=1)
        return h + skip


class NoSkip(nn.Module):
    def forward(self, x):
        return x.chunk(2, dim=1)[0]


class ShiftOnly(helpers.ResidualLayer):
    """The time as a shift of the second norm, without a scale."""

    def forward(self, x, embedding):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        shift = self.time(embedding)[:, : h.shape[1], None, None]
        return x + self.conv2(nn.functional.silu(self.norm2(h) + shift))


def add_skips(model):
    model.mix1, model.mix2 = AddedSkip(), AddedSkip()


def drop_full_skip(model):
    model.mix1 = NoSkip()


def residual_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, helpers.ResidualLayer)]


def shift_only(model):
    for layer in residual_layers(model):
        layer.__class__ = ShiftOnly


def batch_norm(model):
    for layer in residual_layers(model):
        layer.norm1, layer.norm2 = (nn.BatchNorm2d(layer.conv1.in_channels) for _ in range(2))


def ordinary_start(model):
    """PyTorch's initialisation of the convolutions that the recipe starts at zero."""
    model.head[-1].reset_parameters()
    for layer in residual_layers(model):
        layer.conv2.reset_parameters()


# name: what differs from the recipe; change: a function of the network
RUNS = {
    "recipe": {},
    "no average of the weights": {"ema": 0.0},
    "average, decay 0.99": {"ema": 0.99},
    "constant rate": {"constant": True},
    "no warm-up": {"warmup": 1},
    "peak rate 1e-3": {"lr": 1e-3},
    "peak rate 4e-3": {"lr": 4e-3},
    "skips added": {"change": add_skips},
    "no skip at full resolution": {"change": drop_full_skip},
    "BatchNorm": {"change": batch_norm},
    "time as a shift only": {"change": shift_only},
    "no zero initialisation": {"change": ordinary_start},
    "half the width": {"channels": (16, 32, 64)},
    "half as wide again, equal time": {"channels": (48, 96, 192), "equal_time": True},
}


def flow_loss(model, z, *, generator):
    return helpers.flow_matching_loss(model, z, PATH, generator=generator)


def train(run, steps, sample_batch, device, seconds_of_recipe):
    """The trained network and its log; with equal_time as many steps as the seconds allow."""
    options = RECIPE | {key: run[key] for key in RECIPE.keys() & run.keys()}
    fit = functools.partial(
        helpers.train, loss=flow_loss, sample_batch=sample_batch, seed=SEED, **options
    )

    def build():
        torch.manual_seed(SEED)
        model = helpers.UNet(run.get("channels", (32, 64, 128)))
        run.get("change", lambda model: None)(model)
        return model.to(device, memory_format=torch.channels_last)

    if run.get("equal_time"):
        log = {}
        fit(build(), steps=20, log=log)
        steps = round(seconds_of_recipe / (log["seconds"] / 20))
    model, log = build(), {"steps": steps}
    constant = mock.patch("helpers.learning_rate", lambda step, steps, peak, *_: peak)
    with constant if run.get("constant") else contextlib.nullcontext():
        fit(model, steps=steps, log=log)
    return model, log


@torch.no_grad()
def held_out_loss(model, device):
    """The loss on 2000 test images, times on a grid, one draw of the noise."""
    generator = helpers.make_generator(SEED)
    images, _ = helpers.load_fashion_mnist("test")
    z = helpers.to_model_range(images[:2000])
    t, eps = (torch.arange(2000) % 100 + 0.5) / 100, torch.randn(z.shape, generator=generator)
    total = 0.0
    for part in zip(z.split(BATCH), t.split(BATCH), eps.split(BATCH), strict=True):
        z_part, t_part, eps_part = (x.to(device) for x in part)
        target = PATH.velocity_target(z_part, t_part, eps_part)
        error = model(PATH.sample(z_part, t_part, eps_part), t_part) - target
        total += error.square().mean().item() * len(z_part)
    return total / len(z)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(RUNS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(RUNS)}")
    names = arguments.names or list(RUNS)
    if any("equal_time" in RUNS[name] for name in names) and names[0] != "recipe":
        sys.exit("a run of equal time needs the seconds of the recipe: name that first")
    device, rows = helpers.pick_device(), []
    images, _ = helpers.load_fashion_mnist("train")
    sample_batch = helpers.image_batches(images.to(device), BATCH)
    judge, seconds = evaluate.Judge(device), None
    print(f"{'':32s} steps  seconds    loss  Frechet  sliced  residual noise")
    for name in names:
        model, log = train(RUNS[name], arguments.steps, sample_batch, device, seconds)
        seconds = log["seconds"] if name == "recipe" else seconds

        def solve(x0, generator, model=model):
            return helpers.heun(model, x0, helpers.time_grid(16))

        precision = helpers.choose_dtype(model, device)
        measured = judge.measure(evaluate.sample(solve, 1000, device, precision))
        row = {"name": name, **log, "test_loss": held_out_loss(model, device), **measured}
        rows.append(row)
        print(
            f"{name:32s} {row['steps']:5d} {row['seconds']:8.0f} {row['test_loss']:7.4f} "
            f"{row['frechet']:8.2f} {row['sliced_wasserstein']:7.4f} {row['residual_noise']:15.4f}",
            flush=True,
        )
        if arguments.json:
            settings = {"batch": BATCH, "recipe": RECIPE, **helpers.describe_machine(device)}
            arguments.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
