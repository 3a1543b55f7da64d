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
n_frames = 40
t_save = 0.1
spin_up = 1.0
[dataset]
data_dir = "flow"
trajectories = [5, 6]
frame_range = [[1, 41]]
[train_dataset]
data_dir = "flow"
trajectories = [1, 2, 3]
frame_range = [[1, 41]]
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


def shared(folder: Path, world: int, *words: str) -> subprocess.CompletedProcess:
    "The stages by so many ranks, in a folder of their own."
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    return subprocess.run([sys.executable, *by, ROOT / "tests" / "shared.py", *words], env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=300)


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


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[int, Path]:
    "All stages by one, two and three ranks: the folder of each."
    home = tmp_path_factory.mktemp("shared")
    for world in (1, 2, 3):
        folder = home / str(world)
        folder.mkdir()
        ended = shared(folder, world, str(a_run(folder, "run")), "inference")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return {world: home / str(world) for world in (1, 2, 3)}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    "The files below a folder, by name."
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob(pattern))}


@pytest.mark.parametrize("world", [2, 3])
def test_trajectories_are_the_same_to_the_bit(done, world):
    one, several = (hashes(done[n] / "data" / "flow", "frames.h5") for n in (1, world))
    assert len(one) == 6 and several == one
    assert hashes(done[world] / "data" / "flow", "generate.*").keys() == {"generate.json"}


@pytest.mark.parametrize("world", [2, 3])
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


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 1)])
def test_rollouts_go_on_with_another_number_of_ranks(done, tmp_path, before, after):
    (tmp_path / "data").symlink_to(done[1] / "data")
    config = a_run(tmp_path, "run")
    assert shared(tmp_path, before, str(config), "inference", "dies").returncode != 0
    assert np.load(tmp_path / "runs" / "run" / "inference" / "best" / "restart.npz")["step"] == 10
    ended = shared(tmp_path, after, str(tmp_path / "runs" / "run"), "inference")
    assert ended.returncode == 0, ended.stderr
    one, other = (open_rollouts(folder / "runs" / "run") for folder in (done[1], tmp_path))
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            assert np.abs(a.read() - b.read()).max() < 1e-5 * np.abs(a.read()).max()
