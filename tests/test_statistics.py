"""Intervals hold the truth as often as they say; budgets close on flows that others integrated; extremes, symmetries and drift against known laws."""
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.arima_process import ArmaProcess

from turbvit_nb.physics.budgets import Budgets, SymmetryTest, artefact_score, excess_time, stationarity
from turbvit_nb.physics.metrics import autocorrelation
from turbvit_nb.physics.py2d import Regime, find_runs, open_store
from turbvit_nb.physics.solver import Solver, random_vorticity
from turbvit_nb.physics.spectral import grid
from turbvit_nb.physics import statistics
from turbvit_nb.physics.statistics import (BlockMeans, autocorrelation_band, block_bootstrap, block_length, block_replicates,
                                           decluster, decorrelation_time, difference_interval, event_periods, extremal_index,
                                           fit_gev, fit_gpd, gev_band, gpd_band, mean_interval, return_level)

PROCESSES = {  # coefficients of the autoregression, samples per series
    "white": ([1.0], 100),
    "AR(1) 0.9": ([1.0, -0.9], 1500),
    "oscillating": ([1.0, -2 * 0.98 * math.cos(0.3), 0.98**2], 1500),
    "slow and fast": ([1.0, -0.97 - 0.3, 0.97 * 0.3], 4000),
}


def series(coefficients: list[float], n: int, count: int, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(size=(count, n + 1000))
    return torch.tensor(scipy.signal.lfilter([1], coefficients, noise)[:, 1000:].copy())


def share(interval: tuple[torch.Tensor, torch.Tensor], truth) -> float:
    low, high = interval
    return float(((low <= truth) & (truth <= high)).double().mean())


def bartlett_error(correlation: torch.Tensor, n: int, nlags: int) -> torch.Tensor:
    "Standard error (nlags + 1,) of an estimated autocorrelation by Bartlett's formula, from the true one, 0 beyond its last lag."
    rho, lags = correlation.double(), len(correlation) - 1
    middle = lags + 2 * nlags
    sided = torch.zeros(2 * middle + 1, dtype=torch.float64)
    sided[middle : middle + lags + 1], sided[middle - lags : middle + 1] = rho, rho.flip(0)
    k, v = torch.arange(nlags + 1)[:, None], torch.arange(-lags - nlags, lags + nlags + 1)[None]
    here, behind, ahead, at = sided[middle + v], sided[middle + v - k], sided[middle + v + k], sided[middle + k]
    variance = (here**2 + ahead * behind - 4 * at * here * behind + 2 * here**2 * at**2).sum(1)
    return (variance.clamp(min=0) / n).sqrt()


def record_agreement(records: list[torch.Tensor]) -> torch.Tensor:
    "p-value (…) of records (…, n_i) having one mean: the F test by which `mean_error` decides what the samples are."
    _, within, between, freedom = statistics._between(records)
    return statistics._exceeds(between, len(records) - 1, within, freedom)


# Means ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PROCESSES)
def test_mean_intervals_cover(name):
    x = series(*PROCESSES[name], count=500)
    assert 0.92 <= share(mean_interval(x), 0.0) <= 0.99
    assert share(mean_interval(x, 0.5), 0.0) < 0.6


def test_intervals_that_ignore_memory_do_not_cover():
    x = series(*PROCESSES["AR(1) 0.9"], count=500)
    half = 1.96 * x.std(-1) / x.shape[-1] ** 0.5
    assert share((x.mean(-1) - half, x.mean(-1) + half), 0.0) < 0.5


@pytest.mark.parametrize("name", ["AR(1) 0.9", "slow and fast"])
def test_decorrelation_time_is_that_of_the_process(name):
    coefficients, _ = PROCESSES[name]
    rho = ArmaProcess(np.array(coefficients), np.array([1.0])).acf(2000)
    found = decorrelation_time(series(coefficients, 50_000, 20))
    assert float(found.mean()) == pytest.approx(1 + 2 * rho[1:].sum(), rel=0.08)


def test_oscillating_memory_is_not_cut_at_its_first_zero():
    "Blocks must be longer than the ringing, whose autocorrelation adds up to almost nothing."
    x = series([1.0, -2 * 0.995 * math.cos(0.1), 0.995**2], 20_000, 5)
    assert decorrelation_time(x).max() < 20
    assert block_length(x) > 200


def test_difference_intervals_cover_between_different_processes():
    one, other = series([1.0, -0.5], 400, 500, seed=1), series([1.0, -0.95], 3000, 500, seed=2)
    assert 0.92 <= share(difference_interval(one, other + 0.2), -0.2) <= 0.985


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 9), st.randoms())
def test_block_means_of_any_parts_in_any_order_are_those_of_one_pass(cuts, block, random):
    x = torch.tensor(np.random.default_rng(0).normal(size=(60, 3)))
    edges = [0, *sorted(cuts), 60]
    parts = [BlockMeans(block).update(x[a:b], a) for a, b in zip(edges, edges[1:])]
    random.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    means = x[: 60 // block * block].reshape(-1, block, 3).mean(1)
    torch.testing.assert_close(merged.result()["mean"], means.mean(0), rtol=0, atol=1e-12)
    independent = scipy.stats.t.interval(0.95, len(means) - 1, means.mean(0), scipy.stats.sem(means))[0] if len(means) < 8 else mean_interval(means.T)[0]
    torch.testing.assert_close(merged.result()["low"], torch.as_tensor(independent), rtol=0, atol=1e-10)


def test_the_intervals_of_block_means_know_of_memory_beyond_a_block():
    "AR(1) with memory of half a block: 32 blocks, one record of them and four."
    held = {}
    for records in (1, 4):
        inside = []
        for x in series([1.0, -math.exp(-1 / 50)], 3200, 200, seed=7):
            blocks, size = BlockMeans(100), 3200 // records
            for i in range(records):
                blocks.update(x[i * size : (i + 1) * size, None], i * (size + 200))
            found = blocks.result()
            inside.append(bool(found["low"] <= 0 <= found["high"]))
        held[records] = np.mean(inside)
    assert 0.9 <= held[1] <= 0.99 and 0.9 <= held[4] <= 0.99, held


# Bootstrap ------------------------------------------------------------------------------------------------------------

def test_bootstrap_draws_what_enumeration_finds():
    "All 5³ ways to draw three blocks of two, the last cut to one, from five samples: mean and variance of the resampled mean."
    x, around = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0], dtype=torch.float64), lambda i: [i % 5, (i + 1) % 5]
    every = [float(x[(around(a) + around(b) + around(c))[:5]].mean()) for a, b, c in itertools.product(range(5), repeat=3)]
    drawn = block_replicates(x, None, 2, resamples=40_000)
    assert float(drawn.mean()) == pytest.approx(np.mean(every), abs=0.03)
    assert float(drawn.var()) == pytest.approx(np.var(every), rel=0.03)
    assert set(drawn.round(decimals=9).tolist()) == set(np.round(every, 9).tolist())


@pytest.mark.parametrize("name", PROCESSES)
def test_bootstrap_intervals_cover(name):
    "A difference of means of two halves of a pair of series, drawn together."
    coefficients, n = PROCESSES[name]
    x = series(coefficients, n, 150, seed=3)
    inside = [share(block_bootstrap(s, None, block_length(s), 400), 0.0) for s in x]
    assert 0.9 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize("phi", [0.5, 0.8, 0.95])
def test_blocks_are_twice_as_long_as_politis_and_white_have_them(phi):
    "2 (2G²/D)^⅓ n^⅓ with the sums of the true covariances, term by term (2004, eq. 9; D of circular blocks)."
    n, lags = 20_000, np.arange(-2000, 2001)
    covariance = phi ** np.abs(lags)
    G, D = (np.abs(lags) * covariance).sum(), 4 / 3 * covariance.sum() ** 2
    found = [block_length(s) for s in series([1.0, -phi], n, 20)]
    assert np.mean(found) == pytest.approx(2 * (2 * G**2 / D * n) ** (1 / 3), rel=0.1)


@pytest.mark.parametrize("n, longest, covered", [(16, 0.4, 0.82), (32, 0.1, 0.86), (64, 0.02, 0.9)])
def test_short_series_without_memory_get_short_blocks_and_those_with_some_are_covered(n, longest, covered):
    white, walk = series([1.0], n, 500, seed=4), series([1.0, -0.5], n, 500, seed=5)
    lengths = np.array([block_length(s) for s in white])
    assert np.median(lengths) == 1 and np.mean(lengths == n // 4) < longest
    inside = lambda x: np.mean([share(block_bootstrap(s, None, block_length(s), 300), 0.0) for s in x])
    assert inside(white) > 0.93 and inside(walk) > covered


def test_paired_curves_are_drawn_together():
    "Two forecasts that differ by a constant have a difference without scatter, however much both scatter."
    starts = torch.tensor(np.random.default_rng(0).normal(size=(30, 1, 8)))
    pairs = torch.cat([starts, starts + 0.25], 1)
    low, high = block_bootstrap(pairs, lambda s: (s[:, 1] - s[:, 0]).mean(0), 3, 100)
    torch.testing.assert_close(low, torch.full((8,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(high, low)


# Autocorrelation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("coefficients", [[1.0, -0.9], [1.0, -2 * 0.9 * math.cos(0.4), 0.81]])
def test_autocorrelation_bands_cover(coefficients):
    truth = torch.tensor(ArmaProcess(np.array(coefficients), np.array([1.0])).acf(61))
    x = series(coefficients, 2500, 80)
    inside, formula = [], []
    for s in x:
        band = autocorrelation_band(s, 60, resamples=200)
        inside.append(share((band["low"], band["high"]), truth))
        error = 1.96 * bartlett_error(truth, len(s), 60)
        formula.append(share((band["correlation"] - error, band["correlation"] + error), truth))
    assert 0.9 < np.mean(inside) < 0.99
    assert 0.9 < np.mean(formula) < 0.99


def test_bartlett_matches_the_scatter_of_many_series():
    coefficients = [1.0, -0.7, 0.3]
    rho = torch.tensor(ArmaProcess(np.array(coefficients), np.array([1.0])).acf(100))
    found = autocorrelation(series(coefficients, 2000, 2000), 20).std(0)
    torch.testing.assert_close(bartlett_error(rho, 2000, 20)[1:] / found[1:], torch.ones(20, dtype=torch.float64), rtol=0, atol=0.08)


# Extremes -------------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.floats(0, 6))
def test_declustering_by_hand(values, run):
    "Frame by frame: an event is open until the line between frames has been below for `run`."
    x, found, level = np.array(values, float), [], 1.5
    crossings = []  # (start, end, peak) of stretches above
    for i, v in enumerate(x):
        if v > level and (i == 0 or x[i - 1] <= level):
            crossings.append([i - 1 + (level - x[i - 1]) / (v - x[i - 1]) if i else 0.0, None, v])
        if v > level:
            crossings[-1][2] = max(crossings[-1][2], v)
            if i + 1 == len(x): crossings[-1][1] = float(i)
            elif x[i + 1] <= level: crossings[-1][1] = i + (v - level) / (v - x[i + 1])
    for start, end, peak in crossings:
        if found and start - found[-1][1] < run: found[-1][1:] = [end, max(peak, found[-1][2])]
        else: found.append([start, end, peak])
    events = decluster(torch.arange(len(x)), torch.tensor(x), level, run)
    ours = torch.stack([events["start"], events["end"], events["peak"]], 1)
    torch.testing.assert_close(ours, torch.tensor(found, dtype=torch.float64).reshape(-1, 3))


def test_return_periods_do_not_know_the_sampling_interval():
    "A smooth Gaussian process at Δt, Δt/2, Δt/4, Δt/8, against Rice's exact rate of upcrossings at high levels."
    rng, width = np.random.default_rng(5), 64
    fine = np.concatenate([scipy.ndimage.gaussian_filter1d(rng.normal(size=2**20), width, mode="wrap")])
    fine, dt = torch.tensor(fine / fine.std()), 1 / 64
    duration, levels = len(fine) * dt, []
    for stride in (8, 4, 2, 1):
        events = decluster(torch.arange(0, len(fine), stride) * dt, fine[::stride], 1.5, run=1.0)
        period, level = event_periods(events["peak"], duration)
        levels.append(np.interp([20, 100, 500], period, level))
    np.testing.assert_allclose(levels, [levels[-1]] * 4, rtol=2e-3)
    rice = 2 * math.pi * math.sqrt(2) * width * dt * np.exp(np.array([2.5, 3.0]) ** 2 / 2)
    np.testing.assert_allclose(np.interp([2.5, 3.0], level, period), rice, rtol=0.25)
    assert extremal_index(fine, 2.0) < extremal_index(fine[::8], 2.0) / 4


@pytest.mark.parametrize("shape", [-0.2, 0.2])
def test_return_bands_cover(shape):
    aims, inside = torch.tensor([20.0, 100.0], dtype=torch.float64), []
    truth = torch.tensor(scipy.stats.genpareto.isf(1 / (0.5 * aims.numpy()), shape, 5))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clock = np.sort(rng.uniform(0, 200, rng.poisson(100)))
        peaks = 5 + torch.tensor(scipy.stats.genpareto.rvs(shape, size=len(clock), random_state=rng))
        band = gpd_band(clock, peaks, 5.0, 200.0, aims, resamples=150)
        inside.append([share((band["low"][i], band["high"][i]), truth[i]) for i in range(2)])
    assert np.mean(inside, 0)[0] > 0.88 and np.mean(inside, 0)[1] > 0.82


def test_gev_of_block_maxima_and_gpd_of_events_agree_where_both_hold():
    "Exponential peaks at random times: the level of period T is ln T, by either road."
    rng = np.random.default_rng(0)
    clock, peaks = np.cumsum(rng.exponential(size=20_000)), rng.exponential(size=20_000)
    blocks = np.zeros(int(clock[-1] // 40))
    np.maximum.at(blocks, np.minimum((clock // 40).astype(int), len(blocks) - 1), peaks)
    aims = torch.tensor([200.0, 2000.0], dtype=torch.float64)
    by_blocks = gev_band(torch.tensor(blocks), 40.0, aims, resamples=200)
    high = peaks > 3
    by_events = return_level(fit_gpd(torch.tensor(peaks[high]), 3.0, float(clock[-1])), aims)
    torch.testing.assert_close(by_events, aims.log(), rtol=0.06, atol=0)
    torch.testing.assert_close(by_blocks["level"], aims.log(), rtol=0.06, atol=0)
    assert (by_blocks["low"] < aims.log()).all() and (aims.log() < by_blocks["high"]).all()


@pytest.mark.parametrize("seed", range(3))
def test_fits_find_a_better_likelihood_than_scipy_or_the_same(seed):
    x = scipy.stats.genextreme.rvs(0.1, 3, 2, size=80, random_state=seed)
    fit = fit_gev(torch.tensor(x))
    ours = scipy.stats.genextreme.logpdf(x, -float(fit.shape), float(fit.location), float(fit.scale)).sum()
    theirs = scipy.stats.genextreme.logpdf(x, *scipy.stats.genextreme.fit(x)).sum()
    assert ours >= theirs - 1e-6


# The solver's own climate ---------------------------------------------------------------------------------------------

SMALL = Regime(Re=100, fkx=0, fky=2, alpha=0.1, beta=0, NX=16)


def climates(regime: Regime, flows: int = 48, time: float = 240.0) -> torch.Tensor:
    "Energy, enstrophy and U(y) of independent flows, (flows, 18, frames), 0.4 apart."
    solver, g = Solver(regime, random_vorticity(16, flows, seed=0), workers=1), grid(16)
    solver.advance(60.0)
    rows = []
    for _, omega in solver.run(time, 0.4):
        rows.append(torch.cat([g.energy(omega)[:, None], g.enstrophy(omega)[:, None], g.velocity(omega)[:, 0].mean(-2)], 1))
    return torch.stack(rows, -1)


def others_mean(means: torch.Tensor) -> torch.Tensor:
    return (means.sum(0) - means) / (len(means) - 1)


@pytest.fixture(scope="module")
def mixing():
    return climates(Regime(Re=100, fkx=3, fky=3, alpha=0.1, beta=1, NX=16))


@pytest.fixture(scope="module")
def symmetric():
    return climates(SMALL)


@pytest.fixture(scope="module")
def settled():
    "A flow that stays in one of several states for longer than the records."
    return climates(Regime(Re=100, fkx=2, fky=3, alpha=0.2, beta=2, NX=16))


def test_halves_of_the_truth_agree_as_often_as_the_intervals_claim(mixing):
    half = mixing.shape[-1] // 2
    one, other = mixing[..., :half], mixing[..., half:]
    assert 0.90 <= share(difference_interval(one, other), 0.0) <= 0.99
    naive = ((one.var(-1) + other.var(-1)) / half).sqrt() * 1.96
    assert float(((one.mean(-1) - other.mean(-1)).abs() <= naive).double().mean()) < 0.6


def test_one_climate_holds_the_mean_of_the_others(mixing):
    assert 0.90 <= share(mean_interval(mixing), others_mean(mixing.mean(-1))) <= 0.99


def test_groups_of_records_that_sit_in_different_states_agree_where_single_records_do_not(settled):
    alone = share(difference_interval(settled[:24], settled[24:]), 0.0)
    pairs = itertools.combinations([list(group) for group in settled.unflatten(0, (6, 8))], 2)
    together = [share(difference_interval(one, other), 0.0) for one, other in pairs]
    assert alone < 0.75 and np.mean(together) > 0.88
    assert float((record_agreement(list(settled)) < 0.05).double().mean()) > 0.8


def test_the_solver_is_symmetric_and_does_not_drift(symmetric):
    groups, frames = symmetric.unflatten(0, (12, 4)), symmetric.shape[-1]
    p = torch.stack([SymmetryTest(SMALL, frames // 4).update(g[:, 2:].mT.flatten(0, 1), 0).result(draws=200)["p_value"] for g in groups])
    assert int((p <= 0.05).sum()) <= 2 and p.median() > 0.15
    clock = torch.arange(frames) * 0.4
    verdicts = [stationarity([(clock, c[row])]).verdict for c in symmetric for row in (0, 1)]
    assert verdicts.count("drifts") <= 0.05 * len(verdicts)


def test_a_tilted_climate_is_called_asymmetric(symmetric):
    tilt = 0.5 * symmetric[:, 2:].std() * torch.cos(torch.arange(16) * 2 * math.pi / 16)
    groups, frames = symmetric.unflatten(0, (12, 4)), symmetric.shape[-1]
    p = torch.stack([SymmetryTest(SMALL, frames // 4).update(g[:, 2:].mT.flatten(0, 1) + tilt, 0).result(draws=200)["p_value"] for g in groups])
    assert int((p <= 0.05).sum()) >= 9


# Budgets --------------------------------------------------------------------------------------------------------------

def test_budgets_of_frames_that_py2d_wrote_lack_what_its_euler_step_adds(py2d_data):
    "Forward Euler on the β term makes the modes of frequency σ gain energy at the rate dt·σ² (formats.md), which no term of the equation has."
    store = open_store(find_runs(py2d_data / "results")[0])
    regime, g = store.regime, grid(store.regime.NX)
    budgets, gain = Budgets(regime, float(store.times[1] - store.times[0]), 200), []
    for part in np.array_split(store.frames, 8):
        omega = torch.as_tensor(store.read(part, dtype=np.float64))
        budgets.update(g.transform(omega), g.velocity(omega), int(part[0]))
        rate = regime.dt * (regime.beta * g.kx * g.inverse_k2) ** 2 * g.power(omega) / 2
        gain.append(torch.stack([(rate * g.inverse_k2).sum((-2, -1)), rate.sum((-2, -1))], 1))
    found, (energy, enstrophy) = budgets.result(), torch.cat(gain).mean(0)
    assert found["energy residual"]["mean"] == pytest.approx(float(energy), rel=0.05)
    assert abs(found["enstrophy residual"]["mean"] - enstrophy) < 5e-3 * found["enstrophy forcing"]["mean"]
    assert found["momentum residual"]["mean"].abs().max() < 2e-3


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=5), st.randoms())
def test_budgets_of_any_parts_in_any_order_are_those_of_one_pass(cuts, random):
    q = torch.tensor(np.random.default_rng(0).normal(size=(40, 5 + 32)))
    whole = Budgets(SMALL, 0.1, 7).take(q, 100).result()
    edges = [0, *sorted(cuts), 40]
    parts = [Budgets(SMALL, 0.1, 7).take(q[a:b], 100 + a) for a, b in zip(edges, edges[1:])]
    random.shuffle(parts)
    for part in parts[1:]:
        parts[0].merge(part)
    for name, found in parts[0].result().items():
        for end in ("mean", "low", "high"):
            torch.testing.assert_close(found[end], whole[name][end], rtol=1e-10, atol=1e-10)


def test_two_records_share_no_pair_of_frames():
    q = torch.tensor(np.random.default_rng(0).normal(size=(40, 5 + 32)))
    both = Budgets(SMALL, 0.1, 1).take(q[:20], 0).take(q[20:], 1000)
    rates = torch.cat([(q[1:20, 0] - q[:19, 0]), (q[21:, 0] - q[20:-1, 0])]) / 0.1
    assert len(both.means.done) == 38
    torch.testing.assert_close(both.result()["energy tendency"]["mean"], rates.mean())


def test_laminar_flow_balances_exactly():
    "The fixed point of identity 3: U = sin(4y)/(α + 16ν); no tendency, no flux, forcing against drag and viscosity."
    regime, g = Regime(Re=50, fkx=0, fky=4, alpha=0.1, beta=20, NX=32), grid(32)
    omega = (-4 * torch.cos(4 * g.y) / (0.1 + 16 / 50)).expand(1, 32, 32)
    budgets = Budgets(regime, 1.0, 1).update(g.transform(omega).expand(4, -1, -1), g.velocity(omega).expand(4, -1, -1, -1), 0)
    found = budgets.result()
    for name in ("energy residual", "enstrophy residual", "momentum residual", "momentum flux"):
        assert found[name]["mean"].abs().max() < 1e-12, name
    assert found["energy forcing"]["mean"] == pytest.approx(1 / (0.1 + 16 / 50) / 2)


# Artefacts and blow-up ------------------------------------------------------------------------------------------------

def test_real_flow_has_no_outlines_of_patches(py2d_data):
    store = open_store(find_runs(py2d_data / "results")[0])
    omega = torch.as_tensor(store.read(store.frames[::20], dtype=np.float64))
    power = grid(64).power(omega).mean(0)
    for patch_size in (4, 8, 16):
        assert 0.8 < artefact_score(power, patch_size, store.regime) < 1.15
    lattice = torch.zeros(64, 64, dtype=torch.float64)
    lattice[::8] = lattice[:, ::8] = 0.3 * omega.std()
    seen = grid(64).power(omega + lattice).mean(0)
    assert artefact_score(seen, 8, store.regime) > 2 * artefact_score(power, 8, store.regime)


def test_blow_up_is_found_where_it_begins():
    t = torch.arange(1000) * 0.5
    energy = torch.where(t < 300, 1.0, torch.exp(t - 300))
    assert excess_time(t, energy) == pytest.approx(300 + math.ceil(2 * math.log(10)) / 2)
    assert excess_time(t, energy.clamp(max=5)) == math.inf
