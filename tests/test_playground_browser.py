"Chapter 14 in a real JupyterLab, in a real browser: a slider, a dragged box, a film, an upload that is none. Pictures of it go to out/browser/."
import shutil
import statistics

import nbformat
import numpy as np
import pytest
from browser import ROOT, SHOTS, cell_output, drag, errors_shown, open_notebook, picture, run_all, shot, upload, wait_idle
from playwright.sync_api import expect

from fantasy_nb.core import read_video

CHAPTER = ROOT / "nbs" / "14_playground.ipynb"


def place(start: str) -> int:
    "Which code cell begins so."
    cells = [cell.source for cell in nbformat.read(CHAPTER, 4).cells if cell.cell_type == "code"]
    return next(k for k, source in enumerate(cells) if source.startswith(start))


def keep(where, name: str) -> None:
    "A picture of one panel."
    SHOTS.mkdir(parents=True, exist_ok=True)
    where.screenshot(path=SHOTS / f"{name}.png")


ANSWER = """([label, moves]) => new Promise(async (done) => {  // milliseconds from a key on the slider to the new picture, drawn
    const slider = document.querySelector(label + ' [role=slider]'), image = document.querySelector(label + ' img'), times = [];
    for (let k = 0; k < moves; k++) {
        const begin = performance.now(), seen = new Promise((ready) => image.addEventListener('load', () => requestAnimationFrame(ready), { once: true }));
        slider.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', keyCode: 39, which: 39, bubbles: true }));
        await seen;
        times.push(performance.now() - begin);
        await new Promise((ready) => setTimeout(ready, 120));
    }
    done(times);
})"""


def test_chapter_14_answers(lab, page, tmp_path, record_property):
    shutil.copytree(CHAPTER.parent / "images", lab.folder / "images")
    open_notebook(page, lab, CHAPTER)
    run_all(page, seconds=600)
    assert errors_shown(page) == []

    mixer = cell_output(page, place("mixer = "))
    mixer.scroll_into_view_if_needed()
    before = picture(mixer)
    mixer.locator(".widget-hslider", has_text="mouth open").get_by_role("slider").press("End")
    page.wait_for_timeout(300)
    wait_idle(page)
    assert np.abs(picture(mixer).astype(int) - before).max() > 60  # a mouth has opened
    keep(mixer, "play-mixer")

    painter = cell_output(page, place("painter = "))
    canvas, owned = painter.locator("canvas"), painter.locator("img").first
    canvas.scroll_into_view_if_needed()
    said, pixels = painter.locator("[role=status]").inner_text(), owned.screenshot()
    drag(page, canvas, 40, 40, start=(0.17, 0.45))
    page.wait_for_timeout(300)
    wait_idle(page)
    assert painter.locator("[role=status]").inner_text() != said and owned.screenshot() != pixels
    keep(painter, "play-regions")

    viewer = cell_output(page, place("viewer = "))
    viewer.scroll_into_view_if_needed()
    dark = picture(viewer)
    viewer.get_by_role("button", name="mouth (learnable)").click()
    page.wait_for_timeout(300)
    wait_idle(page)
    assert (picture(viewer) != dark).any()
    keep(viewer, "play-attention")

    panel = cell_output(page, place("panel = "))
    panel.scroll_into_view_if_needed()
    panel.get_by_role("button", name="animate").click()
    expect(panel.locator("[role=status]")).to_contain_text("frames in")
    film = panel.locator("video")
    page.wait_for_function("film => film.videoHeight > 0 && film.currentTime > 0", arg=film.element_handle())
    assert film.evaluate("film => film.videoHeight") >= 256
    keep(panel, "play-animate")
    with page.expect_download() as kept:
        panel.get_by_role("button", name="keep film.mp4").click()
    assert kept.value.suggested_filename == "film.mp4" and len(read_video(kept.value.path())[0]) == 25
    (tmp_path / "notes.mp4").write_text("just a note")
    upload(page, panel.get_by_role("button", name="upload drivers"), tmp_path / "notes.mp4")
    expect(panel.locator("[role=status]")).to_contain_text("notes.mp4: cannot read it")
    shot(page, "play-upload")
    assert page.errors == []


def test_the_face_answers_at_once(lab, page, record_property):
    open_notebook(page, lab, ["import torch\ntorch.set_num_threads(1)\nfrom fantasy_nb.playground import ExpressionMixer\nmixer = ExpressionMixer(1, height=256)\nmixer.add_class('mixer')\nmixer"])
    run_all(page)
    times = page.evaluate(ANSWER, [".mixer", 15])
    median = statistics.median(times)
    record_property("slider_to_picture_ms", median)
    print(f"slider to new picture, one person at 256 pixels: median {median:.0f} ms, {min(times):.0f} to {max(times):.0f}")
    assert median < 2000  # the aim is 150; a busy machine must not fail a test
    assert page.errors == []


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-s"]))
