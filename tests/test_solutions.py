"""The exercises: three in every chapter, each with a folded solution, and the solutions' code runs and says what its comments promise."""
import io
import linecache
import re
import socket
import time
import tokenize
import warnings
from pathlib import Path

import pytest

from fantasy_nb.core import seed_everything

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
LIMIT = 20  # seconds of one CPU core; the goal is half of it, on an idle machine


def exercises(path: Path) -> list[str]:
    "What stands below `## Exercises`, cut before each bold number."
    nbformat = pytest.importorskip("nbformat")
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    text = "\n\n".join(cells).partition("## Exercises\n")[2]
    return re.split(r"^(?=\*\*\d\.\*\*)", text, flags=re.M)[1:]


def folded(exercise: str) -> str:
    "The solution of one exercise."
    return "\n".join(re.findall(r"<details>(.*?)</details>", exercise, flags=re.S))


def blocks(exercise: str) -> list[str]:
    "Python code of a solution."
    return re.findall(r"^```python\n(.*?)^```$", folded(exercise), flags=re.S | re.M)


def promised(code: str) -> list[str]:
    "Comments behind a `print`: what it prints."
    lines = code.splitlines()
    comments = [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type == tokenize.COMMENT]
    return [token.string[1:].strip() for token in comments if lines[token.start[0] - 1].lstrip().startswith("print(")]


def solutions():
    for path in CHAPTERS:
        for exercise in exercises(path):
            for k, code in enumerate(blocks(exercise)):
                yield pytest.param(code, id=f"{path.stem}-{exercise[2]}{'abc'[k] if k else ''}")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_three_exercises_with_solutions(path):
    found = exercises(path)
    assert [exercise[2] for exercise in found] == ["1", "2", "3"]
    for exercise in found:
        question, fold, _ = exercise.partition("<details>")
        assert fold and len(question) > 40, "a question, and its own folded solution"
        assert "\n\n<details><summary>Solution</summary>\n\n" in exercise and "\n\n</details>" in exercise, "Markdown inside <details> wants empty lines around it"
        assert exercise.count("<details>") == exercise.count("</details>") == 1
        assert len(folded(exercise)) > 60
        lines = folded(exercise).splitlines()
        fences = [k for k, line in enumerate(lines) if line.startswith("```")]
        assert not any(lines[k - 1] for k in fences[::2]) and not any(lines[k + 1] for k in fences[1::2]), "and so do fences"
    assert sum(bool(blocks(exercise)) for exercise in found) >= 2


@pytest.fixture(scope="module")
def warm():
    "What several solutions import, so that none of them is timed for it."
    import matplotlib
    import torch.utils.flop_counter  # noqa: F401

    import fantasy_nb.pretrained  # noqa: F401
    from fantasy_nb.animate import PortraitPipeline

    matplotlib.use("Agg")
    PortraitPipeline.from_pretrained("tiny")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("code", solutions())
def test_solution_runs(code, request, tmp_path, monkeypatch, capsys):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError(f"network: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)
    seed_everything(0)
    name = f"<{request.node.callspec.id}>"
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)  # so that a failure shows its line
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
        exec(compile(code, name, "exec"), {"__name__": "solution"})
    seconds = time.process_time() - start
    import matplotlib.pyplot as plt

    plt.close("all")
    assert not tried, tried
    expected, printed = promised(code), capsys.readouterr().out.splitlines()
    assert expected == [line for line in printed if line.strip()], "each print has what it prints behind it"
    assert expected or re.search(r"^\s*(assert |torch\.testing\.)", code, flags=re.M), "a solution ends in something that can be wrong"
    assert seconds < LIMIT


def test_what_a_print_promises():
    assert promised("x = '# no'  # no\nprint(x)  # [1, 2]\nfor _ in x:\n    print('#', 2)  # # 2\n") == ["[1, 2]", "# 2"]
