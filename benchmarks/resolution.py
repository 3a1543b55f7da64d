"""What a grid resolves: statistics of one flow on 64², 128² and 256² points, kept for the solver's chapter.

    python benchmarks/resolution.py [--into nbs/media/resolution.json]

Re 1000, β 20, α 0.1, fky 4, scheme `exact`, double precision, one process. Every flow is spun up on 64²; the state after it goes on there and,
by Fourier interpolation, on the next finer grid, where it is given time to fill the waves it has won. Statistics are means over the time units
after that, the intervals those of the mean over flows. The panels are one state on three grids, half a unit of time later. Same numbers every
time (about three minutes of one quiet core).
"""
import argparse
import json
import os
from pathlib import Path

import torch

from turbvit_nb.physics.py2d import Regime
from turbvit_nb.physics.solver import Solver, random_vorticity
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.physics.statistics import student

GRIDS = {64: (6, 60.0, 20.0), 128: (6, 8.0, 6.0), 256: (4, 1.5, 2.5)}  # points per side: flows, time units to settle, of the statistics
EVERY = 0.1  # time units between the frames of the statistics
SIDE = 3  # of 8 parts of the domain's side that a panel shows


def regime(NX: int) -> Regime:
    return Regime(Re=1000, fkx=0, fky=4, alpha=0.1, beta=20.0, NX=NX)


def solver(omega: torch.Tensor) -> Solver:
    return Solver(regime(omega.shape[-1]), omega, workers=1)


def measure(omega: torch.Tensor) -> dict[str, torch.Tensor]:
    "Of each frame: energy, enstrophy, palinstrophy, that of the zonal mean, dissipation of enstrophy per shell."
    g = Grid.of(omega)
    k2 = g.power(omega) * g.k2 / 1000  # 2ν · k² · ½|ω|²
    shells = k2.new_zeros(len(omega), int(g.shells.max()) + 1).index_add(-1, g.shells.flatten(), k2.flatten(-2))
    zonal = g.energy(omega.mean(-2, keepdim=True).expand_as(omega))
    scalars = {"energy": g.energy(omega), "zonal_energy": zonal, "enstrophy": g.enstrophy(omega), "palinstrophy": g.palinstrophy(omega)}
    return scalars | {"dissipation": shells}


def statistics(run: Solver, time: float) -> dict:
    "Mean over `time` units and all flows, and half of its 95 % interval."
    frames = [measure(omega) for _, omega in run.run(time, EVERY)]
    flows = {name: torch.stack([frame[name] for frame in frames]).mean(0) for name in frames[0]}
    n = run.omega.shape[0]
    half = float(student(0.95, torch.tensor(n - 1.0))) / n**0.5
    out = {}
    for name, values in flows.items():
        out[name] = torch.as_tensor(values.mean(0)).tolist()
        out[f"{name}_half"] = torch.as_tensor(values.std(0) * half).tolist()
    return out


def panels(omega: torch.Tensor, time: float = 0.5) -> dict[str, list]:
    "Vorticity, rounded, on a part of the domain: of one state cut to each grid and advanced on it by `time`."
    found = {}
    for NX in GRIDS:
        run = solver(Grid.of(omega).resample(omega, NX))
        for _ in range(round(time / EVERY)):
            run.advance(EVERY)
        side = SIDE * NX // 8
        found[str(NX)] = run.omega[:side, :side].round().int().tolist()
    return found


def rounded(value):
    "Five digits are enough for a picture."
    return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.5g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=Path(__file__).parents[1] / "nbs/media/resolution.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = ("flows", "settle", "time")
    about = {"Re": 1000, "beta": 20, "alpha": 0.1, "fky": 4, "scheme": "exact"} | {str(NX): dict(zip(names, of)) for NX, of in GRIDS.items()}
    omega, table = random_vorticity(64, GRIDS[64][0], seed=7), {}
    for NX, (flows, settle, time) in GRIDS.items():
        run = solver(Grid.of(omega).resample(omega[:flows], NX))
        for _ in range(round(settle / EVERY)):
            run.advance(EVERY)
        omega = run.omega.clone()
        table[NX] = {name: rounded(value) for name, value in statistics(run, time).items()}
        print(NX, {name: value for name, value in table[NX].items() if not isinstance(value, list)}, flush=True)
        print("   dissipation at k = 20, 31:", table[NX]["dissipation"][20], table[NX]["dissipation"][31], flush=True)
    kept = {"conditions": about, "side": SIDE / 8, "grids": table, "panels": panels(run.omega[0])}
    part = asked.into.with_name(f".{asked.into.name}.part")
    part.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    os.replace(part, asked.into)


if __name__ == "__main__":
    main()
