"""The analyses as whole jobs: against brute force, on real Py2D output, resumed, and with the mistakes that users make."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from small import small_config

from turbvit_nb.climate.diagnostics import Setting, bin_ranges, block_frames
from turbvit_nb.climate.distances import chance_distances, climate_distances, read_long
from turbvit_nb.climate.keys import AnalysisConfig
from turbvit_nb.climate.passes import accumulate, climate_dataset, in_processes, merge_parts
from turbvit_nb.climate.records import Record, rollout_record, truth_records
from turbvit_nb.compare import compare
from turbvit_nb.datasets import DatasetConfig, open_dataset
from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.inference import infer
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.runs import open_run
from turbvit_nb.long_analysis import long_analysis
from turbvit_nb.model import load_emulator, rollout
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime, find_runs, open_store
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.prune import prune
from turbvit_nb.forecast.reading import horizons
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.train import train

N = 16
SECTIONS = "\n" + small_config([1, 2], 41, 61, "waves") + """[pruning]
importance_metric = "l1"
prune_schedule = [{fraction}]
epoch_schedule = [1]
[finetuning]
batch_size = 16
rollout_steps = 4
rollout_starts = 2
[inference]
inference_length = 40
chunk_size = 16
n_starts = 2
[analysis]
max_leadtime = 12
n_ensembles = 5
PC_autocorr_nlags = 10
eof_ncomp = 2
extreme_block = 0.5
pdf_bins = 40
"""


def waves(ic: int, frames: int) -> np.ndarray:
    "Vorticity (frames, N, N) of a few travelling waves over a breathing jet."
    rng, x = np.random.default_rng(ic), np.arange(N) * 2 * np.pi / N
    X, Y, t = x[:, None], x[None], 0.1 * np.arange(1, frames + 1)[:, None, None]
    field = (1 + 0.3 * np.sin(0.9 * t + ic)) * np.cos(2 * Y)
    for kx, ky in ((1, 0), (1, 1), (2, -1), (3, 2)):
        field = field + rng.normal() * np.cos(kx * X + ky * Y - rng.normal() * t + 6 * rng.random())
    return field


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    "A data root with three packed trajectories."
    root = tmp_path_factory.mktemp("data")
    for ic in (1, 2, 3):
        regime = Regime(200, 0, 4, 0.1, 20.0, NX=N, dt=0.01, IC=ic)
        writer = PackedWriter(root / "waves" / regime.path() / PACKED, regime, 60)
        for n, omega in enumerate(waves(ic, 60), 1):
            writer.append(0.1 * n, omega)
        writer.finish()
    return root


def config(home: Path, name: str, fraction: float = 0.5) -> Path:
    "A config file for the run called `name`."
    path = home / f"{name}.toml"
    path.write_text(f'output_dir = "{name}"' + SECTIONS.format(fraction=fraction))
    return path


def go(path: Path, stage: str, job, *overrides: str):
    "Open the run for a stage, do the job, finish."
    run = open_run(path, stage, overrides)
    result = job(run)
    run.finish()
    return result


@pytest.fixture(scope="session")
def made(data, tmp_path_factory) -> Path:
    "A folder of runs: a pruned one and its control, analysed."
    home = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBVIT_RUNS", str(home / "runs"))
        patch.setenv("TURBVIT_DATA", str(data))
        for name, fraction in (("pruned", 0.5), ("control", 0.0)):
            path = config(home, name, fraction)
            for stage, job in (("train", train), ("prune", prune), ("inference", infer), ("short_analysis", short_analysis), ("long_analysis", long_analysis)):
                go(path, stage, job)
    return home / "runs"


@pytest.fixture
def study(made, home) -> dict[str, Path]:
    "A copy of the study for one test."
    shutil.copytree(made, home / "runs")
    return {name: home / "runs" / name for name in ("pruned", "control")}


def test_a_study_from_training_to_verdict(study, home):
    folder = study["pruned"]
    names = {path.stem for path in (folder / "short_analyses").iterdir()}
    assert names == {"best", "prune1_remaining_50.0"}
    assert {path.stem for path in (folder / "long_analyses").iterdir()} == names | {"truth"}

    scores = xr.load_dataset(folder / "short_analyses" / "best.nc", engine="h5netcdf")
    assert scores.acc.dims == ("forecast", "start", "lead", "field") and scores.sizes["start"] == 5
    assert scores.rmse.attrs["units"] and scores.lead_time.attrs["units"] and "[analysis]" in scores.attrs["config"]
    check_by_brute_force(folder, scores)

    (home / "compare.toml").write_text('output_dir = "study"\n[compare]\nruns = ["pruned", "control"]\nleads = [5, 10]\n')
    entries, missing, said = go(home / "compare.toml", "compare", compare)
    assert [entry.role for entry in entries] == ["dense", "pruned", "dense", "control"] and not missing
    assert any("against its control" in part.sentence or "its control's" in part.sentence for part in said)
    told = json.loads((home / "runs" / "study" / "comparison.json").read_text())
    assert [row["remaining"] for row in told["rows"]][1] == pytest.approx(0.5, abs=0.01) and told["verdict"] == [part.sentence for part in said]
    assert [row["model"] for row in told["scorecard"]] == [row["label"] for row in told["rows"]]
    table = xr.load_dataset(home / "runs" / "study" / "comparison.nc", engine="h5netcdf")
    assert table.sizes["entry"] == 4 and table["ACC u at 5"].notnull().all()


def check_by_brute_force(folder: Path, scores: xr.Dataset) -> None:
    "The file's RMSE and ACC of one start, recomputed with plain numpy from the stores."
    omega = {ic: open_store(path).read(np.arange(1, 61)).astype(np.float64) for ic, path in zip((1, 2, 3), find_runs(os.environ["TURBVIT_DATA"] + "/waves"))}
    k = np.fft.fftfreq(N, 1 / N)
    KX, KY = np.meshgrid(k, k, indexing="ij")
    K2 = KX**2 + KY**2
    inverse = np.divide(1, K2, where=K2 > 0, out=np.zeros_like(K2))
    inner = (np.abs(KX) < N / 2) & (np.abs(KY) < N / 2)

    def velocity(w):
        psi = np.fft.fft2(w) * inverse * inner
        return np.stack([np.fft.ifft2(1j * KY * psi).real, np.fft.ifft2(-1j * KX * psi).real])

    climate = np.mean([velocity(w) for ic in (1, 2) for w in omega[ic][:40]], axis=0)
    emulator = load_emulator(folder / "checkpoints" / "best.tar")
    start, frame = 1, int(scores.start_frame[1])
    x0 = torch.from_numpy(velocity(omega[3][frame - 1])).float()[None, :, None]
    cond = torch.tensor([[200.0, 0.0, 4.0, 0.1, 20.0]])
    states = [state[0].double().numpy() for state in rollout(emulator, x0, 12, cond=cond)]
    for lead in (1, 7, 12):
        truth = velocity(omega[3][frame - 1 + lead])
        for i, field in enumerate("uv"):
            mine, theirs = states[lead - 1][i] - climate[i], truth[i] - climate[i]
            at = dict(forecast="emulator", lead=lead, field=field)
            assert scores.acc.sel(at).values[start] == pytest.approx((mine * theirs).sum() / np.sqrt((mine**2).sum() * (theirs**2).sum()), abs=1e-4)
            assert scores.rmse.sel(at).values[start] == pytest.approx(np.sqrt(((mine - theirs) ** 2).mean()), rel=1e-4)
            at["forecast"] = "persistence"
            assert scores.rmse.sel(at).values[start] == pytest.approx(np.sqrt(((velocity(omega[3][frame - 1])[i] - truth[i]) ** 2).mean()), rel=1e-4)


def test_whole_results_are_not_made_again_and_changed_settings_are(study):
    folder = study["pruned"]
    files = sorted(folder.glob("*_analyses/*.nc"))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == 5
    go(folder, "short_analysis", short_analysis), go(folder, "long_analysis", long_analysis)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    again = go(folder, "short_analysis", short_analysis, "analysis.max_leadtime=6")
    assert again["best"].sizes["lead"] == 6
    assert go(folder, "long_analysis", long_analysis, "analysis.eof_ncomp=1")["truth"].sizes["mode"] == 1
    assert not list(folder.rglob("*.part*"))


def test_every_switch_of_the_analysis_switches(study):
    folder = study["pruned"]
    kept = {"temporal_mean": "mean", "zonal_mean": "zonal_mean", "zonal_eof_pc": "eof", "div": "divergence", "PDF_U": "pdf_u"}
    kept |= {"PDF_Omega": "pdf_omega", "spectra": "energy_spectrum", "return_period": "return_level", "return_period_anomaly": "anomaly_return_level"}
    # Four runs: in run n a switch is on where bit n of its code is 1. No two codes are alike, and each has zeros and ones, so that every
    # switch is seen on and off, and no two of them always together.
    codes = dict(zip(kept, range(1, 15)))
    for n in range(4):
        on = {name: bool(code >> n & 1) for name, code in codes.items()}
        overrides = [f"analysis.{name}={str(value).lower()}" for name, value in on.items()]
        climate = go(folder, "long_analysis", long_analysis, *overrides)["best"]
        assert {name: variable in climate for name, variable in kept.items()} == on
    short = go(folder, "long_analysis", long_analysis, "analysis.analysis_length=25", "analysis.return_period_anomaly=true")
    assert short["best"].sizes["frame"] == short["truth"].sizes["frame"] == 25
    moved = folder.parent / "elsewhere"
    (folder / "inference").rename(moved)
    assert "best" in go(folder, "long_analysis", long_analysis, f'analysis.inference_dir="{moved}"')


MISTAKES = {
    "analysis.PC_autocorr_nlags=60": "PC_autocorr_nlags = 60 needs more frames than that; a record of truth has 60",
    "analysis.eof_ncomp=17": "profiles of 16 points have 1 to 16 EOFs",
    'analysis.inference_dir="/nowhere"': "no rollout in /nowhere; run the inference first, or set analysis.inference_dir",
}
SOUND = ["analysis.PC_autocorr_nlags=10", "analysis.extreme_block=0.5", "analysis.eof_ncomp=2"]


def test_mistakes_cost_one_line(study, home):
    folder = study["pruned"]
    for override, message in MISTAKES.items():
        with pytest.raises(LabError) as error:
            go(folder, "long_analysis", long_analysis, *SOUND, override)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(LabError, match=r"max_leadtime = 60 needs 63 frames in a row; the longest range of \[test_dataset\] has 60"):
        go(folder, "short_analysis", short_analysis, "analysis.max_leadtime=60")
    with pytest.raises(LabError, match="no checkpoint bets in .*; it holds best"):
        go(folder, "short_analysis", short_analysis, 'analysis.checkpoints=["bets"]')
    with pytest.raises(LabError, match="there is no run prunde"):
        (home / "c.toml").write_text('output_dir = "c"\n[compare]\nruns = ["prunde"]\n')
        go(home / "c.toml", "compare", compare)


def test_a_block_of_extremes_longer_than_the_record_costs_one_fit(study, capsys, monkeypatch):
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    climates = go(study["pruned"], "long_analysis", long_analysis, *SOUND, "analysis.extreme_block=5.0")
    told = capsys.readouterr()
    assert "extreme_block = 5 time units needs three blocks" in told.out + told.err
    best = climates["best"]
    assert best.gev_level.isnull().all() and np.isfinite(best.event_rate).all()
    assert all(name in best for name in ("mean", "zonal_mean", "eof", "pdf_u", "energy_spectrum", "energy_budget"))


def test_a_climate_says_of_which_checkpoint_it_is(study):
    best, pruned = (climate.attrs for name, climate in read_long(study["pruned"]).items() if name != "truth")
    assert (best["checkpoint"], best["checkpoint_role"], best["checkpoint_stage"]) == ("best", "dense", 0)
    assert (pruned["checkpoint"], pruned["checkpoint_role"], pruned["checkpoint_stage"]) == ("prune1_remaining_50.0", "pruned", 1)
    assert pruned["checkpoint_remaining"] == pytest.approx(50)
    assert "checkpoint" not in read_long(study["pruned"])["truth"].attrs


def test_a_climatology_that_knows_the_test_frames_is_refused(study):
    overlap = ["climo_dataset.data_dir=\"waves\"", "climo_dataset.frame_range=[[30, 61]]"]
    for stage, job in (("short_analysis", short_analysis), ("long_analysis", long_analysis)):
        with pytest.raises(LabError, match="climo_dataset and test_dataset share 31 frames"):
            go(study["pruned"], stage, job, *overlap)


def test_a_rollout_with_a_nan_keeps_what_came_before(study):
    folder = study["pruned"]
    chunk = sorted((folder / "inference" / "best").glob("*/17.npy"))[0]
    states = np.load(chunk)
    states[5, 1, 2, 2] = np.nan
    np.save(chunk, states)
    climates = go(folder, "long_analysis", long_analysis, "analysis.pdf_bins=41")
    assert np.isfinite(climates["best"].energy.values[0]).sum() == 21
    assert np.isfinite(climates["best"]["mean"].values).all()
    assert json.loads(climates["best"].attrs["ended_early"]) == [f"step 22 of {chunk.parent} is not finite"]


def test_a_rollout_that_blew_up_early_is_left_out_and_said(study):
    folder = study["pruned"]
    for late in (folder / "inference" / "prune1_remaining_50.0").glob("*/[1-9]?.npy"):
        late.unlink()
    for chunk in [*(folder / "inference" / "best").glob("*/17.npy")][:1]:
        (chunk.parent / "33.npy").unlink(), chunk.unlink()
    climates = go(folder, "long_analysis", long_analysis, "analysis.PC_autocorr_nlags=20")
    assert list(climates) == ["truth", "best"] and climates["best"].sizes["record"] == 1
    assert "has only 16 of the 21 frames" in json.loads(climates["best"].attrs["left_out"])[0]
    assert not (folder / "long_analyses" / "prune1_remaining_50.0.nc").exists()
    for late in (folder / "inference" / "best").glob("*/[1-9]?.npy"):
        late.unlink()
    with pytest.raises(LabError, match="no rollout can be analysed: .* has only 16 of the 21 frames"):
        go(folder, "long_analysis", long_analysis)


def test_rollouts_that_do_not_fit_or_are_damaged_are_left_out_and_named(study, capsys, monkeypatch):
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    folder = study["pruned"]
    first, other = sorted(path for path in (folder / "inference" / "best").iterdir() if path.is_dir())
    for chunk in first.glob("*.npy"):
        np.save(chunk, np.zeros((len(np.load(chunk)), 2, 8, 8), np.float32))
    for chunk in (folder / "inference" / "prune1_remaining_50.0").glob("*/17.npy"):
        chunk.write_bytes(chunk.read_bytes()[:500])
    climates = go(folder, "long_analysis", long_analysis, "analysis.pdf_bins=41")
    assert list(climates) == ["truth", "best"] and climates["best"].record.values.tolist() == [f"best/{other.name}"]
    assert json.loads(climates["best"].attrs["left_out"])[0].startswith(f"best/{first.name} is on a grid of 8², the truth on 16²")
    told = capsys.readouterr()
    assert f"17.npy is damaged (ValueError): delete {folder / 'inference' / 'prune1_remaining_50.0'}" in told.out + told.err


def test_damaged_results_are_made_again(study, capsys, monkeypatch):
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    folder = study["pruned"]
    sound = go(folder, "short_analysis", short_analysis), go(folder, "long_analysis", long_analysis)
    for name in ("short_analyses/best.nc", "baselines/fits.npz", "baselines/scores.nc", "long_analyses/best.nc"):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = go(folder, "short_analysis", short_analysis), go(folder, "long_analysis", long_analysis)
    for before, after in zip(sound, again):
        xr.testing.assert_allclose(before["best"], after["best"])
    told = capsys.readouterr()
    assert sum(line.endswith("is made again") or "is damaged" in line for line in (told.out + told.err).splitlines()) >= 3
    (folder / "long_analyses" / "best.nc").write_bytes(b"x")
    with pytest.raises(LabError, match="best.nc is damaged .*: delete it and run 06_long_analysis again"):
        read_long(folder)


SWITCHES = ("temporal_mean", "zonal_mean", "zonal_eof_pc", "div", "return_period", "return_period_anomaly", "PDF_U", "PDF_Omega", "spectra", "budget", "symmetry", "artefact")


@pytest.mark.parametrize("on", [(), ("spectra", "zonal_mean")])
def test_the_report_has_what_is_switched_on_and_nothing_else(study, on, warm):
    told = [f"--set=analysis.{name}={'true' if name in on else 'false'}" for name in SWITCHES]
    ran = subprocess.run([warm, "-m", "turbvit_nb.cli", "run", "--no-lessons", "06", study["pruned"], *told], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = nbformat.read(study["pruned"] / "06_long_analysis.ipynb", 4)
    pictures = [output for cell in report.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 1 + len(on) and not any(output.output_type == "error" for cell in report.cells for output in cell.get("outputs", []))


def brute(records) -> tuple[torch.Tensor, torch.Tensor]:
    "All frames of records of vorticity at once, in double precision: velocity and vorticity."
    omega = torch.cat([record.read(0, len(record))["vorticity"] for record in records]).double()
    return Grid.of(omega).velocity(omega), omega


def trajectories(data: Path, numbers: list[int]):
    "Records of the made-up data."
    return truth_records(open_dataset(DatasetConfig(data_dir=str(data / "waves"), trajectories=numbers, frame_range=[[1, 61]], mode="read"), ("omega",)))


def test_the_long_analysis_agrees_with_numpy_at_once(data):
    records = trajectories(data, [1, 2])
    asked = AnalysisConfig(eof_ncomp=3, PC_autocorr_nlags=8, pdf_bins=31, return_period_anomaly=False, py2d_spectra=True)
    setting = Setting(asked, 0.1, None, bin_ranges(records), block=6, regime=Regime(200, 0, 4, 0.1, 20.0, NX=N))
    climate = climate_dataset(accumulate(records, setting), records)
    uv, omega = brute(records)
    np.testing.assert_allclose(climate["mean"].sel(field="u"), uv[:, 0].mean(0), atol=1e-6)
    np.testing.assert_allclose(climate["mean"].sel(field="omega"), omega.mean(0), atol=1e-6)
    np.testing.assert_allclose(climate.variance.sel(field="omega"), omega.numpy().var(0), atol=1e-5)
    np.testing.assert_allclose(climate.variance.sel(field="v"), uv[:, 1].numpy().var(0), atol=1e-6)
    profiles = uv[:, 0].mean(1).numpy()
    anomalies = profiles - profiles.mean(0)
    _, singular, rows = np.linalg.svd(anomalies, full_matrices=False)
    np.testing.assert_allclose(climate.explained, (singular**2 / (singular**2).sum())[:3], atol=1e-6)
    assert abs(climate.eof.values[0] @ rows[0]) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(np.abs(climate.pc.values.reshape(120, 3)[:, 0]), np.abs(anomalies @ rows[0]), atol=1e-5)
    single = Grid.of(omega.float()).velocity(omega.float())[:, 0].numpy()
    counts, _ = np.histogram(single, 31, (-setting.ranges["u"], setting.ranges["u"]))
    assert np.abs(climate.counts_u.values[1:-1] - counts).sum() <= 4 and climate.counts_u.sum() == single.size
    assert float(climate.kurtosis_omega) == pytest.approx(scipy.stats.kurtosis(omega.numpy().ravel(), fisher=False), rel=1e-5)
    assert float(climate.energy_spectrum.sum()) == pytest.approx(float((uv**2).sum(1).mean()) / 2, rel=1e-6)
    assert float(climate.return_level.sel(extreme="largest u").max()) == pytest.approx(float(uv[:, 0].max()), abs=1e-5)
    np.testing.assert_allclose(climate.energy.values.ravel(), (uv**2).sum(1).mean((-2, -1)) / 2, rtol=1e-6)


def test_a_distribution_counts_its_tails(data):
    records = trajectories(data, [1])
    uv, omega = brute(records)
    setting = Setting(AnalysisConfig(pdf_bins=10), 0.1, None, {"u": 0.5, "omega": 1.0}, block=6)
    climate = climate_dataset(accumulate(records, setting, ["energetics", "PDF_U", "PDF_Omega"]), records)
    assert climate.counts_omega.values[0] == (omega < -1).sum() and climate.counts_omega.values[-1] == (omega >= 1).sum()
    assert climate.counts_omega.sum() == omega.numel()
    assert float(climate.std_omega) == pytest.approx(float(omega.std(correction=0)), rel=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_pass_merge_to_one_pass(study, data, parts):
    "In single precision, as data are stored: truth and rollouts, of several records, in parts of any order."
    folder = study["pruned"]
    rollouts = [rollout_record(r) for r in open_rollouts(folder)["best"]]
    asked = AnalysisConfig(eof_ncomp=3, PC_autocorr_nlags=8, pdf_bins=31)
    for records in (trajectories(data, [1, 2]), rollouts):
        setting = Setting(asked, 0.1, torch.zeros(3, N, N), bin_ranges(records), block=block_frames(records), regime=Regime(200, 0, 4, 0.1, 20.0, NX=N))
        whole = accumulate(records, setting)
        pieces = [accumulate(records, setting, part=(i, parts)) for i in range(parts, 0, -1)]
        one, other = climate_dataset(whole, records), climate_dataset(merge_parts(pieces, records), records)
        for name in one.data_vars:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(other[name].values, one[name].values, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_processes_of_one_pass_merge_and_a_killed_one_is_named(data):
    records, job = trajectories(data, [1, 2]), os.getpid()
    setting = Setting(AnalysisConfig(), 0.1, torch.zeros(3, N, N), bin_ranges(records), block=block_frames(records), regime=Regime(200, 0, 4, 0.1, 20.0, NX=N))
    whole, shared = accumulate(records, setting), in_processes(records, setting, workers=3)
    for name, part in whole.items():
        for series in part.series:
            for mine, theirs in zip(part.rows(series), shared[name].rows(series)):
                np.testing.assert_allclose(theirs, mine, rtol=1e-10, atol=1e-10)
        for sums in part.blocks:
            np.testing.assert_allclose(shared[name].mean(sums), part.mean(sums), rtol=1e-10, atol=1e-10)
    deadly = [replace(record, read=lambda a, b, record=record: record.read(a, b) if os.getpid() == job else os.kill(os.getpid(), signal.SIGKILL)) for record in records]
    with pytest.raises(LabError, match="a process of the long analysis was killed"):
        in_processes(deadly, setting, workers=2)


def test_jobs_over_parts_make_the_files_that_one_job_makes(study, home):
    folder = study["pruned"]
    alone = go(folder, "long_analysis", long_analysis, "analysis.pdf_bins=41")
    settings = folder / "config.toml"
    paths = []
    for i in (1, 2):
        paths.append(home / f"part{i}.toml")
        text = settings.read_text().replace('output_dir = "pruned"', f'output_dir = "part{i}"')
        paths[-1].write_text(text)
        given = [f"analysis.part=[{i}, 2]", "analysis.pdf_bins=41", f'analysis.inference_dir="{folder / "inference"}"']
        assert go(paths[-1], "long_analysis", long_analysis, *given) == {}
    merge = ['analysis.merge=["part1", "part2"]', "analysis.pdf_bins=41", f'analysis.inference_dir="{folder / "inference"}"']
    with pytest.raises(LabError, match="there is none numbered 2"):
        go(folder, "long_analysis", long_analysis, *merge[1:], 'analysis.merge=["part1"]')
    with pytest.raises(LabError, match="were made from other settings or frames"):
        go(folder, "long_analysis", long_analysis, merge[0], merge[2], "analysis.pdf_bins=43")
    for file in (folder / "long_analyses").glob("*.nc"):
        file.unlink()
    merged = go(folder, "long_analysis", long_analysis, *merge)
    assert list(merged) == list(alone)
    for source in alone:
        for name in alone[source].data_vars:
            if alone[source][name].dtype.kind == "f":
                np.testing.assert_allclose(merged[source][name].values, alone[source][name].values, rtol=1e-10, atol=1e-10, err_msg=name)


def endless(record: Record, frames: int) -> Record:
    "The record again and again."
    kept = record.read(0, len(record))["vorticity"]
    return Record(record.label, 0.1 * np.arange(frames), lambda a, b: {"vorticity": kept[torch.arange(a, b) % len(kept)]}, record.where)


def test_what_a_pass_holds_does_not_grow_with_the_record(data):
    "Totals and block sums have one size, whatever the length; the rest lies in files."
    sizes = []
    for length in (640, 6400):
        records = [endless(record, length) for record in trajectories(data, [1, 2])]
        setting = Setting(AnalysisConfig(), 0.1, torch.zeros(3, N, N), {"u": 3.0, "omega": 20.0}, block=block_frames(records), regime=Regime(200, 0, 4, 0.1, 20.0, NX=N))
        diagnostics = accumulate(records, setting).values()
        held = [value for part in diagnostics for kept in part.blocks.values() for _, value in kept.values()]
        sizes.append(sum(value.numel() for value in held))
        assert sum(len(rows) for part in diagnostics for kept in part.series.values() for rows in kept.values()) > 10 * length
    assert sizes[0] == sizes[1]


def test_real_py2d_truth_against_truth(py2d_data):
    root = py2d_data / "results"
    store = open_store(find_runs(root)[0])
    first, last = int(store.frames[0]), int(store.frames[-1])
    cfg = DatasetConfig(data_dir=str(root), frame_range=[[last - 399, last + 1]], mode="read")
    records = truth_records(open_dataset(cfg, ("omega",)))
    setting = Setting(AnalysisConfig(return_period_anomaly=False), records[0].step, None, bin_ranges(records), block=block_frames(records), regime=store.regime)
    climate = climate_dataset(accumulate(records, setting), records)
    distances = chance_distances(climate)
    assert all(np.isfinite(value) for value in distances.values())
    assert distances["spectrum (decades)"] < 0.2 and distances["energy (relative)"] < 0.5
    halves = [records[0].first(200)], [records[0].after(200)]
    one, other = (climate_dataset(accumulate(half, setting), half) for half in halves)
    assert climate_distances(one, other)["energy (relative)"] < 0.5
    assert float(one.divergence_max) == 0
    assert float(other["mean"].sel(field="omega").mean()) == pytest.approx(0, abs=1e-5)
    assert setting.step == pytest.approx(float(np.diff(store.times)[0]), rel=1e-6)
    kx, ky = np.meshgrid(climate.kx, climate.ky, indexing="ij")
    frequency = store.regime.beta * kx / np.maximum(kx**2 + ky**2, 1)
    pumped = float(store.regime.dt) * float((frequency**2 * climate.wave_energy).sum())  # what its forward Euler step of β adds
    left = climate.energy_budget.sel(energy_term="residual").item()
    largest = float(abs(climate.energy_budget.sel(energy_term=["drag", "viscosity", "forcing"])).max())
    assert abs(left - pumped) < 0.01 * largest


def test_a_perfect_emulator_has_no_horizon():
    scores = xr.Dataset({"acc": (("forecast", "start", "lead", "field"), np.ones((3, 2, 5, 3)))})
    scores = scores.assign_coords(forecast=["emulator", "persistence", "climatology"], field=["u", "v", "omega"], lead=np.arange(1, 6)).assign_attrs(threshold=0.6)
    assert horizons(scores) == (np.inf, np.inf, np.inf)
