"""Curves in TensorBoard and trackio: the points of metrics.jsonl, after a kill too, without a network; what is missing is said at the start."""
import fcntl
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from same_bits import equal
from test_training import JOB, plain
from turbvit_nb.cli import app
from turbvit_nb.lab.config import Config, LabError, load_config
from turbvit_nb.lab.runs import left_by, open_run, read_metrics

# every second step is logged, and a state is saved at the end of an epoch only: a kill leaves lines that the next process forgets
LOGGING = JOB.replace("minutes = 0.0", "minutes = 99.0; next(c for c in learner.callbacks if type(c).__name__ == 'Log').every = 2")
ALONE = """
import socket
def refuse(*_): raise RuntimeError("there is no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
TRACKERS = ["tensorboard", "trackio"]
pytestmark = pytest.mark.usefixtures("warm_jobs")


def job(home: Path, config: Path, *death: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    "Train in a process of its own that has no network."
    script, start = home / "job.py", [sys.executable]
    script.write_text((ALONE if ranks == 1 else "") + LOGGING)
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    where = {"TURBVIT_RUNS": str(home / "runs"), "TRACKIO_DIR": str(home / "runs" / "trackio")}
    return subprocess.run([*start, str(script), str(config), *(death or ("-1", "SIGKILL"))], cwd=home, env=os.environ | where | env, capture_output=True, text=True)


def said(home: Path, name: str = "vectors", *trackers: str, keys: str = "") -> Path:
    "The config of a run with trackers."
    on = "\n".join([f"{tracker} = true" for tracker in trackers] + [keys])
    (path := home / f"{name}.toml").write_text(f'output_dir = "runs/{name}"\ndevice = "cpu"\nseed = 3\nwhy = "a | b"\n' + (f"[tracking]\n{on}\n" if on else ""))
    return path


def in_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    "The curves that metrics.jsonl holds, by other means than the code's: every number of a line with a step."
    curves = defaultdict(list)
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for key in line.keys() - {"stage", "fit", "step"}:
            if isinstance(line[key], (int, float)):
                curves[f"{line['fit']}/{key}"].append((line["step"], line[key]))
    return dict(curves)


def in_tensorboard(folder: Path, stage: str = "squeeze") -> dict[str, list[tuple[int, float]]]:
    "The curves in the event files, by TensorBoard's own reader; it thins out nothing."
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard" / stage), {module.SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


READ = """
import json
from trackio import fragments
from trackio.sqlite_storage import SQLiteStorage
fragments.import_inbox_dir()   # as `trackio show` does at its start
print(json.dumps({run["name"]: SQLiteStorage.get_logs("turbvit", run["name"], run_id=run["id"]) for run in SQLiteStorage.get_run_records("turbvit")}))
"""


def in_trackio(home: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    "By run, the curves in the database, read by trackio in a process of its own."
    done = subprocess.run([sys.executable, "-c", READ], env=os.environ | {"TRACKIO_DIR": str(home / "runs" / "trackio")}, capture_output=True, text=True, check=True)
    found = {}
    for run, rows in json.loads(done.stdout.splitlines()[-1]).items():
        curves = found[run] = defaultdict(list)
        for row in rows:
            for key in row.keys() - {"step", "timestamp"}:
                curves[key].append((row["step"], row[key]))
    return found


def single(curves: dict) -> dict:
    "In single precision, which is what event files keep."
    return {name: [(step, np.float32(value)) for step, value in points] for name, points in curves.items()}


@pytest.mark.parametrize("mode", ["sqlite", "jsonl"])
def test_a_killed_training_leaves_the_curves_of_its_log(tmp_path, mode):
    "Killed in its second epoch, where lines are logged after the last checkpoint; trackio as on a disk of its own, and as on a network file system."
    pytest.importorskip("tensorboard"), pytest.importorskip("trackio")
    config, folder = said(tmp_path, "vectors", *TRACKERS), tmp_path / "runs" / "vectors"
    assert job(tmp_path, config, "16", "SIGKILL", TRACKIO_STORAGE_MODE=mode).returncode == -9
    before = in_log(folder)
    assert [step for step, _ in before["squeeze/batch_loss"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert in_tensorboard(folder) == single(before)  # and nothing that was logged is lost with the process
    if mode == "sqlite":
        assert in_trackio(tmp_path) == {"vectors/squeeze": before}
    done = job(tmp_path, folder, TRACKIO_STORAGE_MODE=mode)
    assert done.returncode == 0, done.stderr
    logged = in_log(folder)
    assert [step for step, _ in logged["squeeze/batch_loss"]] == list(range(2, 46, 2)) and len(logged["squeeze/error"]) == 5
    assert in_tensorboard(folder) == single(logged)
    assert in_trackio(tmp_path) == {"vectors/squeeze": logged}
    assert sum(path.stat().st_size > 0 for path in (folder / "tensorboard" / "squeeze").iterdir()) == 1 and not list((folder).glob("**/*.part*"))


def test_tracking_changes_no_bit(tmp_path):
    "The checkpoints of a tracked run are those of one that is not, and the log too."
    pytest.importorskip("tensorboard"), pytest.importorskip("trackio")
    for name, trackers in (("plain", ()), ("tracked", TRACKERS)):
        done = job(tmp_path, said(tmp_path, name, *trackers))
        assert done.returncode == 0, done.stderr
    one, other = (tmp_path / "runs" / name for name in ("plain", "tracked"))
    assert equal(plain(one), plain(other))
    lines = lambda folder: [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]
    assert lines(one) == lines(other) and not (one / "tensorboard").exists()


def test_of_several_ranks_the_first_is_followed(tmp_path):
    pytest.importorskip("tensorboard")
    done = job(tmp_path, said(tmp_path, "two", "tensorboard"), ranks=2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "two"
    assert in_tensorboard(folder) == single(in_log(folder)) and len(list((folder / "tensorboard" / "squeeze").iterdir())) == 1


def test_a_tensorboard_that_is_open_meanwhile_sees_one_curve(place):
    "A reader that has the old points in memory and loads the new file forgets what was rewound."
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = open_run(said(place, "live", "tensorboard"), "train")
    for step in range(1, 6):
        run.log(fit="train", step=step, loss=float(step))
    reader = module.EventAccumulator(str(run.path / "tensorboard" / "train")).Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    run.rewind(3, fit="train")
    run.log(fit="train", step=4, loss=-4.0)
    assert [(event.step, event.value) for event in reader.Reload().Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, -4)]


def test_what_was_left_out_comes_with_the_next_opening(place):
    "Tracking that is switched on later has the curve from its beginning; lines without a step are counted; the times never fall."
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = open_run(said(place, "late", keys="tensorboard = false"), "prune")
    for number in (1, 2):
        run.log(fit=f"prune{number}", step=10, loss=0.5, seconds=30.0 * number)
        run.log(prune_stage=number, percent=90.0, pruned={"horizon": 50 + number, "said": "text"})
    run.close()
    run = open_run(run.path, "prune", ["tracking.tensorboard=true"])
    run.log(prune_stage=3, percent=80.0)
    curves = in_tensorboard(run.path, "prune")
    assert curves["prune1/loss"] == curves["prune2/loss"] == [(10, 0.5)]
    assert curves["prune/pruned/horizon"] == [(1, 51), (2, 52)] and [step for step, _ in curves["prune/percent"]] == [1, 2, 3]
    events = module.EventAccumulator(str(run.path / "tensorboard" / "prune")).Reload()
    first, second, last = (events.Scalars(tag)[0].wall_time for tag in ("prune1/loss", "prune2/loss", "prune/prune_stage"))
    assert second - first == pytest.approx(60, abs=0.1) and events.Scalars("prune/percent")[-1].wall_time >= second
    assert "a | b" in events.Tensors("prune/why/text_summary")[0].tensor_proto.string_val[0].decode()


def test_event_files_are_no_progress(place):
    "A job that does nothing but begin its curves anew is not submitted again for it."
    pytest.importorskip("tensorboard")
    run = open_run(said(place, "idle", "tensorboard"), "train")
    run.log(fit="train", step=1, loss=1.0)
    assert list(run.path.glob("tensorboard/train/events*")) and not any(left_by(run.path, run.opened))


def test_a_busy_database_stops_no_training(place, monkeypatch):
    "Points that could not be written wait, and are written in the end; the training is held up once."
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.setenv("TRACKIO_DIR", str(utils.TRACKIO_DIR))
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", place / "trackio")
    slept = []
    monkeypatch.setattr(sqlite_storage.time, "sleep", slept.append)
    run = open_run(said(place, "busy", "trackio"), "train")
    (place / "trackio").mkdir()
    with (place / "trackio" / "turbvit.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run.log(fit="train", step=1, loss=1.0)
        tries = len(slept)
        run.log(fit="train", step=2, loss=2.0)
    assert len(read_metrics(run.path)) == 2 and tries and len(slept) == tries
    run.close()
    rows = sqlite_storage.SQLiteStorage.get_logs("turbvit", "busy/train")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 2.0)]
    assert sqlite_storage.SQLiteStorage.get_run_config("turbvit", "busy/train", run_id=f"{run.id}-train")["_Group"] == "busy"


def test_the_schema_and_what_is_missing(place, monkeypatch):
    "Mistakes cost one line, before a folder is made; off is the default."
    from turbvit_nb.lab import tracking

    for text, line in [("tensorbord = true", "did you mean tracking.tensorboard?"), ('tensorboard = "yes"', "tracking.tensorboard"), ('project = "a b"', "tracking.project")]:
        with pytest.raises(LabError, match=line.replace("?", r"\?")):
            load_config(said(place, "wrong", keys=text))
    with pytest.raises(LabError, match=r"tracking must be a section: write \[tracking\]"):
        Config({"tracking": ["tensorboard"]})
    off = tracking.TrackingConfig()
    assert not (off.tensorboard or off.trackio or off.pictures)
    for name in TRACKERS:
        monkeypatch.setitem(tracking.NEEDS, name, (999, 0))
        with pytest.raises(LabError, match=rf"tracking\.{name} = true, but {name} is .*pip install '{name}>=999\.0', or leave the key out"):
            open_run(said(place, "missing", name), "train")
        assert not (place / "runs" / "missing").exists()
        checked = CliRunner().invoke(app, ["check", str(place / "missing.toml")])
        assert checked.exit_code == 1 and f"pip install '{name}>=999.0'" in checked.output.replace("\n", " ")


def test_a_chapter_hands_over_its_pictures(tmp_path, monkeypatch):
    "A whole training job: all curves of its log, and each picture of its report that came while the run was open."
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    env = os.environ | {"TURBVIT_RUNS": str(tmp_path / "runs"), "TURBVIT_DATA": str(tmp_path / "data")}
    keys = ["run=seen", "training.epochs=2", "tracking.tensorboard=true", "tracking.pictures=true"]
    words = [word for key in keys for word in ("--set", key)]
    done = subprocess.run([sys.executable, "-m", "turbvit_nb.cli", "run", "02_train", "configs/smoke/train.toml", "--no-lessons", *words], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "seen"
    assert in_tensorboard(folder, "train") == single(in_log(folder))
    events = module.EventAccumulator(str(folder / "tensorboard" / "train"), {module.IMAGES: 0}).Reload()
    report = json.loads((folder / "02_train.ipynb").read_text())
    alts = [out["metadata"]["image/png"]["alt"] for cell in report["cells"] for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert alts and sorted(events.Tags()["images"]) == sorted(f"train/{alt}" for alt in alts)
