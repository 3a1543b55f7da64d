"""The project itself: notebooks that papermill can drive, links that lead somewhere, nothing of one machine in the files."""
import ast
import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name == "nbs" and p.name[0].isdigit()]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "nbs"))


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter_is_a_job(path):
    "One cell tagged `parameters`, not exported, with a config of a smoke job that exists and overrides."
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in tags(c)]
    assert len(cells) == 1
    assert "#| export" not in cells[0].source
    values = {t.target.id: t.value for t in ast.parse(cells[0].source).body if isinstance(t, ast.AnnAssign)}
    assert set(values) == {"config", "overrides"}
    assert (ROOT / "nbs" / ast.literal_eval(values["config"])).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_fit_to_read(path):
    "Valid, with a title and a summary, no traceback among its outputs, no picture too large for a page."
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    assert re.search(r"^# \S", prose, re.M), "no title"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.source
            picture = output.get("data", {}).get("image/png", "")
            assert len(picture) < 200_000, f"a picture of {len(picture)} characters after {cell.source[:60]!r}"


def test_every_notebook_is_in_the_sidebar_and_the_sidebar_leads_somewhere():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = set()

    def walk(items):
        for item in items:
            if isinstance(item, str):
                assert (ROOT / "nbs" / item).is_file(), item
                listed.add(item)
            elif "auto" in item:
                listed.update(name(p) for p in (ROOT / "nbs").glob(item["auto"]))
            else:
                walk(item["contents"])

    walk(site["website"]["sidebar"]["contents"])
    assert {name(p) for p in NOTEBOOKS} == listed
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def imports(module: Path) -> set[str]:
    "Which rooms or chapters of ours a module imports, at the top or inside a function."
    package, found = module.relative_to(ROOT / "turbvit_nb").parts[:-1], set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(package)[:len(package) - (node.level - 1)]
            parts = base + (node.module.split(".") if node.module else [])
            found.update([parts[0]] if parts else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("turbvit_nb."):
            found.add(node.module.split(".")[1])
    return found - {"__version__"}


GROUND = {"physics", "layers", "lab"}
ROOMS = {  # a folder: what its modules may import
    "physics": {"physics"},
    "layers": {"layers"},
    "data": {"data"} | {"physics", "lab"},
    "lab": {"lab"},
    "networks": {"networks", "layers", "lab"},
    "emulators": {"emulators", "lab"},
    "compress": {"compress", "emulators", "networks", "model", "datasets"} | GROUND,
    "flow": {"flow", "emulators", "model", "datasets", "forecast"} | GROUND,
    "forecast": {"forecast", "model", "datasets"} | GROUND,
    "latent": {"latent", "flow", "emulators", "model", "datasets", "forecast"} | GROUND,
    "sparse": {"sparse", "flow", "emulators", "model", "datasets"} | GROUND,
    "climate": {"climate", "forecast", "model", "datasets"} | GROUND,
    "benchmark": {"benchmark", "data", "climate", "forecast", "compress", "sparse", "study", "emulators", "networks", "model", "datasets"} | GROUND,
    "zoo": {"zoo", "data", "climate", "forecast", "compress", "study", "latent", "flow", "sparse", "emulators", "networks", "model", "datasets"} | GROUND,
    "study": {"study", "climate", "forecast", "compress", "emulators", "networks", "model", "datasets"} | GROUND,
}
HANDED_ON = {"prune": {"train", "flow"}, "sparse": {"train"}, "distil": {"train"}, "flow": {"train", "latent"}, "images": {"flow"}, "classes": {"flow", "sparse"}, "methods": {"sparse"}, "arrays": {"latent"}, "condition": {"latent"}}  # what one chapter takes from another: finetuning is a training


def test_every_room_is_on_the_map():
    "A new folder of the package says here what it may import."
    rooms = {p.parent.name for p in (ROOT / "turbvit_nb").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_who_may_import_whom(room):
    "The ground imports nothing above it, a subject folder no chapter, and folders each other only downwards. A `job` in a folder is a chapter."
    for module in (ROOT / "turbvit_nb" / room).glob("*.py"):
        assert module.stem == "job" or imports(module) <= ROOMS[room], module


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapters_take_nothing_from_each_other(path):
    "Chapters from 02 on stand on the folders, on 00 and on 01, and on no chapter of another stage."
    stage = re.sub(r"^\d+_", "", path.stem)
    chapters = {re.sub(r"^\d+_", "", p.stem) for p in CHAPTERS} - {stage}
    below = {"model": set(), "datasets": {"model"}}
    may = below.get(stage, {"model", "datasets"} | HANDED_ON.get(stage, set()))
    module = ROOT / "turbvit_nb" / f"{stage}.py"  # or, where a folder has its name, `job` in that folder
    found = imports(module if module.is_file() else ROOT / "turbvit_nb" / stage / "job.py")
    assert found & (chapters | {"cli", "examine"}) <= may


@pytest.mark.parametrize("room", ROOMS)
def test_notebooks_of_a_folder_stand_in_the_order_of_their_imports(room):
    "A module imports only modules of its folder whose notebooks have a lower number."
    books = {re.sub(r"^\d+_", "", p.stem): p.stem[:2] for p in (ROOT / "nbs" / room).glob("[0-9]*.ipynb")}
    for module, place in books.items():
        tree = ast.parse((ROOT / "turbvit_nb" / room / f"{module}.py").read_text())
        near = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        late = {other for other in near & set(books) if books[other] >= place}
        assert not late, f"{room}/{place}_{module} imports {late}"


def test_no_module_is_a_library_in_disguise():
    "No exported module is longer than a reader can hold."
    for module in (ROOT / "turbvit_nb").rglob("*.py"):
        if module.name != "_modidx.py":
            assert len(module.read_text().splitlines()) <= 750, module


def test_links_between_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                for target in re.findall(r"\]\(([^)#:\s]+\.(?:ipynb|md|toml|gif|png))\)", cell.source):
                    assert (path.parent / target).exists(), f"{name(path)} links to {target}"


def test_nothing_of_one_machine():
    "No tracked text file holds an absolute path of somebody's machine or the address of a package index."
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    bad = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp/[\w.]*ipykernel)[/_]|index-url|site-packages/")
    for file in filter(None, files.split("\0")):
        path = ROOT / file
        if path.is_file() and path.suffix in {".ipynb", ".py", ".toml", ".md", ".yml", ".ini", ".txt", ".json"} \
                and path != Path(__file__).resolve():
            match = bad.search(path.read_text(encoding="utf-8"))
            assert match is None, f"{file}: {match and match.group()}"


def test_torch_is_pinned_in_one_place():
    places = [p.name for p in (ROOT / "settings.ini", ROOT / "constraints.txt", ROOT / "setup.py", ROOT / "Makefile")
              if re.search(r"^(?!#).*\btorch *== *\d", p.read_text(), re.M)]
    assert places == ["settings.ini"]


def test_configs_are_valid():
    "Every TOML file that comes with the lab passes its own strict schema."
    from turbvit_nb.lab.config import load_config

    configs = sorted((ROOT / "nbs" / "configs").rglob("*.toml"))
    assert configs
    for path in configs:
        load_config(path)


def test_outputs_carry_no_timing_bars():
    "Committed outputs hold no progress bars: they would change at every run."
    for path in NOTEBOOKS:
        text = json.dumps([c.get("outputs", []) for c in nbformat.read(path, 4).cells])
        assert "it/s]" not in text and "s/it]" not in text, name(path)
