"""Every notebook runs top to bottom on two CPU cores, inside its limit."""
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
import nb

GOAL, LIMIT = 60, 240  # seconds: what a chapter should need on an idle machine, and what a busy one may take


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    start = time.time()
    nb.execute(path, timeout=LIMIT)
    seconds = time.time() - start
    with capsys.disabled():
        print(f"  {path.stem}: {seconds:.0f} s{' (goal: under a minute)' if seconds > GOAL else ''}")
    assert seconds < LIMIT
