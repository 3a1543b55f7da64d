"""Write README.md from nbs/index.ipynb, without Quarto: its prose, its code and the text that the code printed.

Cells that start with `#| hide` are left out, and so are directives and what only the site fills in: <!-- … -->.
"""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The README as text."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not re.match(r"\s*(#\| hide|<!--.*-->\s*$)", c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        else:  # a link of the page is relative to nbs/, one of the README to the root
            cell.source = re.sub(r"\]\((?![a-z]+:|#)", "](nbs/", cell.source)
    body, _ = MarkdownExporter().from_notebook_node(nb)
    note = "<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n"
    return note + body.strip() + "\n"


if __name__ == "__main__":
    target = ROOT / "README.md"
    text = readme()
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
