"""What holds the house together: twins, layers, exports, imports, notebooks as a reader meets them, the wheel."""
import ast
import configparser
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]
MODULES = {path.stem.split("_", 1)[1]: int(path.stem[:2]) for path in CHAPTERS}  # name: chapter number
SET_UP = '''#| hide
import glob, importlib.metadata, importlib.util
if importlib.util.find_spec("fantasy_nb") is None:  # a fresh Colab: install the wheel lying beside this notebook, and what Colab has not got
    wheels = sorted(glob.glob("fantasy_nb-*.whl"))
    assert wheels, "no fantasy_nb wheel beside this notebook: make one with `make wheel` and upload it to the same folder"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {wheels[-1]} mediapipe==0.10.21")  # MediaPipe asks for NumPy 1 and works with 2
    needs = [need.split(";")[0] for need in importlib.metadata.requires("fantasy_nb") if "mediapipe" not in need and ("extra" not in need or "colab" in need)]
    get_ipython().run_line_magic("pip", "install -q " + " ".join(f'"{need}"' for need in needs))'''


def cells(path, kind="code"):
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def python(code, folder, timeout=120, **env):
    "Run code in a fresh interpreter, away from the checkout."
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- twins


def test_settings_ini_is_the_twin_of_pyproject():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini, project, nbdev = ini["DEFAULT"], PROJECT["project"], PROJECT["tool"]["nbdev"]
    for key in ("version", "description"):
        assert ini[key] == project[key], key
    assert ini["repo"].replace("-", "_") == ini["lib_name"] == project["name"] == nbdev["lib_name"]
    for key in ("nbs_path", "lib_path", "doc_path", "readme_nb"):
        assert ini[key] == nbdev[key], key
    assert project["requires-python"].startswith(f">={ini['min_python']},")
    assert (ini["license"], project["license"]) == ("apache2", "Apache-2.0")
    assert ini["author"] == project["authors"][0]["name"]
    assert ini["keywords"].split() == [word.replace(" ", "-") for word in project["keywords"]]
    assert ini["requirements"].split() == project["dependencies"]
    for extra, packages in project["optional-dependencies"].items():
        assert ini[f"{extra}_requirements"].split() == packages, extra
    assert ini["console_scripts"].split() == [f"{name}={place}" for name, place in project.get("scripts", {}).items()]


def test_version_is_one():
    import fantasy_nb

    assert fantasy_nb.__version__ == PROJECT["project"]["version"]


def test_environment_yml_installs_what_pyproject_says():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "fantasy-nb"
    conda, (pip,) = environment["dependencies"][:-1], environment["dependencies"][-1].values()
    assert f"python{PROJECT['project']['requires-python']}" in conda
    assert [d for d in conda if not d.startswith(("python", "pip"))] == []  # no second place for pins
    assert pip == ["--constraint constraints.txt", "--editable .[dev,docs,scale,wan]"]
    assert set("dev,docs,scale,wan".split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_constraints_agree_with_pyproject_and_with_what_is_installed():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {r.name: next(iter(r.specifier)).version for r in map(Requirement, lines)}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for wanted in map(Requirement, [*PROJECT["project"]["dependencies"], *(p for group in extras for p in group)]):
        if wanted.name in pins:
            assert pins[wanted.name] in wanted.specifier, wanted
    assert pins["torch"] == version("torch").split("+")[0]
    assert pins["opencv-python"] == pins["opencv-contrib-python"]  # they share one folder


def test_console_scripts_are_real():
    for name, place in PROJECT["project"].get("scripts", {}).items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name


# --- layers and exports


def test_export_in_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import in_step

    assert "\n".join(in_step.differences()) == ""


def imported(path):
    "Names of fantasy_nb's modules that a file imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = "fantasy_nb." * bool(node.level) + (node.module or "")
            names = [inside] if inside not in ("fantasy_nb", "fantasy_nb.") else [f"fantasy_nb.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("fantasy_nb."))


def test_the_layer_test_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from .train import train\nimport fantasy_nb.animate\nfrom fantasy_nb import flow\nfrom fantasy_nb.core import x\n")
    assert sorted(imported(bad)) == ["animate", "core", "flow", "train"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_lower_chapters(module):
    for other in imported(ROOT / "fantasy_nb" / f"{module}.py"):
        assert other in MODULES and MODULES[other] < MODULES[module], f"{module} imports {other}"


def test_one_chapter_one_module():
    modules = {path.stem for path in (ROOT / "fantasy_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_every_exported_name_has_a_docstring(module):
    module = importlib.import_module(f"fantasy_nb.{module}")
    assert module.__all__
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            doc = inspect.getdoc(thing) or ""
            assert len(doc) > 10 and not doc.startswith(f"{name}("), f"{module.__name__}.{name}: {doc!r}"


# --- imports: quick, light, offline


def test_import_is_quick(tmp_path):
    out = python("import time; start = time.process_time(); import fantasy_nb; print(time.process_time() - start)", tmp_path)
    assert float(out) < 3


def test_importing_every_chapter_is_quick_and_light(tmp_path):
    # torch and diffusers are the platform: the clock starts when they are there. CPU seconds, so that a busy machine does not count.
    code = f"""
import sys, time, torch, diffusers.models.modeling_utils, diffusers.configuration_utils
start = time.process_time()
import importlib
for name in {list(MODULES)}:
    importlib.import_module("fantasy_nb." + name)
print(time.process_time() - start, *(name for name in ('mediapipe', 'jax', 'matplotlib.pyplot', 'skimage') if name in sys.modules))"""
    seconds, *loaded = python(code, tmp_path).split()
    assert loaded == []
    assert float(seconds) < 3


def test_nothing_touches_the_network(tmp_path):
    code = f"""
import socket
tried = []
def refuse(*args, **kwargs): tried.append(args); raise OSError(f"network: {{args}}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import importlib
for name in {list(MODULES)}: importlib.import_module("fantasy_nb." + name)
from fantasy_nb.core import data_samples
if (data_samples("weights") / "tiny").is_dir():
    from fantasy_nb.animate import PortraitPipeline
    PortraitPipeline.from_pretrained("tiny")
    print("loaded")
assert not tried, tried  # what a library swallows or a thread of it does is seen as well
"""
    out = python(code, tmp_path, HF_HUB_OFFLINE="0")
    assert out.strip() == ("loaded" if (ROOT / "data_samples" / "weights" / "tiny").is_dir() else "")


# --- notebooks as a reader meets them


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_set_up_cell(path):
    code = cells(path)
    assert code[0]["source"].startswith("#| default_exp ")
    assert code[0]["source"].split()[-1] == path.stem.split("_", 1)[1]
    assert code[1]["source"] == SET_UP


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_opening(path):
    title, *rest = cells(path, "markdown")[0]["source"].strip().splitlines()
    assert title.startswith("# ")
    assert any(line.startswith("> ") for line in rest)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 1.5e6
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "raises-exception" not in cell["metadata"].get("tags", []):
            assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
        for output in cell.get("outputs", []):
            shown = json.dumps(output)
            assert str(Path.home()) + "/" not in shown and "/work/" not in shown, "a stored output names a folder of the author's machine"
    drawn = [c for c in cells(path) if any("image/png" in o.get("data", {}) or "text/html" in o.get("data", {}) for o in c["outputs"])]
    assert drawn or path.stem == "index", "no picture stored"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_links_away_that_may_be_dead(path):
    for cell in cells(path, "markdown"):
        assert "](http" not in cell["source"].replace("](https://arxiv.org/", ""), cell["source"][:200]
        assert "<img src=\"http" not in cell["source"]


def test_readme_is_made_from_the_index():
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_files_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)\)", cell["source"]):
            assert target.startswith("https://arxiv.org/") or (path.parent / target).exists(), target


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets
    for target in targets:
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # built from what git would hand out, so that the checkout stays clean
    tracked = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (made,) = folder.glob("fantasy_nb-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", made], check=True)
    return made, folder / "site"


def test_wheel_holds_the_samples_and_nothing_else(wheel):
    made, _ = wheel
    names = [name for name in zipfile.ZipFile(made).namelist() if ".dist-info/" not in name]
    samples = {f"fantasy_nb/{p.relative_to(ROOT)}" for p in (ROOT / "data_samples").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert samples <= set(names)
    assert {name.split("/")[0] for name in names} == {"fantasy_nb"}
    assert "licenses/LICENSE" in " ".join(zipfile.ZipFile(made).namelist())


def test_wheel_works_in_an_empty_folder(wheel, tmp_path):
    _, site = wheel
    code = f"""
import sys; sys.path.insert(0, {str(site)!r})
import importlib, fantasy_nb
assert fantasy_nb.__file__.startswith({str(site)!r}), fantasy_nb.__file__
for name in {list(MODULES)}: importlib.import_module("fantasy_nb." + name)
from fantasy_nb.core import data_samples
if (data_samples("weights") / "tiny").is_dir():
    from fantasy_nb.animate import PortraitPipeline
    PortraitPipeline.from_pretrained("tiny")
print(data_samples())"""
    assert python(code, tmp_path).strip() == str(site / "fantasy_nb" / "data_samples")


def test_a_chapter_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path, monkeypatch):
    _, site = wheel
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", str(site))  # before the editable install of the checkout
    import nb
    import nbformat

    notebook = nbformat.read(ROOT / "nbs" / "00_core.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell("import fantasy_nb; print(fantasy_nb.__file__)"))
    nbformat.write(notebook, tmp_path / "00_core.ipynb")
    assert nb.execute(tmp_path / "00_core.ipynb").cells[-1].outputs[0].text.startswith(str(site))


# --- Colab


COLAB = dict(line.split("==") for line in (ROOT / "tools" / "colab-versions.txt").read_text().splitlines() if line and not line.startswith("#"))


def test_colab_has_nothing_too_old_for_us():
    known = 0
    for need in map(Requirement, PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["colab"]):
        if need.name in COLAB and need.name != "protobuf":  # the one that the set-up cell changes, for MediaPipe
            assert need.specifier.contains(COLAB[need.name]), need
            known += 1
    assert known >= 15


def test_set_up_cell_installs_the_wheel_and_what_colab_lacks(tmp_path, monkeypatch):
    lines = []
    shell = SimpleNamespace(run_line_magic=lambda magic, line: lines.append((magic, line)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="make wheel"):
        exec(SET_UP, {"get_ipython": lambda: shell})
    assert lines == []
    for version in ("0.0.1", "0.0.2"):
        (tmp_path / f"fantasy_nb-{version}-py3-none-any.whl").touch()
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [*PROJECT["project"]["dependencies"], 'ray[data]>=2.40; extra == "scale"', 'absl-py; extra == "colab"'])
    exec(SET_UP, {"get_ipython": lambda: shell})
    assert lines[0] == ("pip", "install -q --no-deps fantasy_nb-0.0.2-py3-none-any.whl " + next(need for need in PROJECT["project"]["dependencies"] if "mediapipe" in need))
    assert lines[1] == ("pip", "install -q " + " ".join(f'"{need}"' for need in PROJECT["project"]["dependencies"] if "mediapipe" not in need) + ' "absl-py"')


def test_colab_check_looks_for_python(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("colab_check", ROOT / "tools" / "colab_check.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="want Python 3.12"):
        tool.find_python(None)
    with pytest.raises(FileNotFoundError, match="want Python 3.12"):
        tool.find_python("/no/such/python")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "00_core.ipynb").touch()
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    ran, built = [], []

    def build(command, **options):
        built.append((tmp_path / "build").exists())
        Path(command[command.index("--wheel-dir") + 1], "x.whl").touch()

    for name, stand_in in {
        "ROOT": tmp_path,
        "find_python": str,
        "make_environment": lambda folder, python: folder,
        "versions": lambda python: dict.fromkeys(("numpy", "torch", "ipython", "ipywidgets", "protobuf"), "1"),
        "run_chapter": lambda python, *rest: ran.append(python) or (0.0, ""),
    }.items():
        monkeypatch.setattr(tool, name, stand_in)
    monkeypatch.setattr(tool, "subprocess", SimpleNamespace(run=build))
    assert tool.main(["--env", "kept"]) == 0
    assert ran == [tmp_path / "kept"] and built == [False]  # a chapter runs in another folder; nothing of an earlier build gets in


# --- tools


@pytest.fixture
def tool(monkeypatch):
    "name, its arguments -> the module, ready for main()."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def get(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return importlib.import_module(name)

    return get


def test_answers_that_are_no_numbers_do_not_agree(tool, monkeypatch, capsys):
    nan, spent = float("nan"), {name: [(1.0, 1.0)] for name in ("ours", "diffusers")}
    bench = tool("bench_dit", "--cpu", "--sizes", "1x4x4")
    monkeypatch.setattr(bench, "compare", lambda *_: (spent, {name: 1 for name in spent}, nan))
    assert bench.main() == "1 comparisons differ by more than 1e-04"
    bench = tool("bench_encoder", "--config", "tiny", "--crops", "1", "--no-compile")
    monkeypatch.setattr(bench, "timed", lambda read, crops, device: (1.0, torch.tensor([nan])))
    with pytest.raises(SystemExit, match="features differ by nan"):
        bench.main()


@pytest.mark.parametrize("name", ["measure_animation", "measure_encoder"])
def test_real_films_are_looked_for_where_one_says(tool, name, tmp_path):
    with pytest.raises(SystemExit, match="want a folder for --real, got .*nowhere"):
        tool(name, "--real", tmp_path / "nowhere").main()


def test_changed_settings_are_timed_and_missing_drivers_told_of(tool, monkeypatch, tmp_path, capsys):
    measure, ran = tool("measure_animation", "--weights", "tiny", "--parts", "real", "time", "--set", '{"looks": 1}'), []
    monkeypatch.setattr(measure, "REAL", tmp_path / "nowhere")
    monkeypatch.setattr(measure, "subprocess", SimpleNamespace(run=lambda command, check: ran.append(command)))
    assert measure.main() == 0 and "no real drivers" in capsys.readouterr().out
    assert len(ran) == 2 and all(command[-2:] == ["--set", '{"looks": 1}'] for command in ran)
    made = SimpleNamespace(settings=measure.PortraitPipeline.from_pretrained("tiny").settings)
    monkeypatch.setattr(measure.PortraitPipeline, "from_pretrained", lambda *_: made)
    with pytest.raises(AttributeError):  # there is no more of a pipeline here
        measure.time_one("tiny", 1, "cpu", {"looks": 1})
    assert made.settings.looks == 1


def test_a_bank_of_other_clips_is_refused(tool, monkeypatch, tmp_path):
    bank = tmp_path / "bank.pt"
    torch.save({"train": {"clips": [0] * 3}, "test": {}}, bank)
    train = tool("train_vae", tmp_path / "out", "--clips", "4", "--bank", bank)
    monkeypatch.setattr(train.torch, "set_num_threads", lambda n: None)
    with pytest.raises(SystemExit, match="want a bank of 4 clips, got 3 in .*bank.pt"):
        train.main()
    bank.unlink()
    monkeypatch.setattr(train, "render_bank", lambda *_: {"clips": []})
    monkeypatch.setattr(train.torch, "save", lambda bank, path: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main()
    assert not bank.exists()
