"""README.md from nbs/index.ipynb: prose and code as they stand, cells with `#| hide` and all set-up left out (`--check`: compare only)."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n"


def readme() -> str:
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    for cell in notebook.cells:
        if cell.source.startswith("#| hide"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove"]
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": ["remove"]}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(notebook)
    text = re.sub(r"\]\((?![a-z]+:|#|\.\./)", "](nbs/", text)  # the notebook's paths are seen from nbs/
    return NOTE + text.strip().replace("](../", "](") + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv:
        sys.exit(path.read_text() != text and "README.md is not what nbs/index.ipynb makes: make readme")
    path.write_text(text)
