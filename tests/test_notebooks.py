"""Guards: what the committed notebooks and figures must be. They read files and run nothing.

That the numbers in the outputs are true is checked by nbval, which runs every notebook again.
"""

import ast
import base64
import io
import json
import re
import statistics
from pathlib import Path

import IPython.display
import pytest
import run
import torch
from PIL import Image

import helpers
import plots

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "01_sde_basics",
    "02_conditional_paths",
    "03_flow_matching_2d",
    "04_unet_image_flow",
    "05_score_sde_sampling",
]
POINTS = {  # of the assignment, 25 in all
    "01": {"a": 1, "b": 1, "c": 1, "d": 2},
    "02": {"a": 1, "b": 1, "c": 1, "d": 1},
    "03": {"a": 1, "b": 1, "c": 1, "d": 1},
    "04": {"a": 1, "b": 3, "c": 1, "d": 1},
    "05": {"a": 3, "b": 3},
}
PATHS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
PNGS = sorted((ROOT / "figures").glob("*.png"))


class Notebook:
    """A notebook file, with the views of it that the tests need."""

    def __init__(self, path):
        self.path = path
        content = json.loads(path.read_text(encoding="utf-8"))
        self.metadata, self.cells = content["metadata"], content["cells"]
        for cell in self.cells:
            cell["source"] = "".join(cell["source"])
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.outputs = [output for cell in self.code for output in cell["outputs"]]
        self.prose = "\n\n".join(c["source"] for c in self.cells if c["cell_type"] == "markdown")

    def shown(self, kind):
        """The outputs of one MIME type, in order."""
        data = (output.get("data", {}) for output in self.outputs)
        return ["".join(item[kind]) for item in data if kind in item]

    def images(self):
        """The displayed PNG files and their captions."""
        items = (output["data"] for output in self.outputs if "image/png" in output.get("data", {}))
        return [
            (base64.b64decode("".join(item["image/png"])), "".join(item["text/plain"]))
            for item in items
        ]

    def section(self, heading):
        """The prose from a heading (a pattern) to the next heading of level 2 or 3, or None."""
        match = re.search(rf"^{heading}.*?(?=^##+ |\Z)", self.prose, re.MULTILINE | re.DOTALL)
        return match and match.group()


@pytest.fixture(params=PATHS, ids=lambda path: path.stem[:2])
def notebook(request):
    return Notebook(request.param)


def test_the_five_notebooks_exist():
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == {
        f"{name}.ipynb" for name in NAMES
    }


# Outputs


def test_executed_in_order_from_a_fresh_kernel(notebook):
    assert [c["execution_count"] for c in notebook.code] == list(range(1, len(notebook.code) + 1))


def test_no_errors_and_no_warnings(notebook):
    """No traceback, and nothing on stderr: warnings and progress bars end up there."""
    assert not [output for output in notebook.outputs if output["output_type"] == "error"]
    assert not [o for o in notebook.outputs if o.get("name") == "stderr"]


def test_outputs_are_stable(notebook):
    """No widgets, no addresses of objects, no updated displays, no figure unlike the committed."""
    for output in notebook.outputs:
        assert not any("widget" in kind for kind in output.get("data", {}))
        assert "transient" not in output
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not re.search(r" at 0x[0-9a-f]{6}", text), text
        assert "Not as in figures/" not in "".join(output.get("data", {}).get("text/markdown", ""))


def test_metadata(notebook):
    """Python 3 with a GPU on Colab; no widgets, no time stamps, no Python version."""
    remedy = "a front end left something behind: python notebooks/run.py --in-place"
    colab = {k: v for k, v in notebook.metadata["colab"].items() if k != "collapsed_sections"}
    assert {**notebook.metadata, "colab": colab} == run.METADATA, remedy
    for cell in notebook.cells:
        assert cell["metadata"].keys() <= run.KEPT, remedy


def test_every_claim_holds(notebook):
    """A reader who changes a number may see a cross; the committed notebooks have none."""
    assert not [o for o in notebook.outputs if "✗" in "".join(o.get("text", ""))]


def test_size(notebook):
    assert notebook.path.stat().st_size < 1.5e6


# Sources


def imported_object(node):
    """The object of helpers that an expression such as GaussianPath.sample names."""
    if isinstance(node, ast.Attribute):
        return getattr(imported_object(node.value), node.attr)
    assert isinstance(node, ast.Name), "show_source takes names only"
    return helpers if node.id == "helpers" else getattr(helpers, node.id)


def shown_sources(cell):
    """The arguments of each call of show_source in a cell, as objects."""
    calls = [
        node
        for node in ast.walk(ast.parse(cell["source"]))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show_source"
    ]
    return [[imported_object(argument) for argument in call.args] for call in calls]


def test_shown_sources_are_the_present_ones(notebook, monkeypatch):
    present = []
    monkeypatch.setattr(IPython.display, "display", lambda item: present.append(item.data))
    for cell in notebook.code:
        for objects in shown_sources(cell):
            helpers.show_source(*objects)
    stored = [text for text in notebook.shown("text/markdown") if text.startswith("```python")]
    assert stored == present


def test_setup_cell_is_the_same_everywhere():
    assert len({Notebook(path).code[0]["source"] for path in PATHS}) <= 1


def test_cells_are_short(notebook):
    """At most 25 lines, and 8 in the middle; the setup cell is the only exception."""
    lengths = [len(cell["source"].splitlines()) for cell in notebook.code[1:]]
    assert max(lengths) <= 25
    assert statistics.median(lengths) <= 8


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("a magic", r"^\s*[%!]"),
        ("a trailing semicolon", r";\s*$"),
        ("a warning filter", r"filterwarnings|simplefilter"),
        ("clear_output", r"clear_output"),
        ("an nbval tag", r"NBVAL_"),
    ],
)
def test_no_cell_has(name, pattern, notebook):
    found = [c["source"] for c in notebook.code if re.search(pattern, c["source"], re.MULTILINE)]
    assert not found, name


# Figures


def test_every_png_has_its_pdf_and_nothing_else_is_there():
    others = {".gif", ".tex", ".csv", ".md"}
    names = {path.name for path in (ROOT / "figures").iterdir() if path.suffix not in others}
    assert names == {path.stem + kind for path in PNGS for kind in (".png", ".pdf")}


@pytest.mark.parametrize("path", PNGS, ids=lambda path: path.stem)
def test_size_of_figures(path):
    assert path.stat().st_size < 200_000


def test_animations_are_small_and_made_by_a_notebook():
    code = "".join(cell["source"] for path in PATHS for cell in Notebook(path).code)
    for path in (ROOT / "figures").glob("*.gif"):
        assert path.stat().st_size < 2e6
        assert re.search(rf'save_animation\([^)]*"{path.stem}"', code)


def test_figures_are_what_the_notebooks_show():
    """Byte for byte and once each, in the notebook of their question; beyond_* in any."""
    shown = {image: path.stem[1] for path in PATHS for image, _ in Notebook(path).images()}
    files = {path.read_bytes(): path.name for path in PNGS}
    assert len(shown) == sum(len(Notebook(path).images()) for path in PATHS)
    missing = [
        f"{question}: an image without a file"
        for image, question in shown.items()
        if image not in files
    ]
    missing += [name for image, name in files.items() if image not in shown]
    assert not missing
    assert not [name for image, name in files.items() if name[0] not in ("b", shown[image])]


def test_captions(notebook):
    """Sentences that say what to see: 40 characters at least, none twice."""
    captions = [caption for _, caption in notebook.images()]
    assert captions
    assert not [c for c in captions if len(c) < 40 or not c.endswith(".") or c.startswith("<")]
    assert len(set(captions)) == len(captions)


# How a notebook reads


def test_figures_are_as_wide_as_a_page_or_a_column(notebook):
    widths = {Image.open(io.BytesIO(png)).width for png, _ in notebook.images()}
    assert widths <= {round(200 * width) for width in (plots.FULL, plots.HALF)}


def test_exercises_are_one_definition_each_and_the_claims_enough(notebook):
    code = notebook.code
    exercises = [c["source"] for c in code if "exercise" in c["metadata"].get("tags", [])]
    assert len(exercises) >= 3
    assert all(run.emptied(source) != source for source in exercises)
    assert sum(c["source"].count("claim(") for c in code) >= 5
    assert not [c for c in code if re.search(r"^\s*assert ", c["source"], re.M)]


# Weights


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data" / "weights").glob("*.pt")), ids=lambda path: path.stem
)
def test_weights_files(path):
    """At most 4 MB, half precision, finite, and with the record of the run that made them."""
    assert path.stat().st_size < 4e6
    content = torch.load(path, weights_only=True)
    for value in content["weights"].values():
        assert value.dtype == torch.float16
        assert value.isfinite().all()
    assert {"config", "losses", "seconds", "device", "versions"} <= content["record"].keys()
    assert content["record"]["losses"].isfinite().all()


# Answers


def test_every_question_is_answered(notebook):
    """Its heading with its points, in order, and an answer under it."""
    number = notebook.path.stem[:2]
    found = re.findall(r"^### Question (\d) \((\w)\).*\((\d) points?\)\s*$", notebook.prose, re.M)
    expected = [(number[1], letter, str(p)) for letter, p in POINTS[number].items()]
    assert found == expected
    for _, letter, _ in found:
        section = notebook.section(rf"### Question {number[1]} \({letter}\)")
        assert "**Answer" in section, letter


def test_frame(notebook):
    assert notebook.cells[0]["source"].startswith(f"# {notebook.path.stem[:2]} ")
    for heading in ("## Conclusion", "## References"):
        assert len(notebook.section(heading) or "") > 100, heading


def test_the_final_question_is_answered():
    path = ROOT / "notebooks" / f"{NAMES[-1]}.ipynb"
    assert re.search(r"^#+ .*Final question", Notebook(path).prose, re.MULTILINE)


# The public address


def test_one_address_everywhere():
    """Badges and setup cells name one repository, and each badge its own notebook."""
    readme, addresses = (ROOT / "README.md").read_text(encoding="utf-8"), set()
    badge = r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/notebooks/(\w+)"
    for path in PATHS:
        book = Notebook(path)
        ((address, name),) = re.findall(badge, book.cells[0]["source"])
        assert name == path.stem
        assert f'https://github.com/{address} flow"' in book.code[0]["source"]
        assert f"{address}/blob/main/notebooks/{name}.ipynb" in readme
        addresses.add(address)
    assert len(addresses) <= 1
