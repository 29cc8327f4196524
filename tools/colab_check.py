"""Does every chapter run as on Colab? `make colab-check`, or `python tools/colab_check.py [--only 03 07] [--python PYTHON3.12] [--env FOLDER]`.

The wheel is built and installed into a fresh environment of Python 3.12 with NumPy 2; each notebook then runs in an empty folder of its own, with
nothing beside it but the wheel. MediaPipe 0.10.21 asks pip for NumPy 1 but works with NumPy 2 and protobuf 4 (or 6; not 5 or 7), so it is installed without its requirements.
So this says that the chapters run on such versions; it does not try the first cell's own installation, which takes pip's choice (NumPy 1.26).
Prints a line for each chapter, goes on after a failure, and ends with 1 where there was one. An environment given with --env is used again."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ["numpy>=2", "protobuf>=4.25.3,<5", "absl-py", "attrs", "flatbuffers", "nbclient", "ipykernel", "scikit-image", "scenedetect", "pyarrow", "pytest"]  # Colab's own, MediaPipe's own, and what chapters 09 and 12 use
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


def wanted() -> list[str]:
    "What the wheel requires, less MediaPipe."
    meta = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [need for need in meta["dependencies"] if not need.startswith("mediapipe")]


def make_environment(folder: Path, python: str, wheel: Path) -> Path:  # its interpreter
    "A virtual environment with everything but a network's worth of CUDA, if the machine has a CPU build of torch."
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run([own, "-m", "pip", "install", "-q", *wanted(), *BESIDE], check=True)
    subprocess.run([own, "-m", "pip", "install", "-q", "--no-deps", "mediapipe==0.10.21"], check=True)
    subprocess.run([own, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return own


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
    parser.add_argument("--env", type=Path, help="keep the environment here, and use it again")
    args = parser.parse_args(arguments)
    chapters = [path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not args.only or path.name[:2] in args.only]
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = find_python(args.python)
        except FileNotFoundError as error:
            print(f"colab-check: {error}", file=sys.stderr)
            return 2
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        python = make_environment(args.env or Path(folder) / "env", python, wheel)
        print(subprocess.run([python, "-c", "import sys, numpy, torch; print('Python', sys.version.split()[0], 'NumPy', numpy.__version__, 'torch', torch.__version__)"], capture_output=True, text=True).stdout.strip(), flush=True)
        failed = 0
        for chapter in chapters:
            seconds, error = run_chapter(python, chapter, wheel)
            failed += bool(error)
            print(f"{chapter.stem:16}{seconds:6.0f} s  {'FAILED: ' + error if error else 'ran'}", flush=True)
    print(f"{len(chapters) - failed} of {len(chapters)} chapters ran")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
