"""Truth against truth: do the intervals of `physics.statistics` hold the truth as often as they claim, on the solver's own flow?

    python benchmarks/bench_coverage.py [--NX 32] [--Re 200] [--flows 96] [--time 600] [--step 0.1] [--keep series.npz]
    python benchmarks/bench_coverage.py --data data/reference_truth [--parts 2]

Independent flows of one regime, each a record as long as a rollout. The climate of all flows together stands for the truth; each flow alone, or
its two halves against each other, must lie inside the intervals as often as their level says. `--data` takes stored runs in place of the solver, each
cut into `--parts` records.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from fields import independent_flows
from turbvit_nb.physics.budgets import SymmetryTest, nearest_image, shifted, stationarity
from turbvit_nb.physics.metrics import eofs, principal_components
from turbvit_nb.physics.py2d import Regime, find_runs, open_store
from turbvit_nb.physics.spectral import grid
from turbvit_nb.physics.statistics import (autocorrelation_band, block_bootstrap, block_length, decluster, decorrelation_time,
                                           difference_interval, effective_size, event_periods, gpd_band, mean_interval)


def observe(omega: torch.Tensor) -> torch.Tensor:
    "Of vorticity (n, N, N): E, Z, the largest |ω|, U(y), ln E(k) for k = 1 … N/2 − 2; (n, 3 + N + N/2 − 2)."
    g = grid(omega.shape[-1])
    uv = g.velocity(omega)
    head = torch.stack([g.energy(omega), g.enstrophy(omega), omega.abs().amax((-2, -1))], 1)
    return torch.cat([head, uv[:, 0].mean(-2), g.energy_spectrum(uv)[:, 1 : g.NX // 2 - 1].log()], 1)


def stored(folder: Path, parts: int) -> torch.Tensor:
    "Series (records, quantities, frames) of stored runs, each cut into `parts`."
    series = []
    for store in map(open_store, find_runs(folder)):
        numbers = np.arange(1, len(store) + 1)
        whole = torch.cat([observe(torch.as_tensor(store.read(part)).double()) for part in np.array_split(numbers, max(1, len(store) // 500))])
        series += list(whole.T.split(len(store) // parts, -1)[:parts])
    return torch.stack(series)


def share(inside: torch.Tensor) -> str:
    "The share of True over all axes; its standard error is that of the records (axis 0), since the quantities of one flow are not independent."
    per_record = inside.double().flatten(1).mean(1)
    return f"{100 * per_record.mean():5.1f} % ± {100 * per_record.std() / len(per_record) ** 0.5:.1f}"


def held(interval: tuple[torch.Tensor, torch.Tensor], truth: torch.Tensor | float) -> torch.Tensor:
    return (interval[0] <= truth) & (truth <= interval[1])


def others_mean(values: torch.Tensor) -> torch.Tensor:
    "For each record, the mean of `values` (records, …) over the other records."
    return (values.sum(0) - values) / (len(values) - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--NX", type=int, default=32)
    parser.add_argument("--Re", type=float, default=200)
    parser.add_argument("--flows", type=int, default=96)
    parser.add_argument("--time", type=float, default=600.0)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--spin-up", type=float, default=100.0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file that holds the series, written if absent")
    args = parser.parse_args()
    torch.set_num_threads(1)
    regime = Regime(Re=args.Re, fkx=0, fky=4, alpha=0.1, beta=20, NX=args.NX)
    step = args.step
    if args.data:
        store = open_store(find_runs(args.data)[0])
        regime, step = store.regime, float(store.times[1] - store.times[0])
    if args.keep and args.keep.exists(): series = torch.as_tensor(np.load(args.keep)["series"]).double()
    elif args.data: series = stored(args.data, args.parts)
    else: series = torch.stack([observe(omega) for omega in independent_flows(regime, args.flows, args.time, args.step, args.spin_up)], -1)
    if args.keep and not args.keep.exists(): np.savez(args.keep, series=series.numpy().astype(np.float32))
    if len(series) < 8:
        parser.error(f"{len(series)} records: coverage needs 8 or more, from --flows, or from --data in --parts")
    report(regime, series, step)


def aligned(profiles: torch.Tensor, fky: int) -> torch.Tensor:
    "Profiles (records, N, n), each record shifted along y by a symmetry of the flow to where its mean is nearest to the first record's."
    moved = []
    for record in profiles:
        _, image = nearest_image(record.mean(-1), profiles[0].mean(-1), fky)
        moved.append(shifted(record.mT, 2 * np.pi / fky * image).mT)
    return torch.stack(moved)


def report(regime: Regime, series: torch.Tensor, step: float):
    N, (records, _, n) = regime.NX, series.shape
    groups = {"energy": slice(0, 1), "enstrophy": slice(1, 2), "largest |ω|": slice(2, 3), "U(y)": slice(3, 3 + N), "ln E(k)": slice(3 + N, None)}
    quantities = {name: series[:, cut] for name, cut in groups.items()}
    quantities["U(y), aligned"] = aligned(quantities["U(y)"], int(regime.fky))
    print(f"{regime}\n{records} records of {n} frames, {step:g} apart ({n * step:g} time units)\n")
    print(f"{'95 % intervals':16}{'memory':>9}{'eff. size':>10}{'mean holds':>18}{'halves agree':>18}{'naive halves':>18}{'median, bootstrap':>20}")
    for name, x in quantities.items():
        one, other = x[..., : n // 2], x[..., n // 2 :]
        error = ((one.var(-1) + other.var(-1)) / (n // 2)).sqrt() * 1.96
        naive = (one.mean(-1) - other.mean(-1)).abs() <= error
        thin = x[:, :: max(1, x.shape[1] // 4)]  # a bootstrap per series takes its time
        medians = thin.median(-1).values
        inside = torch.stack([torch.stack([held(block_bootstrap(s, lambda s: s.median(0).values, block_length(s), 200), t) for s, t in zip(r, m)])
                              for r, m in zip(thin, others_mean(medians))])
        print(f"{name:16}{float(decorrelation_time(x).mean()) * step:9.2f}{float(effective_size(x).mean()):10.0f}"
              f"{share(held(mean_interval(x), others_mean(x.mean(-1)))):>18}{share(held(difference_interval(one, other), 0.0)):>18}{share(naive):>18}{share(inside):>20}")
    correlations(quantities["U(y), aligned"], step)
    extremes(series[:, 2], step)
    symmetry(regime, series, step)


def correlations(profiles: torch.Tensor, step: float):
    "Bands of the autocorrelation of the first two PCs, against the mean over the other records."
    stacked = profiles.mT.reshape(-1, profiles.shape[1])
    mean = stacked.mean(0)
    patterns = eofs(torch.cov(stacked.T), 2)["patterns"]
    pcs = principal_components(profiles.mT, mean, patterns).mT
    lags = min(200, pcs.shape[-1] // 8)
    bands = [autocorrelation_band(pc, lags, resamples=300) for pc in pcs]
    covariance = torch.fft.irfft(torch.fft.rfft(pcs, 2 * pcs.shape[-1]).abs() ** 2)[..., : lags + 1] / (pcs.shape[-1] - torch.arange(lags + 1))
    truth = others_mean(covariance)
    inside = torch.stack([held((b["low"], b["high"]), t / t[..., :1]) for b, t in zip(bands, truth)])[..., 1:]
    print(f"\nautocorrelation of PC 1, 2 to lag {lags * step:g}: 95 % bands hold {share(inside)}")


def extremes(largest: torch.Tensor, step: float):
    "Bands of the GPD's return level of the largest |ω|, against the empirical level of all records."
    threshold, duration = float(largest.flatten().quantile(0.95)), largest.shape[-1] * step
    run, clock = float(decorrelation_time(largest).mean()) * step, torch.arange(largest.shape[-1]) * step
    events = [decluster(clock, series, threshold, run) for series in largest]
    period, level = event_periods(torch.cat([e["peak"] for e in events]), duration * len(events))
    aims = torch.tensor([duration / 4, duration])
    truth = torch.as_tensor(np.interp(aims, period, level))
    usable = [e for e in events if len(e["peak"]) >= 10]
    bands = [gpd_band(e["time"], e["peak"], threshold, duration, aims, resamples=300) for e in usable]
    inside = torch.stack([held((b["low"], b["high"]), truth) for b in bands])
    print(f"return level of the largest |ω|, {np.mean([len(e['peak']) for e in events]):.0f} events a record, {len(usable)} records with 10 or more: "
          f"95 % bands hold {share(inside[:, :1])} at a quarter of the record, {share(inside[:, 1:])} at its length")


def symmetry(regime: Regime, series: torch.Tensor, step: float):
    "How often the climate of the solver is called asymmetric, in groups of eight records, or drifting."
    N, n = regime.NX, series.shape[-1]
    profiles = series[:, 3 : 3 + N].mT[: len(series) // 8 * 8].reshape(-1, 8 * n, N)
    p = torch.stack([SymmetryTest(regime, n // 8).update(group, 0).result(draws=500)["p_value"] for group in profiles])
    print(f"symmetry, {len(p)} groups of 8 records: {int((p <= 0.05).sum())} called asymmetric at the 5 % level, median p {float(p.median()):.2f}")
    clock = torch.arange(n) * step
    for name, row in (("energy", 0), ("enstrophy", 1)):
        verdicts = [stationarity([(clock, record[row])]).verdict for record in series]
        print(f"{name}: " + ", ".join(f"{word} {verdicts.count(word)}" for word in ("stationary", "drifts", "too short")))


if __name__ == "__main__":
    main()
