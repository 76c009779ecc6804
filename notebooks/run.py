"""Execute the notebooks: into build/, so that a clone stays as it was, or in place.

Usage: python notebooks/run.py [--in-place] [--html] [--student DIR] [--figures DIR] [NAME ...]
A NAME is the start of a file name, such as 03; without one, all notebooks are meant.
    --in-place     for maintainers: write notebooks/, figures/ and data/ themselves
    --html         also write each executed notebook as a page, its hidden cells folded
    --student DIR  execute nothing; write the notebooks without answers and with the exercises
                   emptied, and what they need, to DIR
    --figures DIR  write only figures, those whose names begin with a NAME such as 1d or
                   beyond_dog, to DIR, with their captions (figures.tex) and the tables of these
                   names; --format png,pdf,svg says how
Prints a line a notebook with its seconds, and whether its text is that of the committed one.
Notebooks run side by side, a core each (but with FLOW_RETRAIN one by one, with all cores). The
first failing cell ends the run and leaves that notebook's file as it was.
"""

import argparse
import ast
import asyncio
import copy
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gallery  # with pyplot: its first scan of fonts writes to stderr, not in a kernel

import helpers

ROOT = helpers.ROOT
HERE = ROOT / "notebooks"
METADATA = {
    "accelerator": "GPU",
    "colab": {"provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
TASK = "Write the functions `my_…` and `My…`: their ✗ turns to ✓. Answer the questions in cells of "
TASK += "your own, and write the captions of the figures."
KEPT = {"tags", "jupyter", "cellView", "jp-MarkdownHeadingCollapsed"}  # metadata of a cell


def execute(path, clients=None):
    """Run one notebook from a fresh kernel; the notebook, without time stamps and versions.

    clients: a dict that holds the client under its path while it runs; client.stop() ends it.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    clients = {} if clients is None else clients

    def report(cell, cell_index):
        client.place = f"{path.name[:2]}: cell {cell_index + 1} of {len(notebook.cells)}"
        if sys.stdout.isatty():
            places = (getattr(other, "place", "") for other in list(clients.values()))
            print("\r" + "   ".join(places), end=" ", flush=True)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
        on_cell_start=report,
        extra_arguments=["--log-level=CRITICAL"],
    )

    async def go():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        client.stop = lambda: loop.call_soon_threadsafe(task.cancel)
        clients[path] = client
        try:
            await client.async_execute()
        finally:
            clients.pop(path, None)

    asyncio.run(go())
    return normalise(notebook)


def normalise(notebook):
    """Leave the metadata that are meant: front ends add their own, and the Python version."""
    folded = notebook.metadata.get("colab", {}).get("collapsed_sections")
    notebook.metadata = copy.deepcopy(METADATA)
    if folded:
        notebook.metadata["colab"]["collapsed_sections"] = folded
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEPT}
    return notebook


def texts(notebook):
    """What each code cell says: all of its outputs but pictures."""
    kinds = ("text/plain", "text/markdown", "text/html", "text/latex")
    return [
        [
            "".join(output.get("text", ""))
            + "".join("".join(output.get("data", {}).get(kind, "")) for kind in kinds)
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def verdict(notebook, path):
    """Whether a notebook says what the committed one does, else which code cells do not."""
    import nbformat

    if not path.exists():
        return ""
    old, new = texts(nbformat.read(path, as_version=4)), texts(notebook)
    if len(old) != len(new):
        return ", other cells than the committed one"
    other = [str(i) for i, pair in enumerate(zip(old, new, strict=True), 1) if pair[0] != pair[1]]
    if not other:
        return ", text as committed"
    return f", other text than committed in [{'], ['.join(other)}]"


def write(notebook, path):
    """Write a notebook so that a crash, or a second run, leaves a whole file."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    helpers.write_atomically(path, (nbformat.writes(notebook) + "\n").encode())


def fold(notebook):
    """The notebook for a page: the source of a hidden cell in a <details> above its outputs."""
    import nbformat

    cells = []
    for cell in notebook.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            source = (
                f"<details><summary>code</summary>\n\n```python\n{cell.source}\n```\n</details>"
            )
            cells.append(nbformat.v4.new_markdown_cell(source))
            cell = copy.deepcopy(cell)
            cell.metadata["tags"] = ["source-in-details"]
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def write_page(notebook, path):
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    options = Config({"TagRemovePreprocessor": {"enabled": True}})
    options.TagRemovePreprocessor.remove_input_tags = {"source-in-details"}
    page, _ = HTMLExporter(config=options).from_notebook_node(fold(notebook))
    helpers.write_atomically(path, page.encode())


def emptied(source):
    """An exercise, one definition, down to its signatures and docstrings, each with `...`."""
    tree = ast.parse(source)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.ClassDef):
        raise ValueError(f"an exercise must be one def or class and nothing else, got:\n{source}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            node.body = [*node.body[:documented], ast.Expr(ast.Constant(...))]
    return ast.unparse(tree)


def uncaptioned(source):
    """The code of a cell without the caption of its figure, which tells what one sees."""
    lines = source.split("\n")
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "caption":
            lines[node.lineno - 1 : node.end_lineno] = ['caption = "?"  # what does one see?']
    return "\n".join(lines)


def student(notebook):
    """A notebook to hand out: no answers, derivations or outputs, the exercises emptied, and the
    figures of the questions without caption."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if not {"answer", "derivation"} & set(cell.metadata.get("tags", []))
    ]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # the badge would open the solved notebook
            cell.source = re.sub(r"^\[!\[Open in Colab\].*\n*", "", cell.source, flags=re.MULTILINE)
        else:
            cell.outputs, cell.execution_count = [], None
            if "exercise" in cell.metadata.get("tags", []):
                cell.source = emptied(cell.source)
            if "caption = " in cell.source and '"beyond_' not in cell.source:
                cell.source = uncaptioned(cell.source)
    notebook.cells[0].source += f"\n\n{TASK}"
    return notebook


def hand_out(paths, folder):
    """Write the student version of the notebooks, and what their setup cell needs, to folder."""
    import nbformat

    folder = Path(folder).expanduser().resolve()
    taken = [path.name for path in paths if (folder / "notebooks" / path.name).exists()]
    if taken:
        sys.exit(f"{folder} holds {', '.join(taken)} already: name another folder")
    for path in paths:
        write(student(nbformat.read(path, as_version=4)), folder / "notebooks" / path.name)
    for name in ("plots.py", "show.py", "plots.mplstyle", "evaluate.py", "baseline.py"):
        shutil.copy(HERE / name, folder / "notebooks" / name)
    for name in ("helpers.py", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    print(f"{len(paths)} notebooks to hand out: {folder}")


def prepare(in_place, profile):
    """The environment of the kernels; the folder that the notebooks are written to."""
    output = os.environ.get("FLOW_OUTPUT") or ROOT / "build"
    output = ROOT if in_place else Path(output).expanduser().absolute()
    folder = HERE if in_place else output / "notebooks"
    for place in (folder, output / "figures"):  # an error now, not after the first notebook
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    os.environ.update(FLOW_OUTPUT=str(output), IPYTHONDIR=profile)
    os.environ.setdefault("FLOW_PROGRESS", "0")
    if not os.environ.get("FLOW_RETRAIN"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return folder


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="start of a name: 03, or 1d")
    parser.add_argument("--in-place", action="store_true", help="write notebooks/ and figures/")
    parser.add_argument("--html", action="store_true", help="pages, too")
    parser.add_argument("--student", metavar="DIR", help="write notebooks to hand out")
    parser.add_argument("--figures", metavar="DIR", help="write figures only, of questions: 1d")
    parser.add_argument("--format", default="png,pdf", help="of these figures: png,pdf,svg")
    options = parser.parse_args(arguments)
    if options.figures:
        return write_figures(options)
    paths = chosen(options.names)
    try:
        if options.student:
            return hand_out(paths, options.student)
        run(paths, options)
        if options.in_place:
            gallery.write(ROOT)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        sys.exit(f"cannot write ({error}); make it writable or name another by FLOW_OUTPUT")


def chosen(names):
    """The notebooks whose file names begin with one of these; all without names."""
    paths = sorted(p for p in HERE.glob("0*.ipynb") if p.name.startswith(tuple(names or [""])))
    if not paths:
        sys.exit(f"no notebook in {HERE} begins with {' or '.join(names)}")
    return paths


def write_figures(options):
    """Run the notebooks that hold the figures of these names, and keep only those."""
    formats = {f".{kind}" for kind in options.format.split(",")}
    if not formats <= {".png", ".pdf", ".svg"}:
        sys.exit(f"--format must be some of png,pdf,svg, with commas, got {options.format}")
    begins = tuple(options.names or [""])
    wanted = [figure for figure in gallery.figures(ROOT) if figure.name.startswith(begins)]
    if not wanted:
        sys.exit(f"no figure begins with {' or '.join(begins)}; figures/README.md lists them")
    folder = Path(options.figures).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="figures-") as made:
        os.environ.update(FLOW_OUTPUT=made, FLOW_SVG="1" if ".svg" in formats else "")
        run(sorted({figure.notebook for figure in wanted}), options)
        drawn = [figure for figure in gallery.figures(Path(made)) if figure.name.startswith(begins)]
        kept = {figure.name + kind for figure in drawn for kind in formats}
        for path in (Path(made) / "figures").iterdir():
            table = path.suffix in (".tex", ".csv") and path.name.startswith(begins)
            if table or path.name in kept:
                shutil.copy(path, folder)
    helpers.write_atomically(folder / "figures.tex", gallery.latex(drawn).encode())
    print(f"{len(drawn)} figures: {folder}")


def stop():
    """After Ctrl-C: all files are whole."""
    print("\ninterrupted; the notebook at hand was left as it was", file=sys.stderr)
    sys.exit(130)


def run(paths, options):
    """Execute the notebooks, the longest, which are the last, first (but 04 trains what 05 needs),
    and say where they are."""
    start, clients = time.perf_counter(), {}
    # not the user's settings; a kernel that is ended may still write there
    with tempfile.TemporaryDirectory(prefix="ipython-", ignore_cleanup_errors=True) as profile:
        folder = prepare(options.in_place, profile)
        side_by_side = 1 if os.environ.get("FLOW_RETRAIN") else min(os.cpu_count(), 4)
        with ThreadPoolExecutor(side_by_side) as pool:
            order = paths if os.environ.get("FLOW_RETRAIN") else reversed(paths)
            tasks = [pool.submit(run_one, path, folder, options, clients) for path in order]
            try:
                for task in as_completed(tasks):
                    print(task.result(), flush=True)
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(task.done() for task in tasks):  # one may only be starting
                    while clients:
                        clients.popitem()[1].stop()
                    time.sleep(0.1)
                if isinstance(error, KeyboardInterrupt):
                    stop()
                raise
    if not options.figures:
        print(f"{len(paths)} notebooks in {time.perf_counter() - start:.0f} s, in {folder}")
        print(f"to read them: jupyter lab {folder}")


def run_one(path, folder, options, clients):
    """Execute one notebook and write it; a line about it."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    begin = time.perf_counter()
    try:
        notebook = execute(path, clients)
    except CellExecutionError as error:
        sys.exit(f"failed\n{path.name}: {error}")
    except DeadKernelError:
        sys.exit(f"failed\n{path.name}: the kernel died, perhaps for lack of memory")
    same = verdict(notebook, HERE / path.name)
    write(notebook, folder / path.name)
    if options.html:
        write_page(notebook, folder / f"{path.stem}.html")
    back = "\r" if sys.stdout.isatty() else ""
    return f"{back}{path.name} {time.perf_counter() - begin:.0f} s{same}"


if __name__ == "__main__":
    main(sys.argv[1:])
