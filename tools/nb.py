"""Work on notebooks as text and run them: `tools/nb.py {text,make,run} NAME ...` (a chapter's name, as in `01_faces`).

text  nbs/NAME.ipynb -> .nbtext/NAME.py (jupytext's percent format; outputs stay in the notebook)
make  .nbtext/NAME.py -> nbs/NAME.ipynb, keeping the outputs of cells that did not change
run   execute nbs/NAME.ipynb top to bottom and store its outputs (`--check`: execute, store nothing); cells with `#| eval: false`
      or `#| cuda` are left as they are
"""
import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class Runner(NotebookClient):
    "Executes a notebook as a reader on two CPU cores would: what needs longer or a GPU keeps its stored output."

    async def async_execute_cell(self, cell, *args, **kwargs):
        if any(line.replace(" ", "") in ("#|eval:false", "#|cuda") for line in cell.source.splitlines()):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def execute(path, timeout=900):
    "The notebook, executed where it lies. Raises CellExecutionError."
    notebook = nbformat.read(path, 4)
    where = {"metadata": {"path": str(Path(path).parent)}}
    Runner(notebook, timeout=timeout, startup_timeout=300, kernel_name="python3", resources=where).execute()  # a busy machine starts slowly
    return notebook


def save(notebook, path):
    "Write atomically, with stable cell ids and only the metadata a reader's Jupyter needs."
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")}
        for output in cell.get("outputs", []):
            output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(execution_count=None)
        if cell.cell_type == "code":
            cell["execution_count"] = None
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(notebook).rstrip("\n") + "\n")
    os.replace(part, path)


def to_text(name):
    out = ROOT / ".nbtext" / f"{name}.py"
    out.parent.mkdir(exist_ok=True)
    jupytext.write(jupytext.read(ROOT / "nbs" / f"{name}.ipynb"), out, fmt="py:percent")


def to_notebook(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    new = jupytext.read(ROOT / ".nbtext" / f"{name}.py", fmt="py:percent")
    kept = {}
    if path.exists():
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                kept.setdefault(cell.source, []).append(cell.outputs)
    for cell in new.cells:
        if cell.cell_type == "code" and kept.get(cell.source):
            cell.outputs = kept[cell.source].pop(0)
    save(new, path)


def run(name, check=False, timeout=900):
    path = ROOT / "nbs" / f"{name}.ipynb"
    start = time.time()
    notebook = execute(path, timeout)
    if not check:
        save(notebook, path)
    print(f"{name}: {time.time() - start:.0f} s, {path.stat().st_size / 1e6:.2f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "make", "run"])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--check", action="store_true", help="execute without storing outputs")
    args = parser.parse_args()
    for name in [Path(n).stem for n in args.names]:
        {"text": to_text, "make": to_notebook, "run": lambda n: run(n, args.check)}[args.what](name)


if __name__ == "__main__":
    sys.exit(main())
