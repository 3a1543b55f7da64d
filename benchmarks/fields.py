"""Data for the benchmarks: random fields, where only their number and size matter."""
from pathlib import Path

import numpy as np

from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime


def packed_run(folder: Path, NX: int, frames: int) -> Path:
    "A packed run of random vorticity with a steep spectrum; ten fields, repeated."
    regime = Regime(1000, beta=20.0, NX=NX)
    k = np.hypot(np.fft.fftfreq(NX, 1 / NX)[:, None], np.arange(NX // 2 + 1))
    fields = np.fft.irfft2(np.random.default_rng(0).standard_normal((10, NX, NX // 2 + 1)) * (k / (1 + (k / 4) ** 4)) * NX)
    writer = PackedWriter(folder / regime.path() / PACKED, regime, frames)
    for n in range(frames):
        writer.append(0.06 * (n + 1), fields[n % 10])
    return writer.finish()
