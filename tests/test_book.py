"What makes the chapters one book: how they open and end, the map, the pages beside them."
import base64
import json
import re
from pathlib import Path

import pytest

from fantasy_nb.core import MAP, map_svg

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path):
    "Kind, text and the cell itself."
    return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in json.loads(path.read_text())["cells"]]


def prose(path):
    return "\n\n".join(text for kind, text, _ in cells(path) if kind == "markdown")


def slugs(path):
    "Anchors of a notebook's or page's headings, as the site names them."
    text = prose(path) if path.suffix == ".ipynb" else path.read_text()
    headings = re.findall(r"^#{1,3} (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*$]", "", heading).lower()).replace(" ", "-") for heading in headings}


# --- openings and endings


@each_chapter
def test_title_and_subtitle(path):
    title, *rest = cells(path)[0][1].strip().splitlines()
    assert re.fullmatch(rf"# {path.stem[:2]} · \w+: \S.*[^.]", title), title
    (subtitle,) = [line for line in rest if line.startswith("> ")]
    assert len(subtitle) > 30 and subtitle.endswith("."), subtitle


@each_chapter
def test_where_we_are(path):
    opening = "\n\n".join(text for kind, text, _ in cells(path)[:5] if kind == "markdown")
    places = [opening.index(words) for words in ("**Where we are.** ", "**In:** ", "**Out:** ")]
    assert places == sorted(places)
    assert len(opening[places[0] : places[1]].split()) > 10


@each_chapter
def test_what_breaks_exercises_onward(path):
    text = prose(path)
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings.index("What breaks") < headings.index("Exercises") == len(headings) - 1
    (onward,) = re.findall(r"^\*\*Onward\.\*\* .+(?:\n.+)*", text, re.M)
    assert text.rstrip().endswith(onward)
    later = [other.name for other in CHAPTERS if other.name > path.name]
    assert not later or any(f"]({name})" in onward for name in later), onward


# --- the map


@each_chapter
def test_every_chapter_shows_the_map_with_itself_lit(path):
    number = path.stem[:2]
    shown = [(at, cell) for at, (_, text, cell) in enumerate(cells(path)) if text.endswith(f'show_map("{number}")')]
    assert len(shown) == 1
    at, cell = shown[0]
    if number != "00":  # which draws it first
        assert at < 5 and cell["metadata"]["jupyter"]["source_hidden"]
        assert "".join(cell["source"]).startswith("from fantasy_nb.core import show_map\n")
    (stored,) = re.findall('base64,([^"]+)"', "".join(cell["outputs"][0]["data"]["text/html"]))
    assert base64.b64decode(stored).decode() == map_svg(number), "the stored map is an old one: run its cell again"


def test_the_map_has_a_box_for_every_chapter():
    assert {name: box[0] for name, box in MAP.items() if name.isdigit()} == {p.stem[:2]: p.stem[3:] for p in CHAPTERS}


def test_boxes_of_the_map_do_not_touch():
    places = [(column, row + k) for _, _, column, row, rows in MAP.values() for k in range(rows)]
    assert all(c != column or abs(r - row) >= 1 for i, (column, row) in enumerate(places) for c, r in places[:i])


def test_the_map_lights_one_box():
    assert map_svg().count(" lit") == 0 and map_svg("07").count('class="chapter lit"') == 1
    for svg in (map_svg(), map_svg("05")):
        assert "<title>" in svg and "<desc>" in svg and "prefers-color-scheme" in svg
    for wrong in ("in", "15", ""):
        with pytest.raises(ValueError, match="want a chapter"):
            map_svg(wrong)


def test_the_readme_s_map_is_the_book_s():
    assert (ROOT / "docs" / "assets" / "map.svg").read_text() == map_svg() + "\n"
    assert "](docs/assets/map.svg)" in (ROOT / "README.md").read_text()


# --- pages beside the chapters


def test_pages_are_known_to_the_index():
    index = prose(ROOT / "nbs" / "index.ipynb")
    assert len(PAGES) == 6
    for name in PAGES:
        assert f"](../docs/{name}.md)" in index, name


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_pages_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)]*))?\)", PAGES[name]):
        path = ROOT / "docs" / target
        assert path.exists(), target
        assert not anchor or anchor in slugs(path), f"{target} has no #{anchor}"


def test_glossary():
    terms = re.findall(r"^- \*\*([^*]+)\.\*\* (.+)$", PAGES["glossary"], re.M)
    assert len(terms) >= 50 and len({term for term, _ in terms}) == len(terms)
    for term, meaning in terms:
        assert "](../nbs/" in meaning, term
        assert len(re.findall(r"[.!?](?= |$)", re.sub(r"\[.*", "", meaning))) <= 3, term


def test_pictures_to_play_with_are_there_and_small():
    folder = ROOT / "docs" / "_static" / "play"
    found = json.loads((folder / "films.json").read_text())
    assert len(found) == 9 and all((folder / f"{name}.mp4").is_file() for name in found)
    assert len(list(folder.glob("yaw*.webp"))) == 5
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6
    for name, changed in found.items():
        own = changed[int(name[-1]) - 1]
        if name.startswith("full"):
            assert sum(changed) - own < 0.25 * own, "under the right mask only one person changes"
    assert found["release-2"][1] < min(found["release-2"][::2]), "and under the release's, the middle one's driver moves the neighbours"


def test_costs_are_known_for_every_chapter():
    found = json.loads((ROOT / "docs" / "costs.json").read_text())["chapters"]
    assert found.keys() == {path.stem for path in CHAPTERS}, "tools/chapter_costs.py NAME takes what is missing"
    for cost in found.values():
        assert 0 < cost["cpu"] < 240 and 100 < cost["mb"] < 8000
