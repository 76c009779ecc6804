"""Speed and memory of training, sampling and simulation: one table, measured in one run.

Usage: python tests/benchmarks.py [--json FILE] [--rounds N] [--repeats N]
Every case runs in a process of its own, so that its peak memory is its own; its time is the
median over the repeats, after a warm-up. All cases run in turn, several rounds, and a ratio is
the median of the ratios of each round, since other work on the machine comes and goes. The
convolution peak is measured on the shapes that the UNet has in training, one convolution at a
time, forwards and backwards.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import helpers
from helpers import GaussianPath, LinearScheduler, UNet

BATCH = 250
DEVICE = helpers.pick_device()


def median_seconds(call, repeats):
    """Median wall time of call() after one warm-up call."""

    def timed():
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(repeats))


# Training


def training_step(model, dtype):
    """One step of train as a call without arguments, and the dtype that it uses."""
    path = GaussianPath(LinearScheduler())
    images, _ = helpers.load_fashion_mnist("train")
    sample_batch = helpers.image_batches(images.to(DEVICE), BATCH)

    def loss(model, z, *, generator):
        return helpers.flow_matching_loss(model, z, path, generator=generator)

    options = dict(lr=1e-3, muon_lr=None, warmup=0, decay=False, clip=1.0, ema=0.999)
    run = helpers._TrainingRun(model.train(), {"steps": 10_000, "seed": 0, **options}, dtype)
    return lambda: run.update(loss, sample_batch), run.dtype


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def training(repeats):
    step, dtype = training_step(UNet().to(DEVICE), None)
    return {
        "seconds": median_seconds(step, repeats),
        "dtype": dtype,
        "operations": operations(step),
    }


def training_plain(repeats):
    """The same network in float32 and the default memory layout."""
    model = UNet().to(DEVICE).to(memory_format=torch.contiguous_format)
    step, dtype = training_step(model, "float32")
    return {"seconds": median_seconds(step, repeats), "dtype": dtype}


def convolutions(repeats):
    """All convolutions of a training step alone, forwards and backwards, one at a time."""
    model, calls = UNet().to(DEVICE), []
    dtype = getattr(torch, helpers.choose_dtype(model, DEVICE))

    def remember(module, inputs, output):
        calls.append((module, inputs[0].shape, output.shape))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(remember)
    with torch.no_grad():
        model(torch.randn(BATCH, 1, 28, 28, device=DEVICE), torch.rand(BATCH, device=DEVICE))
    seconds = {}
    for module, shape, out_shape in calls:
        key = (shape, out_shape, module.kernel_size, module.stride)
        if key not in seconds:
            layer = module.to(dtype)
            form = {"dtype": dtype, "device": DEVICE}
            x = torch.randn(shape, **form).to(memory_format=torch.channels_last)
            gradient = torch.randn(out_shape, **form).to(memory_format=torch.channels_last)
            x.requires_grad_(shape[1] > 1)  # the image needs no gradient
            layer._forward_hooks.clear()

            def both(layer=layer, x=x, gradient=gradient):
                layer(x).backward(gradient)

            seconds[key] = median_seconds(both, repeats)
    total = sum(seconds[(s, o, m.kernel_size, m.stride)] for m, s, o in calls)
    return {"seconds": total, "dtype": str(dtype).removeprefix("torch.")}


# Sampling


def sampler(method, evaluations, dtype):
    """A call that samples 64 images with flow_linear."""
    model = helpers.load_weights(UNet(), "flow_linear").to(DEVICE)
    x0 = torch.randn(64, 1, 28, 28, generator=helpers.make_generator(0)).to(DEVICE)
    dtype = getattr(torch, dtype)

    def sample():
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            if method == "heun":
                return helpers.heun(model, x0, helpers.time_grid(evaluations // 2))
            return helpers.euler_maruyama(model, 0, x0, helpers.time_grid(evaluations))

    return sample


def sampling(method, evaluations):
    def case(repeats):
        dtype = helpers.choose_dtype(UNet(), DEVICE)
        fast, exact = (sampler(method, evaluations, p) for p in (dtype, "float32"))
        difference = (fast() - exact()).square().mean().sqrt().item()
        return {
            "seconds": median_seconds(fast, repeats),
            "dtype": dtype,
            "rms_to_float32": difference,
            "seconds_float32": median_seconds(exact, repeats),
        }

    return case


# Simulation: 1e5 Ornstein-Uhlenbeck paths, 1000 steps

PATHS, STEPS = 100_000, 1000


def normals(repeats):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw():
        for _ in range(STEPS):
            torch.randn(PATHS, generator=generator, device=DEVICE)

    return {"seconds": median_seconds(draw, repeats)}


def simulation(repeats):
    generator = torch.Generator(DEVICE).manual_seed(0)
    x0, ts = torch.ones(PATHS, device=DEVICE), helpers.time_grid(STEPS)

    def simulate():
        return helpers.euler_maruyama(lambda x, t: -x, 0.5, x0, ts, generator=generator)

    return {"seconds": median_seconds(simulate, repeats)}


def simulation_torchsde(repeats):
    import torchsde

    class OU(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, y):
            return -y

        def g(self, t, y):
            return torch.full_like(y, 0.5)

    x0, ts = torch.ones(PATHS, 1, device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)

    def simulate():
        with torch.no_grad():
            return torchsde.sdeint(OU(), x0, ts, method="euler", dt=1 / STEPS)

    return {"seconds": median_seconds(simulate, 1)}


CASES = {
    "training step": training,
    "training step, plain float32": training_plain,
    "its convolutions alone": convolutions,
    "64 images, Heun, 32 evaluations": sampling("heun", 32),
    "64 images, Euler, 100 evaluations": sampling("euler", 100),
    "1e5 x 1000 normals": normals,
    "1e5 OU paths, 1000 steps": simulation,
    "the same by torchsde": simulation_torchsde,
}


def run_case(name, repeats):
    """Run one case here; its figures with the peak memory of this process in GiB."""
    result = CASES[name](repeats)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {**result, "peak_gib": peak / 2**30}


def measure(rounds, repeats):
    """A list of rounds, each the figures of all cases one after the other."""
    names = list(CASES)
    if importlib.util.find_spec("torchsde") is None:
        print("torchsde is not installed: its case is left out", file=sys.stderr)
        names.remove("the same by torchsde")
    results = []
    for number in range(rounds):
        results.append({})
        for name in names:
            command = [sys.executable, __file__, "--case", name, "--repeats", str(repeats)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[-1][name] = json.loads(output)
            seconds = results[-1][name]["seconds"]
            print(f"round {number + 1}, {name}: {seconds:.3f} s", file=sys.stderr)
    return results


def table(results):
    """The medians over the rounds as lines of text, with the ratios that matter."""

    def median(name, key="seconds"):
        return statistics.median(r[name][key] for r in results)

    def ratio(above, below):
        return statistics.median(r[above]["seconds"] / r[below]["seconds"] for r in results)

    names = list(results[0])
    step, plain, alone, heun, _, draw, simulate = names[:7]
    work, dtype = results[0][step]["operations"] / 1e9, results[0][step]["dtype"]
    lines = [f"{'case':36s} {'median s':>9s} {'peak GiB':>9s}"]
    for name in names:
        peak = max(r[name]["peak_gib"] for r in results)
        lines.append(f"{name:36s} {median(name):9.3f} {peak:9.2f}")
    lines += [
        f"5000 steps: {5000 * median(step) / 60:.0f} minutes, in {dtype}",
        f"plain / ours: {ratio(plain, step):.2f}",
        f"convolutions alone / step: {ratio(alone, step):.2f}",
        f"convolution peak: {work / median(alone):.0f} GFLOP/s, {work:.0f} GFLOP a step",
        f"64 images, Heun, in float32: {median(heun, 'seconds_float32'):.3f} s",
        f"RMS of {dtype} against float32 there: {median(heun, 'rms_to_float32'):.3f}",
        f"normals alone / simulation: {ratio(draw, simulate):.2f}",
    ]
    lines += [f"torchsde / ours: {ratio(name, simulate):.1f}" for name in names[7:]]
    return "\n".join(lines)


def processor_name():
    """The model of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.repeats)))
        return
    machine = {**helpers.describe_machine(DEVICE), "processor_name": processor_name()}
    results = measure(arguments.rounds, arguments.repeats)
    print(json.dumps(machine))
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "rounds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
