"""Are fantasy_nb/*.py what the notebooks export? Exports into a copy and compares: exit code 1 and the difference when not."""
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differences() -> list[str]:
    "Unified diffs between the committed package and a fresh export; also modules that no notebook makes."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        (copy / "fantasy_nb").mkdir()
        for name in ("pyproject.toml", "README.md", "fantasy_nb/__init__.py"):
            shutil.copy(ROOT / name, copy / name)
        subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=copy, check=True, capture_output=True, text=True)
        fresh = {p.name: p.read_text() for p in (copy / "fantasy_nb").glob("*.py")}
    here = {p.name: p.read_text() for p in (ROOT / "fantasy_nb").glob("*.py")}
    diffs = []
    for name in sorted(fresh.keys() | here.keys()):
        old, new = (texts.get(name, "").splitlines(keepends=True) for texts in (here, fresh))
        diffs += ["".join(difflib.unified_diff(old, new, f"fantasy_nb/{name}", f"exported/{name}"))] if old != new else []
    return diffs


if __name__ == "__main__":
    found = differences()
    print("\n".join(found) or "export in step")
    sys.exit(bool(found) and "the package and the notebooks differ: make export, then commit")
