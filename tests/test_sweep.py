"""A study through the command line: what is refused before anything starts, and that a killed one ends with the same bits."""
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_jobs import config, epochs, one_line, place, start, turbvit, wait_for  # noqa: F401 (place is a fixture)

from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.jobs import JobError
from turbvit_nb.lab.runs import Lock, open_run, stages
from turbvit_nb.lab.sweeping import LOCK, Sweeping, choose, count, look
from turbvit_nb.lab.sweeps import points, read_sweep

STUDY = """
[sweep]
name = "{name}"
part = "dense"
base = "study.toml"
run = "{name}_{{seed}}"
chapters = ["02_train.ipynb"]
jobs = 2
overrides = ["training.epochs=12"]

[sweep.grid]
seed = [3, 4]

[[sweep.also]]
part = "longer"
run = "{name}_longer_{{seed}}"
overrides = ["training.epochs=1", "checkpoint_file={name}_{{seed}}/checkpoints/best.tar"]
grid = {{ seed = [3] }}
"""


def study(place: Path, name: str, *changes: tuple[str, str]) -> Path:
    "A file of a sweep and its base."
    base, path, text = config(place, "study"), place / f"{name}.toml", STUDY.format(name=name)
    base.write_text(base.read_text().replace("seed = 3\n", ""))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------------------------ refused, nothing begun
MISTAKES = {
    "a key that does not exist": ('[3, 4]\n', '[3, 4]\ntraining.lrr = [1e-3]\n', "oops_3: training.lrr is not a key; did you mean training.lr?"),
    "a value that does not fit": ('[3, 4]\n', '[3, 4]\nmodel.patch_size = [5]\n', "oops_3: [model] img_size = 16 is not divisible by patch_size = 5"),
    "one name for two points": ('run = "oops_{seed}"', 'run = "oops_"', "{'seed': 3} and {'seed': 4} are both called oops_; name every key"),
    "a word of the name that is no key": ('run = "oops_{seed}"', 'run = "oops_{lr}"', "{lr} is not a key of the grid; there are sweep, part, seed"),
    "no values": ("[3, 4]", "[]", 'sweep.grid."seed" must be a list of values, and not an empty one'),
    "a base that is not there": ('"study.toml"', '"stdy.toml"', "no config stdy.toml; the nearest is"),
    "a chapter that is not there": ('["02_train.ipynb"]', '["02_trian"]', "no chapter 02_trian; did you mean 02_train?"),
    "a chapter without its section": ('["02_train.ipynb"]', '["02_train.ipynb", "03_prune"]', "oops_3: 03_prune needs a [pruning] section"),
    "a start that nobody makes": ("=oops_{seed}/", "=ops_{seed}/", "oops_longer_3: checkpoint_file = ops_3/checkpoints/best.tar is not there"),
    "a part that is not there": ('part = "longer"', 'part = "longer"\nneeds = "dnse"', "part longer: needs dnse, earlier parts are: dense"),
    "a run that is called like the sweep": ('run = "oops_{seed}"', 'run = "oops"', "a run and the sweep are both called oops"),
    "a key of the sweep": ("jobs = 2", "job = 2", "sweep.job is not a key; did you mean sweep.jobs?"),
    "a key of a part": ('part = "longer"', 'name = "longer"', "sweep.also[0].name is not a key"),
    "tuples of another length": ("seed = [3, 4]", '"seed, device" = [[3]]', "[3] does not give one value for each of seed, device"),
    "the folder of a run": ("training.epochs=12", "output_dir=x", "the folder of a run is named by sweep.run"),
    "no name": ('name = "oops"\n', "", "sweep.name is missing"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_and_nothing_is_begun(place, case):
    old, new, wanted = MISTAKES[case]
    path = study(place, "oops", (old, new))
    one_line(turbvit("sweep", path), wanted)
    assert not list((place / "runs").glob("oops*"))


def test_other_mistakes(place):
    one_line(turbvit("sweep", "nowhere"), "no sweep nowhere")
    one_line(turbvit("sweep", study(place, "picky"), "--only", "nothing*"), "--only nothing* is the name of no run of the sweep")
    (place / "runs" / "busy").mkdir(parents=True)
    lock = Lock(place / "runs" / "busy", name=LOCK)
    assert turbvit("sweep", study(place, "busy"), "--dry-run").exit_code == 0
    result = turbvit("sweep", study(place, "busy"))
    assert result.exit_code == 1 and result.output.strip().splitlines()[-1].startswith(f"error: {place / 'runs' / 'busy'} is being written by process")
    lock.release()


def test_plan_starts_nothing(place):
    result = turbvit("sweep", study(place, "plan"), "--dry-run")
    assert result.exit_code == 0 and len(re.findall(r"to do", result.output)) == 3
    assert "3 runs, 0 done, 3 left, time not known before a first run" in result.output
    assert not list((place / "runs").glob("plan*"))


# ------------------------------------------------------------------------------------------------------------------------ killed, stopped
@pytest.fixture(scope="module")
def killed(place) -> Path:
    "The file of a sweep that was killed while its first run trained."
    path, first = study(place, "night", ("[3, 4]", "[3]")), place / "runs" / "night_3"
    job = start("sweep", path)
    wait_for(lambda: epochs(first) >= 2)
    assert "1 running" in turbvit("status").output
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=180)
    wait_for(lambda: stages(first)["train"]["state"] == "stopped")
    return path


def test_killed_sweep_goes_on_to_the_same_bits(place, killed):
    "Its jobs stop by themselves; begun runs are resumed and a later part starts from an earlier one."
    from turbvit_nb.train import train

    runs, before = place / "runs", epochs(place / "runs" / "night_3")
    assert "0 done" in turbvit("status").output and not (runs / "night_longer_3").exists()
    result = turbvit("sweep", killed)
    assert result.exit_code == 0, result.output
    assert len(re.findall("^started", result.output, re.M)) == 2 and "2 runs, 2 done" in result.output
    assert "based on" in result.output  # the cost, once a run has been through
    straight = open_run(place / "study.toml", "train", ["seed=3", "training.epochs=12", "output_dir=night_straight"])
    train(straight)
    straight.finish()
    ours, theirs = (read_checkpoint(runs / name / "checkpoints/last.tar")["model_state"] for name in ("night_3", "night_straight"))
    assert before < 12 and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert epochs(runs / "night_3") == epochs(runs / "night_straight") == 12

    assert load_config(runs / "night_longer_3").top.checkpoint_file == "night_3/checkpoints/best.tar"
    again = turbvit("sweep", "night")
    assert again.exit_code == 0 and "started" not in again.output and re.search(r"night_longer_3 +done", again.output)
    assert points("night") == [(runs / "night_3", {"seed": 3}), (runs / "night_longer_3", {"seed": 3})]


def test_status_of_a_finished_sweep(place, killed):
    "One line for its runs, which are not listed beside it; in detail by name."
    config(place, "apart")
    open_run(place / "apart.toml", "train").finish()
    every, detail = turbvit("status").output, turbvit("status", "runs/night").output
    assert re.search(r"night \(sweep\): 2 runs", every) and "night_3" not in every and "apart" in every
    assert "night_3" in detail and "02_train" in detail and "night: 2 runs" in detail


def test_changed_settings_and_points(place, killed):
    "Runs that are there keep their settings; new points are run, vanished ones are named and left alone."
    other = study(place, "night", ("[3, 4]", "[3]"), ("training.epochs=12", "training.epochs=13"))
    one_line(turbvit("sweep", other), "night_3: training.epochs = 13, but stage train of", "used 12")
    grown = study(place, "night", ("seed = [3, 4]", "seed = [5]"), ("grid = { seed = [3] }", "grid = { seed = [5] }"))
    result = turbvit("sweep", grown, "--dry-run")
    assert result.exit_code == 0 and "night_3 is no longer in the file; its folder is left alone" in result.output
    assert re.search(r"night_5 +to do", result.output)
    study(place, "night", ("[3, 4]", "[3]"))


# ------------------------------------------------------------------------------------------------------------------ with stand-ins for jobs
def sleeper(task) -> list[str]:
    "A job that takes long, unless its run says otherwise."
    code = "import sys, time; print('working', flush=True); time.sleep(0 if sys.argv[1].endswith('4') else 60)"
    return [sys.executable, "-c", code, task.point.run]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_all_jobs(place, number, code):
    sweep = read_sweep(study(place, f"stopped{code}"))
    work, seen = Sweeping(sweep, 2, choose(sweep), sleeper), []
    with pytest.raises(JobError, match=f"was stopped; turbvit sweep .*stopped{code}.toml goes on from here") as stop:
        for event in work:
            seen.append((event.task.point.run, event.kind))
            if seen[-1] == (f"stopped{code}_3", "said"):
                os.kill(os.getpid(), number)
    assert stop.value.code == code and (f"stopped{code}_3", "stopped") in seen
    assert not any(run.endswith("longer_3") for run, _ in seen)
    Lock(sweep.folder, name=LOCK).release()


def test_a_reader_that_gives_up_leaves_no_job_behind(place):
    sweep = read_sweep(study(place, "left"))
    work = Sweeping(sweep, 1, choose(sweep), sleeper)
    events = iter(work)
    next(events)
    process = work.together.running["left_3 02_train"]
    events.close()
    assert process.returncode is not None
    Lock(sweep.folder, name=LOCK).release()


def test_damaged_record_hides_no_other_sweep(place):
    sweep = read_sweep(study(place, "torn"))
    Sweeping(sweep, 1, choose(sweep), sleeper).lock.release()
    (sweep.folder / "sweep.json").write_text('{"runs": ')
    with pytest.raises(LabError, match="sweep.json is damaged.*: delete it"):
        look(sweep)
    assert re.search(r"torn \(sweep\): damaged", turbvit("status").output)
    (sweep.folder / "sweep.json").unlink()
    assert str(count(sweep, look(sweep), 2)) == "3 runs, 0 done, 3 left, time not known before a first run"
