"""Packing many small `.mat` files, and loading them: does the cost of a file stay flat, and what would a million take?

    python benchmarks/bench_pack.py                       # 10⁴ files of 64² as MATLAB v5 (written by scipy) and v7.3 (by h5py)
    python benchmarks/bench_pack.py --frames 3000 --NX 32

Packing runs in a process of its own, which says how long it took and its peak of memory; importing is not counted. `cached`: the files are in the system's cache. `cold`: they were put out of it (POSIX_FADV_DONTNEED), names and
inodes were not. `1 ms`: opening a file takes a millisecond longer, as on a shared file system. What is compared runs in turns; the best of `--repeats` counts. A million is the cost per file times a million, for files of this size under these
conditions; a disk slower than this one sets its own pace.

Loading: batches of `--batch` samples (input and target) in random order, velocities computed. `memory` holds the frames as velocities; `packed` and `tree` read them for each batch. `step` is a training that takes so long per batch on
another device (it sleeps): what a batch costs beside it is what training waits for.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import h5py
import numpy as np

from turbvit_nb.data.packing import pack
from turbvit_nb.physics.py2d import Regime, TreeWriter, open_store

PACK = """
import json, os, resource, sys, time
from turbvit_nb.data import packing
from turbvit_nb.physics import mat
source, target, readers, late, what = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
read = mat._read_whole
mat._read_whole = lambda path: (time.sleep(late), read(path))[1] if late else read(path)
start = time.perf_counter()
packing.pack(source, target, readers=readers) if what == "pack" else packing.verify(target, source, readers=readers)
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""
LOAD = """
import json, re, sys, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from turbvit_nb.data.batches import Batches
from turbvit_nb.data.frames import DatasetConfig, open_dataset
path, mode, batch, ahead, step, count, frames = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:8])
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) / 256
disk = lambda: int(re.search(r"^read_bytes: (\\d+)", Path("/proc/self/io").read_text(), re.M)[1])
dataset = open_dataset(DatasetConfig(data_dir=path, frame_range=[[1, int(frames) + 1]], mode=mode))
batches, points, needed = Batches(dataset, int(batch), prefetch=int(ahead), limit=int(count)), [], 0
before, start, asleep = disk(), time.perf_counter(), 0.0
for number, one in enumerate(batches.epoch(0)):
    time.sleep(step)
    needed += len(np.unique(dataset.frame[one["index"]][:, None] + dataset.offsets)) * dataset.NX**2 * 4
    if number % max(1, len(batches) // 4) == 0: points.append(resident())
spent = time.perf_counter() - start
print(json.dumps([spent / len(batches), (disk() - before) / needed, points + [resident()]]))
"""


def child(program: str, *words: object) -> list:
    "What a process of its own says."
    env = os.environ | {"OMP_NUM_THREADS": "1", "TURBVIT_PROGRESS": "0"}
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def make_tree(root: Path, kind: str, frames: int, NX: int) -> Path:
    "A run of noise; every file is one of its own."
    regime = Regime(1000, beta=20.0, NX=NX, IC=1 + (kind == "v7.3"))
    fields = np.random.default_rng(0).standard_normal((10, NX, NX))
    writer = TreeWriter(root, regime)
    for n in range(1, frames + 1):
        if kind == "v5":
            writer.append(0.06 * n, fields[n % 10])
            continue
        (path := writer.path / f"data/{n}.mat").parent.mkdir(exist_ok=True)
        with h5py.File(path, "w", userblock_size=512) as file:
            file["Omega"], file["time"] = fields[n % 10].T, [[0.06 * n]]
    return writer.path


def some_of(tree: Path, root: Path, frames: int) -> Path:
    "The first frames of a run, as links."
    part = root / Path(*tree.parts[-4:])
    (part / "data").mkdir(parents=True)
    for n in range(1, frames + 1):
        os.link(tree / f"data/{n}.mat", part / f"data/{n}.mat")
    return part


def cool(path: Path) -> None:
    "Put a file, or the frames of a run, out of the system's cache."
    for file in [path] if path.is_file() else (path / "data").iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def clock(seconds: float) -> str:
    "A duration for the table."
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"


def packing(trees: dict[tuple[str, int], Path], scratch: Path, repeats: int) -> None:
    "Cost per file of packing and of verifying, in turns."
    conditions = list(product(("cached", "cold"), (1, 4, 8))) + [("1 ms", 1), ("1 ms", 4), ("1 ms", 8)]
    print(f"\n{'files':>6} {'':>5} {'':>7} {'readers':>7} {'µs/file':>8} {'files/s':>8} {'10⁶ files':>10} {'peak MiB':>9}")
    largest = max(n for _, n in trees)
    for (kind, n), tree in trees.items():
        wanted = [(c, r) for c, r in conditions if n == largest or (c == "cached" and r == 8)]
        wanted = [(c, r) for c, r in wanted if not (c == "1 ms" and n > 3000)] + ([("1 ms", r) for r in (1, 4, 8)] if n == largest and kind == "v5" else [])
        best = {}
        for _ in range(repeats):
            for condition, readers in wanted:
                source = trees[kind, min(m for _, m in trees)] if condition == "1 ms" else tree
                files = min(m for _, m in trees) if condition == "1 ms" else n
                if condition == "cold":
                    cool(source)
                spent, peak = child(PACK, source, target := scratch / "x.h5", readers, 1e-3 * (condition == "1 ms"), "pack")
                best[condition, readers] = min(best.get((condition, readers), (1e9, 0)), (spent / files, peak))
                target.unlink()
        for (condition, readers), (spent, peak) in best.items():
            print(f"{n if condition != '1 ms' else files:6d} {kind:>5} {condition:>7} {readers:7d} {1e6 * spent:8.0f} {1 / spent:8.0f} {clock(1e6 * spent):>10} {peak:9.0f}", flush=True)


def again(tree: Path, n: int, scratch: Path) -> None:
    "What going on and verifying cost."
    target = pack(tree, scratch / "x.h5").path
    spent, peak = min(child(PACK, tree, target, 4, 0, "verify") for _ in range(2))
    print(f"\nverify against itself and the tree, cached: {1e6 * spent / n:.0f} µs/frame, 10⁶ frames {clock(1e6 * spent / n)}, peak {peak:.0f} MiB")
    start = time.perf_counter()
    store = open_store(target)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    open_store(tree / "data")
    print(f"open: packed {1e3 * opened:.1f} ms, tree {1e3 * (time.perf_counter() - start):.1f} ms ({n} names); on disk {target.stat().st_size / n / 1e3:.1f} kB/frame of {store._size / 1e3:.1f} kB")


def loading(tree: Path, n: int, scratch: Path, args: argparse.Namespace) -> None:
    "Cost per batch by where frames are, by threads, by what training does meanwhile."
    places = {"memory": (scratch / "x.h5", "memory"), "packed": (scratch / "x.h5", "mmap"), "tree": (tree, "read")}
    cases = [(place, state, ahead, step) for place in places for state in ("cached", "cold") for ahead, step in ((0, 0.0), (1, 0.0), (2, 0.0), (0, 0.02), (2, 0.02))
             if (place != "memory" or (state == "cached" and ahead == 0))]
    best = {}
    for _ in range(args.repeats):
        for place, state, ahead, step in cases:
            path, mode = places[place]
            if state == "cold":
                cool(path)
            found = child(LOAD, path, mode, args.batch, ahead, step, min(200, (n - 1) // args.batch), n)
            best[place, state, ahead, step] = min(best.get((place, state, ahead, step), [1e9]), found)
    print(f"\nbatches of {args.batch} samples; threads ahead; step of the training")
    print(f"{'':>7} {'':>7} {'ahead':>5} {'step':>6} {'ms/batch':>9} {'samples/s':>10} {'waits ms':>9} {'bytes read/needed':>18}  resident MiB along the pass")
    for (place, state, ahead, step), (spent, ratio, points) in best.items():
        print(f"{place:>7} {state:>7} {ahead:5d} {1e3 * step:4.0f}ms {1e3 * spent:9.2f} {args.batch / spent:10.0f} {1e3 * (spent - step):9.2f} {ratio:18.2f}  {' '.join(f'{p:.0f}' for p in points)}")


def amplification(packed: Path, batch: int, batches: int = 40) -> None:
    "Bytes that the disk gave for random batches, over those that were needed: by reading places, and through a mapping."
    import mmap
    disk = lambda: int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])
    store, rng = open_store(packed), np.random.default_rng(0)
    wanted = [np.unique(np.concatenate([first := rng.choice(len(store) - 1, batch, replace=False) + 1, first + 1])) for _ in range(batches)]
    with open(packed, "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), store.dtype, len(store) * store.regime.NX**2, store._start).reshape(len(store), -1)
        for name, read in (("places", store.read), ("mapping", lambda numbers: mapped[numbers - 1].sum())):
            cool(packed)
            before, needed = disk(), 0
            for numbers in wanted[:10]:
                read(numbers)
                needed += len(numbers) * store._size
            print(f"random batches, cold, {name:>8}: {(disk() - before) / needed:.2f} bytes read per byte needed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--NX", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to be measured; default: the system's for temporary files")
    args = parser.parse_args()
    n = args.frames
    print(f"{n} frames of {args.NX}², {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        scratch = Path(tmp)
        trees = {}
        for kind in ("v5", "v7.3"):
            tree = make_tree(scratch / "all", kind, n, args.NX)
            parts = sorted({max(1000, n // 10), max(1000, 3 * n // 10)} - {n})
            trees |= {(kind, m): some_of(tree, scratch / f"{kind}_{m}", m) for m in parts if m < n} | {(kind, n): tree}
        packing(trees, scratch, args.repeats)
        again(trees["v5", n], n, scratch)
        amplification(scratch / "x.h5", args.batch)
        loading(trees["v5", n], n, scratch, args)


if __name__ == "__main__":
    main()
