"""Execute the five notebooks in order, in place, with real outputs and figures.

Usage: python notebooks/run.py [NAME ...]
A NAME is the start of a file name, such as 03; without one, all notebooks are run. Prints
each notebook with the seconds it took. The first failing cell ends the run with the notebook,
the cell and the error, and leaves that notebook's file as it was.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent


def execute(path):
    """Run one notebook from a fresh kernel and write it back without time stamps."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()
    notebook.metadata.pop("language_info", None)  # it names the Python version
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def main(names):
    paths = sorted(p for p in HERE.glob("0*.ipynb") if p.name.startswith(tuple(names or [""])))
    if not paths:
        sys.exit(f"no notebook in {HERE} begins with {' or '.join(names)}")
    os.environ.setdefault("FLOW_PROGRESS", "0")
    start = time.perf_counter()
    for path in paths:
        print(f"{path.name} ...", end=" ", flush=True)
        begin = time.perf_counter()
        try:
            execute(path)
        except CellExecutionError as error:
            sys.exit(f"failed\n{path.name}: {error}")
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    print(f"{len(paths)} notebooks in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
