"""Does every chapter run as on Colab? `make colab-check`, or `python tools/colab_check.py [--only 03 07] [--python PYTHON3.12] [--env FOLDER]`.

A fresh environment gets Python 3.12 and what Colab has (tools/colab-versions.txt: NumPy 2, ipywidgets 7, IPython 7), and nothing of ours. Then
each notebook runs in an empty folder of its own, with nothing beside it but the wheel: the first one's own first cell installs it, as on Colab.
What that cell changed of Colab's is listed; anything but protobuf (MediaPipe's) is a fault, for Colab would ask for a restart.
Prints a line for each chapter, goes on after a failure, and ends with 1 where there was one. An environment kept with --env gets Colab's versions back first and loses fantasy_nb
and mediapipe; what else an earlier run installed stays in it.
What it cannot say: whether Colab's own page shows the widgets."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tools" / "colab-versions.txt"
MAY_CHANGE = {"protobuf"}
RUN = """
import sys, nbformat
from nbclient import NotebookClient

class Reader(NotebookClient):
    async def async_execute_cell(self, cell, *args, **kwargs):
        if any(line.replace(" ", "") in ("#|eval:false", "#|cuda") for line in cell.source.splitlines()):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)

Reader(nbformat.read(sys.argv[1], 4), timeout=1200, startup_timeout=300, kernel_name="python3").execute()
"""


def find_python(asked: str | None) -> str:
    "Python 3.12: what was asked for, on the path, or pyenv's. Raises FileNotFoundError where there is none."
    versions = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.12*/bin/python3.12"))
    for path in [asked] if asked else [shutil.which("python3.12"), *map(str, versions)]:
        if path and shutil.which(path) and subprocess.run([path, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"], capture_output=True).returncode == 0:
            return path
    raise FileNotFoundError("want Python 3.12, as Colab has it, found none: say where with --python PATH")


def make_environment(folder: Path, python: str) -> Path:  # its interpreter
    "Colab's packages in a virtual environment; in one that is there they get their versions back, and fantasy_nb and mediapipe go."
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run([own, "-m", "pip", "uninstall", "-q", "-y", "fantasy_nb", "mediapipe"], check=True)
    subprocess.run([own, "-m", "pip", "install", "-q", "-r", VERSIONS], check=True)
    return own


def versions(python: Path) -> dict[str, str]:
    "What is installed there."
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"], check=True, capture_output=True, text=True).stdout
    return {package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed)}


def run_chapter(python: Path, notebook: Path, wheel: Path) -> tuple[float, str]:  # seconds, "" or the last line of the error
    "One notebook in an empty folder."
    with tempfile.TemporaryDirectory() as empty:
        for file in (notebook, wheel):
            shutil.copy(file, empty)
        begin = time.monotonic()
        done = subprocess.run([python, "-c", RUN, notebook.name], cwd=empty, env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}, capture_output=True, text=True)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in done.stderr.splitlines() if line.strip()]
    return time.monotonic() - begin, "" if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NN", help="chapters by number (default: all)")
    parser.add_argument("--python", help="a Python 3.12 (default: python3.12, or pyenv's)")
    parser.add_argument("--env", type=lambda text: Path(text).absolute(), help="keep the environment here, and use it again")
    args = parser.parse_args(arguments)
    chapters = [path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not args.only or path.name[:2] in args.only]
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = find_python(args.python)
        except FileNotFoundError as error:
            print(f"colab-check: {error}", file=sys.stderr)
            return 2
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # files deleted since would enter the wheel
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        python = make_environment(args.env or Path(folder) / "env", python)
        before, failed = versions(python), 0
        print("Python 3.12, " + ", ".join(f"{name} {before[name]}" for name in ("numpy", "torch", "ipython", "ipywidgets", "protobuf")), flush=True)
        for chapter in chapters:
            seconds, error = run_chapter(python, chapter, wheel)
            failed += bool(error)
            print(f"{chapter.stem:16}{seconds:6.0f} s  {'FAILED: ' + error if error else 'ran'}", flush=True)
        after = versions(python)
        changed = {name: f"{name} {version} -> {after.get(name)}" for name, version in before.items() if after.get(name) != version}
        print(f"installed: {len(after) - len(before)} packages; changed of Colab's: {', '.join(changed.values()) or 'nothing'}")
    print(f"{len(chapters) - failed} of {len(chapters)} chapters ran")
    return int(failed > 0 or not changed.keys() <= MAY_CHANGE)


if __name__ == "__main__":
    raise SystemExit(main())
