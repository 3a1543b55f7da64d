"""Whole jobs through the command line: what is refused and how, what is left after a kill, that a resumed run ends with the same bits."""
import ast
import builtins
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pytest
import torch
from scipy.io import savemat
from typer.testing import CliRunner

from turbvit_nb.cli import app
from turbvit_nb.lab import jobs
from turbvit_nb.lab.config import find_config, is_users
from turbvit_nb.lab.demo import DEMO
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.jobs import chapters, run_job
from turbvit_nb.lab.files import Lock
from turbvit_nb.lab.runs import open_run, read_metrics, stages
from turbvit_nb.train import train

CONFIG = """
output_dir = "{name}"
seed = 3

[generate]
data_dir = "flow"
Re = 200
fkx = 0
fky = 4
alpha = 0.1
beta = 20.0
NX = 16
dt = 0.01
n_trajectories = 2
n_frames = 40
t_save = 0.1
spin_up = 1.0

[model]
model_type = "ViT"
img_size = 16
patch_size = 4
embed_dim = 16
depth = 1
num_heads = 2

[train_dataset]
data_dir = "flow"
frame_range = [[1, 26]]

[validation_dataset]
data_dir = "flow"
frame_range = [[26, 41]]

[training]
epochs = {epochs}
batch_size = 4
lr = 1e-3
warmup_epochs = 0.5
rollout_steps = 5
rollout_starts = 2

[inference]
inference_length = 12
chunk_size = 5
n_starts = 2
"""
RUN = {
    "02_train": "from turbvit_nb.train import train\nrun = open_run(config, 'train', overrides)\ntrain(run)\nrun.finish()",
    "04_inference": "from turbvit_nb.inference import infer\nrun = open_run(config, 'inference', overrides)\ninfer(run)\nrun.finish()",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, warm) -> Path:
    "A folder for the data and the runs of these tests, and chapters reduced to what they do. What this process starts is warm; `PROGRAM` is not."
    folder = tmp_path_factory.mktemp("jobs")
    for name, work in RUN.items():
        cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []', metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell("from turbvit_nb.lab.runs import open_run"), nbformat.v4.new_code_cell("print('a lesson')"),
                 nbformat.v4.new_markdown_cell("## Run"), nbformat.v4.new_code_cell("print('the run')\n" + work)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    os.environ |= {"TURBVIT_RUNS": str(folder / "runs"), "TURBVIT_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    result = turbvit("generate", config(folder, "data"))
    assert result.exit_code == 0, result.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm)
        yield folder
    del os.environ["TURBVIT_RUNS"], os.environ["TURBVIT_DATA"]


def config(place: Path, name: str, epochs: int = 2) -> Path:
    "A config for the run `name`."
    path = place / f"{name}.toml"
    path.write_text(CONFIG.format(name=name, epochs=epochs))
    return path


def turbvit(*words):
    "The command line, in this process."
    return CliRunner().invoke(app, [str(word) for word in words])


PROGRAM = [sys.executable, "-m", "turbvit_nb.cli"]


def start(*words, **options) -> subprocess.Popen:
    "The command line, in a process of its own."
    return subprocess.Popen([*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def one_line(result, *wanted: str) -> str:
    "The single line of an error; it holds the `wanted` words."
    lines = result.output.strip().splitlines()
    assert result.exit_code == 1 and len(lines) == 1, result.output
    assert lines[0].startswith("error: ") and all(word in lines[0] for word in wanted), lines[0]
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------- without a job
def test_bare_command_explains_itself():
    result = turbvit()
    assert result.exit_code == 0
    for word in ("generate", "pack", "run 02_train", "--set", "resume", "status", "gif", "explore", "demo", "run all", "check",
                 "inspect", "import", "example", "sweep", "deploy"):
        assert word in result.output


def test_version_and_completion():
    assert re.match(r"turbvit_nb \d+\.\d+\.\d+", turbvit("--version").output)
    assert "completion" not in turbvit("--help").output
    script = subprocess.run([*PROGRAM, "--show-completion", "bash"], capture_output=True, text=True).stdout
    assert "complete" in script and "TURBVIT" in script.upper()
    words = {"_TURBVIT_COMPLETE": "complete_bash", "COMP_WORDS": "turbvit run 04", "COMP_CWORD": "2"}
    done = subprocess.run([Path(sys.executable).parent / "turbvit"], capture_output=True, text=True, env=os.environ | words)
    assert done.stdout.split() == ["04_inference"]


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys, turbvit_nb.cli; print([m for m in ('torch', 'papermill', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_chapter_can_be_run_by_papermill():
    assert len(chapters()) >= 7
    for chapter in chapters():
        chapter.check(["config", "overrides"])
        assert nbformat.read(chapter.path, 4).metadata["kernelspec"]["name"] == "python3", f"{chapter.path} names no kernel"


def names(cells, kind) -> set[str]:
    "The names that cells of code read (ast.Load) or bind (ast.Store), imports and definitions among the latter."
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    plain = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
    if kind is ast.Load:
        return plain
    imported = {alias.asname or alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    return plain | imported | {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))} \
        | {node.arg for node in nodes if isinstance(node, ast.arg)}


@pytest.mark.parametrize("chapter", [c for c in chapters() if c.name[:2] >= "02"], ids=lambda c: c.name)
def test_run_of_a_chapter_does_not_lean_on_its_lessons(chapter):
    "So that `--no-lessons` may leave them out: what the section Run reads is bound in it, exported, imported or defined."
    nb = nbformat.read(chapter.path, 4)
    run, left_out = jobs.run_heading(nb), jobs.lessons(nb)
    code = [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and i not in left_out]
    there = names([cell for _, cell in code], ast.Store) | set(dir(builtins)) | {"display"}  # of IPython
    assert left_out and names([cell for i, cell in code if i > run], ast.Load) <= there


# ------------------------------------------------------------------------------------------------- mistakes, refused before any kernel
MISTAKES = {
    "unknown key": (["training.epoch=3"], ["training.epoch is not a key; did you mean training.epochs?"]),
    "unknown section": (["trainig.epochs=3"], ["[trainig] is not a section; did you mean [training]?"]),
    "unknown top-level key": (["outputdir=x"], ["outputdir is not a top-level key; did you mean output_dir?"]),
    "wrong type": (['training.epochs="many"'], ['training.epochs = "many"', "integer"]),
    "no such value": (['model.model_type="VIT"'], ["model.model_type", "ViT"]),
    "patches do not fit": (["model.patch_size=5"], ["img_size = 16 is not divisible by patch_size = 5"]),
    "heads do not fit": (["model.num_heads=3"], ["embed_dim = 16 is not divisible by num_heads = 3"]),
    "not an assignment": (["training.epochs"], ["does not read section.key=value"]),
    "overlapping ranges": (["validation_dataset.frame_range=[[20, 41]]"], ["train_dataset", "validation_dataset", "share"]),
    "range outside the data": (["validation_dataset.frame_range=[[26, 90]]"], ["validation_dataset", "[26, 90]", "1 to 40"]),
    "empty range": (["train_dataset.frame_range=[[9, 9]]"], ["train_dataset", "frame_range"]),
    "no data": (["train_dataset.data_dir=nowhere"], ["nowhere"]),
    "size of the model": (["model.img_size=32"], ["img_size = 32", "16²"]),
    "not finite": (["training.lr=1e400"], ["training.lr = Infinity", "finite"]),
    "no such seed": (["seed=-1"], ["seed = -1", "greater than or equal to 0"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_in_the_config_is_one_line(place, case):
    overrides, wanted = MISTAKES[case]
    result = turbvit("run", place / "02_train.ipynb", config(place, "mistake"), *(word for text in overrides for word in ("--set", text)))
    one_line(result, *wanted)
    assert not (place / "runs" / "mistake").exists()


def test_mistake_on_the_command_line_is_one_line(place, tmp_path):
    chapter, toml = place / "02_train.ipynb", config(place, "mistake")
    one_line(turbvit("run", "02_trian", toml), "no chapter 02_trian; did you mean 02_train?")
    one_line(turbvit("run", chapter, toml, "-p", "overides=1"), "02_train has no parameter overides; did you mean overrides?")
    one_line(turbvit("run", chapter, place / "mistaken.toml"), "no config", "mistake.toml")
    one_line(turbvit("resume", "runs/nothing"), "no config or run folder runs/nothing")
    (tmp_path / "bad.toml").write_text("[training\nepochs = 3")
    one_line(turbvit("run", chapter, tmp_path / "bad.toml"), "bad.toml is not valid TOML", "line 1")
    (tmp_path / "homeless.toml").write_text("seed = 1")
    one_line(turbvit("run", chapter, tmp_path / "homeless.toml"), "names no output_dir")
    one_line(turbvit("generate", tmp_path / "homeless.toml"), "has no [generate] section")
    one_line(turbvit("gif", place), "holds no rollouts")


def test_folder_without_a_config_is_one_line(place, tmp_path):
    one_line(turbvit("run", place / "02_train.ipynb", tmp_path), str(tmp_path), "holds no run: it has no config.toml")


@pytest.mark.parametrize("number, words", [(13, "no permission for"), (30, "no permission for"), (28, "no room to write")])
def test_disk_that_cannot_be_written_is_one_line(place, monkeypatch, number, words):
    "Read-only folders and full disks; the tests may run as root, who may write anywhere, so the error is made."
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(place / "runs"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = turbvit("run", place / "02_train.ipynb", config(place, "mistake"))
    last = result.output.strip().splitlines()[-1]
    assert result.exit_code == 1 and last.startswith(f"error: {words} {place / 'runs'}") and "Traceback" not in result.output
    assert not (place / "runs" / "mistake").exists()
    monkeypatch.setitem(sys.modules, "turbvit_nb.explore", fake := ModuleType("explore"))
    fake.explore = refuse
    one_line(turbvit("explore", place), words, str(place / "runs"))


def test_runs_are_found_where_the_environment_says(place, tmp_path, monkeypatch):
    "Also by somebody who stands in a folder that has a run of the same name."
    for folder in (tmp_path / "here", tmp_path / "elsewhere"):
        (folder / "runs" / "ref").mkdir(parents=True)
        (folder / "runs" / "ref" / "config.toml").write_text("seed = 1\n")
    (tmp_path / "here" / "runs" / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TURBVIT_RUNS", str(tmp_path / "elsewhere" / "runs"))
    assert find_config("runs/ref") == find_config("ref") == tmp_path / "elsewhere" / "runs" / "ref"
    line = one_line(turbvit("status", "runs/nope"), f"TURBVIT_RUNS = {tmp_path / 'elsewhere' / 'runs'}")
    assert "nearest" not in line
    one_line(turbvit("status", "runs/other"), "no config or run folder")
    one_line(turbvit("resume", "runs/rf"), "the nearest is runs/ref")
    monkeypatch.delenv("TURBVIT_RUNS")
    assert find_config("runs/ref") == tmp_path / "here" / "runs" / "ref"


def test_commands_of_other_modules_are_wired(monkeypatch, tmp_path):
    "`check`, `inspect` and `import` print what `examine` and `importers` find."
    from turbvit_nb.inspection import Examination

    examine, importers, seen = ModuleType("examine"), ModuleType("importers"), []
    facts = [("train_dataset", "frames", "30"), ("train_dataset", "grid", "16²"), ("model", "parameters", "9,000")]
    told = [Examination("my", facts, ["12 GB will not fit"], ok) for ok in (True, False)]
    examine.check_config = lambda path, overrides: (seen.append((path, overrides)), told.pop(0))[1]
    examine.inspect_path = lambda path, full: Examination("best", [("checkpoint", "role", f"pruned [x] {full}")])
    importers.import_frames = lambda source, target, regime, **how: seen.append((str(source), regime, how["variable"])) or []
    monkeypatch.setitem(sys.modules, "turbvit_nb.examine", examine)
    monkeypatch.setitem(sys.modules, "turbvit_nb.physics.importers", importers)
    result = turbvit("check", "my.toml", "-s", "seed=3")
    assert result.exit_code == 0 and "9,000" in result.output and "note: 12 GB will not fit" in result.output
    result = turbvit("check", "my.toml")
    assert result.exit_code == 1 and "mistake: 12 GB will not fit" in result.output
    assert "pruned [x] True" in turbvit("inspect", "best.tar", "--full").output
    assert turbvit("import", "a.npz", "b.h5", "-f", "Re=1000", "--variable", "omega").exit_code == 0
    assert seen == [("my.toml", ["seed=3"]), ("my.toml", []), ("a.npz", {"Re": 1000}, "omega")]


def test_check_and_inspect_look_at_real_files(place):
    "Nothing is run, and nothing is left behind."
    before = sorted(place.rglob("*"))
    result = turbvit("check", config(place, "looked_at"))
    assert result.exit_code == 0 and "samples" in result.output and "02_train" in result.output
    result = turbvit("check", config(place, "looked_at"), "--set", "model.patch_size=5")
    assert result.exit_code == 1 and "patch_size" in result.output
    result = turbvit("inspect", place / "flow")
    assert result.exit_code == 0 and "Re200" in result.output and "40 frames" in result.output
    assert [path for path in sorted(place.rglob("*")) if path.suffix != ".toml"] == [path for path in before if path.suffix != ".toml"]


# ----------------------------------------------------------------------------------------------------------------- mistakes in the data
def own_data(place: Path, folder: Path) -> Path:
    "A Py2D tree with the frames of the first trajectory."
    from turbvit_nb.physics.py2d import TreeWriter, find_runs, open_store

    store = open_store(find_runs(place / "flow")[0])
    writer = TreeWriter(folder, store.regime)
    for n in range(1, 41):
        writer.append(0.1 * n, store.read([n], np.float64)[0])
    return Path(writer.finish())


def on_own_data(place: Path, tree: Path, name: str = "own"):
    "Train on a tree."
    toml = place / f"{name}.toml"
    head, rest = CONFIG.format(name=name, epochs=2).split("[generate]")
    toml.write_text(head + rest[rest.index("[model]"):].replace('"flow"', f'"{tree}"'))
    return turbvit("run", place / "02_train.ipynb", toml)


def test_mistake_in_a_tree_is_named_with_its_path(place, tmp_path):
    tree = own_data(place, tmp_path)
    frame = tree / "data" / "7.mat"
    whole = frame.read_bytes()
    frame.unlink()
    one_line(on_own_data(place, tree), "7.mat", "missing")
    frame.write_bytes(whole[:500])
    result = on_own_data(place, tree)
    assert result.exit_code == 1 and "7.mat" in result.output.splitlines()[-1] and "Traceback" not in result.output
    assert (place / "runs/own/02_train.failed.ipynb").exists() and not (place / "runs/own/02_train.ipynb").exists()
    savemat(frame, {"Omega": np.full((16, 16), np.nan), "time": 0.7})
    run = open_run(place / "own.toml", "train", ["output_dir=nans"])  # the same job without its kernel
    with pytest.raises(ValueError, match="7.mat") as error:
        train(run)
    run.close()
    assert is_users(error.value)
    frame.write_bytes(whole)
    odd = tree.rename(tree.with_name("run_one"))
    one_line(on_own_data(place, odd, "odd"), "run_one", "name does not say which flow")


# ------------------------------------------------------------------------------------------------------------- mistakes in checkpoints
class Harmful:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch '{self.trace}'",))


def test_checkpoint_that_is_no_checkpoint_is_one_line(place, tmp_path):
    torch.save({"model_state": {}, "extra": Harmful(tmp_path / "was-here")}, tmp_path / "harmful.tar")
    (tmp_path / "short.tar").write_bytes(b"PK\x03\x04")
    torch.save({"model_state": {}}, tmp_path / "empty.tar")
    for name, wanted in (("harmful", "tensors and plain values"), ("short", "short.tar"), ("empty", "empty.tar")):
        line = one_line(turbvit("run", place / "02_train.ipynb", config(place, "mistake"), "--set", f"checkpoint_file={tmp_path / name}.tar"), wanted)
        assert f"{name}.tar" in line
    assert not (tmp_path / "was-here").exists()


# ------------------------------------------------------------------------------------------------------------------------- whole jobs
def wait_for(condition, seconds: float = 600) -> None:
    "Look every tenth of a second."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def epochs(run: Path) -> int:
    "Epochs logged so far."
    return len([row for row in read_metrics(run, stage="train") if "validation_loss" in row]) if run.exists() else 0


@pytest.fixture(scope="module")
def straight(place) -> Path:
    "A run trained without interruption."
    result = turbvit("run", place / "02_train.ipynb", config(place, "straight", epochs=12))
    assert result.exit_code == 0, result.output
    assert "the run" in result.output and "a lesson" not in result.output
    return place / "runs" / "straight"


def test_finished_job_leaves_report_and_sentinel(straight):
    assert stages(straight)["train"]["state"] == "done"
    assert (straight / "02_train.ipynb").exists() and not list(straight.glob(".*.ipynb"))
    page = (straight / "02_train.html").read_text()
    assert "the run" in page and "<script" not in page and "http" not in page


def test_report_leads_with_the_run_and_says_what_made_it(straight):
    nb = nbformat.read(straight / "02_train.ipynb", 4)
    assert nb.metadata["turbvit"]["code"].startswith("turbvit_nb ") and any("a lesson" in c.source for c in nb.cells)
    page = (straight / "02_train.html").read_text()
    assert page.index("the run") < page.index("a lesson") and nb.metadata["turbvit"]["code"] in page
    assert stages(straight)["train"]["code"] == nb.metadata["turbvit"]["code"] and stages(straight)["train"]["threads"] >= 1


def test_existing_run_is_not_overwritten(place, straight):
    before = (straight / "status.json").read_bytes()
    one_line(turbvit("run", place / "02_train.ipynb", place / "straight.toml"), "already holds stage train (done)", f"resume it with turbvit resume {straight}")
    assert (straight / "status.json").read_bytes() == before


def test_checkpoint_of_another_model_is_refused(place, straight):
    toml, best = config(place, "mistake"), straight / "checkpoints/best.tar"
    result = turbvit("run", place / "02_train.ipynb", toml, "--set", f"checkpoint_file={best}", "--set", "model.embed_dim=32")
    one_line(result, "best.tar does not fit the model: embed_dim is 16 there and 32 in [model]")


def test_run_of_another_process_is_left_alone(place, straight):
    lock = Lock(straight)
    line = one_line(turbvit("run", place / "04_inference.ipynb", straight), "is being written by process")
    assert str(os.getpid()) in line
    lock.release()


def test_killed_and_stopped_job_resumes_to_the_same_bits(place, straight):
    chapter, run = place / "02_train.ipynb", place / "runs" / "broken"
    job = start("run", chapter, config(place, "broken", epochs=12))
    wait_for(lambda: epochs(run) >= 2)
    os.kill(stages(run)["train"]["process"], signal.SIGKILL)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 138 and "the kernel was killed" in err and "turbvit resume" in out
    assert stages(run)["train"]["state"] == "killed" and not (run / "02_train.ipynb").exists()

    before = epochs(run)
    job = start("run", chapter, run)
    wait_for(lambda: epochs(run) > before)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 130 and "was stopped" in err and "turbvit resume" in out and "Traceback" not in out + err
    assert stages(run)["train"]["state"] == "stopped" and not (run / "02_train.ipynb").exists()

    result = turbvit("run", chapter, run)
    assert result.exit_code == 0, result.output
    ours, theirs = (read_checkpoint(folder / "checkpoints/last.tar")["model_state"] for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert epochs(run) == epochs(straight) == 12


def test_job_that_ran_out_of_time_says_so_with_75(place):
    result = turbvit("run", place / "02_train.ipynb", config(place, "late"), "--set", "training.max_hours=1e-9")
    assert result.exit_code == 75 and "turbvit resume" in result.output and "stopped by" in result.output, result.output
    assert stages(place / "runs/late")["train"]["state"] == "stopped"


def test_job_killed_in_its_lesson_is_begun_again(place, straight, monkeypatch):
    "Its run was not opened yet: nothing but the hidden notebook tells of it."
    lesson = f"import time\nfrom pathlib import Path\ntime.sleep(60 * (not Path({str(place / 'awake')!r}).exists()))"
    cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(lesson), nbformat.v4.new_markdown_cell("## Run"),
             nbformat.v4.new_code_cell("from turbvit_nb.lab.runs import open_run\nopen_run(config, 'essay', overrides).finish(seed=3)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), place / "10_essay.ipynb")
    run = shutil.copytree(straight, place / "runs" / "essays")
    job = start("run", place / "10_essay.ipynb", run, "-s", "device=cpu", cwd=place)
    wait_for(lambda: list(run.glob(".10_essay.unfinished.ipynb")) and jobs.at_work(run))
    assert "starting" in turbvit("status", run).output
    one_line(turbvit("run", place / "10_essay.ipynb", run), "is being written by process")
    job.kill()
    job.wait()
    whole = (notebook := run / ".10_essay.unfinished.ipynb").read_text()
    assert re.search(r"essay\s+killed", turbvit("status", run).output)
    notebook.write_text(whole[:100])
    assert "damaged" in turbvit("status", run).output
    writing = Lock(run, name=jobs.JOB_LOCK)  # of a job whose papermill is writing it just now
    assert re.search(r"essay\s+starting", turbvit("status", run).output)
    writing.release()
    notebook.write_text(whole)
    (place / "awake").touch()
    monkeypatch.setattr(jobs, "nbs_dir", lambda: place)
    assert jobs.next_stage(run) == "essay" and jobs.unopened(run)["essay"]["overrides"] == ["device=cpu"]
    result = turbvit("resume", run)
    assert result.exit_code == 0 and stages(run)["essay"]["state"] == "done", result.output


def test_all_stages_of_a_config(place, monkeypatch):
    "In order; what is done is kept; a stage that is made again makes later ones again; the first failure ends it."
    monkeypatch.setattr(jobs, "nbs_dir", lambda: place)
    toml, run = config(place, "whole", epochs=1), place / "runs" / "whole"
    result = turbvit("run", "all", toml)
    assert result.exit_code == 0, result.output
    assert [stages(run)[name]["state"] for name in ("train", "inference")] == ["done", "done"]
    assert result.output.index("02_train in") < result.output.index("04_inference in")
    again = turbvit("run", "all", toml)
    assert again.exit_code == 0 and again.output.split() == ["02_train", "done", "04_inference", "done"]

    file = run / "status.json"
    status = json.loads(file.read_text())
    status["stages"]["train"]["changed"] = "2999-01-01T00:00:00.000+00:00"
    file.write_text(json.dumps(status))
    assert "done, but train was made again since" in turbvit("status", run).output
    result = turbvit("run", "all", toml, "-s", 'inference.checkpoints=["nope"]')
    assert result.exit_code == 1 and "04_inference" in result.output and "to do again: train is newer" in result.output


def test_terminal_gets_a_bar_and_a_pipe_gets_lines(place):
    "The bar redraws itself in the terminal of whoever started the job; the report keeps nothing of it."
    cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_markdown_cell("## Run"),
             nbformat.v4.new_code_cell("import time\nfrom turbvit_nb.lab.progress import progress\nfor i in progress(range(9), desc='steps', every=0.3): "
                                       "time.sleep(0.3)\nprint('so ' * 60)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), place / "11_steps.ipynb")
    env = os.environ | {"TURBVIT_PROGRESS": "", "COLUMNS": "80", "TERM": "xterm"}
    job = start("run", place / "11_steps.ipynb", config(place, "piped"), env=env)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and re.search(r"^steps \d/9, ", out, re.M) and "\r" not in out

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words = [*PROGRAM, "run", str(place / "11_steps.ipynb"), str(config(place, "shown"))]
    job, said = subprocess.Popen(words, stdout=theirs, stderr=theirs, env=env), b""
    os.close(theirs)
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert job.wait() == 0, said.decode()
    text = said.decode()
    assert re.search(r"\rsteps: .*\d/9", text) and "\x1e" not in text
    assert max(len(line) for line in text.replace("\r", "\n").splitlines() if line.startswith("so ")) <= 80
    report = (place / "runs" / "shown" / "11_steps.ipynb").read_text()
    assert "so so" in report and "x1e" not in report and "u001e" not in report and "steps " not in report


def test_sigterm_ends_a_job_with_143(place):
    cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_markdown_cell("## Run"), nbformat.v4.new_code_cell("import time\nprint('asleep', flush=True)\ntime.sleep(60)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), place / "09_sleep.ipynb")
    job = start("run", place / "09_sleep.ipynb", config(place, "asleep"))
    while "asleep" not in job.stdout.readline().split():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 143 and "terminated" in err


def test_full_disk_is_one_line_and_loses_nothing(place, straight):
    best = (straight / "checkpoints/best.tar").read_bytes()
    toml = config(place, "full", epochs=2)
    command = f"ulimit -f 40; exec {' '.join(PROGRAM)} run {place / '02_train.ipynb'} {toml} --set model.embed_dim=64"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "no room to write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    run = place / "runs" / "full"
    assert stages(run)["train"]["state"] == "failed" and not list(run.rglob("*.part*"))
    assert (straight / "checkpoints/best.tar").read_bytes() == best


@pytest.fixture(scope="module")
def rolled(place, straight) -> Path:
    "The run trained without interruption, rolled out."
    result = turbvit("run", place / "04_inference.ipynb", straight)
    assert result.exit_code == 0, result.output
    return straight


def test_rollouts_resume_to_the_same_bits(rolled):
    from turbvit_nb.climate.rollouts import open_rollouts

    whole = [r.read() for r in open_rollouts(rolled)["best"]]
    assert len(whole) == 2 and whole[0].shape == (12, 2, 16, 16)
    restart = rolled / "inference/best/restart.npz"
    kept = dict(np.load(restart))
    # as if killed after the first chunk
    from turbvit_nb.inference import infer

    for chunk in (rolled / "inference/best").glob("*/6.npy"):
        chunk.unlink()
    first = {"x": np.stack([r.read([5]).swapaxes(0, 1) for r in open_rollouts(rolled)["best"]]), "step": 5}
    np.savez(restart, **(kept | first))
    run = open_run(rolled, "inference")
    again = infer(run)["best"]
    run.finish()
    assert all(np.array_equal(a.read(), b) for a, b in zip(again, whole))


def test_status_and_gif(place, rolled):
    result = turbvit("status")
    assert result.exit_code == 0 and "straight" in result.output and "done" in result.output
    result = turbvit("gif", rolled, "-o", place / "moving.mp4", "--error")
    assert result.exit_code == 0 and (place / "moving.mp4").stat().st_size < 3_000_000, result.output


def test_one_damaged_status_hides_no_other_run(place, straight):
    (place / "runs" / "torn").mkdir()
    (place / "runs" / "torn" / "status.json").write_text("")
    result = turbvit("status")
    assert result.exit_code == 0 and "straight" in result.output and re.search(r"torn\s+damaged", result.output)
    shutil.rmtree(place / "runs" / "torn")


NOT_COMPARED = ("unet 04_inference", "control 04_inference", "unet 06_long_analysis", "control 06_long_analysis")


@pytest.mark.parametrize("left_out", [NOT_COMPARED, pytest.param((), marks=pytest.mark.soak)], ids=["most", "all"])
def test_demo_from_data_to_table(place, monkeypatch, left_out):
    "Every chapter once, and all that the last one must have; the rollouts of two of the runs take long, and are left to the soak."
    for job in left_out:
        monkeypatch.delitem(DEMO, job)
    result = turbvit("demo", "--smoke")
    assert result.exit_code == 0, result.output
    run = place / "runs" / "demo_smoke"
    for name in ("02_train", "03_prune", "04_inference", "05_short_analysis", "06_long_analysis", "07_compare"):
        assert (run / f"{name}.ipynb").exists() and (run / f"{name}.html").exists() and str(run / f"{name}.html") in result.output
    assert all(entry["state"] == "done" for entry in stages(run).values())
    assert all(0 < (run / name).stat().st_size < 3_000_000 for name in ("demo.gif", "demo.mp4"))
    for name in ("ViT, dense", "ViT, 50 % of the weights", "UNet, dense", "persistence"):
        assert name in result.output
    again = turbvit("demo", "--smoke")
    assert again.exit_code == 0 and "done in" not in again.output and again.output.count("done before") == len(DEMO) + 2
