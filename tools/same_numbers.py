"""Compare every number that two folders of results hold: NetCDF, JSON and rollouts, file by file.

    python tools/same_numbers.py runs_before/vit runs_after/vit

What to run before and after a change that must not move a result. Words may change; a value that is more
than 1e-10 from the other, relative to the largest of its array, is told with its place and fails the command;
differences below 1e-14 are rounding of what is zero. So does a file or an array that only the first folder has.
Items of a JSON list are known by their words, so a list may have gained some.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr

TOLERANCE, ROUNDING = 1e-10, 1e-14


def gap(before: np.ndarray, after: np.ndarray) -> float:
    "The largest difference relative to the largest magnitude; infinite where shapes or the places of NaN differ."
    if before.shape != after.shape or before.dtype.kind != after.dtype.kind:
        return np.inf
    if before.dtype.kind not in "fiub":
        return 0.0 if (before == after).all() else np.inf
    before, after = before.astype(float), after.astype(float)
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], after[~finite], equal_nan=True) or not np.isfinite(after[finite]).all():
        return np.inf
    scale = np.abs(before[finite]).max(initial=0.0) or 1.0
    apart = float(np.abs(before[finite] - after[finite]).max(initial=0.0))
    return 0.0 if apart < ROUNDING else apart / scale


def numbers_in(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    "Every number of a JSON value with its place."
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_in(item, f"{place}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            words = [text for text in item.values() if isinstance(text, str)] if isinstance(item, dict) else []
            yield from numbers_in(item, f"{place}[{' | '.join(words) or i}]")
    elif isinstance(value, (int, float)):
        yield place, float(value)


def arrays(path: Path) -> dict[str, np.ndarray]:
    "The arrays of a file by name."
    if path.suffix == ".npy":
        return {"": np.load(path, mmap_mode="r")}
    if path.suffix == ".json":
        return {place: np.array(number) for place, number in numbers_in(json.loads(path.read_text()))}
    with xr.open_dataset(path, engine="h5netcdf") as data:
        return {str(name): data[name].values for name in data.variables}


def differences(before: Path, after: Path) -> Iterator[str]:
    "One line for each number that is not the same."
    was, now = arrays(before), arrays(after)
    for name, values in was.items():
        if name not in now:
            yield f"{after}: {name or 'the array'} is gone"
        elif (found := gap(values, now[name])) > TOLERANCE:
            yield f"{after}: {name or 'the array'} differs by {found:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    files = sorted(f for suffix in ("nc", "json", "npy") for f in options.before.rglob(f"*.{suffix}"))
    files = [f for f in files if f.name != "status.json"]  # times and durations
    told = []
    for file in files:
        other = options.after / file.relative_to(options.before)
        told += differences(file, other) if other.exists() else [f"{other} is not there"]
    print("\n".join([*told, f"{len(files)} files compared, {len(told)} differences"]))
    return bool(told) or not files


if __name__ == "__main__":
    sys.exit(main())
