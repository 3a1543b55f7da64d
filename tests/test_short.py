"""The short analysis as a whole job on a flow of the solver: every forecast against numpy, what is kept and what is made again, several runs, ensembles, and bad input."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import scoringrules
import torch
import xarray as xr
from small import small_config
from torch import nn

from turbvit_nb import short_analysis as chapter
from turbvit_nb.data.generate import GenerateConfig, generate
from turbvit_nb.datasets import DatasetConfig, open_dataset
from turbvit_nb.forecast import baselines, ceiling, ensembles, reading
from turbvit_nb.forecast import starts as begin
from turbvit_nb.forecast.ensembles import emulator_ensemble
from turbvit_nb.forecast.figures import verdict
from turbvit_nb.forecast.reading import curve, curve_interval, horizons, read_short
from turbvit_nb.forecast.scores import FORECASTS
from turbvit_nb.forecast.starts import Starts, open_scored, start_samples
from turbvit_nb.lab.checkpoints import identity_from
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.results import read_netcdf
from turbvit_nb.lab.runs import open_run
from turbvit_nb.model import Emulator, Normaliser, load_emulator
from turbvit_nb.physics import predictability
from turbvit_nb.physics.predictability import LinearForecast, fit_autoregression, twin_forecast
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime, find_runs, open_store
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.train import train

N, LEADS, STARTS = 16, 12, 6
SECTIONS = "\n" + small_config([1, 2], 71, 91) + """[analysis]
max_leadtime = 12
n_ensembles = 6
lyapunov_time = 4.0
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    "A data root with three trajectories of a small flow."
    root = tmp_path_factory.mktemp("flow")
    generate(GenerateConfig(data_dir=str(root / "flow"), Re=100, fky=4, beta=20.0, NX=N, n_trajectories=3, n_frames=90, t_save=0.1, spin_up=20.0))
    return root


def write(home: Path, name: str, top: str = "") -> Path:
    "A config file for the run called `name`."
    (home / f"{name}.toml").write_text(f'output_dir = "{name}"\n{top}{SECTIONS}')
    return home / f"{name}.toml"


def go(path: Path, job=short_analysis, *overrides: str, stage: str = "short_analysis"):
    "Open the run, do the job, finish."
    run = open_run(path, stage, overrides)
    result = job(run)
    run.finish()
    return result


@pytest.fixture(scope="session")
def made(data, tmp_path_factory) -> Path:
    "A run, trained for an instant, and analysed."
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBVIT_RUNS", str(home / "runs"))
        patch.setenv("TURBVIT_DATA", str(data))
        go(write(home, "vit"), train, stage="train")
        go(home / "runs" / "vit")
    return home / "runs"


@pytest.fixture
def folder(made, home) -> Path:
    "A copy of the run for one test."
    shutil.copytree(made, home / "runs")
    return home / "runs" / "vit"


def frames() -> dict[int, np.ndarray]:
    "The vorticity of every trajectory, float64, frame 1 first."
    return {i: open_store(path).read(np.arange(1, 91)).astype(float) for i, path in enumerate(find_runs(os.environ["TURBVIT_DATA"] + "/flow"), 1)}


def velocity(omega: np.ndarray) -> np.ndarray:
    "u and v (…, 2, N, N) by plain numpy."
    k = np.fft.fftfreq(N, 1 / N)
    KX, KY = np.meshgrid(k, k, indexing="ij")
    K2 = KX**2 + KY**2
    inner = (np.abs(KX) < N / 2) & (np.abs(KY) < N / 2) & (K2 > 0)
    psi = np.fft.fft2(omega) * np.divide(1, K2, where=K2 > 0, out=np.zeros_like(K2)) * inner
    return np.stack([np.fft.ifft2(1j * KY * psi).real, np.fft.ifft2(-1j * KX * psi).real], -3)


@pytest.fixture
def truth(folder) -> tuple[xr.Dataset, dict[int, np.ndarray], np.ndarray]:
    "The analysed scores, the velocity of all frames by trajectory, and the climatology."
    uv = {ic: velocity(omega) for ic, omega in frames().items()}
    return read_short(folder)["best"], uv, np.concatenate([uv[1][:70], uv[2][:70]]).mean(0)


def test_the_file_holds_every_forecast_and_says_what_it_is(truth):
    scores, _, _ = truth
    assert tuple(scores.forecast.values) == FORECASTS
    assert scores.acc.dims == ("forecast", "start", "lead", "field") and scores.band_rmse.dims == (*scores.acc.dims, "band")
    assert dict(scores.sizes) | {"start": STARTS, "lead": LEADS} == dict(scores.sizes)
    assert all(scores[name].attrs["long_name"] and scores[name].attrs["units"] for name in scores.data_vars)
    assert all(np.isfinite(scores[name].values).all() for name in scores.data_vars)
    assert (scores.valid == LEADS).all() and scores.attrs["ceiling_from"] == "best" and "[analysis]" in scores.attrs["config"]
    assert scores.attrs["lyapunov_low"] < scores.attrs["lyapunov_exponent"] < scores.attrs["lyapunov_high"]
    assert set(json.loads(scores.attrs["made_from"])["test_dataset"]) >= {"data_dir", "frame_range"}
    assert identity_from(scores.attrs).label == "dense" and scores.attrs["checkpoint_role"] == "dense"


def test_intervals_can_be_computed_again_from_the_files(folder):
    "Every score of every forecast is kept for every start, in the baselines' file as well."
    scores, kept = read_short(folder)["best"], read_netcdf(folder / "baselines" / "scores.nc")
    for data in (scores, kept):
        assert all(data[name].sizes["start"] == STARTS for name in ("rmse", "acc", "vrmse", "band_rmse"))
    for forecast in FORECASTS[1:]:
        np.testing.assert_array_equal(kept.acc.sel(forecast=forecast).values, scores.acc.sel(forecast=forecast).values)
    low, high = curve_interval(scores.assign_attrs(level=0.5), "acc")
    wide = curve_interval(scores, "acc")
    assert (wide[0] <= low).all() and (high <= wide[1]).all() and (low < high).any()


def test_persistence_climatology_and_damping_agree_with_numpy(truth):
    scores, uv, climate = truth
    anomalies = [part - climate for ic in (1, 2) for part in np.split(uv[ic][:70], 2)]  # stretches of at least 2 · 12 + 3 frames
    for start in (0, STARTS - 1):
        frame = int(scores.start_frame[start])
        for lead in (1, 5, LEADS):
            there, x0 = uv[3][frame - 1 + lead], uv[3][frame - 1]
            pairs = [(a[:-lead], a[lead:]) for a in anomalies]
            rho = [sum((a[:, i] * b[:, i]).sum() for a, b in pairs) / sum((a[:, i] ** 2).sum() for a, _ in pairs) for i in (0, 1)]
            damped = climate + np.array(rho)[:, None, None] * (x0 - climate)
            for name, forecast in (("persistence", x0), ("climatology", climate), ("damped", damped)):
                for i, field in enumerate("uv"):
                    at = dict(forecast=name, lead=lead, field=field)
                    wrong, spread = forecast[i] - there[i], there[i].std()
                    got = {score: float(scores[score].sel(at)[start]) for score in ("rmse", "mae", "vrmse", "bias", "nrmse")}
                    want = dict(rmse=np.sqrt((wrong**2).mean()), mae=abs(wrong).mean(), bias=wrong.mean())
                    want |= dict(vrmse=want["rmse"] / spread, nrmse=want["rmse"] / np.sqrt((there[i] ** 2).mean()))
                    for score, value in want.items():
                        assert got[score] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, score)


def test_spectra_and_bands_agree_with_numpy(truth):
    scores, uv, _ = truth
    k = np.fft.fftfreq(N, 1 / N)
    shells = np.rint(np.hypot(*np.meshgrid(k, k, indexing="ij"))).astype(int)
    first = scores.start_frame.values - 1
    for lead in (1, LEADS):
        there, wrong = uv[3][first + lead], uv[3][first] - uv[3][first + lead]
        power = lambda f: np.abs(np.fft.fft2(f, norm="forward")) ** 2
        spectrum = lambda f: np.bincount(shells.ravel(), 0.5 * power(f).sum(1).mean(0).ravel())
        np.testing.assert_allclose(scores.truth_spectrum.sel(lead=lead), spectrum(there), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(scores.error_spectrum.sel(lead=lead, forecast="persistence"), spectrum(wrong), rtol=1e-4, atol=1e-7)
        middle = (shells > 4) & (shells <= 8)
        by_band = np.sqrt(power(wrong)[:, 0][:, middle].sum(1))
        np.testing.assert_allclose(scores.band_rmse.sel(lead=lead, forecast="persistence", field="u", band="middle"), by_band, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose((scores.band_rmse**2).sum("band"), scores.rmse**2, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(curve(scores, "band_rmse", "omega", band="small")[3], np.sqrt((scores.band_rmse.sel(forecast="emulator", field="omega", band="small")[:, 3] ** 2).mean()), rtol=1e-5)


def test_the_linear_model_is_the_regression_it_says_it_is(truth, folder):
    scores, uv, _ = truth
    kept = np.load(folder / "baselines" / "fits.npz")
    modes, matrices, mean, damping = kept["modes"].astype(float).reshape(len(kept["modes"]), -1), kept["matrices"], kept["mean"], kept["rest"]
    np.testing.assert_allclose(modes @ modes.T, np.eye(len(modes)), atol=1e-4)
    frame = int(scores.start_frame[2])
    past = [modes @ (uv[3][frame - 1 - i] - mean).ravel() for i in range(len(matrices))]
    rest = uv[3][frame - 1] - mean - (past[0] @ modes).reshape(2, N, N)
    for lead in range(1, LEADS + 1):
        past = [sum(z @ A for z, A in zip(past, matrices)), *past][: len(matrices)]
        state = mean + (past[0] @ modes).reshape(2, N, N) + damping[:, lead - 1, None, None] * rest
        wrong = np.sqrt(((state - uv[3][frame - 1 + lead]) ** 2).mean((1, 2)))
        np.testing.assert_allclose(scores.rmse.sel(forecast="linear", lead=lead).values[2][:2], wrong, rtol=1e-3)


class Waves:
    "A flow that is linear: the coefficients z of six waves follow z(t+1) = z(t) A + noise, four more waves are noise without memory."

    R, extra = 6, 0.03  # waves with memory; variance of each of the other four

    def __init__(self, rng: np.random.Generator):
        turn = lambda r, a: r * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        blocks, mix = scipy.linalg.block_diag(turn(0.93, 0.5), turn(0.85, 0.15), 0.8, 0.5), np.eye(self.R) + 0.25 * rng.normal(size=(self.R, self.R))
        self.A, root = np.linalg.inv(mix) @ blocks @ mix, rng.normal(size=(self.R, self.R))
        self.Q = 0.1 * (root @ root.T / self.R + 0.3 * np.eye(self.R))
        self.P = scipy.linalg.solve_discrete_lyapunov(self.A.T, self.Q)
        y, x = np.meshgrid(*[np.arange(N) * 2 * np.pi / N] * 2)
        waves = [f(k * x + l * y) for k, l in ((0, 1), (1, 0), (1, 1), (2, 1), (0, 2)) for f in (np.cos, np.sin)]
        self.omega = np.array([w / np.sqrt((velocity(w) ** 2).mean((-2, -1)).sum()) for w in waves])  # so that ⟨u² + v²⟩ = 1

    def series(self, n: int, rng: np.random.Generator) -> np.ndarray:
        "The coefficients (n, 10) of one stretch of time."
        z, noise = [rng.multivariate_normal(np.zeros(self.R), self.P)], rng.multivariate_normal(np.zeros(self.R), self.Q, size=n)
        for e in noise[1:]:
            z.append(z[-1] @ self.A + e)
        return np.concatenate([z, math.sqrt(self.extra) * rng.normal(size=(n, 4))], 1)

    def write(self, root: Path, sizes: list[int], rng: np.random.Generator) -> list[np.ndarray]:
        "A packed run for each size; the coefficients that are in it."
        made = [self.series(n, rng) for n in sizes]
        for i, z in enumerate(made, 1):
            regime = Regime(100, fkx=0, fky=4, alpha=0.1, beta=20.0, NX=N, IC=i)
            writer = PackedWriter(root / regime.path() / PACKED, regime, len(z))
            for t, field in enumerate(np.tensordot(z, self.omega, 1), 1):
                writer.append(0.1 * t, 0.7 * self.omega[4] + field)
            writer.finish()
        return made

    def velocity(self, z: np.ndarray) -> torch.Tensor:
        "u and v (…, 2, N, N) of coefficients (…, 6 or 10), the mean flow with them."
        return torch.from_numpy(velocity(0.7 * self.omega[4] + np.tensordot(z, self.omega[: z.shape[-1]], 1)))

    def theory(self, leads: int) -> dict[str, np.ndarray]:
        "Mean of |error|² over starts, u and v together, (leads,), of the best forecast there is, of persistence and of climatology."
        powers = [np.linalg.matrix_power(self.A, k) for k in range(leads + 1)]
        best = np.cumsum([np.trace(M.T @ self.Q @ M) for M in powers[:-1]])
        still = np.array([2 * np.trace(self.P) - 2 * np.trace(self.P @ M) for M in powers[1:]])
        return {"linear": best + 4 * self.extra, "persistence": still + 8 * self.extra, "climatology": np.full(leads, np.trace(self.P)) + 4 * self.extra}


@pytest.fixture(scope="module")
def linear_flow(tmp_path_factory):
    "A linear flow, the coefficients of its training trajectories, its fits, and the scores from a trajectory of its own, those of the true system's forecast among them."
    rng, root, leads = np.random.default_rng(3), tmp_path_factory.mktemp("linear"), 20
    flow = Waves(rng)
    *made, unseen = flow.write(root, [1300, 1300, 1300, 6000], rng)
    section = lambda which, frames: DatasetConfig(data_dir=str(root), trajectories=which, frame_range=[[1, frames + 1]], mode="read")
    training, test = open_dataset(section([1, 2, 3], 1300)), open_dataset(section([4], 6000), num_frames=begin.HISTORY)
    test.targets = leads
    damped, linear = baselines.fit_baselines(training, leads)
    starts = Starts(test, start_samples(len(test), 800), damped.mean, torch.device("cpu"))
    known = unseen[test.frame[starts.samples] - 1, : flow.R]
    best = lambda group: (flow.velocity(known[group["rows"]] @ np.linalg.matrix_power(flow.A, k)) for k in range(1, leads + 1))
    states = baselines.baseline_states(starts, baselines.Fits(damped.mean, damped, linear)) | {"best": best}
    return flow, made, linear, xr.concat([begin.score_forecast(starts, name, states[name]) for name in states], "forecast")


def test_the_regression_finds_the_operator_of_a_linear_flow_within_its_sampling_error(linear_flow):
    "The errors of least squares have the covariance Q ⊗ P⁻¹/n, so their weighted sum of squares is χ² with a degree of freedom for each entry (Lütkepohl 2005, prop. 3.1)."
    flow, made, linear, _ = linear_flow
    wrong = fit_autoregression([torch.from_numpy(z[:, : flow.R].copy()) for z in made], 1)[0].numpy() - flow.A
    distance = sum(len(z) - 1 for z in made) * np.trace(wrong.T @ flow.P @ wrong @ np.linalg.inv(flow.Q))
    assert scipy.stats.chi2.ppf(0.001, flow.R**2) < distance < scipy.stats.chi2.ppf(0.999, flow.R**2)
    z = flow.series(2000, np.random.default_rng(4))  # and the model that was chosen, in fields
    history = torch.stack([flow.velocity(z[2 - i : len(z) - i]) for i in range(3)], 2)
    alone = LinearForecast(linear.mean, linear.modes, linear.matrices)  # without what the modes leave out
    excess = (next(alone.forecast(history, 1)) - flow.velocity(z[2:, : flow.R] @ flow.A)).square().mean((-2, -1)).sum(-1).mean()
    assert excess < 0.01 * np.trace(flow.Q)


def test_on_a_linear_flow_nothing_beats_the_linear_model_and_its_errors_are_those_of_theory(linear_flow):
    flow, _, linear, scores = linear_flow
    assert linear.damping.abs().max() < 0.1  # what the modes leave out is noise without memory
    squares = (scores.rmse.sel(field=["u", "v"]) ** 2).sum("field").mean("start")
    theory = flow.theory(squares.sizes["lead"])
    for name, truth in theory.items():
        np.testing.assert_allclose(squares.sel(forecast=name), truth, rtol=0.12)  # what 6000 frames tell of a variance
    np.testing.assert_allclose(squares.sel(forecast="linear", lead=slice(1, 5)), theory["linear"][:5], rtol=0.06)
    ratio = (squares.sel(forecast="linear") / squares.sel(forecast="best")).values  # from the same starts
    assert 0.995 < ratio.min() and ratio.max() < 1.02
    for name in ("persistence", "climatology"):
        sure = theory["linear"] < 0.95 * theory[name]
        assert sure.sum() >= 15 and (squares.sel(forecast="linear") < squares.sel(forecast=name)).values[sure].all()
    assert (squares.sel(forecast="linear") < squares.sel(forecast="damped"))[:15].all()


def test_the_linear_model_is_chosen_on_stretches_that_its_candidates_have_not_seen(monkeypatch):
    "The first coefficient is the number of the stretch, so that it shows who sees which."
    flow, rng, fitted, judged = Waves(np.random.default_rng(0)), np.random.default_rng(1), [], []
    series = [torch.from_numpy(np.concatenate([np.full((60, 1), float(i)), flow.series(60, rng)], 1)) for i in range(20)]
    seen = lambda tensors: {int(t) for s in tensors for t in s[..., 0].unique()}
    fit, judge = predictability.fit_autoregression, predictability.held_out_error
    monkeypatch.setattr(predictability, "fit_autoregression", lambda series, *rest: (fitted.append(seen(series)), fit(series, *rest))[1])
    monkeypatch.setattr(predictability, "held_out_error", lambda matrices, past, future: (judged.append(seen([past, future])), judge(matrices, past, future))[1])
    predictability.choose_linear(series, 8)
    assert all(part == set(range(16)) for part in fitted[:-1]) and fitted[-1] == set(range(20))
    assert len(judged) == len(fitted) - 1 and all(part == set(range(16, 20)) for part in judged)


def test_no_fit_knows_the_frames_that_are_scored(folder, data, home, monkeypatch):
    kept = dict(np.load(folder / "baselines" / "fits.npz"))
    shutil.copytree(data, home / "changed")
    monkeypatch.setenv("TURBVIT_DATA", str(home / "changed"))

    def fitted_with_noise_in(trajectory: int) -> dict[str, np.ndarray]:
        with h5py.File(find_runs(home / "changed" / "flow")[trajectory - 1] / PACKED, "r+") as file:
            frames = next(item for item in file.values() if item.ndim == 3)
            frames[:] = np.random.default_rng(trajectory).normal(size=frames.shape)
        (folder / "baselines" / "fits.npz").unlink()
        baselines.baseline_fits(open_run(folder, "short_analysis"))
        return dict(np.load(folder / "baselines" / "fits.npz"))

    same, other = fitted_with_noise_in(3), fitted_with_noise_in(1)
    for name, value in kept.items():
        np.testing.assert_array_equal(same[name], value)
    assert all(other[name].shape != kept[name].shape or (other[name] != kept[name]).any() for name in ("mean", "damping", "modes", "matrices"))


def test_the_ceiling_begins_with_the_emulators_error_and_would_be_perfect_without(truth, folder):
    scores, uv, _ = truth
    start, regime = uv[3][int(scores.start_frame[0]) - 1], open_store(find_runs(os.environ["TURBVIT_DATA"] + "/flow")[2]).regime
    omega = Grid.of(torch.from_numpy(start)).vorticity(torch.from_numpy(start))[None]
    exact = list(twin_forecast(regime, omega, 0 * omega, 0.1, LEADS))
    assert max(abs(state[0].numpy() - uv[3][int(scores.start_frame[0]) - 1 + lead]).max() for lead, state in enumerate(exact, 1)) < 1e-4
    first = scores.error_spectrum.sel(lead=1)
    assert float(first.sel(forecast="ceiling").sum()) == pytest.approx(float(first.sel(forecast="emulator").sum()), rel=0.6)
    assert (curve(scores, "rmse", forecast="ceiling")[1:] < curve(scores, "rmse")[1:]).all()


def test_other_forecasts_are_scored_once_and_only_what_changed_is_made_again(folder, monkeypatch):
    shutil.copy(folder / "checkpoints" / "best.tar", folder / "checkpoints" / "prune1_remaining_100.0.tar")
    files = [*(folder / "baselines").iterdir(), folder / "short_analyses" / "best.nc"]
    before = {path: path.stat().st_mtime_ns for path in files}
    forbidden = lambda *args, **kwargs: pytest.fail("a baseline was made again")
    with monkeypatch.context() as patch:
        for place, name in ((chapter, "baseline_states"), (baselines, "fit_baselines"), (ceiling, "lyapunov_exponent")):
            patch.setattr(place, name, forbidden)
        results = go(folder)
    assert list(results) == ["best", "prune1_remaining_100.0"]
    assert {path: path.stat().st_mtime_ns for path in files} == before
    np.testing.assert_array_equal(*(scores.rmse for scores in results.values()))


def test_switches_switch(folder):
    assert "The solver, from the one-step error of dense," in verdict("best", read_short(folder)["best"])
    plain = go(folder, short_analysis, "analysis.linear=false", "analysis.ceiling=false")["best"]
    assert tuple(plain.forecast.values) == ("emulator", "persistence", "damped", "climatology")
    assert math.isnan(plain.attrs["lyapunov_exponent"]) and "solver" not in verdict("best", plain)
    assert go(folder, short_analysis, "analysis.max_leadtime=5")["best"].sizes["lead"] == 5
    assert go(folder, short_analysis, "analysis.n_ensembles=3")["best"].sizes["start"] == 3


def test_small_groups_give_the_same_numbers(folder, monkeypatch):
    whole = read_short(folder)["best"]
    shutil.rmtree(folder / "short_analyses"), shutil.rmtree(folder / "baselines")
    for place in (begin, baselines):
        monkeypatch.setattr(place, "GROUP", 2 * N**2 * 4 * 16 * 2)  # two starts at a time
    parts = go(folder)["best"]
    for name in ("rmse", "acc", "band_rmse", "error_spectrum"):
        for forecast in [f for f in FORECASTS if f != "linear"]:  # whose modes come from fewer snapshots
            slack = 1e-2 if forecast in ("emulator", "ceiling") else 1e-4  # rounding and the solver's step depend on the batch
            np.testing.assert_allclose(parts[name].sel(forecast=forecast), whole[name].sel(forecast=forecast), rtol=slack, atol=slack)


def test_memory_does_not_grow_with_the_leads():
    "In a process of its own: what scoring takes beside a truth of 84 MB, which is little more than one lead of all starts."
    script = """
import resource, torch
from itertools import repeat
from turbvit_nb.forecast.scores import score_states
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
truth, climate = torch.rand(64, 2, 40, 64, 64), torch.rand(2, 64, 64)
score_states(repeat(truth[:, :, 0], 2), truth[:, :, :2], climate, (4, 8))
before = peak()
score_states(repeat(truth[:, :, 0], 40), truth, climate, (4, 8))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # MiB; 1200 when every lead's scores were tensors of their own


def test_several_runs_in_one_go(folder, home):
    shutil.copytree(folder, folder.parent / "other")
    path = write(home, "study", 'checkpoint_dir = "."\n')
    results = go(path)
    assert list(results) == ["other-best", "vit-best"]
    assert [identity_from(scores.attrs).label for scores in results.values()] == ["other dense", "vit dense"]
    np.testing.assert_array_equal(results["other-best"].rmse, results["vit-best"].rmse)
    alone = go(write(home, "second", f'checkpoint_dir = "{folder}"\n'))
    assert list(alone) == ["best"]
    np.testing.assert_allclose(alone["best"].acc, read_short(folder)["best"].acc, atol=1e-6)


def test_an_ensemble_scores_as_scoringrules_says(folder):
    scores = go(folder, short_analysis, "analysis.members=5", "analysis.perturbation=0.5")["best"]
    assert list(scores.ensemble.values) == ["emulator", "climatology"] and scores.attrs["perturbation"] == 0.5
    usual, scores = scores.sel(ensemble="climatology"), scores.sel(ensemble="emulator")
    assert scores.rank_count.dims == ("lead", "field", "rank") and (scores.rank_count.sum("rank") == STARTS * N * N).all()
    ratio = usual.spread.sel(field="u").mean() / usual.skill.sel(field="u").mean()
    assert 0.5 < ratio < 1.5 and abs(usual.crps.sel(field="u").mean("start").diff("lead")).max() < 0.2 * usual.crps.max()
    run = open_run(folder, "short_analysis", ["analysis.members=5"])
    dataset = open_scored(run.config)
    starts = Starts(dataset, start_samples(len(dataset), STARTS), torch.zeros(2, N, N), run.device)
    emulator = load_emulator(folder / "checkpoints" / "best.tar")
    group = starts.group(starts.spans()[0])
    spectrum = 0.25 * begin.one_step_error(emulator, starts)
    lead = 4
    states = list(ensembles.ensemble_states(emulator, group, lead, 5, spectrum))[-1].double().numpy()
    there = group["truth"][:, :, lead - 1].double().numpy()
    crps = scoringrules.crps_ensemble(there, states, m_axis=1, estimator="fair").mean((-2, -1))
    np.testing.assert_allclose(scores.crps.sel(lead=lead).values[:, :2], crps, rtol=1e-3)
    np.testing.assert_allclose(scores.spread.sel(lead=lead).values[:, :2], np.sqrt(states.var(1, ddof=1).mean((-2, -1))), rtol=1e-3)
    np.testing.assert_allclose(scores.skill.sel(lead=lead).values[:, :2], np.sqrt(((states.mean(1) - there) ** 2).mean((-2, -1))), rtol=1e-3)
    start = Grid.of(torch.from_numpy(states)).energy_spectrum(torch.from_numpy(states - states.mean(1, keepdims=True)))
    assert float(start.sum()) > 0


def test_a_perturbation_is_tuned_on_frames_that_are_not_scored(folder, home):
    scores = go(folder, short_analysis, "analysis.members=4", "analysis.perturbation=tuned")["best"]
    size = scores.attrs["perturbation"]
    assert 1 / 64 <= size <= 64 and abs(2 * np.log2(size) - round(2 * np.log2(size))) < 1e-9
    fixed = go(folder, short_analysis, "analysis.members=4", f"analysis.perturbation={size}")["best"]
    np.testing.assert_array_equal(fixed.crps, scores.crps)
    path = write(home, "vit", 'checkpoint_dir = "vit"\n')
    path.write_text(re.sub(r"\[test_dataset\].*?(?=\[training)", "", path.read_text(), flags=re.S))
    with pytest.raises(LabError, match="needs .validation_dataset. beside .test_dataset."):
        go(path, short_analysis, "output_dir=blind", "analysis.members=4", "analysis.perturbation=tuned")


def test_the_solver_parts_from_itself_where_frames_do_not_hold_its_waves(home, folder, capsys, monkeypatch):
    fine = GenerateConfig(data_dir=str(home / "fine"), Re=100, fky=4, beta=20.0, NX=N, solve_NX=2 * N, n_frames=40, t_save=0.1, spin_up=20.0)
    dataset = open_dataset(DatasetConfig(data_dirs=[str(generate(fine))], frame_range=[[1, 41]], mode="read"), num_frames=begin.HISTORY)
    dataset.targets = LEADS
    starts = Starts(dataset, start_samples(len(dataset), 4), torch.zeros(2, N, N), torch.device("cpu"))
    unseen = ensembles.unseen_spectrum(starts)
    scores = ensembles.score_ensemble(lambda group: ensembles.solver_members(starts, group, 4, unseen), starts, 4, "solver")
    scores = scores.sel(ensemble="solver", field="omega")
    still = begin.score_forecast(starts, "persistence", lambda group: [group["x"][:, :, 0]] * LEADS)
    assert (scores.spread > 0).all() and (scores.skill < 0.2 * still.rmse.sel(forecast="persistence", field="omega")).all()
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    go(folder, short_analysis, "analysis.members=4", "analysis.solver_ensemble=true")
    assert "no ensemble of the solver: the frames hold all of its waves" in "".join(capsys.readouterr())


def test_starts_of_several_flows_are_advanced_each_by_its_own(home, data):
    generate(GenerateConfig(data_dir=str(home / "viscous"), Re=40, fky=4, beta=5.0, NX=N, n_frames=20, t_save=0.1, spin_up=5.0))
    cfg = DatasetConfig(data_dirs=[str(data / "flow"), str(home / "viscous")], frame_range=[[1, 21]], mode="read")
    dataset = open_dataset(cfg, num_frames=begin.HISTORY)
    dataset.targets = 5
    starts = Starts(dataset, start_samples(len(dataset), 8), torch.zeros(2, N, N), torch.device("cpu"))
    assert len(set(starts.flows)) == 2
    group = starts.group(starts.spans()[0])
    unperturbed = torch.zeros(int(Grid.of(group["x"]).shells.max()) + 1)
    for lead, state in enumerate(ceiling.twin_states(starts, group, unperturbed)):
        torch.testing.assert_close(state.float(), group["truth"][:, :, lead], atol=1e-3, rtol=0)


@pytest.mark.parametrize("fields", [("omega",), ("v", "omega", "u")])
def test_an_emulator_of_other_fields_is_scored_by_its_velocity(starts, fields):
    emulator = Emulator(Noisy(0.0), Normaliser([0.0] * len(fields), [1.0] * len(fields)), fields=fields, step=0.1)
    mine = begin.score_emulator(emulator, starts)
    still = begin.score_forecast(starts, "persistence", lambda group: [group["x"][:, :, 0]] * LEADS)
    np.testing.assert_allclose(mine.rmse[0], still.rmse[0], atol=1e-4)


class Noisy(nn.Module):
    "A generative network: what it adds to the newest frame is drawn anew at every call."

    def __init__(self, size: float, blow_up: float = 0.0):
        super().__init__()
        self.config, self.size, self.blow_up = {"img_size": N}, size, blow_up
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, z, cond):
        late = torch.where(z.abs().amax((1, 2, 3, 4), keepdim=True) > self.blow_up, torch.nan, 0.0) if self.blow_up else 0.0
        return self.size * torch.randn_like(z[:, :, :1]) + late


def noisy_emulator(size: float, blow_up: float = 0.0) -> Emulator:
    return Emulator(Noisy(size, blow_up), Normaliser([0.0, 0.0], [1.0, 1.0]), step=0.1, project=True)


@pytest.fixture
def starts(folder) -> Starts:
    run = open_run(folder, "short_analysis")
    dataset = open_scored(run.config)
    return Starts(dataset, start_samples(len(dataset), STARTS), baselines.baseline_fits(run).climate, run.device)


def test_a_generative_emulator_makes_its_own_members(starts):
    torch.manual_seed(0)
    scores = emulator_ensemble(noisy_emulator(0.1), starts, 4, perturbation=0.0)
    spread = scores.spread.sel(field=["u", "v"], ensemble="emulator").mean(("start", "field")).values
    np.testing.assert_allclose(spread[1:] / spread[0], np.sqrt(np.arange(2, LEADS + 1)), rtol=0.1)  # a random walk
    with pytest.raises(LabError, match="the 4 members are all the same: .* set analysis.perturbation above 0"):
        emulator_ensemble(noisy_emulator(0.0), starts, 4, perturbation=0.0)


def test_what_came_before_a_nan_is_kept_and_marked(starts):
    torch.manual_seed(0)
    scores = begin.score_emulator(noisy_emulator(1.0, blow_up=6.0), starts)
    finite = np.isfinite(scores.rmse.values[0]).all(-1)
    assert finite[:, 0].all() and not finite[:, -1].all()
    assert (np.diff(finite.astype(int)) <= 0).all()
    lost = int(np.where(finite.all(0), LEADS, 0).size - finite.all(0).sum())
    mean = curve(scores, "rmse")
    assert np.isfinite(mean[: LEADS - lost]).all() and np.isnan(mean[LEADS - lost :]).all()
    scores.attrs |= {"threshold": -2.0}
    assert horizons(scores)[0] == LEADS - lost + 1


def test_mistakes_cost_one_line(folder, home):
    sound = (folder / "config.toml").read_text()

    def fails(message: str, *overrides: str):
        (folder / "config.toml").write_text(sound)
        with pytest.raises(LabError, match=message) as error:
            go(folder, short_analysis, *overrides)
        assert "\n" not in str(error.value)

    fails(r"max_leadtime = 90 needs 93 frames in a row; the longest range of \[test_dataset\] has 90", "analysis.max_leadtime=90")
    fails("train_dataset and test_dataset share 10 frames", "test_dataset.trajectories=[2]", "test_dataset.frame_range=[[61, 91]]", "validation_dataset.trajectories=[3]")
    fails("climo_dataset and test_dataset share 31 frames", 'climo_dataset.data_dir="flow"', "climo_dataset.trajectories=[3]", "climo_dataset.frame_range=[[60, 91]]")
    fails("lyapunov_time = 1 is too short", "analysis.lyapunov_time=1.0")
    fails("no checkpoint bets in .*; it holds best", 'analysis.checkpoints=["bets"]')
    fails("holds 2 frames in a row; the forecasts to compare with need 4", "train_dataset.frame_range=[[1, 3]]")
    generate(GenerateConfig(data_dir=str(home / "fine"), Re=100, fky=4, beta=20.0, NX=32, n_frames=90, t_save=0.1, spin_up=0.5))
    fails(r"model.img_size = 16, but the frames of \[test_dataset\] are 32²", f'test_dataset.data_dir="{home / "fine"}"', "test_dataset.trajectories=[1]")
    fails(r"best makes steps of 0.1 time units, target_step of \[test_dataset\] makes them 0.2", "test_dataset.target_step=2")


def test_a_short_training_range_says_where_damping_ends(folder, capsys, monkeypatch):
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    scores = go(folder, short_analysis, "train_dataset.frame_range=[[1, 11]]")["best"]
    assert "holds 10 frames in a row: damped persistence ends at step 7 of 12" in "".join(capsys.readouterr())
    each = np.isfinite(scores.rmse.sel(forecast="damped")).all(("start", "field")).values
    assert each[:7].all() and not each[7:].any() and np.isfinite(scores.rmse.sel(forecast="emulator")).all()


def synthetic(rng: np.random.Generator, starts: int, memory: float) -> xr.Dataset:
    "Scores whose ACC is 1 − 0.05 lead on average, with a deviation that is an AR(1) process from start to start."
    deviation = [rng.normal()]
    for _ in range(starts - 1):
        deviation.append(memory * deviation[-1] + math.sqrt(1 - memory**2) * rng.normal())
    acc = 1 - 0.05 * np.arange(1, 16)[None] + 0.1 * np.array(deviation)[:, None]
    values = np.repeat(acc[None, :, :, None], 3, -1)
    return xr.Dataset({name: (("forecast", "start", "lead", "field"), values) for name in ("acc", "rmse")}, {"forecast": ["emulator"], "field": ["u", "v", "omega"], "lead": np.arange(1, 16)}, {"threshold": 0.62})


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_intervals_hold_the_truth_though_starts_are_dependent(memory, monkeypatch):
    rng, held, naive, horizon_held, trials = np.random.default_rng(1), 0, 0, 0, 120
    for _ in range(trials):
        scores = synthetic(rng, 48, memory)
        low, high = curve_interval(scores, "acc")
        held += low[4] <= 0.75 <= high[4]
        middle, left, right = horizons(scores)
        horizon_held += left <= 8 <= right  # 1 − 0.05 · 8 = 0.6 is the first below 0.62
        with monkeypatch.context() as patch:
            patch.setattr(reading, "start_block", lambda *args: 1)
            low, high = curve_interval(scores, "acc")
            naive += low[4] <= 0.75 <= high[4]
    assert held >= 0.88 * trials and horizon_held >= 0.88 * trials
    assert naive < (0.75 if memory else 1.0) * trials + 1


def test_too_few_starts_have_no_interval():
    scores = synthetic(np.random.default_rng(0), 1, 0.0)
    assert curve_interval(scores, "acc") is None
    assert all(math.isnan(value) for value in horizons(scores)[1:])
