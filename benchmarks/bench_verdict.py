"""False alarms of the long analysis: how often is a climate of one flow "farther from the truth than chance explains"?

    python benchmarks/bench_verdict.py [--NX 32] [--Re 200] [--groups 12] [--records 4] [--time 400]

Independent flows of one regime in groups, each analysed as the truth and as a rollout of every other group. Nothing differs but the initial
states, so at a level of 95 % one verdict in twenty may be wrong. With `--unturned` the records are compared as they are, not turned by the flow's symmetry.
"""
import argparse

import numpy as np
import torch

from turbvit_nb.lab.progress import progress
from turbvit_nb.long_analysis import Setting, accumulate, array_record, bin_ranges, block_frames, chance_points, climate_dataset, climate_distances, judged_by
from turbvit_nb.physics.py2d import Regime
from turbvit_nb.physics.solver import Solver, random_vorticity
from turbvit_nb.short_analysis import AnalysisConfig

NAMES = ["energetics", "spectra", "PDF_U", "PDF_Omega", "zonal_mean", "symmetry"]


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
    solver = Solver(regime, random_vorticity(args.NX, args.groups * args.records, seed=0))
    solver.advance(100.0)
    total = round(args.time / args.step)
    flows = torch.stack([omega.float() for _, omega in progress(solver.run(args.time, args.step), total, "flows")], 1)
    names = [name for name in NAMES if name != "symmetry" or not args.unturned]
    groups = [[array_record(f"{g}/{i}", args.step, vorticity=flow) for i, flow in enumerate(group)] for g, group in enumerate(flows.split(args.records))]
    setting = Setting(AnalysisConfig(), args.step, ranges=bin_ranges(groups[0]), block=block_frames(groups[0]), regime=regime)
    kept = [accumulate(group, setting, names) for group in groups]
    alarms: dict[str, list] = {}
    for i, truth in enumerate(groups):
        true = climate_dataset(kept[i], truth).assign_attrs(block_frames=setting.block)
        judged = judged_by(setting, true)
        chance = None
        for j, others in enumerate(groups):
            if i == j:
                continue
            for part in kept[j].values():
                part.setting = judged
            other = climate_dataset(kept[j], others).assign_attrs(block_frames=setting.block)
            for part in kept[j].values():
                part.setting = setting
            chance = chance or chance_points(true, other)
            for name, value in climate_distances(other, true).items():
                alarms.setdefault(name, []).append((i, value > chance[name], value / chance[name]))
    print(f"{len(groups)} groups of {args.records} records of {args.time:g} time units; share of the pairs beyond chance, ± its error over the truths; median distance over the point")
    for name, found in alarms.items():
        truths, beyond, ratio = map(np.array, zip(*found))
        each = np.array([beyond[truths == i].mean() for i in range(len(groups))])
        print(f"{name:>22} {100 * beyond.mean():5.1f} % ± {100 * each.std(ddof=1) / len(each)**0.5:.1f}   {np.median(ratio):.2f}")


if __name__ == "__main__":
    main()
