"""Frames of other people's files: streamed, resumed after SIGKILL, refused in one line."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from turbvit_nb.physics import importers
from turbvit_nb.physics.importers import import_frames
from turbvit_nb.physics.py2d import PackedStore, StoreError

FLOW = dict(Re=200, fkx=0, fky=4, alpha=0.1, beta=20.0)


def fields(n: int, N: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, N, N))


SLOWLY = """
import sys, time
from turbvit_nb.physics import importers
def slowly(items, desc=""):
    for item in items:
        yield item
        time.sleep(0.02)
importers.BLOCK = 1
importers.import_frames(sys.argv[1], sys.argv[2], axes="txy", progress=slowly)
"""


def test_a_killed_import_goes_on(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", omega=fields(200), time=0.1 * np.arange(1, 201), **FLOW)
    target, part = tmp_path / "a.h5", tmp_path / "a.h5.part"
    child = subprocess.Popen([sys.executable, "-c", SLOWLY, tmp_path / "a.npz", target], stderr=subprocess.PIPE, text=True)
    while not part.exists() or not (frames := _count(part)):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists() and 0 < _count(part) < 200 and frames
    done = []
    counted = lambda items, desc="": done.extend(items) or done if "importing" in desc else items
    store, = import_frames(tmp_path / "a.npz", target, axes="txy", progress=counted)
    assert done[0] > 0 and not part.exists() and not store.check()
    np.testing.assert_array_equal(store.read(range(1, 201)), fields(200).astype("f4"))


def _count(part: Path) -> int:
    try:
        with h5py.File(part) as file:
            return int((file["frame"][()] > 0).sum())
    except (OSError, KeyError):
        return 0


LIMITED = """
import resource, sys
from turbvit_nb.physics import importers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
importers.BLOCK = 1 << 20
importers.import_frames(sys.argv[1], sys.argv[2], axes="txy")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_import_stays_small_in_memory(tmp_path, save):
    save(tmp_path / "a.npz", omega=np.repeat(fields(40, 128), 15, 0), time=0.1 * np.arange(1, 601), **FLOW)  # 79 MB
    run = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "a.npz", tmp_path / "a.h5"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 30_000  # kB
    assert len(PackedStore(tmp_path / "a.h5")) == 600


def test_zarr_is_asked_for_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "flow.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(StoreError, match=r"flow\.zarr: reading Zarr needs a package: pip install zarr"):
        import_frames(tmp_path / "flow.zarr", tmp_path / "a.h5")


def test_zarr_is_read_where_it_is_installed(tmp_path):
    pytest.importorskip("zarr")
    import xarray as xr
    omega = fields(5)
    xr.Dataset({"vorticity": (("time", "y", "x"), omega)}, {"time": np.arange(5.0)}, FLOW).to_zarr(tmp_path / "flow.zarr")
    store, = import_frames(tmp_path / "flow.zarr", tmp_path / "a.h5", dtype="float64")
    np.testing.assert_array_equal(store.read(range(1, 6), np.float64), omega.swapaxes(1, 2))


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_netcdf_of_both_generations(tmp_path, engine):
    import xarray as xr
    omega = fields(5)
    data = xr.Dataset({"vorticity": (("lat", "time", "lon"), omega.transpose(1, 0, 2))}, {"time": np.arange(5.0)}, FLOW | {"Re": 200.5})
    data.to_netcdf(tmp_path / "flow.nc", engine=engine)
    store, = import_frames(tmp_path / "flow.nc", tmp_path / "a.h5", {"IC": 7, "dt": 0.01}, dtype="float64")
    np.testing.assert_array_equal(store.read(range(1, 6), np.float64), omega.swapaxes(1, 2))
    assert store.regime.IC == 7 and store.regime.Re == 200.5 and store.regime.dt == 0.01


def test_every_truncation_is_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", omega=fields(20), time=0.1 * np.arange(1, 21), **FLOW)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["omega"], file["time"] = fields(20), 0.1 * np.arange(1, 21)
        file.attrs.update(FLOW)
    for name in ("a.npz", "a.h5"):
        whole = (tmp_path / name).read_bytes()
        for size in np.linspace(0, len(whole) - 1, 25).astype(int):
            cut = tmp_path / f"cut{Path(name).suffix}"
            cut.write_bytes(whole[:size])
            with pytest.raises(StoreError) as error:
                import_frames(cut, tmp_path / "out.h5", axes="txy")
            assert "\n" not in str(error.value) and not (tmp_path / "out.h5").exists()


def test_a_damaged_member_is_one_line_and_leaves_no_store(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", omega=fields(50), time=0.1 * np.arange(1, 51), **FLOW)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    whole[40_000:40_200] = os.urandom(200)
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(StoreError) as error:
        import_frames(tmp_path / "a.npz", tmp_path / "out.h5", axes="txy")
    assert "\n" not in str(error.value) and not (tmp_path / "out.h5").exists()


def test_a_pickle_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))
    for name, save in (("a.npz", lambda p, a: np.savez(p, omega=a)), ("a.npy", lambda p, a: np.save(p, a, allow_pickle=True))):
        save(tmp_path / name, np.array([Bomb()], object))
        with pytest.raises(StoreError, match="Python objects|plain numbers"):
            import_frames(tmp_path / name, tmp_path / "out.h5", FLOW, axes="txy", t_save=0.1)
    assert not (tmp_path / "ran").exists()


def test_a_well_field_that_does_not_vary_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        space = file.create_group("dimensions")
        space.attrs["spatial_dims"] = ["x", "y"]
        space["time"] = np.arange(5.0)
        file["t0_fields/vorticity"] = fields(1)[0]
        file["t0_fields/vorticity"].attrs.update(sample_varying=False, time_varying=False)
    with pytest.raises(StoreError, match='vorticity has 2 axes, and axes = "xy" does not describe them'):
        import_frames(tmp_path / "a.hdf5", tmp_path / "out.h5", FLOW)


def test_block_size_changes_nothing(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", omega=fields(23), time=0.1 * np.arange(1, 24), **FLOW)
    whole, = import_frames(tmp_path / "a.npz", tmp_path / "one.h5", axes="txy")
    monkeypatch.setattr(importers, "BLOCK", 5 * 8 * 16 * 16)
    parts, = import_frames(tmp_path / "a.npz", tmp_path / "many.h5", axes="txy")
    np.testing.assert_array_equal(whole.read(range(1, 24)), parts.read(range(1, 24)))
