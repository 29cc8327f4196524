"The site, opened page by page in a browser at the width of a phone."
import functools
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHONE = {"width": 390, "height": 844}
LOOK = """() => ({
    width: document.scrollingElement.scrollWidth, room: innerWidth,
    silent: [...document.images].filter(image => !image.alt.trim()).map(image => image.src.slice(0, 100)),
    broken: [...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src.slice(0, 100)),
    unnamed: [...document.querySelectorAll("video:not([aria-label]), svg.map:not(:has(title))")].length,
    maps: document.querySelectorAll("svg.map").length, lit: document.querySelectorAll("svg.map .lit").length,
    text: (document.querySelector("article") || document.body).innerText.length,
})"""


def is_fresh(site):
    "Is the built site younger than all it is made of?"
    if not (site / "index.html").exists():
        return False
    sources = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "docs").glob("*.*"), *(ROOT / "docs" / "_static").rglob("*.*")]
    return max(path.stat().st_mtime for path in sources) < (site / "index.html").stat().st_mtime


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The address of the site: what `make docs` left if that is fresh, else built into a folder of its own."
    folder = ROOT / "docs" / "_build" / "html"
    if not is_fresh(folder):
        home = tmp_path_factory.mktemp("site")
        done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", home], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        folder = home / "_build" / "html"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def reader(browser_window):
    "A page as wide as a phone."
    from browser import gather_errors

    page = browser_window.new_page(viewport=PHONE)
    gather_errors(page)
    yield page
    page.close()


def test_every_page_on_a_phone(site, reader):
    folder, address = site
    pages = sorted(path.name for path in folder.glob("*.html"))
    assert len(pages) > 20
    for name in pages:
        reader.goto(f"{address}/{name}", wait_until="load")
        reader.wait_for_timeout(100)
        found = reader.evaluate(LOOK)
        assert reader.errors == [], f"{name}: {reader.errors}"
        assert found["width"] <= found["room"], f"{name} is {found['width']} pixels wide"
        assert (found["silent"], found["broken"], found["unnamed"]) == ([], [], 0), name
        if name[:2].isdigit() or name == "index.html":
            assert (found["maps"], found["lit"]) == (1, int(name != "index.html")), name
        assert found["text"] > 200 or name in ("genindex.html", "search.html"), name


def test_boxes_of_the_map_lead_to_chapters(site, reader):
    _, address = site
    reader.goto(f"{address}/index.html")
    reader.locator("svg.map a[aria-label='07 regions']").focus()
    reader.keyboard.press("Enter")
    reader.wait_for_url("**/07_regions.html")
    assert reader.locator("svg.map .lit").text_content().startswith("07 regions")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_map_follows_the_page_s_colours(site, browser_window, mode):
    _, address = site
    other = {"light": "dark", "dark": "light"}[mode]  # the machine says one thing, the reader's switch another
    page = browser_window.new_page(viewport=PHONE, color_scheme=other)
    page.add_init_script(f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')")
    page.goto(f"{address}/07_regions.html")
    lightness = [sum(map(int, page.locator(where).first.evaluate("e => getComputedStyle(e).fill").strip("rgb()").split(","))) for where in ("svg.map .paper", "svg.map .chapter text")]
    page.close()
    assert (lightness[0] > 600 > 200 > lightness[1]) if mode == "light" else (lightness[0] < 200 < 600 < lightness[1])


def test_films_to_choose_by_keyboard(site, reader):
    _, address = site
    reader.goto(f"{address}/play.html")
    video, said = reader.locator("#films video"), reader.locator("#films-said")
    assert video.get_attribute("src").endswith("full-1.mp4") and "As before: middle, right" in said.text_content()
    reader.locator("[name=rule]:checked").focus()
    reader.keyboard.press("ArrowDown")
    reader.keyboard.press("ArrowDown")
    reader.locator("[name=person]:checked").focus()
    reader.keyboard.press("ArrowRight")
    assert video.get_attribute("src").endswith("release-2.mp4")
    assert "Changed: left, right. As before: middle." in said.text_content()
    assert reader.locator("table.films tr.shown").get_attribute("data-film") == "release-2"
    reader.wait_for_function("document.querySelector('#films video').readyState >= 2")
    assert reader.errors == []


def test_sliders_by_keyboard(site, reader):
    _, address = site
    reader.goto(f"{address}/play.html")
    face, place = reader.locator("#factors .face"), "e => [e.style.backgroundImage, e.style.backgroundPosition]"
    assert face.evaluate(place) == ['url("_static/play/yaw0.webp")', "12.5% 0%"]
    for name, key in (("yaw", "ArrowRight"), ("smile", "ArrowRight"), ("blink", "End"), ("gaze_x", "Home")):
        reader.locator(f"#factors [name={name}]").focus()
        reader.keyboard.press(key)
    assert face.evaluate(place) == ['url("_static/play/yaw15.webp")', "75% 12.5%"]
    assert face.get_attribute("aria-label") == "A drawn face: yaw 15 degrees right, mouth open 0, smile 0.5, blink 1, gaze left"
    reader.get_by_role("button", name="neutral").click()
    assert face.evaluate(place) == ['url("_static/play/yaw0.webp")', "12.5% 0%"]
    assert reader.errors == []
