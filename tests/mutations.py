"""Do the unit tests notice a fault? Make one-line faults in helpers.py, one at a time.

Usage: python tests/mutations.py [--workers N] [text ...]
Each fault is made in a copy of the repository, where the unit tests run alone: nbval and the
guards that compare stored source do not count. Prints every fault with the test that noticed
it, and exits with 1 if one survived. With texts, only the faults that contain one of them.
Before that, the tests must pass without a fault and every fault must find its place.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# (what is in helpers.py, exactly once; what replaces it)
FAULTS = [
    ("x, \"drift\").to(x.dtype), alpha=h)", "x, \"drift\").to(x.dtype))"),
    ("alpha=math.sqrt(h) * sigma", "alpha=h * sigma"),
    ("generator), sigma, value=math.sqrt(h))", "generator), sigma)"),
    ("_randn_like(x, generator), alpha=", "_randn_like(x, generator).square(), alpha="),
    (
        "addcmul_(_randn_like(x, generator), sigma",
        "addcmul_(_randn_like(x, generator) * _randn_like(x, generator), sigma",
    ),
    ("_randn_like(x, generator), alpha=", "_randn_like(x[:1], generator).expand_as(x), alpha="),
    ("velocity(guess, t_next)", "velocity(guess, t)"),
    ("torch.add(x, slope + slope_next, alpha=h / 2)", "torch.add(x, slope, alpha=h)"),
    ("    xs[0] = x\n", "    pass\n"),
    (
        "slope_next = check_like(velocity(guess, t_next), x, \"velocity\").to(x.dtype)",
        "slope_next = check_like(velocity(guess, t_next), x, \"velocity\")",
    ),
    ("half = _diffusion_at(diffusion, x, t) ** 2 / 2", "half = _diffusion_at(diffusion, x, t) / 2"),
    ("diffusion, x, t) ** 2 / 2\n", "diffusion, x, t) ** 2\n"),
    ("return u + half * check_like(score", "return u - half * check_like(score"),
    ("-torch.expm1(-2 * theta * t) / rate", "-torch.expm1(-theta * t) / rate"),
    ("torch.ones_like(theta), 2 * theta)", "torch.ones_like(theta), theta)"),
    ("x0 * torch.exp(-theta * t), sigma**2", "x0 * torch.exp(-theta * t), sigma"),
    ("return u.detach(), total / count", "return u.detach(), total"),
    ("return change - (z.square()", "return -change - (z.square()"),
    ("means + self.stds[index, None] *", "means + self.stds[index, None] ** 2 *"),
    ("stds = torch.sqrt(alpha**2 * self.stds**2 + beta**2)", "stds = alpha * self.stds + beta"),
    ("log_norm = x.shape[1] * torch", "log_norm = torch"),
    (
        "gain = (alpha_dot * alpha * self.stds**2 + beta_dot",
        "gain = (alpha_dot * self.stds**2 + beta_dot",
    ),
    (
        "(alpha_dot * beta - alpha * beta_dot) ** 2 / variance",
        "(alpha_dot * beta + alpha * beta_dot) ** 2 / variance",
    ),
    ("- x.shape[1] / 2 * torch.log(variance)", "- x.shape[1] * torch.log(variance)"),
    ("between + x.shape[1] * (post", "between + (post"),
    ("return math.pi / 2 * torch.sin(math.pi / 2 * (1", "return torch.sin(math.pi / 2 * (1"),
    ("return -math.pi / 2 * torch.sin", "return math.pi / 2 * torch.sin"),
    (
        "return torch.sin(math.pi / 2 * (1 - t))\n\n    def alpha_dot",
        "return torch.cos(math.pi / 2 * t)\n\n    def alpha_dot",
    ),
    ("return alpha * z + beta * eps", "return beta * z + alpha * eps"),
    ("return alpha * z + beta * eps", "return alpha * z + beta**2 * eps"),
    ("return alpha_dot * z + beta_dot * eps", "return alpha_dot * z - beta_dot * eps"),
    ("(alpha_dot - beta_dot / beta * alpha) * z", "(alpha_dot - beta_dot / beta) * z"),
    ("return -(x - alpha * z) / beta**2", "return -(x - alpha * z) / beta"),
    ("return -(x - alpha * z) / beta**2", "return -(x - z) / beta**2"),
    ("return (alpha * u - alpha_dot * x) / (beta *", "return (u - alpha_dot * x) / (beta *"),
    ("return -eps / beta\n", "return -eps / beta**2\n"),
    ("return (beta * u - beta_dot * x) /", "return (beta * u + beta_dot * x) /"),
    ("t.reshape(-1, *[1] * (x.ndim - 1))", "t"),
    ("growth = expand_like(alpha_dot + beta_dot, x) * linear_x", "growth = 0"),
    ("/ scale  # c s_dot", "  # c s_dot"),
    ("shift, self.norm2(h), 1 + scale)", "shift, self.norm2(h), scale)"),
    ("torch.addcmul(shift, self.norm2(h), 1 + scale)", "self.norm2(h) * (1 + scale)"),
    ("return x + self.conv2(F.silu(h))", "return self.conv2(F.silu(h))"),
    ("self.mix1(torch.cat([h, skip1], dim=1))", "self.mix1(torch.cat([h, h], dim=1))"),
    (
        "return -check_like(self.net(x, t), x, \"net\") / beta",
        "return check_like(self.net(x, t), x, \"net\") / beta",
    ),
    ("nn.init.zeros_(last.weight)", "pass"),
    ("residual = beta * check_like", "residual = check_like"),
    ("(residual if weighted else residual / beta)", "(residual if weighted else residual * beta)"),
    (
        "eps = _randn_like(z, generator) if source is None else source",
        "eps = _randn_like(z, generator)",
    ),
    (">= (8, 0) else", ">= (7, 0) else"),
    ("run.step % 50 == 0:", "run.step % 1 == 0:"),
    ("return peak * (step + 1) / warmup", "return peak"),
    ("(1 + math.cos(math.pi * decay * (step - warmup) / (steps - warmup))) / 2", "1.0"),
    ("decay = min(config[\"ema\"], (1 + self.step) / (10 + self.step))", "decay = 0.0"),
    ("decay = min(config[\"ema\"], (1 + self.step) / (10 + self.step))", "decay = config[\"ema\"]"),
    ("self.generator.set_state(state[\"random\"][0])", "pass"),
    ("optimizer.load_state_dict(value)", "pass"),
    ("/ (2 * bandwidth**2))", "/ bandwidth**2)"),
    ("(xx.sum() - xx.trace()) / (n * (n - 1))", "xx.sum() / (n * n)"),
    ("directions = directions / directions.norm(dim=0)", "directions = directions"),
    ("difference.square().mean().sqrt().item()", "difference.abs().mean().item()"),
    ("samples.detach().cpu().double()", "samples.detach().double()"),
    ("cov_y.trace() - 2 * cross", "cov_y.trace() - cross"),
    ("[..., [0, 1, -2, -1]] + 1).abs()", "[..., [0, 1, -2, -1]]).abs()"),
    ("alpha=h * h / (2 * before[1])", "alpha=h / 2"),
    ("a**2 * half_squares", "half_squares"),
    ("crossings % 2 == 1", "crossings > 0"),
    ("() is True", "() is not False"),
    ("if shape != tuple(target.shape):", "if False:"),
    ("return 1 - (1 - time_grid(n)) ** 1.5", "return time_grid(n)"),
    (
        "matrices = orthogonalize(torch.stack(looks_ahead), self.dtype)",
        "matrices = torch.stack(looks_ahead)",
    ),
    ("max(1, matrices.shape[1] / matrices.shape[2]) ** 0.5", "1"),
    ("kernel.grad.lerp(velocity, group[\"momentum\"])", "velocity"),
    ("min(p.shape[:2]) >= 16]", "min(p.shape[:2]) >= 1]"),
    ("*self.parameters, *self.kept_buffers,", "*self.parameters, *self.buffers,"),
    ("zip(self.global_random, self.saved_random,", "zip(self.global_random, [],"),
    ("self.norms[self.step] = norm.detach()", "pass"),
    ("if b.is_floating_point()]", "if False]"),
    ("clip = math.inf if config", "clip = 1.0 if config"),
    ("return half if not (lost", "return half if True or not (lost"),
    ("os.fsync(file.fileno())", "pass"),
    ("value[\"param_groups\"][0][\"fused\"] = optimizer.defaults.get(\"fused\")", "pass"),
    ("self.random is None or self.fault():", "self.fault():"),
    ("or self.random is None or self.fault():", "or self.random is None:"),
    ("if last[\"device\"] == self.device.type:", "if True:"),
]  # fmt: skip


def own_tests(source, place):
    """The files that test the section of helpers.py in which a place lies."""
    section = re.findall(r"^# (\d)  ", source[:place], re.MULTILINE)[-1]
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{f.name}" for f in files if f.read_text().startswith(f'"""Section {section}:')]


def first_failure(source, first=()):
    """The first unit test that fails with this source of helpers.py, of the files `first` and
    then of all, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("tests", "notebooks"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("conftest.py", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, copy / name)
        (copy / "data").symlink_to(ROOT / "data")
        (copy / "helpers.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
        guards = ("test_notebooks", "test_print", "test_runner", "test_setup_cell")  # of notebooks
        rest = ["tests", *(f"--ignore=tests/{name}.py" for name in guards)]
        options = {"cwd": copy, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
        for files in filter(None, (first, rest)):
            run = subprocess.run([*command, *files], capture_output=True, **options)
            if run.returncode:
                found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
                return found.group(1) if found else run.stdout[-300:]
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not arguments.texts or any(text in part for part in fault for text in arguments.texts)
    ]
    source = (ROOT / "helpers.py").read_text()
    for old, _ in chosen:
        if source.count(old) != 1:
            sys.exit(f"out of date, not exactly once in helpers.py: {old}")
    if failure := first_failure(source):
        sys.exit(f"the tests fail without a fault: {failure}")
    faulty = [source.replace(*fault) for fault in chosen]
    first = [own_tests(source, source.index(old)) for old, _ in chosen]
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        for fault, killer in zip(chosen, pool.map(first_failure, faulty, first), strict=True):
            old, new = (" ".join(text.split()) for text in fault)
            print(
                f"{'SURVIVED' if killer is None else 'noticed '} {old}  ->  {new}   {killer or ''}"
            )
            sys.stdout.flush()
            survivors += killer is None
    print(f"{len(chosen)} faults, {survivors} survivors")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
