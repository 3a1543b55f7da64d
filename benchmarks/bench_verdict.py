"""False alarms of the long analysis: how often is a climate of one flow "farther from the truth than chance explains", or its extremes not the truth's?

    python benchmarks/bench_verdict.py [--NX 32] [--Re 200] [--groups 12] [--records 4] [--time 400]

Independent flows of one regime in groups, each analysed as the truth and as a rollout of every other group. Nothing differs but the initial
states, so at a level of 95 % one verdict in twenty may be wrong. With `--unturned` the records are compared as they are, not turned by the flow's symmetry.
"""
import argparse

import numpy as np
import torch
import xarray as xr

from fields import independent_flows
from turbvit_nb.climate.diagnostics import Diagnostic, Setting, bin_ranges, block_frames
from turbvit_nb.climate.distances import chance_points, climate_distances
from turbvit_nb.climate.extremes import EXTREMES
from turbvit_nb.climate.keys import AnalysisConfig
from turbvit_nb.climate.passes import accumulate, climate_dataset
from turbvit_nb.climate.records import Record, array_record
from turbvit_nb.climate.verdict import extreme_words
from turbvit_nb.physics.py2d import Regime

NAMES = ["energetics", "spectra", "PDF_U", "PDF_Omega", "zonal_mean", "symmetry", "return_period"]


def climate_of(kept: dict[str, Diagnostic], records: list[Record], setting: Setting) -> xr.Dataset:
    "The climate that `kept` makes under a setting."
    for part in kept.values():
        part.setting = setting
    return climate_dataset(kept, records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--NX", type=int, default=32)
    parser.add_argument("--Re", type=float, default=200)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--time", type=float, default=400.0)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--unturned", action="store_true")
    args = parser.parse_args()
    regime = Regime(Re=args.Re, fkx=0, fky=4, alpha=0.1, beta=20, NX=args.NX)
    flows = torch.stack([omega.float() for omega in independent_flows(regime, args.groups * args.records, args.time, args.step, 100.0)], 1)
    names = [name for name in NAMES if name != "symmetry" or not args.unturned]
    groups = [[array_record(f"{g}/{i}", args.step, vorticity=flow) for i, flow in enumerate(group)] for g, group in enumerate(flows.split(args.records))]
    setting = Setting(AnalysisConfig(), args.step, ranges=bin_ranges(groups[0]), block=block_frames(groups[0]), regime=regime)
    kept = [accumulate(group, setting, names) for group in groups]
    alarms: dict[str, list] = {}
    for i, truth in enumerate(groups):
        true = climate_of(kept[i], truth, setting)
        chance = chance_points(true, true)  # all are of one length
        for j in range(len(groups)):
            if i == j:
                continue
            other = climate_of(kept[j], groups[j], setting.with_truth(true))
            for name, value in climate_distances(other, true).items():
                alarms.setdefault(name, []).append((i, value > chance[name], value / chance[name]))
            told = extreme_words(other, true)
            for name in EXTREMES:
                alarms.setdefault(name, []).append((i, any(words.startswith(name.replace("omega", "ω")) for words in told), np.nan))
    print(f"{len(groups)} groups of {args.records} records of {args.time:g} time units; share of the pairs beyond chance, ± its error over the truths; median distance over the point")
    for name, found in alarms.items():
        truths, beyond, ratio = map(np.array, zip(*found))
        each = np.array([beyond[truths == i].mean() for i in range(len(groups))])
        print(f"{name:>22} {100 * beyond.mean():5.1f} % ± {100 * each.std(ddof=1) / len(each)**0.5:.1f}   " + (f"{np.median(ratio):.2f}" if np.isfinite(ratio).all() else ""))


if __name__ == "__main__":
    main()
