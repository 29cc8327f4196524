"Widgets in a real JupyterLab, driven by a real browser: the parts that the playground is built from."
import sys

import pytest
from browser import cell_output, chromium, drag, errors_shown, kernel_error, open_notebook, picture, run_all, shot, upload, wait_idle
from playwright.sync_api import expect

SLIDER = '''import io, os, sys, threading
import ipywidgets as widgets, numpy as np
from PIL import Image

def png(red):
    data = io.BytesIO()
    Image.fromarray(np.full((60, 80, 3), (red, 40, 40), np.uint8)).save(data, "png")
    return data.getvalue()

slider, shown, label = widgets.IntSlider(value=100, max=250, step=50), widgets.Image(value=png(100), layout={"width": "160px"}), widgets.Label("red 100")

def moved(change):
    shown.value, label.value = png(change["new"]), f"red {change['new']}"

slider.observe(moved, "value")
widgets.VBox([slider, shown, label])'''

UPLOAD = '''file, message = widgets.FileUpload(accept=".txt"), widgets.Label("nothing yet")
file.observe(lambda change: setattr(message, "value", f"{change['new'][0].name}: {bytes(change['new'][0].content).decode()}"), "value")
widgets.HBox([file, message])'''

BUTTON = '''button, out = widgets.Button(description="Say it"), widgets.Output()

def say(_):
    with out:
        print("said")

button.on_click(say)
widgets.VBox([button, out])'''

ABOUT = '''print(sys.executable, os.environ["OMP_NUM_THREADS"])'''

# A film, and a picture to drag on: an HTML widget's own handlers write into a Text widget, which tells the kernel.
FILM = '''import io
import av, ipywidgets as widgets, numpy as np

data = io.BytesIO()
with av.open(data, "w", format="mp4") as film:
    stream = film.add_stream("libx264", rate=8, width=64, height=48, pix_fmt="yuv420p")
    for grey in (*range(0, 160, 10), None):
        film.mux(stream.encode(None if grey is None else av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8))))
widgets.Video(value=data.getvalue(), format="mp4", layout={"width": "128px"})'''

DRAG = '''area, wire, label = widgets.HTML('''  + '"""' + '''<div style="width: 300px; height: 200px; background: silver; touch-action: none"
    onpointerdown="this.from = [event.offsetX, event.offsetY]"
    onpointerup="const wire = this.closest('.drawing').querySelector('input'); wire.value = [...this.from, event.offsetX, event.offsetY].map(Math.round);
                 wire.dispatchEvent(new Event('input', {bubbles: true}))"></div>''' + '"""' + '''), widgets.Text(layout={"display": "none"}), widgets.Label()
wire.observe(lambda change: setattr(label, "value", f"from {change['new'].replace(',', ' ')}"), "value")
drawing = widgets.VBox([area, wire, label])
drawing.add_class("drawing")
drawing'''

WRONG = '''button = widgets.Button(description="fail")
button.on_click(lambda _: [][1])
button'''


def test_slider_upload_and_button(lab, page, tmp_path):
    open_notebook(page, lab, [SLIDER, UPLOAD, BUTTON, ABOUT])
    run_all(page)
    assert errors_shown(page) == []
    expect(cell_output(page, 3)).to_have_text(f"{sys.executable} 1")  # the kernel is this interpreter

    sliders = cell_output(page, 0)
    assert abs(picture(sliders)[30, 40].astype(int) - (100, 40, 40)).max() < 3
    sliders.get_by_role("slider").press("ArrowRight")
    expect(sliders).to_contain_text("red 150")
    drag(page, sliders.get_by_role("slider"), 400, 0)
    expect(sliders).to_contain_text("red 250")
    wait_idle(page)
    assert abs(picture(sliders)[30, 40].astype(int) - (250, 40, 40)).max() < 3

    (tmp_path / "note.txt").write_text("hello")
    upload(page, cell_output(page, 1).get_by_role("button"), tmp_path / "note.txt")
    expect(cell_output(page, 1)).to_contain_text("note.txt: hello")

    for _ in range(2):
        cell_output(page, 2).get_by_role("button").click()
    expect(cell_output(page, 2)).to_contain_text("said\nsaid")
    assert shot(page, "widgets").stat().st_size > 5000
    assert page.errors == []


def test_film_and_drag(lab, page):
    open_notebook(page, lab, [FILM, DRAG])
    run_all(page)
    film = cell_output(page, 0).locator("video")
    assert film.evaluate("film => [film.videoWidth, film.videoHeight]") == [64, 48]
    page.wait_for_function("film => film.currentTime > 0.2", arg=film.element_handle())  # it plays
    drag(page, cell_output(page, 1).locator("[onpointerdown]"), 100, 60, start=(0.2, 0.25))
    expect(cell_output(page, 1)).to_contain_text("from 60 50 160 110")
    assert page.errors == []


def test_what_goes_wrong_is_seen(lab, page):
    open_notebook(page, lab, ["import ipywidgets as widgets", WRONG, "1 / 0"])
    run_all(page)
    assert any("ZeroDivisionError" in text for text in errors_shown(page))
    cell_output(page, 1).get_by_role("button").click()  # its callback raises: JupyterLab shows that nowhere
    page.evaluate("setTimeout(() => { throw new Error('on the page') })")
    page.evaluate("fetch('http://elsewhere.example').catch(() => 0)")
    wait_idle(page)
    for wrong in ("ZeroDivisionError: division by zero", "IndexError: list index out of range", "on the page", "elsewhere.example"):
        assert [error for error in page.errors if wrong in error], (wrong, page.errors)


def test_no_browser(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(FileNotFoundError, match="make browser"):
        chromium()
    monkeypatch.setenv("CHROMIUM", sys.executable)
    assert chromium() == sys.executable


def test_kernel_error():
    assert kernel_error(b'..{"msg_type":"error"}{"traceback":[],"ename":"ValueError","evalue":"no \\"x\\""}') == 'ValueError: no \\"x\\"'
    assert kernel_error('{"msg_type": "stream", "text": "error"}') is None
