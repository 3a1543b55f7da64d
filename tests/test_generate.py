"""Frames that are cut out of a finer solution, from `[generate]` to the analyses: a whole small job on them."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config

from turbvit_nb.data.generate import GenerateConfig, generate
from turbvit_nb.datasets import DatasetConfig, open_dataset
from turbvit_nb.examine import inspect_path
from turbvit_nb.forecast.ceiling import twin_states
from turbvit_nb.forecast.starts import HISTORY, Starts, start_samples
from turbvit_nb.inference import infer
from turbvit_nb.lab.runs import open_run
from turbvit_nb.long_analysis import long_analysis
from turbvit_nb.physics.py2d import find_runs, open_store
from turbvit_nb.physics.solver import Solver, random_vorticity
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.train import train

N, FINE = 16, 32
FLOW = dict(Re=100, fky=4, beta=20.0, NX=N, solve_NX=FINE, t_save=0.1, spin_up=15.0)
CONFIG = '\noutput_dir = "cut"\n' + small_config([1], 61, 91, training="steps_per_epoch = 4\nbatch_size = 8") + """[inference]
inference_length = 90
[analysis]
max_leadtime = 6
n_ensembles = 4
lyapunov_time = 4.0
PC_autocorr_nlags = 10
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "A data root with two trajectories of a small flow, solved on twice the points."
    root = tmp_path_factory.mktemp("cut")
    generate(GenerateConfig(data_dir=str(root / "flow"), n_trajectories=2, n_frames=90, **FLOW))
    return root


def test_the_files_say_what_the_frames_were_cut_out_of(data):
    store = open_store(find_runs(data / "flow")[1])
    assert (store.regime.sgs, store.regime.NX, store.regime.solved.NX) == ("FDNS32", 16, 32)
    assert "16², cut out of a solution on 32²" in str(inspect_path(store.path))


def test_from_generate_to_the_analyses(home):
    (home / "cut.toml").write_text(CONFIG)
    for job, stage in ((train, "train"), (infer, "inference"), (short_analysis, "short_analysis"), (long_analysis, "long_analysis")):
        run = open_run(home / "cut.toml" if job is train else Path(os.environ["TURBVIT_RUNS"]) / "cut", stage, [])
        result = job(run)
        run.finish()
        if job is short_analysis:
            scores = result["best"]
            assert {"ceiling", "persistence"} <= set(scores.forecast.values.tolist())
            assert np.isfinite(scores.rmse.sel(forecast="ceiling")).all() and np.isfinite(scores.attrs["lyapunov_exponent"])
    for source in ("truth", "best"):
        assert result[source].enstrophy_budget.attrs["solved_NX"] == FINE
    assert float(result["truth"].enstrophy_budget.sel(enstrophy_term="residual")) < 0


def test_the_twin_of_a_frame_alone(data):
    "It is the fine solution that begins without what the frame does not hold: wrong from the start, and less so than the coarse grid."
    cfg = DatasetConfig(data_dir=str(data / "flow"), frame_range=[[1, 91]], mode="read")
    dataset = open_dataset(cfg, num_frames=HISTORY)
    dataset.targets = 5
    starts = Starts(dataset, start_samples(len(dataset), 6), torch.zeros(2, N, N), torch.device("cpu"))
    group = starts.group(starts.spans()[0])
    first = group["x"][:, :, 0].double()
    twins = list(twin_states(starts, group, torch.zeros(12)))
    frame, flow = Grid.of(first).vorticity(first), starts.flows[0]
    begun = Solver(flow.solved, Grid.of(frame).resample(frame, FINE), workers=1)
    coarse = Solver(GenerateConfig(data_dir="x", n_frames=2, **FLOW | {"solve_NX": None}).regime(), frame, workers=1)
    wrong = {"twin": [], "coarse": []}
    for twin, truth in zip(twins, group["truth"].unbind(2)):
        for solver in (begun, coarse): solver.advance(0.1)
        there = Grid.of(begun.omega).resample(begun.omega, N)
        torch.testing.assert_close(twin, Grid.of(there).velocity(there), atol=1e-9, rtol=0)
        for name, state in (("twin", twin), ("coarse", Grid.of(frame).velocity(coarse.omega))):
            wrong[name].append(float((state - truth).square().mean().sqrt() / truth.std()))
    assert 1e-3 < wrong["twin"][0] < wrong["coarse"][0] and wrong["twin"][-1] < wrong["coarse"][-1]


def test_the_same_initial_conditions_as_on_the_solved_grid(data):
    "Trajectory 2 is the solution of the fine grid from the fine grid's second initial condition."
    store = open_store(find_runs(data / "flow")[1])
    solver = Solver(store.regime.solved, random_vorticity(FINE, 2, 0), workers=1)
    for _ in range(151): solver.advance(0.1)
    omega = Grid.of(solver.omega).resample(solver.omega, N)[1]
    np.testing.assert_allclose(store.read([1])[0], omega.float().numpy(), atol=1e-4)
