"""notebooks/run.py on small notebooks: into build/ or in place, faults, pages, handing out."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

EXERCISE = '''def double(x):
    """Twice x."""
    return 2 * x'''


def small(*sources):
    cells = [new_code_cell(source) for source in sources]
    left_behind = {"vscode": {"x": 1}, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=left_behind)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of a repository of its own for the runner, with one small notebook."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "HERE", tmp_path / "notebooks")
    for name in ("FLOW_OUTPUT", "FLOW_SVG", "IPYTHONDIR"):  # the runner sets them
        monkeypatch.setenv(name, "")
    nbformat.write(small("print(1 + 1)", "import os\nos.environ['FLOW_OUTPUT']"), tmp_path / NAME)
    return tmp_path


NAME = Path("notebooks") / "01_small.ipynb"


def said(notebook):
    return ["".join(texts) for texts in run.texts(notebook)]


def test_it_writes_to_build_and_leaves_the_clone(home, capsys):
    before = (home / NAME).read_bytes()
    run.main([])
    assert (home / NAME).read_bytes() == before
    made = nbformat.read(home / "build" / NAME, as_version=4)
    assert said(made) == ["2\n", repr(str(home / "build"))]
    assert made.metadata == run.METADATA
    out = capsys.readouterr().out
    assert "other text than committed in [1], [2]" in out
    assert f"jupyter lab {home / 'build' / 'notebooks'}" in out


def test_in_place(home, capsys):
    run.main(["--in-place", "01"])
    made = nbformat.read(home / NAME, as_version=4)
    assert said(made) == ["2\n", repr(str(home))]
    assert made.metadata == run.METADATA
    before = (home / NAME).read_bytes()
    run.main(["--in-place"])
    assert (home / NAME).read_bytes() == before
    assert "text as committed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import os\nos._exit(1)", "the kernel died")],
)
def test_a_fault_is_one_clear_line_and_leaves_the_file(source, message, home):
    nbformat.write(small(source), home / NAME)
    before = (home / NAME).read_bytes()
    with pytest.raises(SystemExit) as stop:
        run.main(["--in-place"])
    assert message in str(stop.value)
    assert str(stop.value).lstrip().startswith("failed\n01_small.ipynb: ")
    assert (home / NAME).read_bytes() == before
    assert [path.name for path in (home / "notebooks").iterdir()] == [NAME.name]


def test_ctrl_c_ends_with_a_line_and_leaves_the_file(home):
    """As a terminal sends it: to the runner and to its kernel."""
    nbformat.write(small("import time\nprint('waiting')\ntime.sleep(60)"), home / NAME)
    before = (home / NAME).read_bytes()
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    # a shell starts what runs in the background, these tests for instance, with Ctrl-C ignored
    start += f"import sys; sys.path.insert(0, {str(Path(run.__file__).parent)!r}); import run; "
    start += f"from pathlib import Path; run.HERE = Path({str(home / 'notebooks')!r}); run.main([])"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"FLOW_OUTPUT": str(home / "build")}
    process = subprocess.Popen(
        [sys.executable, "-c", start], start_new_session=True, env=environment, **options
    )
    while not list(home.glob("build/figures")):
        time.sleep(0.2)
    time.sleep(6)  # until the cell runs
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "interrupted; the notebook at hand was left as it was"
    assert (home / NAME).read_bytes() == before
    assert not list(home.glob("build/notebooks/*"))


def test_a_folder_that_cannot_be_written_is_said_before_the_first_cell(home, monkeypatch):
    (home / "file").write_text("in the way")
    monkeypatch.setenv("FLOW_OUTPUT", str(home / "file"))
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("a notebook was run"))
    with pytest.raises(SystemExit, match="cannot write"):
        run.main([])


def test_an_unknown_name(home):
    with pytest.raises(SystemExit, match=r"no notebook in .* begins with 07"):
        run.main(["07"])


def test_a_page_folds_the_hidden_cells(home):
    notebook = small("print('seen')", "print('in the details')")
    notebook.cells[1].metadata["jupyter"] = {"source_hidden": True}
    nbformat.write(notebook, home / NAME)
    run.main(["--html"])
    page = (home / "build" / NAME).with_suffix(".html").read_text()
    assert page.count("<summary>code</summary>") == 1
    assert page.count("in the details") == 2  # its source, once, and its output


def hand_out_example():
    cells = [
        new_markdown_cell(
            "# 01\n\n[![Open in Colab](badge)](solved)\n\n### Question 1 (a) (1 point)"
        ),
        new_markdown_cell("**Answer.** 42", metadata={"tags": ["answer"]}),
        new_markdown_cell("**Derivation.** QED", metadata={"tags": ["derivation"]}),
        new_code_cell(EXERCISE, metadata={"tags": ["exercise"]}),
        new_code_cell(
            "from helpers import claim\nclaim('double doubles', lambda: double(2) == 4)",
            outputs=[new_output("stream", name="stdout", text="✓ double doubles\n")],
        ),
    ]
    return new_notebook(cells=cells, metadata=run.METADATA)


def test_the_student_version_runs_and_the_solution_turns_its_cross(home, tmp_path):
    """Answers, derivations and outputs are gone; ✗ before the exercise is solved, ✓ after."""
    nbformat.write(hand_out_example(), home / NAME)
    for name in ("helpers.py", "requirements.txt", "LICENSE", "data/x", "notebooks/plots.py"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("")
    beside = {"plots.py", "show.py", "plots.mplstyle", "evaluate.py", "baseline.py"}
    for name in beside:
        (home / "notebooks" / name).write_text("")
    run.main(["--student", str(tmp_path / "class")])
    with pytest.raises(SystemExit, match="already"):  # solved work may be there
        run.main(["--student", str(tmp_path / "class")])
    handed = nbformat.read(tmp_path / "class" / NAME, as_version=4)
    names = {path.name for path in (tmp_path / "class" / "notebooks").iterdir()}
    assert names == {NAME.name, *beside}
    assert [cell.cell_type for cell in handed.cells] == ["markdown", "code", "code"]
    first = "# 01\n\n### Question 1 (a) (1 point)"  # without the badge
    assert handed.cells[0].source == f"{first}\n\n{run.TASK}"
    assert handed.cells[1].source == 'def double(x):\n    """Twice x."""\n    ...'
    assert not handed.cells[2].outputs
    for solution, mark in ((None, "✗"), (EXERCISE, "✓")):
        if solution:
            handed.cells[1].source = solution
        handed.cells[2].source = (
            f"import sys\nsys.path.insert(0, {str(Path(run.__file__).parents[1])!r})\n"
            + hand_out_example().cells[4].source
        )
        nbformat.write(handed, home / NAME)
        assert said(run.execute(home / NAME))[1].startswith(f"{mark} double doubles")


def uses(notebook):
    """Each exercise, and the other cells of code that name it."""
    code = [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code"]
    exercises = {i: c.source for i, c in code if "exercise" in c.metadata.get("tags", [])}
    names = [re.search(r"^(?:def|class) (\w+)", s, re.MULTILINE)[1] for s in exercises.values()]
    others = [(i, c.source) for i, c in code if i not in exercises]
    return {name: [i for i, s in others if re.search(rf"\b{name}\b", s)] for name in names}


@pytest.mark.parametrize("path", sorted(run.HERE.glob("*.ipynb")), ids=lambda path: path.stem[:2])
def test_a_notebook_needs_an_exercise_for_its_claim_only(path):
    """So the student version runs to its end wherever the whole notebook does."""
    notebook = nbformat.read(path, as_version=4)
    for name, cells in uses(notebook).items():
        assert len(cells) == 1, name
        assert re.search(r"claim\(\s*\".* agree", notebook.cells[cells[0]].source), name


@pytest.mark.parametrize("number", ["01", "02"])  # the others take minutes: run.py --student
def test_the_student_version_of_a_notebook_has_a_cross_for_each_exercise(number):
    """As far as the last of them; with ✗ where one is empty, and nowhere else."""
    (path,) = run.HERE.glob(f"{number}_*.ipynb")
    whole = nbformat.read(path, as_version=4)
    last = max(cell for cells in uses(whole).values() for cell in cells)
    whole.cells = whole.cells[: last + 1]
    with tempfile.TemporaryDirectory() as folder:
        write = Path(folder) / path.name
        nbformat.write(run.student(whole), write)
        texts = said(run.execute(write))
    crosses = [line for text in texts for line in text.splitlines() if line.startswith("✗")]
    exercises = len(uses(whole))
    assert exercises - 1 <= len(crosses) <= exercises, crosses  # two may share a claim


def test_the_caption_of_a_question_is_left_to_the_student():
    source = 'x = 1\ncaption = (\n    f"{x} is "\n    "one"\n)\nsave_figure(x, "1a_x", caption)'
    cells = [
        new_markdown_cell("#"),
        new_code_cell(source),
        new_code_cell(source.replace("1a", "beyond")),
    ]
    handed = run.student(new_notebook(cells=cells))
    short = 'x = 1\ncaption = "?"  # what does one see?\nsave_figure(x, "1a_x", caption)'
    assert [cell.source for cell in handed.cells[1:]] == [short, cells[2].source]


def test_an_exercise_that_is_a_class_keeps_its_methods():
    source = '''class Layer(Module):

    def __init__(self): super().__init__()

    def forward(self, x):
        """x + f(x)."""
        def inner(y):
            return y
        return inner(x)'''
    assert (
        run.emptied(source)
        == '''class Layer(Module):

    def __init__(self):
        ...

    def forward(self, x):
        """x + f(x)."""
        ...'''
    )


@pytest.mark.parametrize("source", ["x = 1", "import math\n\ndef f():\n    return 1"])
def test_an_exercise_is_one_definition(source):
    with pytest.raises(ValueError, match="one def or class and nothing else"):
        run.emptied(source)


def test_the_command_line_says_what_it_can(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    assert {"--in-place", "--html", "--student"} <= set(capsys.readouterr().out.split())


def test_notebooks_run_side_by_side_and_a_fault_ends_the_others(home, capsys):
    """The first waits for the second; then the second fails while the first would wait on."""
    other = home / "notebooks" / "02_small.ipynb"
    waits = "import pathlib, time\nwhile not pathlib.Path('made').exists(): time.sleep(0.1)"
    nbformat.write(small(waits), home / NAME)
    nbformat.write(small("open('made', 'w').close()"), other)
    run.main([])
    assert capsys.readouterr().out.count("small.ipynb") == 2
    nbformat.write(small("import time\ntime.sleep(100)"), home / NAME)
    nbformat.write(small("import time\ntime.sleep(3)\n1 / 0"), other)
    for number in range(3, 8):  # more than run at a time: these wait, or are stopped
        nbformat.write(small("import time\ntime.sleep(100)"), other.with_name(f"00_{number}.ipynb"))
    start = time.perf_counter()
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        run.main([])
    assert time.perf_counter() - start < 60


DRAWS = f"""import sys
sys.path[:0] = [{str(Path(run.__file__).parent)!r}, {str(Path(run.__file__).parents[1])!r}]
from plots import save_figure, save_table, plt
for name in ("1a_line", "1b_line"):
    fig, ax = plt.subplots(figsize=(3.2, 2))
    ax.plot([0, 1])
    ax.set_title(name)
    save_figure(fig, name, f"{{name[:2]}}: 50 % of $x_1$, `x|y`")
    save_table([{{"n": 1}}], name[:2] + "_table", "one number")"""


def test_the_gallery_and_figures_of_one_question(home, tmp_path):
    nbformat.write(small(DRAWS), home / NAME)
    run.main(["--in-place"])
    page = (home / "figures" / "README.md").read_text()
    assert page.count("\n| <img") == 2
    assert r"1a: 50 % of $x_1$, `x\|y` | 1 (a) | [01](../notebooks/01_small.ipynb) |" in page
    latex = (home / "figures" / "figures.tex").read_text()
    assert r"\includegraphics{1b_line.pdf}" in latex
    assert r"\caption{1b: 50 \% of $x_1$, \texttt{x|y}}" in latex
    assert r"\label{fig:1b-line}" in latex
    run.main(["--figures", str(tmp_path / "report"), "--format", "svg,pdf", "1b"])
    table, captions = ["1b_table.tex", "1b_table.csv"], tmp_path / "report" / "figures.tex"
    made = {"1b_line.svg", "1b_line.pdf", *table, captions.name}
    assert {p.name for p in (tmp_path / "report").iterdir()} == made
    assert captions.read_text().count(r"\label") == 1
    assert "fig:1b-line" in captions.read_text()
    with pytest.raises(SystemExit, match="no figure begins with 7c"):
        run.main(["--figures", str(tmp_path / "report"), "7c"])
    with pytest.raises(SystemExit, match="png,pdf,svg"):
        run.main(["--figures", str(tmp_path / "report"), "--format", "eps"])


def test_nbval_does_not_wait_for_a_dead_kernel(tmp_path):
    nbformat.write(small("import os\nos._exit(1)", "1"), tmp_path / "01_small.ipynb")
    (tmp_path / "conftest.py").write_text((Path(run.ROOT) / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "the kernel died, perhaps for lack of memory" in done.stdout
    assert time.perf_counter() - start < 100
