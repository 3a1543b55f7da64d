"""Deployed emulators: every network in every backend, rollouts that resume, the job, and the chapters that take them."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.compress.backends import BACKENDS, Deployed, deploy
from turbvit_nb.deploy import deploy_run
from turbvit_nb.inference import RolloutJob, infer
from turbvit_nb.lab.checkpoints import Identity, as_state, identify, results_in
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint, write_checkpoint
from turbvit_nb.lab.runs import open_run
from turbvit_nb.long_analysis import long_analysis
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, emulator_state, evaluating, load_emulator, rollout
from turbvit_nb.networks.transformers import FEATURES
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.study.entries import gather
from turbvit_nb.study.shown import collect

CONFIG = """
output_dir = "{name}"
device = "cpu"

[generate]
data_dir = "flow"
Re = 200
fky = 4
beta = 20.0
NX = 16
dt = 0.01
n_trajectories = 2
n_frames = 60
t_save = 0.1

[train_dataset]
data_dir = "flow"
trajectories = [1]
frame_range = [[1, 61]]

[test_dataset]
data_dir = "flow"
trajectories = [2]
frame_range = [[1, 61]]

[inference]
inference_length = 40
chunk_size = 10
n_starts = 2

[analysis]
max_leadtime = 5
n_ensembles = 4
ceiling = false
lyapunov_time = 0.0
PC_autocorr_nlags = 5
extreme_block = 0.5

[deploy]
batch_size = 2
calibration_frames = 8
check_frames = 4
rollout_steps = 5
repeats = 3
"""
NETWORKS = {
    "ViT": dict(embed_dim=32, depth=2, num_heads=2),
    "removed": dict(embed_dim=32, depth=2, num_heads=2, block_heads=[0, 1], block_mlp=[40, 0]),
    "in windows": dict(embed_dim=32, depth=2, num_heads=2, window=2),
    "ReViT": dict(model_type="ReViT", embed_dim=32, depth=1, num_heads=2),
    "UNet": dict(model_type="UNet", base_channels=8, depth=1),
    "EncoderDecoderViT": dict(model_type="EncoderDecoderViT", num_frames=2, num_out_frames=2, encoder_embed_dim=32, encoder_depth=1,
                              decoder_embed_dim=32, decoder_depth=1),
}


def emulator_of(name: str = "ViT", size: float = 0.02):
    "A small emulator of random weights that changes its fields a little."
    torch.manual_seed(0)
    normaliser = Normaliser([0.1, 0.0], [1.0, 0.5], [size, size / 2])
    emulator = create_emulator(ModelConfig(img_size=16, **NETWORKS[name]), normaliser, step=0.1).eval()
    torch.nn.init.normal_(emulator.network.output.weight, std=0.1)
    return emulator


def batch_for(emulator, n: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(n, 2, emulator.num_frames, 16, 16)
    return {"x": x, "cond": torch.tensor([[200.0, 0.0, 4.0, 0.1, 20.0]]) * (1 + 0.2 * torch.rand(n, len(FEATURES)))}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def start(home: Path, name: str, stage: str = "deploy", emulator=None, overrides: list[str] = []):
    "A run that holds an emulator as its best, open for a stage."
    (home / f"{name}.toml").write_text(CONFIG.format(name=name))
    if emulator is not None:
        path = home / "runs" / name / "checkpoints" / "best.tar"
        write_checkpoint(path, emulator_state(emulator) | {"identity": as_state(Identity("best"))})
    return open_run(home / f"{name}.toml", stage, overrides)


# Programs


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_runs_in_every_backend(name, backend):
    "Equal to its emulator; told another regime it answers otherwise, if it listens."
    emulator = emulator_of(name)
    batch, program = batch_for(emulator), deploy(emulator, backend)
    with evaluating(emulator):
        exact = emulator(**batch)
        other = emulator(batch["x"], 2 * batch["cond"])
    assert torch.allclose(program(**batch), exact, atol=2e-6) and program(**batch).dtype == torch.float32
    assert torch.allclose(program(batch["x"], 2 * batch["cond"]), other, atol=2e-6)
    if name == "ReViT":
        assert torch.allclose(program(batch["x"][:1], batch["cond"][:1]), exact[:1], atol=2e-6)
    assert torch.equal(other, exact) == (name != "ReViT")


@pytest.mark.parametrize("backend, precision", [(b, p) for b in ("torch", "onnxruntime", "openvino") for p in BACKENDS[b].precisions])
def test_a_rollout_of_fifty_steps_stays_with_its_source(backend, precision):
    "A step within 1 % of the field's standard deviation; fifty within what so many of its errors can add up to."
    emulator = emulator_of("ViT")
    batch = batch_for(emulator)
    program, std = deploy(emulator, backend, precision, [batch]), emulator.normaliser.std.view(2, 1, 1)
    ours, theirs = (torch.stack(list(rollout(each, batch["x"], 50, cond=batch["cond"]))) for each in (program, emulator))
    apart = ((ours - theirs) / std).abs().flatten(1).amax(1)
    first, last = (5e-6, 1e-4) if precision == "fp32" else (1e-3, 2e-2)
    coarser = 127 / BACKENDS[backend].levels if precision == "int8" else 1.0  # weights than those of eight bits; their rounding and that of the inputs are independent
    assert apart[0] < first and apart[-1] < last * math.sqrt((1 + coarser**2) / 2)


TWO_OPENED_AND_CLOSED = """
import gc, os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_deploy import batch_for, deploy, emulator_of
emulator = emulator_of("ViT")
first, second = (deploy(emulator, "openvino") for _ in range(2))
for program in (first, second):
    program(**batch_for(emulator))
del first, program
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_are_heard_after_programs_of_openvino_are_closed():
    "Its cores give the main thread a stack for signals; the first of two to go used to leave one that was no more: SIGTERM was a crash."
    command = [sys.executable, "-c", TWO_OPENED_AND_CLOSED, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout.strip()) == (0, "heard"), done.stderr[-2000:]


def test_several_frames_follow_as_in_the_emulator():
    emulator = emulator_of("EncoderDecoderViT")
    batch, program = batch_for(emulator), deploy(emulator, "onnxruntime")
    ours, theirs = (torch.stack(list(rollout(each, batch["x"], 5, cond=batch["cond"]))) for each in (program, emulator))
    assert torch.allclose(ours, theirs, atol=1e-5) and len(ours) == 5


# Rollouts


def test_a_rollout_that_was_killed_goes_on_to_the_same_bits(home, monkeypatch):
    emulator = emulator_of("ViT")
    programs = {name: emulator_state(deploy(emulator, name, "bf16" if name == "openvino" else "fp32")) for name in ("openvino", "onnxruntime")}
    kept, keep = {}, RolloutJob.keep
    for name in ("whole", "killed"):
        run = start(home, name, "inference", overrides=["inference.inference_length=25"])
        for each, state in programs.items():
            write_checkpoint(run.checkpoints / f"{each}.tar", state | {"identity": as_state(Identity(each, "deployed"))})
        if name == "killed":
            def dies(self, frames, save_every):
                keep(self, frames, save_every)
                if self.step == 17:
                    raise KeyboardInterrupt
            monkeypatch.setattr(RolloutJob, "keep", dies)
            with pytest.raises(KeyboardInterrupt):
                infer(run)
            monkeypatch.setattr(RolloutJob, "keep", keep)
            run = open_run(run.path, "inference")
        kept[name] = {each: [r.read() for r in found] for each, found in infer(run).items()}
    for each in programs:
        assert len(kept["whole"][each][0]) == 25
        assert all(np.array_equal(a, b) for a, b in zip(kept["whole"][each], kept["killed"][each]))


# The job


def test_the_job_and_what_comes_after(home):
    "A row for every program, those that cannot be made too; the checkpoints go through analyses, comparison and explorer."
    only = ["deploy.precisions=[\"fp32\", \"bf16\"]", "deploy.backends=[\"onnxruntime\"]"]
    run = start(home, "whole", emulator=emulator_of("ViT"), overrides=only)
    table = deploy_run(run)
    assert json.loads((run.path / "deployed.json").read_text()) == table
    eager, *rows = table["rows"]
    assert eager["ratio"] == 1.0 and [row.get("error") for row in rows] == [None, "onnxruntime does not compute in bf16: it has fp32, int8"]
    for row in rows[:1]:
        path = run.checkpoints / f"deployed_best_{row['backend']}_{row['precision']}.tar"
        known = identify(path)
        assert (known.name, known.role, known.parent, known.result) == (path.stem, "deployed", "best", True)
        assert row["bytes"] == path.stat().st_size and row["ms"] == sorted(row["ms"]) and row["rms"] <= row["max"] < 1e-2
        assert len(row["divergence"]) == len(row["twin"]) == 5 and row["divergence"][0] == row["twin"][0]
    assert [row["name"] for row in deploy_run(run)["rows"] if "name" in row] == ["best", "deployed_best_onnxruntime_fp32"]
    run.finish()

    for stage, job in (("inference", infer), ("short_analysis", short_analysis), ("long_analysis", long_analysis)):
        run = open_run(run.path, stage)
        job(run)
        run.finish()
    assert len(open_rollouts(run.path)) == 2
    entries, _ = gather({"whole": run.path})
    assert [entry.label for entry in entries] == ["dense", "best onnxruntime fp32"]
    costs = [{name: entry.facts[name] for name in ("model", "parameters", "remaining", "flops")} for entry in entries]
    assert costs[0] == costs[1] and all(entry.has_climate for entry in entries)
    assert len(collect({"whole": run.path}, 1_000_000)) > 0


def test_the_last_smaller_model_is_deployed_beside_the_best(home):
    run = start(home, "two", emulator=emulator_of("ViT"), overrides=["deploy.precisions=[\"bf16\"]", "deploy.backends=[\"torch\"]"])
    for stage, share in ((1, 80.0), (2, 60.0)):
        state = emulator_state(emulator_of("removed")) | {"identity": as_state(Identity("x", "materialised", stage, share))}
        write_checkpoint(run.checkpoints / f"small{stage}_remaining_{share}.tar", state)
    names = [row["name"] for row in deploy_run(run)["rows"]]
    assert names == ["best", "deployed_best_torch_bf16", "small2_remaining_60.0", "deployed_small2_remaining_60.0_torch_bf16"]
    known = identify(run.checkpoints / f"{names[-1]}.tar")
    assert (known.stage, known.remaining, known.parent) == (2, 60.0, "small2_remaining_60.0")
    assert [k.role for k in results_in(run.checkpoints).values()].count("deployed") == 2


# Mistakes


def test_a_missing_backend_is_one_line(home, tmp_path, monkeypatch):
    path = tmp_path / "deployed_best_onnxruntime_fp32.tar"
    write_checkpoint(path, emulator_state(deploy(emulator_of("ViT"), "onnxruntime")))
    monkeypatch.setattr(BACKENDS["onnxruntime"], "package", "no_such_runtime")
    told = r"onnxruntime, and no_such_runtime is not installed: pip install -e '.\[deploy\]'"
    with pytest.raises(LabError, match=f"{path} needs the backend {told}"):
        load_emulator(path)
    with pytest.raises(LabError, match=f"deploy.backends needs the backend {told}"):
        start(home, "lacks", overrides=["deploy.backends=[\"onnxruntime\"]"])
    assert not (home / "runs" / "lacks").exists()
    run = start(home, "default", emulator=emulator_of("UNet"), overrides=["deploy.precisions=[\"int8\"]"])
    rows = deploy_run(run)["rows"]
    assert [row["backend"] for row in rows] == ["eager", "torch", "openvino"]
    assert all("a UNet has none: use bf16" in row["error"] for row in rows[1:])


def test_what_cannot_be_deployed_says_so(home):
    run = start(home, "mistakes", emulator=emulator_of("ViT"), overrides=["deploy.checkpoints=[\"bets\"]"])
    with pytest.raises(LabError, match="no checkpoint bets in .* it holds best"):
        deploy_run(run)
    program = deploy(emulator_of("ViT"), "torch", "bf16")
    write_checkpoint(run.checkpoints / "deployed_best_torch_bf16.tar", emulator_state(program) | {"identity": as_state(Identity("x", "deployed"))})
    run = open_run(run.path, "deploy", ["deploy.checkpoints=[\"deployed_best_torch_bf16\"]"])
    with pytest.raises(LabError, match="deployed_best_torch_bf16 is deployed already"):
        deploy_run(run)
    for words, message in (("backends=[\"openvin\"]", "did you mean openvino"), ("precisions=[\"int4\"]", "'int4' is none of fp32, bf16, int8")):
        with pytest.raises(LabError, match=message):
            load_config(run.path, [f"deploy.{words}"])


def test_a_checkpoint_holds_tensors_and_plain_values(tmp_path):
    "And the weights of a bf16 program in two bytes, those of int8 in one."
    emulator, sizes = emulator_of("ViT"), {}
    for precision in ("fp32", "bf16", "int8"):
        program = deploy(emulator, "torch", precision, [batch_for(emulator)])
        write_checkpoint(tmp_path / "one.tar", emulator_state(program))
        state = read_checkpoint(tmp_path / "one.tar")
        assert isinstance(load_emulator(tmp_path / "one.tar"), Deployed)
        sizes[precision] = state["model_state"]["network.blocks.0.mlp.fc1.weight"].nbytes
    assert sizes["fp32"] == 2 * sizes["bf16"] == 4 * sizes["int8"]
