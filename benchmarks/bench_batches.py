"""Frames per second from the packed store to batches, velocity conversion included, and memory along a long epoch.

    python benchmarks/bench_batches.py                  # 64² and 256², two threads
    python benchmarks/bench_batches.py --sizes 64 --threads 1 --targets 4

Frames are counted once per batch, as they are read and converted: the input and the target(s) of each sample. What stays on the disk is made
ahead by one thread and by as many as there may be, each on one core; what is in memory by the caller, on all of them. Memory is the
resident set of the process at five points of one epoch over a packed store, whose frames stay on the disk.
"""
import argparse
import os
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import torch

from fields import packed_run
from turbvit_nb.datasets import Batches, DatasetConfig, open_dataset
from turbvit_nb.physics.py2d import Regime, TreeWriter, open_store
from turbvit_nb.physics.symmetries import Symmetries

TARGET = {64: 10_000, 256: 600}


def rate(dataset, batch_size: int, seconds: float, augment=None, prefetch: int | None = None) -> tuple[float, float]:
    "Samples and frames per second, the best of three."
    best = (0.0, 0.0)
    for epoch in range(3):
        samples = frames = 0
        batches, start = Batches(dataset, batch_size, augment=augment, seed=epoch, prefetch=prefetch), time.perf_counter()
        for batch in batches.epoch(0):
            samples += len(batch["x"])
            numbers = dataset.frame[batch["index"]][:, None] + dataset.offsets
            frames += len(np.unique(dataset.tree[batch["index"]][:, None] * 10**9 + numbers))
            if (spent := time.perf_counter() - start) > seconds / 3:
                break
        best = max(best, (samples / spent, frames / spent))
    return best


def memory(dataset, batch_size: int) -> list[float]:
    "Resident MiB at the start and after each quarter of an epoch."
    process, batches = psutil.Process(os.getpid()), Batches(dataset, batch_size)
    points, quarter = [], max(1, len(batches) // 4)
    for number, _ in enumerate(batches.epoch(0)):
        if number % quarter == 0:
            points.append(process.memory_info().rss / 2**20)
    return points[:4] + [process.memory_info().rss / 2**20]


def trees(folder: Path, frames: int = 300) -> list[tuple[str, float]]:
    "Frames per second from `.mat` files, ours and scipy's."
    from scipy.io import loadmat
    writer = TreeWriter(folder, Regime(1000, NX=64))
    for n in range(frames):
        writer.append(0.1 * (n + 1), np.random.default_rng(n).standard_normal((64, 64)))
    store = open_store(writer.path)
    out = []
    for name, read in (("scipy.io.loadmat", lambda: [loadmat(store.frame_path(n))["Omega"] for n in store.frames]), ("open_store(tree).read", lambda: store.read(store.frames))):
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            read()
            spent.append(time.perf_counter() - start)
        out.append((name, frames / min(spent)))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=400, help="size of the packed store")
    parser.add_argument("--seconds", type=float, default=6, help="per measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), batch {args.batch}, {args.targets} target(s), float32 store of {args.megabytes} MB in the page cache")
    print(f"{'NX':>4} {'mode':>7} {'symmetries':>10} {'ahead':>5} {'samples/s':>10} {'frames/s':>10} {'target':>7}")
    with tempfile.TemporaryDirectory() as tmp:
        memories = {}
        for NX in args.sizes:
            frames = args.megabytes * 10**6 // (4 * NX**2)
            path = packed_run(Path(tmp) / str(NX), NX, frames)
            for mode in ("mmap", "memory"):
                dataset = open_dataset(DatasetConfig(data_dir=str(path), frame_range=[[1, frames + 1 if mode == "mmap" else frames // 4]], mode=mode))
                dataset.targets = args.targets
                for augment, ahead in product((None, Symmetries(dataset.regimes)), sorted({1, args.threads}) if mode == "mmap" else [0]):
                    samples, read = rate(dataset, args.batch, args.seconds, augment, ahead)
                    print(f"{NX:4d} {mode:>7} {'yes' if augment else 'no':>10} {ahead:5d} {samples:10.0f} {read:10.0f} {TARGET.get(NX, 0):7d}", flush=True)
                if mode == "mmap":
                    memories[NX] = memory(dataset, args.batch)
                del dataset
        print("\nresident MiB at 0, 25, 50, 75, 100 % of an epoch in mode mmap")
        for NX, points in memories.items():
            print(f"{NX:4d}  " + "  ".join(f"{p:7.1f}" for p in points))
        print("\nfrom .mat files, 64²: frames/s")
        (_, theirs), (_, ours) = rows = trees(Path(tmp) / "tree")
        for name, value in rows:
            print(f"{name:>22} {value:8.0f}")
        print(f"{'ratio':>22} {ours / theirs:8.1f}")


if __name__ == "__main__":
    main()
