"""Every notebook runs top to bottom on two CPU cores, inside its limit: minutes of a machine like the one they were written on."""
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
import nb

GOAL, LIMIT = 60, 300  # seconds: what a chapter should need, and what it may need, where `pace` is 1
REFERENCE = 0.25  # seconds of `errand` on that machine, idle (two cores, 2026-12-01)


def errand() -> float:
    "Seconds for a fixed piece of the work that notebooks do: products of matrices, convolutions, and maps too large for a cache."
    torch.manual_seed(0)
    a, pictures, kernel = torch.randn(1024, 1024), torch.randn(4, 64, 96, 96), torch.randn(64, 64, 3, 3)
    start = time.perf_counter()
    for _ in range(4):
        a = (a @ a).tanh()
        pictures = torch.nn.functional.conv2d(pictures, kernel, padding=1).sin()
    return time.perf_counter() - start


def pace() -> float:
    "How many times slower than there the same work is here and now; the least of four, for a neighbour may pass by."
    return max(1.0, min(errand() for _ in range(4)) / REFERENCE)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    before, start = pace(), time.time()
    nb.execute(path, timeout=4 * LIMIT)
    seconds, slower = time.time() - start, max(before, pace())
    with capsys.disabled():
        print(f"  {path.stem}: {seconds:.0f} s at a pace of {slower:.1f}{' (goal: under a minute)' if seconds > GOAL * slower else ''}")
    assert seconds < LIMIT * slower
