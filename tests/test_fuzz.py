"""Every file that the lab reads, damaged in thousands of ways and made by somebody with bad intentions: a reader returns something or
says in one line which file is wrong; it runs nothing, asks for no more memory than there is, and changes nothing.

| what | read by | damaged as |
|---|---|---|
| a config, TOML | `lab.config.read_toml`, `load_config`; `lab.sweeps.read_sweep`; `lab.queue.read_queue` | config, config of a run, sweep, queue |
| the records of a run, JSON | `lab.files.read_json`: `status.json`, `sweep.json`, `rollout.json`, `generate.json`, `latency.json`, `comparison.json`, `lyapunov.json` | status, …, record |
| its log, JSON lines | `lab.runs.read_metrics` | metrics |
| notebooks | `lab.jobs.Chapter.parameters`, `unopened` | chapter, unopened |
| checkpoints, a zip of torch or its older pickle | `lab.files.read_checkpoint`, and `load_emulator`, `identify`, `inspect` behind it | checkpoint, older checkpoint |
| Py2D frames, `.mat` v5 and v7.3, and `parameters.txt` | `physics.py2d.read_mat`, `open_store` | mat v5, … |
| packed frames, HDF5 | `physics.py2d.PackedStore` | packed |
| somebody's arrays, `.npy`, `.npz`, HDF5, NetCDF | `physics.importers.open_archive`; `lab.files.read_arrays`; `latent.arrays.read_array`; `inspection` | import …, inspect …, array … |
| rollouts, `.npy` with a record, `restart.npz` | `climate.rollouts.Rollout`, `inference.RolloutJob.restore` | rollout … |
| results, NetCDF | `lab.results.read_netcdf` by `read_short`, `read_long`, `up_to_date` | short analysis, long analysis |
| fits and parts, `.npz` | `lab.files.read_arrays` by `baseline_fits`, `read_kept`, and the statistics of `legacy` | fits |
| parameters, CSV | `latent.arrays.read_parameters` | csv |
| pictures | `flow.images.picture` | png, jpg, … |

The damage is the same at every run of `make test`. `make soak` has ten thousand cases of its own, from a seed that it prints:
`TURBVIT_FUZZ_SEED` repeats it.
"""
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from fuzzing import SEED, damages, hashes, in_child, judged
from PIL import Image
from scipy.io import savemat
from small import small_config

from turbvit_nb.climate.distances import read_long
from turbvit_nb.climate.rollouts import open_rollout, open_rollouts
from turbvit_nb.data.generate import GenerateConfig, generate, is_made
from turbvit_nb.emulators.files import load_emulator
from turbvit_nb.flow.images import _arrays, _file
from turbvit_nb.forecast.reading import read_short
from turbvit_nb.inference import infer
from turbvit_nb.inspection import inspect_path
from turbvit_nb.lab.checkpoints import identify
from turbvit_nb.lab.config import load_config
from turbvit_nb.lab.files import read_arrays, result_file
from turbvit_nb.lab.index import read_scorecard, run_rows
from turbvit_nb.lab.jobs import find_chapter, next_stage, unopened
from turbvit_nb.lab.queue import read_queue
from turbvit_nb.lab.runs import open_run, read_metrics, stages
from turbvit_nb.lab.status import status_rows
from turbvit_nb.lab.sweeping import look
from turbvit_nb.lab.sweeps import read_sweep
from turbvit_nb.latent.arrays import read_array, read_parameters, read_pictures
from turbvit_nb.physics.importers import import_frames
from turbvit_nb.physics.py2d import PackedStore, open_store
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.study.costs import read_latency
from turbvit_nb.train import train

CONFIG = 'output_dir = "vit"\n' + small_config([1], 41, 61) + """[inference]
inference_length = 6
chunk_size = 3
n_starts = 2
[analysis]
max_leadtime = 4
n_ensembles = 4
ceiling = false
"""
SWEEP = """[sweep]
name = "study"
run = "study/{seed}"
chapters = ["02_train"]
base = "vit.toml"
overrides = ["training.epochs={seed}"]
[sweep.grid]
seed = [1, 2]
[[sweep.also]]
part = "more"
run = "study/more"
needs = "*"
"""
QUEUE = 'system = "slurm"\nsetup = ["module load x"]\nwalltime = "1:00:00"\n[stages.02_train]\ngpus = 1\n'
CELL = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["config: str = 'a'\n", "overrides: list = []"]}
BEGUN = {"cells": [CELL], "metadata": {"papermill": {"parameters": {"config": "a.toml", "overrides": []}}}, "nbformat": 4, "nbformat_minor": 5}
LABELS = "Reynolds Number (Re): 100.0\nBeta plan coefficient (beta): 0\nNumber of Grid Points (NX): 16\nTime Step (dt): 0.01\nDe-aliasing: True\n"
DATA = dict(Re=100, fky=4, beta=20.0, NX=16, n_trajectories=2, n_frames=60, t_save=0.1, spin_up=2.0)
FLOW = dict(Re=100, fkx=0, fky=4, alpha=0.1, beta=0.0)
RUN, ROLLOUT = "runs/vit", "runs/vit/inference/best/1"
PACK = "data/flow/Re100_fkx0fky4_r0.1_b20.0/NoSGS/NX16/dt0.1_IC1/frames.h5"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    "A run that was trained for an instant, rolled out and analysed, its data, and one small file of every other kind."
    home = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBVIT_RUNS", str(home / "runs"))
        patch.setenv("TURBVIT_DATA", str(home / "data"))
        generate(GenerateConfig(data_dir="flow", **DATA))
        (home / "vit.toml").write_text(CONFIG)
        for stage, job in {"train": train, "inference": infer, "short_analysis": short_analysis}.items():
            run = open_run(home / ("vit.toml" if stage == "train" else RUN), stage)
            job(run)
            run.finish()
    (home / RUN / "long_analyses").mkdir()
    shutil.copy(home / RUN / "short_analyses/best.nc", home / RUN / "long_analyses/best.nc")
    (home / RUN / "latency.json").write_text('{"machine": "mine", "models": {"vit/best": {"ms": 1.5}}}')
    (home / RUN / "comparison.json").write_text('{"rows": [{"label": "vit", "horizon": 3.0}]}')
    for name, text in {"sweep.toml": SWEEP, "queue.toml": QUEUE, "20_own.ipynb": json.dumps(BEGUN), ".02_prune.unfinished.ipynb": json.dumps(BEGUN)}.items():
        (home / name).write_text(text)
    frames, times = np.random.default_rng(0).standard_normal((6, 16, 16)), np.arange(6) * 0.1
    for kind, how in {"v5": {}, "v5z": {"do_compression": True}, "v73": None}.items():
        data = home / f"{kind}/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/data"
        data.mkdir(parents=True)
        (data.parent / "parameters.txt").write_text(LABELS)
        for n in (1, 2):
            savemat(data / f"{n}.mat", {"Omega": frames[n], "time": float(n)}, **how) if how is not None else mat73(data / f"{n}.mat", frames[n], float(n))
    np.save(home / "a.npy", frames)
    np.savez(home / "a.npz", omega=frames, time=times, Re=100.0)
    np.savez_compressed(home / "z.npz", omega=frames, images=frames)
    with h5py.File(home / "a.h5", "w") as file:
        file["omega"], file["time"], file.attrs["Re"] = frames, times, 100.0
    data = xr.Dataset({"omega": (("time", "x", "y"), frames)}, {"time": times}, {"Re": 100.0})
    data.to_netcdf(home / "a.nc", engine="h5netcdf")
    data.to_netcdf(home / "b.nc", engine="scipy")
    (home / "a.csv").write_text("Re,beta\n" + "\n".join(f"{i},{i * 0.5}" for i in range(8)))
    for kind in ("png", "jpg", "bmp", "tif", "webp"):
        (home / kind).mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(home / kind / f"a.{kind}")
    torch.save({"model_state": {"w": torch.ones(3)}}, home / "older.tar", _use_new_zipfile_serialization=False)
    return home


def mat73(path: Path, omega: np.ndarray, time: float) -> None:
    "A `.mat` of MATLAB's v7.3: HDF5 behind a header of 512 bytes."
    with h5py.File(path, "w", userblock_size=512) as file:
        file["Omega"], file["time"] = omega, time
    data = path.read_bytes()
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + data[128:])


@pytest.fixture
def place(home, tmp_path, monkeypatch) -> Path:
    "A copy of all of it for one test."
    shutil.copytree(home, tmp_path / "place")
    monkeypatch.setenv("TURBVIT_RUNS", str(tmp_path / "place/runs"))
    monkeypatch.setenv("TURBVIT_DATA", str(tmp_path / "place/data"))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture(params=[pytest.param(1, id="few"), pytest.param(20, id="many", marks=pytest.mark.soak)])
def dose(request, capsys) -> int:
    "How many times the cases of a commit; a soak says what it is from."
    if request.param > 1:
        with capsys.disabled():
            print(f"\nTURBVIT_FUZZ_SEED={SEED} repeats {request.node.name}")
    return request.param


@dataclass
class Reader:
    "A file of `home`, and what reads it."

    file: str
    read: Callable[[Path], object]  # of its path
    names: tuple[str, ...] = ()  # what a line may name in place of the file; "" for a key of it


def read_tree(path: Path) -> None:
    "All there is to read of a tree one of whose frames is given."
    store = open_store(path.parents[1])
    store.check()
    store.times, store.read(store.frames)


def read_pack(path: Path) -> None:
    "All there is to read of a packed file."
    store = PackedStore(path)
    store.check()
    store.read(store.frames)


def imported(path: Path) -> None:
    "A file of frames as a packed file beside it."
    target = path.with_suffix(".out.h5")
    for old in (target, target.with_name(f"{target.name}.part")):
        old.unlink(missing_ok=True)
    import_frames(path, target, FLOW, axes=None if path.suffix == ".nc" else "txy", t_save=0.1)


def read_all(rollout) -> None:
    "All there is to read of a rollout."
    rollout.read(), rollout.times, rollout.identity, rollout.member, rollout.state, repr(rollout)


def listed(path: Path) -> None:
    "What lists of runs say of one."
    stages(path.parent), run_rows(path.parent, path.parents[1])
    assert not [row for row in status_rows([path.parent]) if len(row) != 5]


def restored(path: Path) -> None:
    "A job of rollouts that goes on, or begins anew, whatever its restart file holds."
    run = open_run(path.parents[2], "inference")
    try:
        infer(run)
    finally:
        run.close()


READERS = {
    "config": Reader("vit.toml", load_config, ("",)),
    "config of a run": Reader(f"{RUN}/config.toml", lambda path: load_config(path.parent), ("",)),
    "sweep": Reader("sweep.toml", lambda path: look(read_sweep(path)), ("",)),
    "queue": Reader("queue.toml", read_queue),
    "status": Reader(f"{RUN}/status.json", listed),
    "status to resume": Reader(f"{RUN}/status.json", lambda path: next_stage(path.parent), (RUN,)),
    "status of a run that is inspected": Reader(f"{RUN}/status.json", lambda path: inspect_path(path.parent)),
    "metrics": Reader(f"{RUN}/metrics.jsonl", lambda path: (read_metrics(path.parent), listed(path))),
    "generated": Reader("data/flow/generate.json", lambda path: is_made(GenerateConfig(data_dir="flow", **DATA)), ("holds data made with other settings",)),
    "latency": Reader(f"{RUN}/latency.json", lambda path: read_latency(path.parent)),
    "comparison": Reader(f"{RUN}/comparison.json", lambda path: read_scorecard(path.parent)),
    "unopened": Reader(".02_prune.unfinished.ipynb", lambda path: unopened(path.parent)),
    "chapter": Reader("20_own.ipynb", lambda path: find_chapter(path).check(["config"]), ("20_own has no parameter",)),
    "checkpoint": Reader(f"{RUN}/checkpoints/best.tar", lambda path: (load_emulator(path), identify(path))),
    "checkpoint that is inspected": Reader(f"{RUN}/checkpoints/best.tar", inspect_path),
    "older checkpoint": Reader("older.tar", inspect_path),
    **{f"mat {kind}": Reader(f"{kind}/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/data/1.mat", read_tree, ("time does not increase",)) for kind in ("v5", "v5z", "v73")},
    "parameters.txt": Reader("v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/parameters.txt", lambda path: open_store(path.parent)),
    "packed": Reader(PACK, read_pack),
    "packed that is inspected": Reader(PACK, lambda path: inspect_path(path, True)),
    **{f"import {name}": Reader(name, imported) for name in ("a.npy", "a.npz", "z.npz", "a.h5", "a.nc", "b.nc")},
    **{f"inspect {name}": Reader(name, inspect_path) for name in ("a.npy", "a.npz", "a.h5", "a.nc", "b.nc")},
    "array npy": Reader("a.npy", read_array),
    **{f"array {name}": Reader(name, lambda path: read_array(path, "omega")) for name in ("z.npz", "a.h5")},
    "images npz": Reader("z.npz", _arrays),
    "csv": Reader("a.csv", read_parameters),
    **{kind: Reader(f"{kind}/a.{kind}", lambda path: (read_pictures(path.parent), _file(path, 8, 3))) for kind in ("png", "jpg", "bmp", "tif", "webp")},
    "rollout": Reader(f"{ROLLOUT}/rollout.json", lambda path: read_all(open_rollout(path.parent)), ("rollout.json", ROLLOUT)),
    "rollouts": Reader(f"{ROLLOUT}/rollout.json", lambda path: [read_all(one) for ones in open_rollouts(path.parents[3]).values() for one in ones], ("is no role", ROLLOUT)),
    "rollout that is inspected": Reader(f"{ROLLOUT}/rollout.json", lambda path: (inspect_path(path.parent), inspect_path(path.parents[3]))),
    "rollout's states": Reader(f"{ROLLOUT}/1.npy", lambda path: read_all(open_rollout(path.parent))),
    "short analysis": Reader(f"{RUN}/short_analyses/best.nc", lambda path: read_short(path.parents[1])),
    "long analysis": Reader(f"{RUN}/long_analyses/best.nc", lambda path: read_long(path.parents[1])),
    "fits": Reader(f"{RUN}/baselines/fits.npz", lambda path: result_file(path, read_arrays, "delete it")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named_in_one_line(name, dose, place):
    reader = READERS[name]
    path = place / reader.file
    assert judged(lambda: reader.read(path), *reader.names or (path.name,)) == ""
    cases = list(damages(path.read_bytes(), 12 * dose, name))

    def task(number: int) -> str:
        path.write_bytes(cases[number])
        return judged(lambda: reader.read(path), path.name, *reader.names)

    assert in_child(task, len(cases)) == {}


def test_a_damaged_restart_is_begun_again(dose, place):
    path = place / RUN / "inference/best/restart.npz"
    states = lambda: {file: digest for file, digest in hashes(place / ROLLOUT).items() if file.endswith(".npy")}
    expected, data = states(), path.read_bytes()
    for case in damages(data, 2 + dose):
        path.write_bytes(case)
        restored(path)
        assert states() == expected
        assert int(read_arrays(path)["step"]) == 6


@pytest.mark.skipif("not __import__('conftest').real_py2d()", reason="no real Py2D output")
def test_real_frames_damaged(dose, tmp_path, py2d_data):
    source = next(py2d_data.glob("results/Re*/*/NX*/dt*"))
    for folder in ("data", "IC"):
        real = next((source / folder).glob("*.mat")).read_bytes()
        cases = list(damages(real, 20 * dose, folder))
        path = tmp_path / source.relative_to(py2d_data) / "data/1.mat"
        path.parent.mkdir(parents=True, exist_ok=True)

        def task(number: int) -> str:
            path.write_bytes(cases[number])
            return judged(lambda: read_tree(path), path.name)

        assert in_child(task, len(cases)) == {}
