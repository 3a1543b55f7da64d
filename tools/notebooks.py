"""Run every notebook as `nbdev_test` does, each in a process of its own, and name those that fail or whose process dies.

`nbdev_test` runs many notebooks in one process: what one registers, or how many threads it leaves, the next one finds.
"""
import importlib
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [  # what most notebooks import, none of it ours
    "torch", "torch.distributed.fsdp", "scipy.stats", "scipy.optimize", "sklearn.ensemble", "matplotlib.pyplot", "holoviews.plotting.mpl", "xarray", "h5netcdf",
    "pydantic", "papermill", "nbdev.test",
]
AT_ONCE = 2


def run(path: Path) -> tuple[bool, float]:
    "Whether the cells of a notebook ran, and the seconds that they took."
    sys.path.insert(0, str(ROOT))
    test = importlib.import_module("nbdev.test")
    return test.test_nb(path, skip_flags=test.get_config().tst_flags.split(), basepath=ROOT)


def alone(path: Path) -> tuple[bool, float]:
    "The same in a new process; one that dies has failed."
    begun = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        try:
            return pool.submit(run, path).result()
        except BrokenProcessPool:
            print(f"the process of {path.relative_to(ROOT)} died", file=sys.stderr)
            return False, time.monotonic() - begun


def main() -> int:
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    found = importlib.import_module("nbdev.doclinks").nbglob(ROOT / "nbs", as_path=True)
    paths = sorted(found, key=lambda path: (path.parent.name != "tutorials", path))  # the longest first: at the end no core waits for them
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ran = dict(zip(paths, pool.map(alone, paths)))
    for path, (passed, seconds) in sorted(ran.items(), key=lambda item: -item[1][1]):
        print(f"{seconds:6.0f} s  {path.relative_to(ROOT)}{'' if passed else '  FAILED'}")
    return 0 if all(passed for passed, _ in ran.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
