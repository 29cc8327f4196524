"""A real JupyterLab and a real browser for tests; the fixtures `lab` and `page` (tests/conftest.py) hand them out.

    from browser import cell_output, open_notebook, picture, run_all, shot, upload, wait_idle

    def test_mixer(lab, page):
        open_notebook(page, lab, ROOT / "nbs" / "14_playground.ipynb")  # copied into the lab's folder; or a list of cells' sources
        run_all(page)                                                   # Run > Run All Cells, and waits until all have run
        out = cell_output(page, 7)                                      # a Playwright locator: what code cell 7 shows, counted from 0
        before = picture(out)                                           # the pixels of the first <img> there, as the browser drew them
        out.get_by_role("slider").first.press("ArrowRight")             # a widget's slider; also drag(page, locator, dx, dy)
        out.get_by_role("button", name="Animate").click()
        upload(page, out.get_by_role("button", name="Upload"), FILE)    # a FileUpload
        wait_idle(page)                                                 # the kernel has nothing left to do
        expect(out).to_contain_text("two people")                       # playwright.sync_api.expect: looks again until it is so
        assert page.errors == []                                        # of the browser's console and of the kernel, callbacks' too
        shot(page, "mixer")                                             # out/browser/mixer.png

Every test leaves a last picture of its page in out/browser/ too. After a click or a key, `expect` what the widget will show: between the
click and the kernel's taking notice of it wait_idle may see an idle kernel. An error in a widget's callback shows in no cell (JupyterLab
hides it in its log), so page.errors is gathered from what the kernel sends. A slider held down sends only its last values.
With JUPYTER=notebook in the environment the tests drive Notebook 7 (`pip install notebook`) instead of JupyterLab.
"""
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image
from playwright.sync_api import expect

APP = os.environ.get("JUPYTER", "jupyterlab")
ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "out" / "browser"
SLOW = 120_000  # milliseconds: a busy machine of two cores starts a kernel slowly
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # who asks for another machine fails at once
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},  # every cell stays in the page
    "@jupyterlab/apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}


def chromium():
    "Where the system's Chromium is. Raises FileNotFoundError, with what to do about it."
    asked = os.environ.get("CHROMIUM")
    found = [path for path in map(shutil.which, [asked] if asked else ["chromium", "chromium-browser", "google-chrome"]) if path]
    if not found:
        raise FileNotFoundError(f"no browser {asked or 'Chromium'} here, and widgets are tested in one: run `make browser`, or set CHROMIUM=/path/to/it")
    return found[0]


def kernel_error(frame):
    "The error that a message from the kernel to the page tells of, or None."
    data = frame if isinstance(frame, bytes) else frame.encode()
    if not re.search(rb'"msg_type": ?"error"', data):
        return None
    return ": ".join(re.search(rb'"%s": ?"((?:[^"\\]|\\.)*)"' % key, data)[1].decode() for key in (b"ename", b"evalue"))


def gather_errors(page):
    "From now on page.errors holds what the page's console and its kernel call errors."
    page.errors = []

    def keep(error):
        page.errors += [error] if error else []

    page.on("console", lambda message: keep(f"{message.text} ({message.location.get('url')})" if message.type == "error" else None))
    page.on("pageerror", lambda error: keep(str(error)))
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: keep(kernel_error(frame))))


def free_port():
    "A loopback port that nobody listens on."
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    "A JupyterLab of this interpreter on a folder of its own, that reads and writes nothing of the user's."

    def __init__(self, folder):
        self.folder, self.log = Path(folder) / "work", Path(folder) / "lab.log"
        self.token, self.port = secrets.token_hex(16), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder.mkdir()
        places = {name: str(Path(folder) / name.lower()) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                                     "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
        for name, settings in SETTINGS.items():
            file = Path(places["JUPYTERLAB_SETTINGS_DIR"], name + ".jupyterlab-settings")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))
        off = Path(places["JUPYTER_CONFIG_DIR"], "labconfig", "page_config.json")
        off.parent.mkdir(parents=True)
        off.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
        self.env = os.environ | places | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(self, seconds=120):
        "Start the server and wait until it answers."
        options = [f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={self.folder}",
                   f"--IdentityProvider.token={self.token}", "--no-browser", "--allow-root", "--LabApp.extension_manager=readonly",
                   f"--{'JupyterNotebookApp' if APP == 'notebook' else 'LabApp'}.expose_app_in_browser=True"]
        with open(self.log, "wb") as log:
            self.server = subprocess.Popen([sys.executable, "-m", APP, *options], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                                           stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        until = time.time() + seconds
        while time.time() < until and self.server.poll() is None:
            with contextlib.suppress(OSError):
                self.ask("api/status")
                return self
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"{APP} did not start:\n{self.log.read_text()[-3000:]}")

    def ask(self, path, method="GET"):
        "What the server's API answers."
        request = urllib.request.Request(f"{self.url}/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or "null")

    def stop_kernels(self):
        "End every session, so that the next test begins with fresh kernels and an idle machine."
        for session in self.ask("api/sessions"):
            self.ask(f"api/sessions/{session['id']}", "DELETE")

    def stop(self):
        "End the server: kindly first, as then it ends its kernels, which have process groups of their own."
        for how, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(seconds)
                return

    def add(self, notebook):
        "Put a notebook into the lab's folder and give its name there: a file's path, or the sources of its code cells."
        if isinstance(notebook, (str, Path)):
            return shutil.copy(notebook, self.folder / Path(notebook).name).name
        name = f"cells{len(list(self.folder.glob('cells*')))}.ipynb"
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in notebook])
        made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(made, self.folder / name)
        return name


def open_notebook(page, lab, notebook):
    "Open a notebook (see Lab.add) as a page of its own, its kernel ready."
    name = lab.add(notebook)
    page.goto(f"{lab.url}/{'notebooks' if APP == 'notebook' else 'doc/tree'}/{name}?reset&token={lab.token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    # What the page shows says "idle" before it is connected to a kernel, and the cells that are run then are lost.
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"{kernel}?.connectionStatus === 'connected'")
    page.evaluate(f"{kernel}.info.then(() => true)")
    wait_idle(page)


def wait_idle(page, seconds=SLOW / 1000, calm=0.4):
    "Wait until no cell has a star and the kernel has been idle for `calm` seconds."
    look = """calm => {
        const kernel = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
        const stars = [...document.querySelectorAll('.jp-InputPrompt')].some(prompt => prompt.textContent.includes('*'));
        if (kernel !== 'idle' || stars) window.idleSince = undefined;
        else window.idleSince ??= performance.now();
        return window.idleSince !== undefined && performance.now() - window.idleSince > 1000 * calm; }"""
    page.evaluate("window.idleSince = undefined")
    page.wait_for_function(look, arg=calm, polling=50, timeout=1000 * seconds)


def run_all(page, seconds=SLOW / 1000):
    "Run > Run All Cells, as a reader does; waits for the last one."
    page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first).not_to_have_text("[ ]:")
    wait_idle(page, seconds)


def cell_output(page, k):
    "What code cell k (counted from 0, Markdown not counted) shows below itself."
    return page.locator(".jp-Notebook .jp-CodeCell").nth(k).locator(".jp-Cell-outputWrapper")


def errors_shown(page):
    "The errors among all cells' outputs, as text."
    return page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.error'], .jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()


def picture(where):
    "The pixels of an element on the screen (the first <img> or <video> in it, if it has one): uint8 (h, w, 3)."
    inside = where.locator("img, video, canvas")
    data = (inside.first if inside.count() else where).screenshot(timeout=SLOW)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def drag(page, where, dx, dy, start=(0.5, 0.5)):
    "Drag with the mouse by (dx, dy) pixels from a point of an element, given in parts of its width and height."
    where.scroll_into_view_if_needed()
    box = where.bounding_box()
    x, y = box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=8)
    page.mouse.up()


def upload(page, button, *files):
    "Click a FileUpload's button and choose files."
    with page.expect_file_chooser() as chosen:
        button.click()
    chosen.value.set_files([str(file) for file in files])


def shot(page, name):
    "Keep a picture of the page: out/browser/NAME.png."
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", timeout=SLOW)
    return SHOTS / f"{name}.png"
