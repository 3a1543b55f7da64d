"""Installed, not cloned: a package built by pip runs its chapters from any folder, in an environment of its own."""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in", "turbvit_nb", "nbs")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    "The programs of an environment that holds the package as pip built it; what it needs comes from this environment."
    home = tmp_path_factory.mktemp("installed")
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_quarto.yml")
    (home / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, home / "source")
        else:
            shutil.copytree(ROOT / name, home / "source" / name, ignore=leave)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "env"], check=True)
    packages = next((home / "env" / "lib").glob("python*")) / "site-packages"
    needed = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]
    (packages / "needed.pth").write_text("\n".join(needed))
    share = Path(sysconfig.get_path("data")) / "share" / "jupyter" / "nbconvert"  # pip would have put it there
    (home / "env" / "share" / "jupyter").mkdir(parents=True)
    (home / "env" / "share" / "jupyter" / "nbconvert").symlink_to(share)
    pip = [sys.executable, "-m", "pip", "--python", home / "env" / "bin" / "python", "install", "--quiet"]
    alone = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*pip, *alone, home / "source"], check=True, env=outside())
    shutil.rmtree(home / "source")
    return home / "env" / "bin"


def outside() -> dict[str, str]:
    "An environment of a process that knows nothing of this checkout."
    unset = ("PYTHONPATH", "TURBVIT_RUNS", "TURBVIT_DATA", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in unset}


def turbvit(environment: Path, folder: Path, *words: str) -> str:
    "What the installed program says, in a folder; it has to succeed."
    path = {"PATH": f"{environment}:{os.environ['PATH']}"}
    done = subprocess.run([environment / "turbvit", *words], cwd=folder, env=outside() | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_chapter_runs_from_an_empty_folder(environment, tmp_path):
    "Runs and data are made where one works; the report is whole; what belongs to the chapter came with the package."
    assert turbvit(environment, tmp_path, "--version") == "turbvit_nb 0.1.0\n"
    turbvit(environment, tmp_path, "run", "02_train", "configs/smoke/train.toml", "--set", "output_dir=first", "--no-lessons")
    run = tmp_path / "runs" / "first"
    assert (run / "02_train.ipynb").exists() and (run / "checkpoints" / "best.tar").exists()
    page = (run / "02_train.html").read_text()
    assert "made by turbvit_nb 0.1.0" in page and "<script" not in page
    assert list((tmp_path / "data" / "smoke").rglob("frames.h5")) and sorted(p.name for p in tmp_path.iterdir()) == ["data", "runs"]
    assert "done" in turbvit(environment, tmp_path, "status", "runs/first")


def test_configs_and_scripts_come_along(environment, tmp_path):
    listed = turbvit(environment, tmp_path, "example").split()
    there = {path.relative_to(ROOT / "nbs").as_posix() for path in (ROOT / "nbs" / "configs").rglob("*.toml")}
    assert there | {"jobs/run.pbs", "jobs/run.slurm", "jobs/queue.toml"} == set(listed)
    turbvit(environment, tmp_path, "example", "configs/train.toml", "my.toml")
    assert (tmp_path / "my.toml").read_text() == (ROOT / "nbs" / "configs" / "train.toml").read_text()


PLAN = """
from turbvit_nb.lab.config import find_config
from turbvit_nb.lab.demo import DEMO, demo_command
from turbvit_nb.lab.jobs import chapters
print(all(demo_command(find_config("configs/demo/smoke"), job)[-1].endswith(".toml") for job in DEMO), *(c.name for c in chapters()))
"""


def test_the_demo_finds_its_chapters(environment, tmp_path):
    done = subprocess.run([environment / "python", "-c", PLAN], cwd=tmp_path, env=outside(), capture_output=True, text=True, check=True)
    complete, *names = done.stdout.split()
    there = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
    assert complete == "True" and set(names) <= set(there) and "07_compare" in names
