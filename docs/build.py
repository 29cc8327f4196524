"""The book as a site: stage the notebooks, run Sphinx on what they store, check every link inside. No cell is run and no network asked.
`docs/build.py` makes docs/_build/html, `docs/build.py FOLDER` makes FOLDER/_build/html.

nbdev's directives become what a reader expects: hidden cells go, `#| export` and its kin lose the directive line. Pictures that cells drew get
words for readers who cannot see them, and the map becomes part of its page, with links. `docs/*.md` are pages beside the chapters.
"""
import base64
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

DOCS = Path(__file__).resolve().parent
HOME = Path(sys.argv[1]).resolve() if __name__ == "__main__" and sys.argv[1:] else DOCS
ROOT, STAGED, SITE = DOCS.parent, HOME / "_staged", HOME / "_build" / "html"
DROP = re.compile(r"#\|\s*(hide|default_exp)\b|show_doc\(")
UP = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)\)")
PAGES = ["twenty-minutes", "play", "glossary", "notation", "costs", "responsible-use"]
MAP = re.compile(r'<img class="map"[^>]*base64,([^"]+)"[^>]*>')
BOX = re.compile(r'<g class="chapter(?: lit)?">.*?<tspan>(\d\d)</tspan> (\w+).*?</g>')


def bring(match: re.Match) -> str:
    "A link out of nbs/: take the file along, or keep the words where it is a folder."
    picture, words, target = match.groups()
    if not (ROOT / target).is_file():
        return words
    if target == "docs/assets/map.svg":
        return f"<figure>{on_the_page((ROOT / target).read_text())}<figcaption>The map of the book. A box leads to its chapter.</figcaption></figure>"
    if Path(target).stem in PAGES:
        return f"[{words}]({Path(target).name})"
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
                fold = "remove-input" if "show_map(" in cell.source else "hide-input"  # the map opens a chapter: nothing above it
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), fold]
        else:
            cell.source = UP.sub(bring, cell.source)
    for number, cell in enumerate(notebook.cells):
        if cell.get("outputs"):
            describe(cell, in_words(notebook.cells, number))
    if path.stem == "index":
        names = [f"{title(p)} <{p.stem}>" for p in sorted(path.parent.glob("[0-9]*.ipynb"))]
        trees = [["```{toctree}", ":hidden:", f":caption: {caption}", "", *lines, "```"] for caption, lines in (("Chapters", names), ("Beside them", PAGES))]
        notebook.cells.append(nbformat.v4.new_markdown_cell("\n\n".join("\n".join(lines) for lines in trees)))
    nbformat.write(notebook, STAGED / path.name)


def in_words(cells: list, number: int) -> str:
    "What a cell's picture shows: its caption, else the sentence above it, else the one below, else its title, else the heading it stands under."
    above, below = ("\n\n" + cells[k].source if 0 <= k < len(cells) and cells[k].cell_type == "markdown" else "" for k in (number - 1, number + 1))
    if written := re.search(r"""(?:caption=|supxlabel\()f?(["'])([^{}]+?)\1""", cells[number].source) or re.match(r"\s*(\*)(?!\*)(.+?)\*(?!\*)", below, re.S):
        return shortened(plain(written[2]))
    sentences = [s for text in (above, below) for s in prose(text)[:: -1 if text is above else 1][:1]]
    heading = re.findall(r"^#+ (.+)$", "\n".join(c.source for c in cells[:number] if c.cell_type == "markdown"), re.M)[-1]
    named = re.search(r"""\btitle=(["'])([^{}]+?)\1""", cells[number].source)
    return shortened(sentences[0] if sentences else named[2] if named else f"Figure: {plain(heading)}")


def prose(text: str) -> list[str]:
    "The sentences of a Markdown text, without headings, tables, formulas on lines of their own, code and lists."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<details>.*?</details>|^(#|\||    |[-*>] ).*$", "", text, flags=re.S | re.M)
    return [s for s in re.split(r"(?<=[.!?])\)?\s+(?=[A-Z])", plain(text)) if len(s) > 15]


def plain(text: str) -> str:
    "Markdown as words."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|[*`$\\{}]|<[^>]+>", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def shortened(text: str) -> str:
    "At most 250 characters, cut between words."
    return text if len(text) <= 250 else text[:250].rsplit(" ", 1)[0] + " ..."


def describe(cell, words: str) -> None:
    "Give the pictures and films of a cell's output an alternative text; the map moves into the page."
    cell.metadata["mystnb"] = {"image": {"alt": words}}
    for output in cell.outputs:
        if "text/html" in output.get("data", {}):
            shown = "".join(output.data["text/html"])
            shown = MAP.sub(lambda match: on_the_page(base64.b64decode(match[1]).decode()), shown)
            output.data["text/html"] = re.sub(r"<video (?!aria)", lambda _: f'<video aria-label="{html.escape(words)}" ', shown)


def on_the_page(svg: str) -> str:
    "The map inside its page: boxes that exist lead to their chapters, and colours follow the page's switch rather than the machine's."
    chapters = {path.stem[:2]: path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}

    def linked(match: re.Match) -> str:
        number, name = match.groups()
        return f'<a href="{chapters[number]}.html" aria-label="{number} {name}">{match[0]}</a>' if number in chapters else match[0]

    def dark(match: re.Match) -> str:
        return re.sub(r"\.map ", 'html[data-theme="dark"] .map ', match[1])

    svg = re.sub(r"@media \(prefers-color-scheme:dark\)\{(.*?\})\s*\}", dark, svg, flags=re.S)
    return BOX.sub(linked, svg.replace('role="img"', 'role="group"')).replace("\n", " ")


def stage_page(name: str) -> None:
    "A page beside the chapters, its tables filled in from what was measured."
    text = (DOCS / f"{name}.md").read_text().replace("](../nbs/", "](")
    for mark, table in {"<!-- films -->": films_table, "<!-- costs -->": costs_table}.items():
        text = text.replace(mark, table()) if mark in text else text
    (STAGED / f"{name}.md").write_text(text)


def films_table() -> str:
    "How much each face changed, by rule and by the person who got another driver."
    found = json.loads((DOCS / "_static" / "play" / "films.json").read_text())
    rules, people = {"full": "own", "no-mask": "everybody", "release": "release's"}, ("left", "middle", "right")
    rows = []
    for key, numbers in found.items():
        rule, person = key.rsplit("-", 1)
        faces = "".join(f'<td data-face{" class=own" * (k + 1 == int(person))}>{x:.2f}</td>' for k, x in enumerate(numbers))
        rows.append(f'<tr data-film="{key}"><td>{rules[rule]}</td><td>{people[int(person) - 1]}</td>{faces}</tr>')
    head = "".join(f'<th scope="col">{x}</th>' for x in ("hears", "other driver", *people))
    return f'<table class="films"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def costs_table() -> str:
    "Seconds and memory of each chapter."
    found = json.loads((DOCS / "costs.json").read_text())
    rows = [f"| [{name.replace('_', ' ')}]({name}.ipynb) | {cost['cpu']} | {cost['seconds']} | {cost['mb']:,} |" for name, cost in found["chapters"].items()]
    cpu, wall = (sum(cost[name] for cost in found["chapters"].values()) for name in ("cpu", "seconds"))
    last = f"| all of them, one after the other | {cpu:,} | {wall:,} | |"
    return "\n".join(["| chapter | processor seconds | seconds by the clock | MB |", "|-|-:|-:|-:|", *rows, last, "", f"Taken on {found['when']}."])


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
    for name in PAGES:
        stage_page(name)
    if (ROOT / "nbs" / "images").is_dir():
        shutil.copytree(ROOT / "nbs" / "images", STAGED / "images", dirs_exist_ok=True)
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", DOCS, "-b", "html", "-d", HOME / "_build" / "doctrees", STAGED, SITE]
    code = subprocess.run(sphinx).returncode
    found = faults(SITE)
    print("\n".join(found) or f"{len(list(SITE.glob('*.html')))} pages in {SITE}, every link inside leads somewhere")
    return code or bool(found)


if __name__ == "__main__":
    sys.exit(main())
