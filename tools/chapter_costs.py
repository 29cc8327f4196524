"""What each chapter costs to run: seconds, processor seconds and peak memory, one thread, each once. `tools/chapter_costs.py [NAME ...]` writes docs/costs.json.

Cells marked `#| eval: false` or `#| cuda` are left out, as everywhere. Processes that a cell starts and waits for count in seconds, not in memory.
"""
import json
import os
import sys
import time
from datetime import date
from pathlib import Path

import nbformat
from nb import ROOT, Runner

OUT = ROOT / "docs" / "costs.json"
ASK = """
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
mine, theirs = getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)
print(mine.ru_maxrss, mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime)"""


def cost(path: Path) -> dict:
    "Run one notebook, store nothing of it."
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    start = time.time()
    Runner(notebook, timeout=1800, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    kibibytes, busy = map(float, notebook.cells[-1].outputs[0].text.split())
    return {"seconds": round(time.time() - start), "cpu": round(busy), "mb": round(kibibytes * 1024 / 1e6)}


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    found = json.loads(OUT.read_text()) if OUT.exists() else {"chapters": {}}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            found["chapters"][path.stem] = cost(path)
            print(path.stem, found["chapters"][path.stem], flush=True)
            OUT.write_text(json.dumps(found | {"when": str(date.today()), "cores": os.cpu_count()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
