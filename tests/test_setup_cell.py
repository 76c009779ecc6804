"""The setup cell of the notebooks: silent, updates on Colab, finds the root elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST = sorted((ROOT / "notebooks").glob("0*.ipynb"))[0]
CELLS = json.loads(FIRST.read_text(encoding="utf-8"))["cells"]
SETUP = "".join(next(cell for cell in CELLS if cell["cell_type"] == "code")["source"])
REPORT = """
import json
import helpers
import plots
print(json.dumps([helpers.__file__, plots.__file__, str(ROOT)]))
"""


def run(code, cwd, said="", **environment):
    """Run code in a fresh interpreter; what the last line printed, after what is said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLOW_")}
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=cwd,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *before, line = result.stdout.splitlines()
    assert "".join(before).startswith(said)
    assert bool(before) is bool(said)
    assert said or result.stderr == ""
    return json.loads(line)


def files_of(root):
    return [str(root / "helpers.py"), str(root / "notebooks" / "plots.py"), str(root)]


@pytest.mark.parametrize("folder", [".", "notebooks", "data/weights"])
def test_elsewhere_it_finds_the_root(folder):
    assert run(SETUP, ROOT / folder) == files_of(ROOT)


def test_in_vs_code_the_file_decides_and_not_the_working_directory(tmp_path):
    here = f"__vsc_ipynb_file__ = {str(FIRST)!r}\n"
    assert run(here + SETUP, tmp_path) == files_of(ROOT)


def test_a_path_of_another_machine_is_passed_over():
    """VS Code on a remote server may name the file as the client sees it."""
    here = "__vsc_ipynb_file__ = '/home/somebody/01_sde_basics.ipynb'\n"
    assert run(here + SETUP, ROOT / "notebooks") == files_of(ROOT)


def test_modules_of_another_project_are_forgotten(tmp_path):
    """One that is imported already, and one in the working directory."""
    for name in ("helpers", "show"):
        (tmp_path / f"{name}.py").write_text("other = True\n")
    imported = "import helpers, show\nassert helpers.other and show.other\n"
    here = f"{imported}__vsc_ipynb_file__ = {str(FIRST)!r}\n"
    assert run(here + SETUP, tmp_path) == files_of(ROOT)


def test_alone_it_says_what_to_do(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SETUP], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith("open this notebook in a clone")


@pytest.fixture
def colab(tmp_path):
    """Run the cell as on Colab, with a repository on the disk in place of the public one."""
    remote, content = tmp_path / "remote", tmp_path / "content"
    content.mkdir()
    (remote / "notebooks").mkdir(parents=True)
    (remote / "notebooks" / "plots.py").write_text("")

    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=remote, check=True, capture_output=True)

    def publish(text):
        (remote / "helpers.py").write_text(text)
        git("add", "-A")
        git("commit", "-m", "a change")

    def open_notebook(said="", remote=remote):
        pretend = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('colab')\n"
        settings = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{remote}.insteadOf",
            "GIT_CONFIG_VALUE_0": re.search(r"https://github\.com/\S+", SETUP)[0],
        }
        return run(pretend + SETUP.replace("/content", str(content)), content, said, **settings)

    git("init", "-b", "main")
    publish("version = 1\n")
    return open_notebook, publish, content / "flow"


def test_on_colab_it_clones_then_updates(colab):
    open_notebook, publish, clone = colab
    assert open_notebook() == files_of(clone)
    assert open_notebook() == files_of(clone)  # a restarted kernel finds the clone
    publish("version = 2\n")
    assert open_notebook() == files_of(clone)
    assert (clone / "helpers.py").read_text() == "version = 2\n"


def test_on_colab_a_failed_update_goes_on_with_the_clone(colab, tmp_path):
    """The network gone, or a local change in the way: one line, and the copy that is there."""
    open_notebook, publish, clone = colab
    open_notebook()
    assert open_notebook("not updated", tmp_path / "gone") == files_of(clone)
    (clone / "helpers.py").write_text("version = 'mine'\n")
    publish("version = 2\n")
    assert open_notebook("not updated") == files_of(clone)
    assert (clone / "helpers.py").read_text() == "version = 'mine'\n"
