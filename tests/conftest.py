"""What every test shares: one thread, no progress bars, the way to real Py2D output, and a browser."""
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TURBVIT_PROGRESS", "0")

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also the tests that are too long for every commit")


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: too long for every commit; runs with --soak")


def pytest_collection_modifyitems(config, items):
    "Long tests run when they are asked for."
    for item in items if not config.getoption("--soak") else []:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="too long for every commit: make soak"))


def pytest_terminal_summary(terminalreporter):
    "How often jobs died, by stage, in the tests that count it and passed."
    kills = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, count in (value for key, value in report.user_properties if key == "kills"):
            kills[name] += count
    if kills:
        terminalreporter.write_sep("-", "deaths survived")
        terminalreporter.write_line(", ".join(f"{name} {count}" for name, count in kills.most_common()) + f"; {kills.total()} in all")


def real_py2d() -> Path | None:
    "The folder of real Py2D output, from `$TURBVIT_PY2D` or beside the checkout; None where there is none."
    folder = Path(os.environ.get("TURBVIT_PY2D", ROOT.parent / "shared" / "data" / "py2d"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def py2d_data() -> Path:
    "The folder of real Py2D output; the test is skipped where there is none."
    folder = real_py2d()
    if folder is None:
        pytest.skip("no real Py2D output: set TURBVIT_PY2D to its folder")
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[str]:
    "A Python whose programs have been imported before, see `warm.py`: for tests of what a job does, not of how its process starts."
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        words, env = [sys.executable, Path(__file__).with_name("warm.py"), folder], os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n"
            yield f"{folder}/python"
            server.stdin.close()


@pytest.fixture
def warm_jobs(warm, monkeypatch) -> None:
    "The jobs that a test starts, and their kernels, are programs of that Python."
    monkeypatch.setattr(sys, "executable", warm)


@pytest.fixture(scope="module")
def browser():
    "A headless browser; the test is skipped where none is installed, and fails where CI should have installed it."
    if BROWSER is None and "CI" in os.environ:
        pytest.fail("CI installs a browser, and there is none on the PATH")
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    "A folder with runs of the test's own and no data; no run is left open."
    from turbvit_nb.lab import runs

    monkeypatch.setenv("TURBVIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for run in list(runs._open.values()):
        run.close()


@pytest.fixture
def home(data, place, monkeypatch) -> Path:
    "The same with data, the `data` of its module."
    monkeypatch.setenv("TURBVIT_DATA", str(data))
    return place
