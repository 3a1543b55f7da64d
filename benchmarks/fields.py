"""Data for the benchmarks: random fields, where only their number and size matter, and independent flows of one regime."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from turbvit_nb.lab.progress import progress
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime
from turbvit_nb.physics.solver import Solver, random_vorticity


def packed_run(folder: Path, NX: int, frames: int) -> Path:
    "A packed run of random vorticity with a steep spectrum; ten fields, repeated."
    regime = Regime(1000, beta=20.0, NX=NX)
    k = np.hypot(np.fft.fftfreq(NX, 1 / NX)[:, None], np.arange(NX // 2 + 1))
    fields = np.fft.irfft2(np.random.default_rng(0).standard_normal((10, NX, NX // 2 + 1)) * (k / (1 + (k / 4) ** 4)) * NX)
    writer = PackedWriter(folder / regime.path() / PACKED, regime, frames)
    for n in range(frames):
        writer.append(0.06 * (n + 1), fields[n % 10])
    return writer.finish()


def independent_flows(regime: Regime, flows: int, time: float, step: float, spin_up: float) -> Iterator[torch.Tensor]:
    "Vorticity (flows, N, N) at every `step` of `time`, from different initial states."
    solver = Solver(regime, random_vorticity(regime.NX, flows, seed=0))
    solver.advance(spin_up)
    return (omega for _, omega in progress(solver.run(time, step), round(time / step), "flows"))
