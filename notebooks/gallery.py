"""The figures as a printed report takes them: figures/README.md and figures/figures.tex.

Both are made from the outputs of the committed notebooks, by run.py --in-place.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

import helpers
from show import to_latex


@dataclass(frozen=True)
class Figure:
    """A figure that a committed notebook shows: its name, its caption, the notebook's path."""

    name: str
    caption: str
    notebook: Path

    @property
    def question(self):
        """1 (d) for 1d_ou_paths, 1 for 1_broken_programs, "beyond" for the others."""
        start = self.name.split("_")[0]
        return f"{start[0]} ({start[1]})" if len(start) == 2 else start


def figures(root):
    """The figures that the notebooks of a repository show, in their order."""
    import nbformat

    names = {path.read_bytes(): path.stem for path in (root / "figures").glob("*.png")}
    found = []
    for path in sorted((root / "notebooks").glob("0*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for output in (o for cell in cells for o in cell.get("outputs", [])):
            png = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if png in names:
                found.append(Figure(names[png], output.data["text/plain"], path))
    return found


def page(root):
    """The gallery in Markdown: a row a figure."""
    lines = [
        "# Figures",
        "",
        "Each as PNG and PDF, made by `python notebooks/run.py --in-place`.",
        "",
    ]
    lines += ["| figure | caption | question | notebook |", "|---|---|---|---|"]
    for figure in figures(root):
        picture = f'<img src="{figure.name}.png" width="320" alt="{figure.name}">'
        link = f"[{figure.notebook.stem[:2]}](../notebooks/{figure.notebook.name})"
        caption = figure.caption.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {picture} `{figure.name}` | {caption} | {figure.question} | {link} |")
    return "\n".join(lines) + "\n"


def latex(chosen):
    """One figure environment for each of these figures, at natural width."""
    lines = [
        "% needs graphicx, and this folder in \\graphicspath; \\input it, or copy what you need",
        "",
    ]
    for figure in chosen:
        lines += [
            r"\begin{figure}",
            r"\centering",
            rf"\includegraphics{{{figure.name}.pdf}}",
            rf"\caption{{{to_latex(figure.caption)}}}",
            rf"\label{{fig:{figure.name.replace('_', '-')}}}",
            r"\end{figure}",
            "",
        ]
    return "\n".join(lines)


def write(root):
    """Write both to root / "figures"."""
    for name, text in (("README.md", page(root)), ("figures.tex", latex(figures(root)))):
        helpers.write_atomically(root / "figures" / name, text.encode())
