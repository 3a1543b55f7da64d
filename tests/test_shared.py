"""What several ranks share by its own parts: trajectories, rollouts, starts, records. Whoever shares, the numbers are the same."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from own_kinds import Swirling
from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.lab.checkpoints import Identity, as_state
from turbvit_nb.lab.files import write_checkpoint
from turbvit_nb.lab.runs import stages
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, emulator_state

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
output_dir = "{name}"
device = "cpu"
[generate]
data_dir = "flow"
Re = 200
NX = 64
n_trajectories = 6
n_frames = 30
t_save = 0.1
spin_up = 1.0
[dataset]
data_dir = "flow"
trajectories = [5, 6]
frame_range = [[1, 31]]
[train_dataset]
data_dir = "flow"
trajectories = [1, 2, 3]
frame_range = [[1, 31]]
[inference]
inference_length = 14
chunk_size = 5
n_starts = 5
members = 2
[analysis]
max_leadtime = 6
n_ensembles = 9
members = 3
lyapunov_time = 4.0
PC_autocorr_nlags = 5
"""


def environment(folder: Path) -> dict[str, str]:
    "Of a process that works in a folder."
    return os.environ | {"TURBVIT_RUNS": str(folder / "runs"), "TURBVIT_DATA": str(folder / "data"), "TURBVIT_PROGRESS": "0", "OMP_NUM_THREADS": "1",
                         "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def shared(warm: str, folder: Path, world: int, *words: str) -> subprocess.CompletedProcess:
    "The stages by so many ranks, programs of a warm Python, in a folder of their own."
    by = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else [warm]
    env = environment(folder) | {"PYTHON_EXEC": warm}
    return subprocess.run([*by, ROOT / "tests" / "shared.py", *words], env=env, cwd=folder, capture_output=True, text=True, timeout=300)


def a_run(folder: Path, name: str) -> Path:
    "A run with a network that is not trained, a kind that draws, and its config; the folder of the config."
    torch.manual_seed(0)
    network = create_emulator(ModelConfig(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2), Normaliser([0.0, 0.0], [1.0, 1.0], [0.05, 0.05]), step=0.1)
    nn.init.normal_(network.network.output.weight, std=0.05)
    for checkpoint, emulator, role in (("best", network, "dense"), ("flow", Swirling(size=64, points=16, step=0.1), "generative")):
        path = folder / "runs" / name / "checkpoints" / f"{checkpoint}.tar"
        write_checkpoint(path, emulator_state(emulator) | {"identity": as_state(Identity(checkpoint, role=role))})
    (folder / f"{name}.toml").write_text(CONFIG.format(name=name))
    return folder / f"{name}.toml"


WORLDS = [pytest.param(2, marks=pytest.mark.soak), 3]


@pytest.fixture(scope="module")
def done(request, tmp_path_factory, warm) -> dict[int, Path]:
    "All stages by one process, by three ranks, and in the soak by two: the folder of each."
    home, worlds = tmp_path_factory.mktemp("shared"), (1, 3, 2) if request.config.getoption("--soak") else (1, 3)
    for world in worlds:
        folder = home / str(world)
        folder.mkdir()
        ended = shared(warm, folder, world, str(a_run(folder, "run")), "inference", "short_analysis", "long_analysis")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return {world: home / str(world) for world in worlds}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    "The files below a folder, by name."
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob(pattern))}


@pytest.mark.parametrize("world", WORLDS)
def test_trajectories_are_the_same_to_the_bit(done, world):
    one, several = (hashes(done[n] / "data" / "flow", "frames.h5") for n in (1, world))
    assert len(one) == 6 and several == one
    assert hashes(done[world] / "data" / "flow", "generate.*").keys() == {"generate.json"}


@pytest.mark.parametrize("world", WORLDS)
def test_rollouts_are_the_same(done, world):
    "But for rounding: of five starts one of three ranks has a batch of one."
    one, several = (open_rollouts(done[n] / "runs" / "run") for n in (1, world))
    assert {name: len(each) for name, each in one.items()} == {"best": 5, "flow": 10}
    for name in one:
        for a, b in zip(one[name], several[name], strict=True):
            assert a.path.name == b.path.name and (a.state, a.first) == (b.state, b.first)
            assert np.abs(a.read() - b.read()).max() < 1e-5 * np.abs(a.read()).max()
    files = [{path.name for path in (done[n] / "runs" / "run" / "inference").rglob("*")} for n in (1, world)]
    assert files[0] == files[1]


@pytest.mark.parametrize("before, after", [pytest.param(1, 3, marks=pytest.mark.soak), (3, 2), pytest.param(2, 1, marks=pytest.mark.soak)])
def test_rollouts_go_on_with_another_number_of_ranks(done, tmp_path, before, after, warm):
    (tmp_path / "data").symlink_to(done[1] / "data")
    config = a_run(tmp_path, "run")
    assert shared(warm, tmp_path, before, str(config), "inference", "dies").returncode != 0
    assert np.load(tmp_path / "runs" / "run" / "inference" / "best" / "restart.npz")["step"] == 10
    ended = shared(warm, tmp_path, after, str(tmp_path / "runs" / "run"), "inference")
    assert ended.returncode == 0, ended.stderr
    one, other = (open_rollouts(folder / "runs" / "run") for folder in (done[1], tmp_path))
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            assert np.abs(a.read() - b.read()).max() < 1e-5 * np.abs(a.read()).max()


@pytest.mark.parametrize("world", WORLDS)
def test_forecasts_are_the_same_to_the_bit(done, world):
    "Forecasts, ensembles, baselines, ceiling: each group of starts is some rank's, and the groups do not depend on the ranks."
    for name in ("best", "flow"):
        one, several = (xr.load_dataset(done[n] / "runs" / "run" / "short_analyses" / f"{name}.nc") for n in (1, world))
        assert one.sizes["start"] == 9 and list(one.ensemble.values) == ["emulator", "climatology"] and "ceiling" in one.forecast
        assert np.isfinite(one.acc.sel(forecast="ceiling")).all()
        xr.testing.assert_equal(one, several)
        differ = {key for key in one.attrs if not np.array_equal(one.attrs[key], several.attrs[key])}
        assert differ <= {"made_from"}  # the times of the checkpoints' files


@pytest.mark.parametrize("world", WORLDS)
def test_climates_are_the_same(done, world):
    "The sums of the truth are added up in another order; the rollouts themselves are the same but for rounding."
    one, several = ({file.stem: xr.load_dataset(file) for file in (done[n] / "runs" / "run" / "long_analyses").glob("*.nc")} for n in (1, world))
    assert one.keys() == several.keys() == {"truth", "best", "flow"}
    xr.testing.assert_allclose(one["truth"], several["truth"], rtol=1e-9, atol=1e-12)
    for name in ("best", "flow"):
        counts = [key for key in one[name].data_vars if "counts_" in key]
        xr.testing.assert_allclose(one[name].drop_vars(counts), several[name].drop_vars(counts), rtol=1e-3, atol=1e-5)
        assert len(counts) == 4
        for key in counts:  # a value at the edge of a bin falls to one side or to the other: two of 286,720 were seen to
            a, b = one[name][key], several[name][key]
            assert int(a.sum()) == int(b.sum()) and int(abs(a - b).sum()) <= 2e-4 * int(a.sum())


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_the_first_rank_alone_says_that_a_stage_is_done(done, world):
    assert {name: entry["state"] for name, entry in stages(done[world] / "runs" / "run").items()} == dict.fromkeys(("inference", "short_analysis", "long_analysis"), "done")
