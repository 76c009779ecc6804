"""The setup cell of the notebooks: silent, updates on Colab, finds the root elsewhere."""

import json
import os
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
keys = ("FLOW_FIGURES", "FLOW_WEIGHTS")
print(json.dumps([helpers.__file__, str(ROOT), *map(os.environ.get, keys)]))
"""


def run(code, cwd, **environment):
    """Run code in a fresh interpreter; what the last line printed, and nothing else may."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLOW_")}
    result = subprocess.run(
        [sys.executable, "-c", code + REPORT],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_elsewhere_it_finds_the_root_and_changes_nothing(folder):
    file, root, figures, weights = run(SETUP, ROOT / folder)
    assert (file, root) == (str(ROOT / "helpers.py"), str(ROOT))
    assert figures is weights is None


def test_in_vs_code_the_file_decides_and_not_the_working_directory(tmp_path):
    here = f"__vsc_ipynb_file__ = {str(FIRST)!r}\n"
    assert run(here + SETUP, tmp_path)[1] == str(ROOT)


@pytest.fixture
def colab(tmp_path):
    """Run the cell as on Colab, with a repository on the disk in place of the public one."""
    remote, content = tmp_path / "remote", tmp_path / "content"
    content.mkdir()
    remote.mkdir()

    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=remote, check=True, capture_output=True)

    def publish(text):
        (remote / "helpers.py").write_text(text)
        git("add", "-A")
        git("commit", "-m", "a change")

    def open_notebook():
        pretend = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('colab')\n"
        settings = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{remote}.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/OWNER/REPOSITORY",
        }
        return run(pretend + SETUP.replace("/content", str(content)), content, **settings)

    git("init", "-b", "main")
    publish("version = 1\n")
    return open_notebook, publish, content


def test_on_colab_it_clones_then_updates(colab):
    open_notebook, publish, content = colab
    clone = content / "flow-matching-notebooks"
    expected = [str(clone / "helpers.py"), str(clone)]
    expected += [str(content / "figures"), str(content / "weights")]
    assert open_notebook() == expected
    assert open_notebook() == expected  # a restarted kernel finds the clone
    publish("version = 2\n")
    assert open_notebook() == expected
    assert (clone / "helpers.py").read_text() == "version = 2\n"
