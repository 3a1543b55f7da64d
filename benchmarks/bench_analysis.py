"""Speed and memory of the long analysis, beside reading and one FFT per frame.

    python benchmarks/bench_analysis.py                         # 64² and 256², Py2D's files, packed stores and rollouts
    python benchmarks/bench_analysis.py --memory                # 1,000 to 100,000 frames of 64²
    python benchmarks/bench_analysis.py --sizes 64 --each       # and every diagnostic alone
    python benchmarks/bench_analysis.py --workers 4             # and by so many processes, in seconds of the clock (default 2)

The floor is reading every frame and one real FFT of what was read, in pieces that fit the cache: in double precision, and in the single
precision that the frames are stored in. Floor and analysis take turns in one process, on one thread, and the least CPU time of several
rounds counts, because other processes only ever add to it. The last three columns are by the clock, on a record thirty times as long (the same frames again),
the floor still in one process: they tell nothing on a busy machine. Memory is the resident set before and
after the pass and after the result, and the peak, each length in a process of its own.
"""
import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from fields import packed_run
from turbvit_nb.climate.rollouts import RolloutWriter, open_rollout
from turbvit_nb.climate.diagnostics import Setting, block_frames
from turbvit_nb.climate.keys import AnalysisConfig
from turbvit_nb.climate.passes import accumulate, climate_dataset, in_processes, switched_on
from turbvit_nb.climate.records import Record, rollout_record, truth_record
from turbvit_nb.physics.py2d import Regime, TreeWriter, find_runs, open_store
from turbvit_nb.physics.spectral import grid

POINTS = 2**18  # of one field in a piece of at least 8 frames, as in the analysis


def floor(records: Sequence[Record], dtype: torch.dtype) -> None:
    "Read every frame and transform it once."
    for record in records:
        size = max(8, POINTS // record.side**2)
        for a in range(0, len(record), size):
            torch.fft.rfft2(next(iter(record.read(a, min(a + size, len(record))).values())).to(dtype))


def seconds(job: Callable, clock: Callable[[], float]) -> float:
    "Time of a job."
    start = clock()
    job()
    return clock() - start


def sources(folder: Path, side: int, frames: int) -> dict[str, Record]:
    "The same frames as Py2D writes them, packed, and as a rollout."
    packed = open_store(packed_run(folder / "packed", side, frames))
    regime, writer = packed.regime, TreeWriter(folder / "tree", packed.regime)
    rollout = RolloutWriter(folder / "rollout" / "1", {"axes": ["step", "field", "x", "y"], "step": 0.06})
    for n in packed.frames:
        omega = packed.read([n], np.float64)[0]
        writer.append(0.06 * n, omega)
        rollout.append(int(n), grid(side).velocity(torch.from_numpy(omega)).numpy())
        if n % 50 == 0:
            rollout.flush()
    rollout.flush(), rollout.describe("done", frames)
    tree = open_store(find_runs(writer.finish())[0])
    return {".mat": truth_record(tree, tree.frames), "packed": truth_record(packed, packed.frames), "rollout": rollout_record(open_rollout(folder / "rollout" / "1"))}


def again(record: Record, times: int = 30) -> Record:
    "The record several times over."
    n = len(record)

    def read(a: int, b: int) -> dict[str, torch.Tensor]:
        a, b = a % n, a % n + b - a
        parts = [record.read(a, min(b, n)), *([record.read(0, b - n)] if b > n else [])]
        return {name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}

    return Record(record.label, 0.06 * np.arange(1, times * n + 1), read, record.where)


def setting_for(records: Sequence[Record]) -> Setting:
    "All default switches."
    side = records[0].side
    regime = Regime(1000, 0, 4, 0.1, 20.0, NX=side)
    return Setting(AnalysisConfig(), 0.06, torch.zeros(3, side, side), {"u": 20.0, "omega": 100.0}, block_frames(records), regime=regime, patch_size=side // 16)


def speed(side: int, frames: int, rounds: int, each: bool, workers: int) -> None:
    "A line per kind of file."
    with tempfile.TemporaryDirectory() as folder:
        for kind, record in sources(Path(folder), side, frames).items():
            setting = setting_for([record])
            jobs = {"read": lambda: [record.read(a, min(a + 16, frames)) for a in range(0, frames, 16)], "f64": lambda: floor([record], torch.float64)}
            jobs |= {"f32": lambda: floor([record], torch.float32), "all": lambda: accumulate([record], setting)}
            jobs |= {name: lambda name=name: accumulate([record], setting, [name]) for name in switched_on(setting.config)} if each else {}
            took = {name: min(times) for name, times in zip(jobs, zip(*[[seconds(job, time.process_time) / frames * 1e6 for job in jobs.values()] for _ in range(rounds)]))}
            shown = "  ".join(f"{took[name]:8.1f}" for name in ("read", "f64", "f32", "all"))
            long = again(record)
            timed = [lambda: floor([long], torch.float64), lambda: in_processes([long], setting_for([long]), workers=workers)]
            base, shared = (min(times) for times in zip(*[[seconds(job, time.perf_counter) / len(long) * 1e6 for job in timed] for _ in range(2)]))
            print(f"{side:4}² {kind:>8}  {shown}   {took['f64'] / took['all']:5.2f} {took['f32'] / took['all']:5.2f} {base:9.1f} {shared:9.1f} {base / shared:5.2f}", flush=True)
            for name in switched_on(setting.config) if each else ():
                print(f"{name:>32} {took[name]:8.1f}")


def resident() -> float:
    "MiB of this process in memory now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(length: int) -> None:
    "One record, made of the same 500 frames read again and again."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(packed_run(Path(folder), 64, 500))
        read = lambda a, b: {"vorticity": torch.from_numpy(store.read(np.arange(a, b) % 500 + 1))}
        records, before = [Record("again", 0.06 * np.arange(1, length + 1), read, str)], resident()
        diagnostics = accumulate(records, setting_for(records))
        after = resident()
        climate_dataset(diagnostics, records)
        print(f"{length:8,} {before:12.0f} {after:15.0f} {resident():17.0f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--frames", type=int, default=None, help="frames of a source; default as many as make 64 MiB in single precision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--each", action="store_true", help="also every diagnostic alone")
    parser.add_argument("--memory", action="store_true", help="memory at 10³, 10⁴ and 10⁵ frames instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(f"{'frames':>8} {'before, MiB':>12} {'after the pass':>15} {'after the result':>17} {'peak':>9}")
        for length in (1000, 10_000, 100_000):
            process = get_context("spawn").Process(target=memory, args=(length,))
            process.start(), process.join()
        return
    os.environ["TURBVIT_PROGRESS"] = "0"
    print("              µs of CPU per frame                        floor / analysis   by the clock, and by several processes")
    print(f"                 read   + FFT 64  + FFT 32  analysis     64    32  + FFT 64     {args.workers} do   64")
    for side in args.sizes:
        speed(side, args.frames or 2**24 // side**2, args.rounds, args.each, args.workers)


if __name__ == "__main__":
    main()
