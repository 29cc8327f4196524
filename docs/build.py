"""The book as a site: stage the notebooks, run Sphinx on what they store, check every link inside. No cell is run and no network asked.

nbdev's directives become what a reader expects: hidden cells go, `#| export` and its kin lose the directive line.
"""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

DOCS = Path(__file__).resolve().parent
ROOT, STAGED, SITE = DOCS.parent, DOCS / "_staged", DOCS / "_build" / "html"
DROP = re.compile(r"#\|\s*(hide|default_exp)\b|show_doc\(")
UP = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")


def bring(match: re.Match) -> str:
    "A link out of nbs/: take the file along, or keep the words where it is a folder."
    picture, words, target = match.groups()
    if not (ROOT / target).is_file():
        return words
    (STAGED / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / target, STAGED / target)
    return f"{picture}[{words}]({target})"


def stage(path: Path) -> None:
    "One notebook as the site shows it."
    notebook = nbformat.read(path, 4)
    notebook.cells = [cell for cell in notebook.cells if not (cell.cell_type == "code" and DROP.match(cell.source))]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
            if cell.metadata.get("jupyter", {}).get("source_hidden"):  # folded in JupyterLab: folded here
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        else:
            cell.source = UP.sub(bring, cell.source)
    if path.stem == "index":
        names = [f"{title(p)} <{p.stem}>" for p in sorted(path.parent.glob("[0-9]*.ipynb"))]
        notebook.cells.append(nbformat.v4.new_markdown_cell("\n".join(["```{toctree}", ":hidden:", "", *names, "```"])))
    nbformat.write(notebook, STAGED / path.name)


def title(path: Path) -> str:
    "A chapter's number and title, the number once."
    heading = next(cell.source for cell in nbformat.read(path, 4).cells if cell.source.startswith("# "))
    return f"{path.stem[:2]} · {re.sub(r'^# *([0-9]+[ ·:.]*)?', '', heading.splitlines()[0])}"


class Page(HTMLParser):
    "What a page points to and what it can be pointed at."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.loads = [], {"", "top"}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)
                if tag in ("script", "img", "video", "source", "link") and urlsplit(value).scheme.startswith("http"):
                    self.loads.append(value)


def faults(site: Path) -> list[str]:
    "Links that lead nowhere inside the site, and whatever a page would load from elsewhere."
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        found += [f"{path.name}: loads {url}" for url in page.loads]
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists():
                found.append(f"{path.name}: {link} does not exist")
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{path.name}: no #{url.fragment} in {target.name}")
    return found


def main() -> int:
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    STAGED.mkdir(parents=True)
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        stage(path)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", DOCS, "-b", "html", "-d", DOCS / "_build" / "doctrees", STAGED, SITE]
    code = subprocess.run(sphinx).returncode
    found = faults(SITE)
    print("\n".join(found) or f"{len(list(SITE.glob('*.html')))} pages in {SITE.relative_to(ROOT)}, every link inside leads somewhere")
    return code or bool(found)


if __name__ == "__main__":
    sys.exit(main())
