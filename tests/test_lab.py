"""Runs and learners as processes: crashes, full disks, signals, two writers, joining, resuming."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from turbvit_nb.lab import config as lab_config
from turbvit_nb.lab import runs
from turbvit_nb.lab.config import LabError, Section, load_config
from turbvit_nb.lab.files import atomic, read_checkpoint
from turbvit_nb.lab.runs import open_run, read_metrics, stages
from turbvit_nb.train import train


class Net(Section):
    depth: int = 4
    width: int


class Fit(Section):
    epochs: int = 10
    lr: float = 0.1


@pytest.fixture
def sections(monkeypatch):
    "Two sections of our own in place of the chapters'."
    points = {"model": SimpleNamespace(load=lambda: Net), "training": SimpleNamespace(load=lambda: Fit)}
    monkeypatch.setattr(lab_config, "schemas", lambda: points)


@pytest.fixture
def home(place):
    "A folder of runs of its own, and no run left open."
    return place


def python(code: str, *arguments: str, **kwargs) -> subprocess.Popen:
    "A Python process that runs `code`."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes | kwargs)


def until(condition, seconds: float = 30.0) -> None:
    "Wait for `condition()`."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# Config


def test_every_mistake_is_one_line(sections, home):
    file = home / "my.toml"
    for text, line in [
        ("[model]\nwidth = 3\ndepht = 4", "model.depht is not a key; did you mean model.depth?"),
        ('[model]\nwidth = "3"', 'model.width = "3": must be a valid integer'),
        ("[model]\ndepth = 3", "model.width is missing"),
        ("[modle]\nwidth = 3", "[modle] is not a section; did you mean [model]?"),
        ("model = 3", "model must be a section: write [model]"),
        ("[training]\nepochs = true", "training.epochs = true: must be a valid integer"),
        ("[training]\nepochs = 3 4", "is not valid TOML: Expected newline or end of document after a statement (at line 2"),
    ]:
        file.write_text(text)
        with pytest.raises(LabError) as error:
            load_config(file)
        assert line in str(error.value) and "\n" not in str(error.value)
    file.write_text("[training]\n")
    with pytest.raises(LabError, match=r"my.toml needs a \[model\] section"):
        load_config(file).section("model")
    with pytest.raises(LabError, match="no config you.toml; the nearest is .*my.toml"):
        load_config("you.toml")


def test_resolved_copy_round_trips(sections, home):
    (home / "my.toml").write_text("seed = 4\n[model]\nwidth = 3\n[training]\nlr = 1\n")
    config = load_config("my.toml", ["training.epochs=3", "output_dir=runs/a"])
    (home / "copy.toml").write_text(config.to_toml())
    again = load_config("copy.toml")
    assert again.to_dict() == config.to_dict()
    assert again.section("training") == Fit(epochs=3, lr=1.0) and again.section("model") == Net(width=3)


def test_the_registry_names_sections():
    "Every class it names is there and is a section; a section of another package joins them, one of ours is not replaced."
    for name in lab_config.registry()["sections"]:
        assert issubclass(lab_config.schema(name), Section), name
    known = lab_config.registry()["stages"]
    assert all(set(stage["after"]) <= set(known) and stage["section"] in lab_config.schemas() for stage in known.values())


def test_sections_of_other_packages(monkeypatch):
    other = [EntryPoint("essay", "essays:Essay", "turbvit.sections"), EntryPoint("model", "essays:Model", "turbvit.sections"),
             EntryPoint("old", "turbvit_nb.old:OldConfig", "turbvit.sections")]  # of an installation before a pull
    monkeypatch.setattr(lab_config, "entry_points", lambda group: other)
    found = lab_config.schemas.__wrapped__()
    assert found["essay"].value == "essays:Essay" and found["model"].value == "turbvit_nb.model:ModelConfig" and "old" not in found


class Flow(Section):
    file: str
    looks: ClassVar[list] = []

    def check(self, config, name):
        self.looks.append((name, config.has("training")))
        if not Path(self.file).exists():
            raise LabError(f"{name}.file = {self.file} is not there")


def test_sections_are_checked_once_and_before_a_folder(home, monkeypatch):
    "By `open_run`, as plain papermill and notebooks use it; the kernel of a job that was planned does not look again."
    points = {"flow": SimpleNamespace(load=lambda: Flow), "training": SimpleNamespace(load=lambda: Fit)}
    monkeypatch.setattr(lab_config, "schemas", lambda: points)
    monkeypatch.setattr(Flow, "looks", [])
    (home / "a.toml").write_text('output_dir = "a"\n[flow]\nfile = "x.h5"\n[training]\n')
    with pytest.raises(LabError, match="flow.file = x.h5 is not there"):
        open_run("a.toml", "train")
    assert Flow.looks == [("flow", True)] and not (home / "runs").exists()
    (home / "x.h5").touch()
    open_run("a.toml", "train").close()
    assert len(Flow.looks) == 2
    monkeypatch.setenv("TURBVIT_JOB", str(home / "runs" / "a"))
    open_run("a.toml", "train").close()
    assert len(Flow.looks) == 2


def test_byte_order_mark(sections, home):
    (home / "windows.toml").write_text("seed = 4\r\n[model]\r\nwidth = 3\r\n", encoding="utf-8-sig")
    assert load_config("windows.toml").top.seed == 4


# Joining


def test_a_stage_joins_and_history_stays(sections, home):
    (home / "train.toml").write_text('output_dir = "runs/a"\n[model]\nwidth = 3\n[training]\nlr = 0.5\n')
    run = open_run("train.toml", "train")
    run.config.section("model")
    run.finish()
    prune = home / "prune.toml"
    prune.write_text('output_dir = "runs/a"\n[model]\nwidth = 3\ndepth = 5\n')
    with pytest.raises(LabError, match=r"model.depth = 5, but stage train of .*runs/a used 4"):
        open_run(prune, "prune")
    prune.write_text('output_dir = "a"\n[model]\nwidth = 3\n[training]\nlr = 0.7\n')  # nobody used [training] yet
    joined = open_run(prune, "prune")
    assert joined.config.section("model").depth == 4 and joined.config.section("training").lr == 0.7
    assert load_config(home / "runs" / "a").section("training").lr == 0.7
    joined.finish()
    assert {name: entry["state"] for name, entry in stages(joined.path).items()} == {"train": "done", "prune": "done"}


def test_a_stage_that_wrote_nothing_may_begin_again(sections, home):
    file = home / "train.toml"
    file.write_text('output_dir = "runs/a"\n[model]\nwidth = 3\n[training]\nlr = 0.5\n')
    run = open_run(file, "train")
    run.config.section("model")
    run.interrupted(LabError("no data folder"))
    run.close()
    assert stages(run.path)["train"]["state"] == "failed"
    file.write_text('output_dir = "runs/a"\n[model]\nwidth = 7\n')
    run = open_run(file, "train")
    assert run.config.section("model").width == 7 and not run.config.has("training")
    with atomic(run.path / "inference" / "1.npy") as part:
        part.write_text("something")
    run.interrupted(LabError("the disk is full"))
    run.close()
    with pytest.raises(LabError, match=r"already holds stage train \(failed\); resume it with config="):
        open_run(file, "train")


def test_a_bad_config_leaves_no_folder(sections, home):
    (home / "train.toml").write_text('output_dir = "runs/a"\ndevice = "gpu"\n')
    with pytest.raises(LabError, match="is none of"):
        open_run("train.toml", "train")
    assert not (home / "runs").exists()


def test_scratch_runs_do_not_meet(sections, home):
    (home / "smoke.toml").write_text("[model]\nwidth = 3\n")
    one, two = open_run("smoke.toml", "train"), open_run("smoke.toml", "train")
    assert one.scratch and two.scratch and one.path != two.path


# Whose checkpoints


def test_a_run_does_not_take_up_another_runs_checkpoints(home):
    for name in ("one", "two"):
        (home / f"{name}.toml").write_text(f'output_dir = "{name}"\ncheckpoint_dir = "shared"\n')
    run = open_run("one.toml", "train")
    run.save("last", {"w": torch.zeros(1)})
    state = run.load("last")
    run.finish()
    assert (state["run_id"], state["run_name"]) == (run.id, "one") and len(run.id) == 12
    with pytest.raises(LabError, match="checkpoint_dir = .*shared holds last.tar of the run one; give each run"):
        open_run("two.toml", "train")
    assert not (home / "runs" / "two").exists()
    again = open_run(home / "runs" / "one", "train")
    assert again.id == run.id
    again.close()
    open_run("two.toml", "inference").close()  # to use them is no harm


def test_older_checkpoints_of_a_shared_folder(home):
    "They do not say whose they are: a run that has begun may go on with them, another may not."
    (home / "one.toml").write_text('output_dir = "one"\ncheckpoint_dir = "shared"\n')
    open_run("one.toml", "train").close()
    runs.write_checkpoint(home / "runs" / "shared" / "last.tar", {"w": torch.zeros(1)})
    open_run(home / "runs" / "one", "train").close()
    with pytest.raises(LabError, match="holds last.tar of an earlier run"):
        open_run("one.toml", "train", ["output_dir=two"])


def test_what_is_made_again_makes_the_later_stages_stale(home):
    "Only where something was made: a stage that is done and is looked at again changes nothing."
    (home / "a.toml").write_text('output_dir = "a"\n')
    folder = home / "runs" / "a"
    stale = lambda: {name: entry["stale"] for name, entry in stages(folder).items() if "stale" in entry}
    for stage in ("train", "inference", "long_analysis"):
        run = open_run("a.toml", stage)
        with atomic(run.path / f"{stage}.npy") as part:
            part.write_text("something")
        run.finish()
        time.sleep(0.02)
    assert stale() == {}
    open_run(folder, "train").finish()
    assert stale() == {}
    run = open_run(folder, "train")
    run.save("best", {"w": torch.zeros(1)})
    run.finish()
    assert stale() == {"inference": "train", "long_analysis": "train"}


def test_a_damaged_status_is_one_line(home):
    (home / "a.toml").write_text('output_dir = "a"\n')
    open_run("a.toml", "train").close()
    (home / "runs" / "a" / "status.json").write_text("")
    with pytest.raises(LabError, match="status.json is damaged .JSONDecodeError.: delete it"):
        open_run(home / "runs" / "a", "train")


THREADS = "import sys\nfrom turbvit_nb.lab.runs import open_run\nrun = open_run(sys.argv[1], 'train')\nrun.log(step=1)"


def test_another_number_of_threads_is_noted(home):
    (home / "a.toml").write_text('output_dir = "a"\n')
    loud = os.environ | {"TURBVIT_PROGRESS": ""}
    first, _ = python(THREADS, "a.toml", env=loud | {"OMP_NUM_THREADS": "2"}).communicate()
    second, _ = python(THREADS, "runs/a", env=loud | {"OMP_NUM_THREADS": "1"}).communicate()
    assert first == "" and second == (
        "train was begun with 2 threads of torch and goes on with 1: set threads = 2 to get the same bits as without the stop\n")
    (home / "runs" / "a" / "config.toml").write_text("threads = 2\n")
    third, _ = python(THREADS, "runs/a", env=loud | {"OMP_NUM_THREADS": "1"}).communicate()
    assert third == ""


# Two writers


HOLD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
from turbvit_nb.lab.runs import open_run
run = open_run(sys.argv[1], "train")
run.log(step=1)
print("open", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


def test_one_writer_at_a_time(home):
    (home / "a.toml").write_text('output_dir = "a"\n')
    holder = python(HOLD, "a.toml")
    assert holder.stdout.readline() == "open\n"
    folder = home / "runs" / "a"
    assert stages(folder)["train"]["state"] == "running"
    with pytest.raises(LabError, match=f"is being written by process {holder.pid} on "):
        open_run(folder, "train")
    holder.kill()
    holder.wait()
    assert stages(folder)["train"]["state"] == "killed"
    open_run(folder, "train").finish()
    assert stages(folder)["train"]["state"] == "done"


def test_looking_does_not_lock(home):
    (home / "a.toml").write_text('output_dir = "a"\n')
    open_run("a.toml", "train").finish()
    look = "import sys\nfrom turbvit_nb.lab.files import locked\nfrom pathlib import Path\nwhile True: locked(Path(sys.argv[1]))"
    looker = python(look, str(home / "runs" / "a"))
    time.sleep(1.0)
    for _ in range(20):
        open_run(home / "runs" / "a", "train").close()
    looker.kill()
    looker.wait()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_stop(home, number):
    (home / "a.toml").write_text('output_dir = "a"\n')
    holder = python(HOLD, "a.toml")
    holder.stdout.readline()
    time.sleep(0.1)
    holder.send_signal(number)
    _, errors = holder.communicate(timeout=30)
    assert holder.returncode != 0
    assert stages(home / "runs" / "a")["train"]["state"] == "stopped"
    if number == signal.SIGTERM:
        assert errors == f"Stopped: stopped by SIGTERM; resume with config={home / 'runs' / 'a'}\n"


def test_an_error_is_a_failure_and_one_line(home):
    (home / "a.toml").write_text('output_dir = "a"\n')
    code = "from turbvit_nb.lab.runs import *\nrun = open_run('a.toml', 'train')\nrun.start_checkpoint()"
    failed = python(code)
    _, errors = failed.communicate()
    assert failed.returncode == 1 and errors.startswith("LabError: ") and errors.count("\n") == 1
    entry = stages(home / "runs" / "a")["train"]
    assert entry["state"] == "failed" and "has no checkpoints/best.tar" in entry["error"]


MISTAKES = {
    "run.start_checkpoint()": "LabError: ",
    "from turbvit_nb.physics.py2d import open_store\nopen_store('nowhere')": "StoreError: ",
}


@pytest.mark.parametrize("cell", MISTAKES)
def test_a_notebook_shows_one_line(home, cell):
    (home / "a.toml").write_text('output_dir = "a"\n')
    cells = ["from turbvit_nb.lab.runs import open_run", "run = open_run('a.toml', 'train')", cell]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with pytest.raises(CellExecutionError) as error:
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(home)}}).execute()
    (output,) = notebook.cells[2].outputs
    assert len(output.traceback) == 1 and output.traceback[0].startswith(MISTAKES[cell]) and "Traceback" not in str(error.value)
    assert stages(home / "runs" / "a")["train"]["state"] == "failed"


# Files


SAVE = """
import sys, torch
from turbvit_nb.lab.runs import open_run
run = open_run("a.toml" if sys.argv[1] == "new" else "runs/a", "train")
print("open", flush=True)
for step in range(10**6):
    run.save("last", {"step": step, "w": torch.full((300_000,), float(step))})
"""


def test_killed_while_saving(home):
    "At whatever moment the process dies, the checkpoint is one of those that were saved."
    (home / "a.toml").write_text('output_dir = "a"\n')
    random.seed(0)
    for attempt in range(3):
        writer = python(SAVE, "old" if attempt else "new")
        writer.stdout.readline()
        until(lambda: (home / "runs" / "a" / "checkpoints" / "last.tar").exists())
        time.sleep(random.uniform(0.0, 0.1))
        writer.kill()
        writer.wait()
        state = read_checkpoint(home / "runs" / "a" / "checkpoints" / "last.tar")
        assert (state["w"] == state["step"]).all()
    open_run(home / "runs" / "a", "train").finish()
    assert [p.name for p in (home / "runs" / "a" / "checkpoints").iterdir()] == ["last.tar"]


FULL = """
import resource, sys, torch
from turbvit_nb.lab.runs import open_run
run = open_run("a.toml", "train")
run.save("last", {"w": torch.zeros(1000)})
run.log(step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
if sys.argv[1] == "save":
    run.save("last", {"w": torch.zeros(100_000)})
else:
    for step in range(2, 10**6):
        run.log(step=step)
"""


@pytest.mark.parametrize("what", ["save", "log"])
def test_full_disk(home, what):
    (home / "a.toml").write_text('output_dir = "a"\n')
    writer = python(FULL, what)
    _, errors = writer.communicate()
    folder = home / "runs" / "a"
    assert writer.returncode == 1 and errors.count("\n") == 1 and "no room to write" in errors
    assert len(read_checkpoint(folder / "checkpoints" / "last.tar")["w"]) == 1000
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["last.tar"]
    steps = [row["step"] for row in read_metrics(folder)]
    assert steps == list(range(1, len(steps) + 1)) and (what == "save" or len(steps) > 100)
    run = open_run(folder, "train")
    run.log(step=len(steps) + 1)
    assert len(run.metrics()) == len(steps) + 1


def test_a_full_disk_found_out_late(home, monkeypatch):
    "Some file systems tell only when the data is forced to the disk."
    (home / "x.txt").write_text("old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LabError, match="no room to write .*x.txt .*what was there is kept"), atomic(home / "x.txt") as part:
        part.write_text("new")
    assert (home / "x.txt").read_text() == "old" and [p.name for p in home.glob(".*")] == []


# The learner


LEARN = """
import os, signal, sys, torch
from torch import nn
from turbvit_nb.lab.learner import *
from turbvit_nb.lab.runs import open_run

torch.manual_seed(0)
x = torch.randn(64, 3)
y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(64)


class Rows:
    def __len__(self): return 8
    def epoch(self, epoch, skip=0):
        for rows in torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(8)[skip:]:
            yield {"x": x[rows], "y": y[rows]}


class Die(Callback):
    def before_step(self, learner):
        if learner.step == int(sys.argv[2]): os.kill(os.getpid(), getattr(signal, sys.argv[3]))


run = open_run(sys.argv[1], "train")
model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))  # dropout draws from the global generator
losses = lambda model, batch: (model(batch["x"]).squeeze(-1) - batch["y"]) ** 2
validate = lambda learner: {"score": losses(learner.model, {"x": x, "y": y}).mean().item()}
learner = Learner(model, losses, Rows(), torch.optim.AdamW(model.parameters(), lr=0.02), [
    Warmup(1.5), Plateau("score", patience=0), EMA(0.9), ClipGradient(1.0), Validate(validate), Log(run.log, run.rewind, every=1),
    Checkpoint(run.save, "score", minutes=0.0), StopOnSignal(), Die()], epochs=6)
if run.has("last"):
    learner.load_state(run.load("last"))
learner.fit()
if learner.stop is None:
    run.finish()
"""


def same(one: Path, other: Path) -> None:
    "Two run folders agree to the last bit in the log (times aside) and in what a resume needs."
    lines = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(each)] for each in (one, other)]
    assert lines[0] == lines[1]
    for name in ("last", "best"):
        ours, theirs = (read_checkpoint(each / "checkpoints" / f"{name}.tar") for each in (one, other))
        for part in (["step"], ["model_state"], ["ema_state"], ["optimizer_state", "state"], ["rng", "torch"], ["callbacks", "Checkpoint"]):
            a, b = ours, theirs
            for key in part:
                a, b = a[key], b[key]
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The folder of a run that nobody disturbed."
    home = tmp_path_factory.mktemp("straight")
    (home / "straight.toml").write_text('output_dir = "straight"\nseed = 5\n')
    process = python(LEARN, "straight.toml", "-1", "-", cwd=home, env=os.environ | {"TURBVIT_RUNS": str(home / "runs")})
    assert process.wait() == 0, process.stderr.read()
    return home / "runs" / "straight"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_in_mid_epoch_and_resumed_to_the_same_bits(home, straight, how):
    (home / "killed.toml").write_text('output_dir = "killed"\nseed = 5\n')
    killed = python(LEARN, "killed.toml", "21", how)
    killed.wait()
    folder = home / "runs" / "killed"
    assert stages(folder)["train"]["state"] == {"SIGKILL": "killed"}.get(how, "stopped")
    resumed = python(LEARN, "runs/killed", "-1", how)
    assert resumed.wait() == 0, resumed.stderr.read()

    same(folder, straight)
    assert {name: entry["state"] for name, entry in stages(folder).items()} == {"train": "done"}


# Training


TRAIN = """
import os, signal, sys
import turbvit_nb.train as t
from turbvit_nb.lab.runs import open_run

noise, when = t.InputNoise.before_batch, int(sys.argv[2])


def kill_or_add(self, learner):
    if learner.step == when: os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    noise(self, learner)


t.InputNoise.before_batch = kill_or_add
run = open_run(sys.argv[1], "train", sys.argv[4:])
learner, _ = t.train(run)
run.finish()
"""
KEYS = ["training.epochs=4", "training.batch_size=32", "training.input_noise=0.05", "training.ema=0.9", "training.unroll=3", "training.unroll_start=0.5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The folder of a small training that nobody disturbed, noise, averaging, symmetries and unrolling included."
    home = tmp_path_factory.mktemp("trained")
    process = python(TRAIN, "configs/smoke/train.toml", "-1", "-", *KEYS, "run=straight", env=os.environ | {"TURBVIT_RUNS": str(home)})
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return home / "straight"


@pytest.mark.parametrize("how, step", [("SIGKILL", 13), ("SIGTERM", 9)])  # three batches an epoch: both die within one
def test_training_resumes_to_the_same_bits(home, trained, how, step):
    killed = python(TRAIN, "configs/smoke/train.toml", str(step), how, *KEYS, "run=killed")
    _, errors = killed.communicate()
    folder = home / "runs" / "killed"
    if how == "SIGTERM":
        assert errors.startswith("Stopped: stopped by SIGTERM at epoch 3.33 of 4; resume with config=")
    resumed = python(TRAIN, str(folder), "-1", "-")
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    same(folder, trained)
    assert stages(folder)["train"]["state"] == "done"


def test_a_finished_training_stays_as_it_is(home, trained):
    checkpoint = trained / "checkpoints" / "last.tar"
    before = checkpoint.stat().st_mtime_ns
    run = open_run(trained, "train")
    learner, _ = train(run)
    run.finish()
    assert learner.epoch == 4 and checkpoint.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "override, line",
    [
        ("training.unroll=45", "train_dataset: no range of"),
        ("training.batch_size=500", "train_dataset: batch_size = 500"),
        ("train_dataset.frame_range=[[1, 50]]", "share 9 frames, 41 to 49"),
        ("device=gpu", "is none of"),
        ("model.embed_dim=48", "the checkpoint does not fit the model"),
    ],
)
def test_mistakes_show_before_any_training(home, trained, override, line):
    "The last one on a resume, the others on a new run."
    source = trained if "does not fit" in line else "configs/smoke/train.toml"
    folder = shutil.copytree(trained, home / "copy") if source == trained else source
    with pytest.raises(LabError, match=line):
        train(open_run(folder, "train", [override]))


OLDER = """
output_dir = "{out}"
wandb_id = "abc"
[model]
model_type = "ViT"
img_size = 64
patch_size = 8
num_frames = 2
embed_dim = 32
depth = 1
num_heads = 2
[train_dataset]
data_dir = "{data}"
frame_range = [[1001, 1041], [1051, 1061]]
target_step = 1
input_step = 1
[validation_dataset]
data_dirs = ["{data}"]
frame_range = [[1801, 1831]]
[training]
lr = 0.001
weight_decay = 0.05
warmup_start_factor = 0.01
warmup_epochs = 0.5
plateau_factor = 0.1
plateau_patience = 0
epochs = 3
batch_size = 8
checkpoint_period = 2
early_stop_lr_threshold = 1e-7
"""


def test_an_older_config_trains_on_a_real_tree(home, py2d_data):
    (tree,) = py2d_data.glob("results/Re*/*/NX*/dt*")
    (home / "older.toml").write_text(OLDER.format(out=home / "vit", data=tree))
    run = open_run("older.toml", "train")
    learner, validation = train(run)
    run.finish()
    assert learner.epoch == 3 and validation.steps == 20
    assert {p.stem for p in run.checkpoints.iterdir()} == {"best", "last", "epoch0002"}
    assert run.metrics("train")[-1]["rollout_vrmse"] < 2
