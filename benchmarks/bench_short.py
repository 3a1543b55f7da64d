"""The parts of a short analysis, in seconds and in memory: fits of the forecasts to compare with, their scores, an emulator's scores.

Memory must not grow with the number of starts or of training frames: run it with more of either and compare the last line.
    python benchmarks/bench_short.py --size 64 --starts 16 --leads 20 --frames 1000
"""
import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from fields import packed_run

from turbvit_nb.datasets import DatasetConfig, open_dataset
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator
from turbvit_nb.physics.spectral import grid
from turbvit_nb.forecast.baselines import Fits, baseline_states, fit_baselines, truth_scores
from turbvit_nb.forecast.ceiling import twin_states
from turbvit_nb.forecast.starts import HISTORY, Starts, score_emulator, score_forecast, start_samples

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", type=int, default=64, help="points per side")
parser.add_argument("--starts", type=int, default=16)
parser.add_argument("--leads", type=int, default=20)
parser.add_argument("--frames", type=int, default=1000, help="training frames")
parser.add_argument("--ceiling", action="store_true", help="also the solver's twins")
args = parser.parse_args()


def timed(what: str, function):
    "What the function returns; says how long it took."
    start = time.perf_counter()
    result = function()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:<24}{time.perf_counter() - start:>9.2f} s   peak so far {memory:>6.0f} MiB", flush=True)
    return result


torch.set_num_threads(1)
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    last = args.frames + args.leads + HISTORY + args.starts
    run = packed_run(Path(folder), args.size, last)
    ranges = [[1, args.frames + 1]], [[args.frames + 1, last + 1]]
    training, test = (open_dataset(DatasetConfig(data_dir=str(run), frame_range=r, mode="read"), num_frames=n) for r, n in zip(ranges, (1, HISTORY)))
    test.targets = args.leads
    print(f"{args.size}², {args.starts} starts, {args.leads} leads, {args.frames} training frames, one thread")
    damped, linear = timed("fits", lambda: fit_baselines(training, args.leads))
    starts = Starts(test, start_samples(len(test), args.starts), damped.mean, torch.device("cpu"))
    spectrum = torch.full((int(grid(args.size).shells.max()) + 1,), 1e-4)
    made = baseline_states(starts, Fits(damped.mean, damped, linear))
    if args.ceiling:
        made["ceiling"] = lambda group: twin_states(starts, group, spectrum)
    for name, states in made.items():
        timed(name, lambda: score_forecast(starts, name, states))
    timed("truth", lambda: truth_scores(starts))
    section = ModelConfig(model_type="UNet", img_size=args.size, base_channels=16, depth=2)
    emulator = create_emulator(section, Normaliser([0.0, 0.0], [1.0, 1.0]), step=0.06)
    timed("emulator (small UNet)", lambda: score_emulator(emulator, starts))
