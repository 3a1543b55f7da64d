"""Speed and memory of the long analysis, beside reading and one FFT per frame.

    python benchmarks/bench_analysis.py                         # 64², 1,000 to 16,000 frames, all diagnostics
    python benchmarks/bench_analysis.py --size 256 --frames 256

A packed store is made and read again and again as so many records, so that the length can grow without the disk. The ratio is the
time of reading and one real FFT per frame over that of the whole analysis; memory is the peak resident set of the process so far.
"""
import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from fields import packed_run
from turbvit_nb.long_analysis import Setting, accumulate, climate_dataset, switched_on, truth_record
from turbvit_nb.physics.py2d import open_store
from turbvit_nb.short_analysis import AnalysisConfig


def floor(records) -> float:
    "Seconds to read every frame and transform it once."
    start = time.process_time()
    for record in records:
        for a in range(0, len(record), 64):
            torch.fft.rfft2(record.read(a, min(a + 64, len(record)))["vorticity"].double())
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=1000, help="frames of the store, and of a record")
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 4, 16], help="records per analysis")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--each", action="store_true", help="also every diagnostic alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(packed_run(Path(folder), args.size, args.frames))
        setting = Setting(AnalysisConfig(), 0.06, torch.zeros(3, args.size, args.size), {"u": 10.0, "omega": 50.0})
        accumulate([truth_record(store, store.frames[:64])], setting)
        print(f"{'frames':>9} {'read + FFT':>12} {'analysis':>12} {'ratio':>6} {'peak MiB':>9}   ({args.size}², CPU seconds; frames/s in the analysis)")
        for repeats in args.repeats:
            records = [truth_record(store, store.frames)] * repeats
            least, start = floor(records), time.process_time()
            climate_dataset(accumulate(records, setting), records)
            spent = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{repeats * args.frames:9,} {least:11.2f}s {spent:11.2f}s {least / spent:6.2f} {peak:9.0f}   {repeats * args.frames / spent:,.0f}/s")
        for name in switched_on(setting.config) if args.each else ():
            start = time.process_time()
            accumulate([truth_record(store, store.frames)], setting, [name])
            print(f"{name:>24} {time.process_time() - start:.2f}s")


if __name__ == "__main__":
    main()
