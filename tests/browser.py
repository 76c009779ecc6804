"""Run the notebooks as a person does: JupyterLab in a real browser, Run All, no error.

Usage: python tests/browser.py [--screenshots FOLDER] [01 03 ...]
Works on a copy of the repository. For each notebook: opens it, runs all cells, and checks that
no cell failed, that progress bars appeared if the notebook trains, that they left nothing
behind, and that every slider, moved by the keyboard, changes its picture. Needs Chromium and
the package playwright; exits with 77 and the reason if one is missing.
"""

import argparse
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINS = {"03"}  # notebooks that train so long that a bar is seen
TOKEN = secrets.token_hex(16)

# The whole notebook as JSON: the page itself holds only the cells that are in view.
CONTENT = "JSON.stringify(jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON())"


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def skip(reason):
    print(f"not run: {reason}")
    sys.exit(77)


def copy_repository(folder):
    """A copy to write into; the data are linked."""
    for name in ("notebooks", "figures"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "helpers.py", folder)
    (folder / "data").symlink_to(ROOT / "data")


def start_jupyterlab(folder):
    """The server process and its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    environment = {k: v for k, v in os.environ.items() if k != "FLOW_PROGRESS"}
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=1)
            return server, address
        except OSError:
            time.sleep(0.5)
    server.kill()
    raise TimeoutError("JupyterLab did not start within a minute")


def stderr_of(content):
    """All text that code cells of a notebook (a dict) hold in their error streams."""
    outputs = (o for cell in content["cells"] for o in cell.get("outputs", []))
    return "".join("".join(o["text"]) for o in outputs if o.get("name") == "stderr")


def run_all(page, address, name, limit):
    """Open a notebook, run all its cells; the executed content, and whether a bar was seen."""
    page.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?token={TOKEN}&reset")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady")
    page.evaluate(
        "window.finished = false;"
        "jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.finished = true);"
        "null"  # else the call would wait for the promise, that is, for the end of the run
    )
    seen, end = False, time.monotonic() + limit
    while not page.evaluate("window.finished"):
        if time.monotonic() > end:
            raise TimeoutError(f"{name} was not finished after {limit} seconds")
        seen = seen or bool(
            re.search(r"training: +\d+%", stderr_of(json.loads(page.evaluate(CONTENT))))
        )
        time.sleep(0.5)
    return json.loads(page.evaluate(CONTENT)), seen


def move_sliders(page):
    """Move each slider by the keyboard and make each choice; how many changed their picture.

    Returns (controls found, pictures that changed)."""
    found = changed = 0
    page.evaluate("jupyterapp.commands.execute('notebook:expand-all-headings'); null")
    page.locator(".jp-WindowedPanel-outer").first.hover()
    for _ in range(400):  # the page holds only the cells that are in view
        while (view := page.locator(".widget-vbox:not([data-moved])").first).count():
            number = str(found)  # a mark that outlives the first of the list
            view.evaluate("(view, n) => view.setAttribute('data-moved', n)", number)
            view = page.locator(f".widget-vbox[data-moved='{number}']")
            for control in view.locator(".noUi-handle, select").all():
                found += 1
                before = view.locator("img").get_attribute("src")
                if control.evaluate("control => control.tagName") == "SELECT":
                    control.select_option(index=1)
                else:
                    control.focus()
                    control.press("ArrowRight")
                end = time.monotonic() + 20
                while time.monotonic() < end:
                    if view.locator("img").get_attribute("src") != before:
                        changed += 1
                        break
                    time.sleep(0.2)
        page.mouse.wheel(0, 400)
        time.sleep(0.05)
    return found, changed


def faults(content, name, seen):
    """What is wrong with an executed notebook, as sentences."""
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    found = [
        f"{name}, cell {number}: {output['ename']}: {output['evalue']}"
        for number, cell in enumerate(code, start=1)
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    if any(cell["execution_count"] is None for cell in code if cell["source"]):
        found.append(f"{name}: not every cell was run")
    if re.sub(r"\x1b\[\w+|\s", "", stderr_of(content)):
        found.append(f"{name}: left behind on stderr: {stderr_of(content).strip()[-200:]!r}")
    if name[:2] in TRAINS and not seen:
        found.append(f"{name}: no progress bar was seen")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="two digits each; by default all")
    parser.add_argument("--screenshots", type=Path, help="folder for the first screen of each")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one notebook")
    arguments = parser.parse_args()
    if importlib.util.find_spec("playwright") is None:
        skip("the package playwright is not installed (pip install playwright)")
    if find_chromium() is None:
        skip("no Chromium was found")
    from playwright.sync_api import sync_playwright

    names = [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    names = [n for n in names if not arguments.numbers or n[:2] in arguments.numbers]
    wrong = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copy_repository(Path(folder))
        server, address = start_jupyterlab(folder)
        try:
            browser = playwright.chromium.launch(
                executable_path=find_chromium(), args=["--no-sandbox"]
            )
            for name in names:
                page = browser.new_page(viewport={"width": 1300, "height": 1000})
                start = time.monotonic()
                content, seen = run_all(page, address, name, arguments.limit)
                if arguments.screenshots:
                    arguments.screenshots.mkdir(parents=True, exist_ok=True)
                    page.evaluate("jupyterapp.shell.currentWidget.content.scrollToItem(0)")
                    time.sleep(2)  # until the cells in view are drawn
                    page.screenshot(path=arguments.screenshots / f"{name}.png")
                controls, changed = move_sliders(page)
                found = faults(content, name, seen)
                if changed < controls:
                    found.append(f"{name}: {controls - changed} controls change no picture")
                bar = "progress bar seen" if seen else "no progress bar"
                print(
                    f"{name}: {time.monotonic() - start:.0f} s, {bar}, "
                    f"{changed} of {controls} controls move, {len(found)} faults"
                )
                page.close()
                wrong += found
        finally:
            server.terminate()
            server.wait()
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
