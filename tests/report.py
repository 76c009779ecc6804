"""A report of all figures and tables, compiled: python tests/report.py [DIR]   (DIR: build/report).

Needs pdflatex (Debian: texlive-latex-recommended). Fails where LaTeX does, and where a figure
or its caption is wider than the page. `pdftoppm -r 150 -png report.pdf page` shows the pages.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = r"""\documentclass[11pt]{article}
\usepackage[T1]{fontenc}
\usepackage[a4paper,textwidth=6.5in,textheight=9.5in]{geometry}
\usepackage{amsmath,amssymb,graphicx,booktabs}
\graphicspath{{%s/}}
\setcounter{totalnumber}{3}
\begin{document}
\title{All figures}\maketitle
"""


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    figures = ROOT / "figures"
    body = (figures / "figures.tex").read_text(encoding="utf-8").replace("\n\n", "\n\\clearpage\n")
    tables = [path.read_text(encoding="utf-8") for path in sorted(figures.glob("[0-9b]*_*.tex"))]
    report = folder / "report.tex"
    text = HEAD % figures + body + "\n\n".join(tables) + "\n\\end{document}\n"
    report.write_text(text, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", report.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    log = (folder / "report.log").read_text(encoding="latin-1")
    faults = [line for line in log.splitlines() if line.startswith(("!", "Overfull"))]
    if done.returncode or faults:
        sys.exit("\n".join(faults) or done.stdout[-2000:])
    print(f"{folder / 'report.pdf'}: no fault, no overfull box")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "report").absolute())
