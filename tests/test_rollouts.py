"""Rollout jobs of every kind of emulator: members, noise that goes on after a kill, older folders, full disks."""
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from turbvit_nb.climate.rollouts import RolloutWriter, open_rollouts
from turbvit_nb.inference import infer, run_movie
from turbvit_nb.lab.checkpoints import Identity, as_state
from turbvit_nb.lab.config import Config, LabError
from turbvit_nb.lab.files import write_checkpoint
from turbvit_nb.lab.runs import open_run
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, emulator_state

sys.path.insert(0, str(Path(__file__).parent))
from own_kinds import Swirling

CONFIG = """
output_dir = "{name}"
seed = 3

[generate]
data_dir = "flow"
Re = 200
NX = 16
dt = 0.01
n_trajectories = 1
n_frames = 40
t_save = 0.1

[test_dataset]
data_dir = "flow"
frame_range = [[1, 41]]

[inference]
inference_length = {length}
chunk_size = 5
n_starts = 2
members = 3
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, length: int = 17) -> Path:
    (home / f"{name}.toml").write_text(CONFIG.format(name=name, length=length))
    return home / f"{name}.toml"


def a_run(home: Path, name: str, emulator, checkpoint: str = "flow", role: str = "generative", **settings):
    "A run that holds one checkpoint, open for inference."
    path = home / "runs" / name / "checkpoints" / f"{checkpoint}.tar"
    write_checkpoint(path, emulator_state(emulator) | {"identity": as_state(Identity(checkpoint, role=role))})
    return open_run(config(home, name, **settings), "inference")


def states(folder: Path, checkpoint: str = "flow") -> list[np.ndarray]:
    return [r.read() for r in open_rollouts(folder)[checkpoint]]


def test_members_have_noise_of_their_own_and_folders_of_their_own(home):
    run = a_run(home, "swirl", Swirling(size=16, points=8, step=0.1))
    rollouts = infer(run)["flow"]
    assert [r.member for r in rollouts] == [0, 1, 2] * 2 and {r.header["seed"] for r in rollouts} == {3}
    assert [r.path.name for r in rollouts[1:3]] == [f"{rollouts[0].path.name}_member{m}" for m in (1, 2)]
    assert [r.identity.role for r in rollouts] == ["generative"] * 6
    fields = np.stack([r.read() for r in rollouts])
    assert fields.shape == (6, 17, 2, 16, 16)
    assert all(not np.array_equal(fields[i], fields[j]) for i in range(6) for j in range(i))
    before = fields.copy()
    run = open_run(run.path, "inference")
    infer(run)  # what is on disk is not computed again
    assert np.array_equal(np.stack(states(run.path)), before)


def test_another_seed_is_another_ensemble(home):
    emulator = Swirling(size=16, points=8, step=0.1)
    one, other = (a_run(home, name, emulator) for name in ("one", "other"))
    infer(one)
    other.config.sections["inference"] = other.config.section("inference").model_copy(update={"seed": 4})
    infer(other)
    assert not np.array_equal(states(one.path)[0], states(other.path)[0])


def test_a_killed_ensemble_resumes_to_the_same_bits(home):
    emulator = Swirling(size=16, points=8, step=0.1)
    infer(a_run(home, "straight", emulator, length=60))
    run = a_run(home, "killed", emulator, length=60)
    run.close()
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import own_kinds
from turbvit_nb.inference import RolloutJob, infer
from turbvit_nb.lab.runs import open_run
keep = RolloutJob.keep
RolloutJob.keep = lambda *args: (time.sleep(0.03), keep(*args))
infer(open_run({str(run.path)!r}, "inference"))
"""
    job, restart = subprocess.Popen([sys.executable, "-c", code]), run.path / "inference/flow/restart.npz"
    while not restart.exists() or np.load(restart)["step"] < 20:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert 20 <= np.load(restart)["step"] < 60
    again = open_run(run.path, "inference")
    infer(again)
    for a, b in zip(states(home / "runs" / "straight"), states(run.path), strict=True):
        assert np.array_equal(a, b)


def a_network(**keys):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    emulator = create_emulator(ModelConfig(**sizes | keys), Normaliser([0.0, 0.0], [1.0, 1.0], [0.05, 0.05]), step=0.1)
    nn.init.normal_(emulator.network.output.weight, std=0.05)
    return emulator.eval()


def test_a_deterministic_emulator_has_one_member(home, capsys, monkeypatch):
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    rollouts = infer(a_run(home, "one", a_network(), "best", "dense"))["best"]
    assert len(rollouts) == 2 and all("member" not in r.header and "seed" not in r.header for r in rollouts)
    assert "best is deterministic: its members would all be the same" in capsys.readouterr().out


def test_a_network_with_a_width_per_block_is_rolled_out(home):
    emulator = a_network(block_heads=[1, 0], block_mlp=[0, 40])
    rollouts = infer(a_run(home, "uneven", emulator, "small", "materialised"))["small"]
    assert len(rollouts) == 2 and rollouts[0].identity.role == "materialised" and np.isfinite(rollouts[0].read()).all()


def test_a_rollout_of_an_older_version_goes_on(home):
    "Its restart file held the last input as `x`, and its headers no identity."
    run = a_run(home, "old", a_network(), "best", "dense", length=10)
    infer(run)
    folder = run.path / "inference" / "best"
    with np.load(folder / "restart.npz") as kept:
        older = {name: kept[name] for name in ("step", "ended", "identity")} | {"x": kept["state_new"]}
    assert '"identity"' not in str(older["identity"])
    np.savez(folder / "restart.npz", **older)
    run.finish()
    longer = a_run(home, "new", a_network(), "best", "dense", length=15)
    expected = [r.read() for r in infer(longer)["best"]]
    chunk = next(folder.glob("*/6.npy"))
    first, stamp = chunk.read_bytes(), chunk.stat().st_mtime_ns
    run = open_run(run.path, "inference", ["inference.inference_length=15"])
    again = [r.read() for r in infer(run)["best"]]
    assert all(np.array_equal(a, b) for a, b in zip(again, expected))
    assert (chunk.read_bytes(), chunk.stat().st_mtime_ns) == (first, stamp)  # not computed again


def test_a_full_disk_is_one_line(tmp_path):
    writer = RolloutWriter(tmp_path / "10", {})
    for step in range(1, 20):
        writer.append(step, np.ones((2, 16, 16)))
    before, old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(LabError, match="no room to write .*1.npy"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
    assert list(writer.folder.iterdir()) == []
    writer.flush()  # with room again nothing is lost
    assert np.load(tmp_path / "10" / "1.npy").shape == (19, 2, 16, 16)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_one_line(home):
    run = a_run(home, "shut", a_network(), "best", "dense")
    infer(run)
    run.finish()
    (home / "shut").mkdir()
    (home / "shut").chmod(0o500)
    with pytest.raises(LabError, match="cannot be written to, so moving.gif cannot be made there"):
        run_movie(run.path, home / "shut" / "moving.gif")


def test_the_frames_that_judge_a_run(home):
    "Rollouts start where the forecast is scored: in [dataset] before [validation_dataset]."
    from turbvit_nb.inference import start_data

    emulator = a_network()
    run = a_run(home, "which", emulator, "best", "dense")
    section = run.config.sections.pop("test_dataset")
    run.config.sections |= {"validation_dataset": section, "dataset": section}
    assert start_data(run, emulator).name == "dataset"
    del run.config.sections["dataset"], run.config.sections["validation_dataset"]
    with pytest.raises(LabError, match=r"needs a \[test_dataset\] section"):
        start_data(run, emulator)


def test_unknown_keys_of_inference():
    with pytest.raises(LabError, match="inference.member is not a key; did you mean inference.members"):
        Config({"inference": {"member": 3}})
