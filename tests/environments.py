"""Do the results hold elsewhere? Run the tests with other versions, processors, devices.

Usage: python tests/environments.py [--python PYTHON] [name ...] [-- pytest arguments]
Every environment works on a copy of the repository. Those with other versions get a fresh
virtual environment of PYTHON (by default the running one), the others use the present one.
Prints pytest's closing line for each, and exits with 1 if one failed. Without a name, all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["-r", "requirements.txt", "-r", "tests/requirements.txt"]

# A kernel of a notebook runs this file first
STARTUP = {"PYTHONSTARTUP": str(ROOT / "tests" / "fake_device.py")}
LEVEL = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")  # of the vector units

# name: (what pip installs, None for the present environment; environment variables)
ENVIRONMENTS = {
    "one thread": (None, {"OMP_NUM_THREADS": "1"}),
    "AVX2": (None, dict(zip(LEVEL, ("avx2", "AVX2", "AVX2"), strict=True))),
    "no vector units": (None, dict(zip(LEVEL, ("default", "SSE41", "COMPATIBLE"), strict=True))),
    "pretended CUDA": (None, {**STARTUP, "PRETENDED_DEVICE": "cuda"}),
    "pretended MPS": (None, {**STARTUP, "PRETENDED_DEVICE": "mps"}),
    "tested versions": ([*TESTS, "-c", "tests/constraints.txt"], {}),
    "newest versions": (TESTS, {}),
    "oldest torch": ([*TESTS, "torch==2.6.*", "torchvision==0.21.*"], {}),
    "Colab": (
        [
            *TESTS,
            *("torch==2.11.*", "numpy==2.0.*", "matplotlib==3.10.*"),
            *("ipython==7.34.*", "ipywidgets==7.7.1"),
        ],
        {},
    ),
}


def run_tests(folder, python, packages, variables, arguments):
    """Closing line and success of pytest in a copy of the repository in folder."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "*.checkpoint")
    copy = folder / "repository"
    shutil.copytree(ROOT, copy, ignore=ignored)
    if packages is not None:
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], cwd=copy, check=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, **variables}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    if run.returncode != 0:
        print(*lines[-60:], run.stderr[-2000:], sep="\n")
    return (lines or ["no output"])[-1], run.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("names", nargs="*")
    own, arguments = sys.argv[1:], []
    if "--" in own:
        own, arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    names = options.names or list(ENVIRONMENTS)
    unknown = set(names) - set(ENVIRONMENTS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ENVIRONMENTS)}")
    failed = 0
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            packages, variables = ENVIRONMENTS[name]
            line, good = run_tests(Path(folder), options.python, packages, variables, arguments)
        failed += not good
        print(f"{name}: {line}   ({time.monotonic() - start:.0f} s in all)", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
