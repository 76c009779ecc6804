"""What a report prints: fonts and widths of the PDF files, the gallery, the LaTeX figures."""

import re
from pathlib import Path

import gallery
import pypdf
import pytest

import plots

ROOT = Path(__file__).resolve().parents[1]
FIGURES = gallery.figures(ROOT)


@pytest.mark.parametrize("name", [figure.name for figure in FIGURES])
def test_a_printed_figure(name):
    """A page's or a column's width; TrueType fonts; letters of 7 pt; scripts (0.7 of a letter) and
    root signs, which are fitted to what they cover, of 6."""
    (page,) = pypdf.PdfReader(ROOT / "figures" / f"{name}.pdf").pages
    assert float(page.mediabox.width) in (72 * plots.FULL, pytest.approx(72 * plots.HALF))
    fonts = page["/Resources"].get("/Font", {})
    kinds = {str(font.get_object()["/Subtype"]) for font in fonts.values()}
    assert kinds <= {"/Type0", "/TrueType"}, kinds
    content = page.get_contents().get_data().decode("latin-1")
    sizes = {float(size) for size in re.findall(r"/F\S+ ([\d.]+) Tf", content)}
    scripts = {size for size in sizes if size < 7}
    assert all(size >= 6 for size in scripts), sizes
    assert all(any(abs(size - 0.7 * s) < 0.05 for s in sizes) for size in scripts), sizes


@pytest.mark.parametrize("name", ["README.md", "figures.tex"])
def test_gallery_and_latex_are_of_the_committed_notebooks(name):
    made = gallery.page(ROOT) if name == "README.md" else gallery.latex(FIGURES)
    remedy = "python notebooks/run.py --in-place writes it"
    assert (ROOT / "figures" / name).read_text(encoding="utf-8") == made, remedy
