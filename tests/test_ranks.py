"""Several ranks do what one process does: losses, weights, scores, choices; and a rank that dies takes the job down."""
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

import ranked
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import read_metrics, stages

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DROPS = ("dropout", "conditioner")  # what drops units draws other ones on each rank
LONG = (*DROPS, "heads", "matching", "mean", "pictures", "classes", "stale", "importance")  # for the soak
ALIKE = [pytest.param(name, marks=pytest.mark.soak) if name in LONG else name for name in ranked.JOBS if name not in (*DROPS, "other_seed")]


def environment(folder: Path) -> dict[str, str]:
    "Of a process that works in a folder."
    return os.environ | {"TURBVIT_RUNS": str(folder / "runs"), "TURBVIT_DATA": str(folder.parent), "TURBVIT_PROGRESS": "0", "OMP_NUM_THREADS": "1",
                         "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.fixture(scope="module")
def done(request, tmp_path_factory, warm) -> dict[int, Path]:
    "The trainings by one process and by two ranks, side by side: the folder of each."
    home = tmp_path_factory.mktemp("ranks")
    folders = {world: home / f"by_{world}" for world in (1, 2)}
    left_out = {"other_seed"} | (set() if request.config.getoption("--soak") else {*LONG})
    everything = [*(name for name in ranked.JOBS if name not in left_out), "scores"]
    commands = {1: [warm], 2: [*TORCHRUN, "--nproc-per-node", "2"]}
    (home / "warm").mkdir()
    first = [warm, ROOT / "tests" / "ranked.py", home / "warm", "everything", "other_seed"]  # makes the data that all share
    subprocess.run(first, env=environment(home / "warm"), check=True, capture_output=True)
    started = {}
    for world, folder in folders.items():
        folder.mkdir()
        words = [*commands[world], ROOT / "tests" / "ranked.py", folder, *everything]
        started[world] = subprocess.Popen(words, env=environment(folder) | {"PYTHON_EXEC": warm}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = {world: process.communicate()[0] for world, process in started.items()}
    for world, process in started.items():
        assert process.returncode == 0, said[world][-4000:]
    return folders


def tensors(state: object) -> list[torch.Tensor]:
    "The numbers of a checkpoint, in order."
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


def off(a: object, b: object) -> float:
    "The norm of the difference between two states, over that of the first."
    one, two = (torch.cat([tensor.double().flatten() for tensor in tensors(state)]) for state in (a, b))
    return ((one - two).norm() / one.norm()).item()


def last_metrics(folder: Path) -> dict[str, float]:
    "The metrics of a run's last epoch."
    row = [row for row in read_metrics(folder) if "loss" in row][-1]
    return {name: value for name, value in row.items() if isinstance(value, float) and "seconds" not in name and "joules" not in name}


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_do_what_one_process_does(done, name):
    "To rounding: a sum of two sums is not the sum. Adam makes much of little where a gradient is zero but for rounding, hence the tolerance."
    one, two = (done[world] / "runs" / name for world in (1, 2))
    files = sorted(path.stem for path in (one / "checkpoints").glob("*.tar"))
    assert files and files == sorted(path.stem for path in (two / "checkpoints").glob("*.tar"))
    for file in files:
        a, b = (read_checkpoint(folder / "checkpoints" / f"{file}.tar") for folder in (one, two))
        assert off(a["model_state"], b["model_state"]) < 1e-3, file
        assert [a[key] for key in ("epoch", "step", "updates") if key in a] == [b[key] for key in ("epoch", "step", "updates") if key in b]
    a, b = map(last_metrics, (one, two))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key


def test_another_seed_is_told_apart(done):
    "The tolerance above is less than a hundredth of what another order of the samples makes."
    one = done[1] / "runs" / "everything" / "checkpoints" / "last.tar"
    other = done[1].parent / "warm" / "runs" / "other_seed" / "checkpoints" / "last.tar"
    assert off(*(read_checkpoint(path)["model_state"] for path in (one, other))) > 0.1


def test_scores_are_sums_over_the_ranks(done):
    "In double precision: the same to ten digits, and the same weights are kept."
    one, two = (read_checkpoint(done[world] / "runs" / "scores" / "checkpoints" / "scores.tar") for world in (1, 2))
    for name in (*ranked.SCORED, "grams"):
        assert off(one[name], two[name]) < 1e-10, name
    assert {name: one[name] for name in one if "hash" in name} == {name: two[name] for name in two if "hash" in name}


@pytest.mark.soak
def test_what_drops_units_trains_all_the_same(done):
    "Each rank drops units of its own, so the numbers are other ones; the loss is not far off."
    for name in DROPS:
        one, two = (last_metrics(done[world] / "runs" / name)["loss"] for world in (1, 2))
        assert one != two and two == pytest.approx(one, rel=0.1)


STOPS = {  # ranks and stage of ranked.py before the stop, ranks and stage after it
    "two ranks, then one": ((2, "stops"), (1, "goes_on")),
    "two ranks that share the weights, then one": ((2, "stops_spread"), (1, "goes_on")),
    "one, then two ranks that share the weights": ((1, "stops"), (2, "goes_on_spread")),
    "two ranks, then two that share the weights": ((2, "stops"), (2, "goes_on_spread")),
}


@pytest.mark.parametrize("who", [pytest.param(name, marks=pytest.mark.soak) if name.endswith("two that share the weights") else name for name in STOPS])
def test_a_stop_of_one_rank_is_everybodys(done, tmp_path, who, warm):
    "The job ends in good order, and goes on with other ranks as if nothing had been: the same samples in the same order."
    folder = tmp_path / "by_2"
    folder.mkdir()
    (tmp_path / "warm").symlink_to(done[1].parent / "warm")
    env = environment(folder) | {"TURBVIT_DATA": str(done[1].parent), "PYTHON_EXEC": warm}
    by = lambda world: [*TORCHRUN, "--nproc-per-node", str(world)] if world > 1 else [warm]
    first, second = ([*by(world), ROOT / "tests" / "ranked.py", folder, name] for world, name in STOPS[who])
    ended = subprocess.run(first, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    run = folder / "runs" / "disturbed"
    left = read_checkpoint(run / "checkpoints" / "last.tar")
    assert stages(run)["train"]["state"] == "stopped", ended.stderr
    assert (left["epoch"], left["batch_index"]) == (1, 4)  # at the end of a step of the optimizer
    ended = subprocess.run(second, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    a, b = (read_checkpoint(path / "checkpoints" / "last.tar") for path in (run, done[1] / "runs" / "everything"))
    assert off(a["model_state"], b["model_state"]) < 1e-3 and off(a["ema_state"], b["ema_state"]) < 1e-3
    assert off(a["optimizer_state"], b["optimizer_state"]) < 1e-2
    assert a["step"] == b["step"] and [row["step"] for row in read_metrics(run)] == [row["step"] for row in read_metrics(done[1] / "runs" / "everything")]


def test_spread_weights_are_stored_as_any_others(done):
    "The checkpoints of two ranks that share the weights hold what those of one process do, whole."
    for file in ("best", "last"):
        one, two = (read_checkpoint(done[world] / "runs" / "spread" / "checkpoints" / f"{file}.tar") for world in (1, 2))
        assert {name: (value.shape, value.dtype) for name, value in one["model_state"].items()} == {name: (value.shape, value.dtype) for name, value in two["model_state"].items()}
        assert off(one["ema_state"], two["ema_state"]) < 1e-3
        moments = [checkpoint["optimizer_state"]["state"] for checkpoint in (one, two)]
        assert moments[0].keys() == moments[1].keys() and off(*moments) < 1e-2
        assert all(a[key].shape == b[key].shape for a, b in zip(*(state.values() for state in moments)) for key in a)


CHAPTER = """from turbvit_nb.lab.learner import Callback
from turbvit_nb.lab.ranks import ranks
from turbvit_nb.train import train


class Slow(Callback):
    "Time for a test to do something meanwhile."

    def after_batch(self, learner):
        print(f"rank {ranks().rank} step {learner.step}", flush=True)
        if slow:
            time.sleep(0.25)


run = open_run(config, "train", overrides)
train(run, [Slow()])
run.finish()"""


@pytest.fixture(scope="module")
def chapter(tmp_path_factory, done) -> Path:
    "A chapter that trains, in a folder where it can be run."
    folder = tmp_path_factory.mktemp("chapter")
    cells = [nbformat.v4.new_code_cell('config: str = ""\noverrides: list = []\nslow: bool = False', metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("import time\nfrom turbvit_nb.lab.runs import open_run"), nbformat.v4.new_markdown_cell("## Run"), nbformat.v4.new_code_cell(CHAPTER)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "02_train.ipynb")
    return folder


def turbvit(chapter: Path, done: dict, name: str, *more: str, by: tuple[str, ...] = (), start: bool = False):
    "The command, on a training of three epochs; with `start` it is only begun."
    config, changes = ranked.config("everything", done[1])
    words = [*by, sys.executable, "-m", "turbvit_nb.cli", "run", str(chapter / "02_train.ipynb"), str(config)]
    words += [word for change in [f"output_dir={chapter}/runs/{name}", *changes[1:]] for word in ("--set", change)]
    env = environment(chapter) | {"TURBVIT_DATA": str(done[1].parent)}
    pipes = dict(env=env, cwd=chapter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*words, *more], **pipes) if start else subprocess.run([*words, *more], timeout=180, **pipes)


def steps_logged(folder: Path) -> list[int]:
    "The steps of a run's log."
    return [row["step"] for row in read_metrics(folder)]


@pytest.mark.parametrize("way", ["nproc", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_chapter_in_two_processes(chapter, done, way):
    "One report, one log of metrics; what the other rank says is in the run folder."
    by = () if way == "nproc" else (*TORCHRUN, "--nproc-per-node", "2", "--no-python")
    ended = turbvit(chapter, done, way, *(["--nproc", "2"] if way == "nproc" else []), by=by)
    assert ended.returncode == 0, ended.stdout
    folder = chapter / "runs" / way
    assert stages(folder)["train"]["state"] == "done" and (folder / "02_train.html").is_file()
    assert "rank 0 step 18" in ended.stdout and "rank 1" not in ended.stdout
    assert [path.name for path in (folder / "ranks").iterdir()] == ["02_train.rank1.log"]
    said = (folder / "ranks" / "02_train.rank1.log").read_text()
    assert "rank 1 step 18" in said and "rank 0" not in said
    a, b = (read_checkpoint(path / "checkpoints" / "last.tar") for path in (folder, done[1] / "runs" / "everything"))
    assert off(a["model_state"], b["model_state"]) < 1e-3 and steps_logged(folder) == steps_logged(done[1] / "runs" / "everything")


def waited_for(path: Path, text: str, process: subprocess.Popen) -> str:
    "What a log holds once it holds `text`."
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and text in (said := path.read_text()):
            return said
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in {path}: {process.communicate()[0] if process.poll() is not None else 'too late'}")


def kernels(process: subprocess.Popen) -> list[psutil.Process]:
    "The kernels below a process."
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(child.cmdline())]


@pytest.mark.parametrize("what", [pytest.param("SIGTERM to the job", marks=pytest.mark.soak), "SIGKILL of a kernel"])
def test_two_processes_that_are_stopped_go_on(chapter, done, what, warm):
    "A stop ends the step and is saved, a kernel that is killed takes the other one with it; both go on, in one process too."
    name = what.split()[0].lower()
    folder, process = chapter / "runs" / name, turbvit(chapter, done, name, "-p", "slow=true", "--nproc", "2", start=True)
    waited_for(folder / "ranks" / "02_train.rank1.log", "step 8", process)
    if name == "sigterm":
        process.terminate()
    else:
        kernels(process)[-1].kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (143 if name == "sigterm" else 138), said
    assert stages(folder)["train"]["state"] == ("stopped" if name == "sigterm" else stages(folder)["train"]["state"]) != "done"
    assert read_checkpoint(folder / "checkpoints" / "last.tar")["step"] >= (8 if name == "sigterm" else 6)
    words = [warm, "-m", "turbvit_nb.cli", "resume", str(folder), str(chapter / "02_train.ipynb")]
    again = subprocess.run(words, env=environment(chapter) | {"TURBVIT_DATA": str(done[1].parent)}, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    a, b = (read_checkpoint(path / "checkpoints" / "last.tar") for path in (folder, done[1] / "runs" / "everything"))
    assert off(a["model_state"], b["model_state"]) < 1e-3 and steps_logged(folder) == steps_logged(done[1] / "runs" / "everything")


def test_mistakes_of_several_ranks_are_one_line(chapter, done):
    ended = turbvit(chapter, done, "uneven", "--set", "training.batch_size=9", "--nproc", "2")
    assert ended.returncode == 1 and "batch_size = 9 cannot be shared evenly by 2 ranks: give a multiple of 2" in ended.stdout
    assert "Traceback" not in ended.stdout
    words = [sys.executable, "-m", "turbvit_nb.cli", "run", "07_compare", str(done[1] / "runs" / "everything"), "--nproc", "2"]
    ended = subprocess.run(words, env=environment(chapter), capture_output=True, text=True)
    assert ended.returncode == 1 and "stage compare is the work of one process" in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
