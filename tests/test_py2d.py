"""Py2D files: the real tree against scipy, packed files, damaged input; data sets made by several processes."""
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.io import loadmat

from turbvit_nb.data.packing import pack
from turbvit_nb.physics.py2d import (
    PACKED, FrameError, PackedStore, PackedWriter, Regime, StoreError, TreeWriter, find_runs, open_store, read_mat, read_parameters, read_state,
)

TINY = Regime(200, beta=20.0, NX=16, dt=1e-2)


@pytest.fixture(scope="module")
def real_run(py2d_data) -> Path:
    return find_runs(py2d_data / "results")[0]


@pytest.fixture
def tree(tmp_path) -> TreeWriter:
    "Forty frames of noise."
    writer = TreeWriter(tmp_path, TINY)
    for n in range(40):
        writer.append(0.1 * (n + 1), np.random.default_rng(n).standard_normal((16, 16)))
    return writer


# Names ---------------------------------------------------------------------------------------------------------------

def test_any_spelling_of_a_path_comes_back():
    rng = random.Random(0)
    digits = lambda n=4: "".join(rng.choice("0123456789") for _ in range(rng.randint(1, n)))
    def number():
        text = rng.choice(["", "-", "", ""]) + rng.choice([digits(), f"{digits()}.{digits()}", f"{digits()}.", f".{digits()}"])
        return text + rng.choice(["", "", f"e-{digits(1)}", f"E+{digits(1)}", f"e{digits(1)}"])
    for _ in range(5000):
        text = (f"Re{rng.randint(1, 10**6)}_fkx{number()}fky{number()}_r{number()}_b{number()}{rng.choice(['', '_alias'])}/"
                f"{rng.choice(['NoSGS', 'SMAG', 'PiOmegaGM2', 'a b'])}/NX{2 * rng.randint(1, 999)}/dt{number()}_IC{digits()}")
        regime = Regime.parse(f"/x/{text}")
        assert str(regime.path()) == text
        assert Regime.parse(regime.path()) == regime


def test_values_print_as_python_prints_them():
    for beta in (20, 20.0, 0.1, 2e-5, 1e16, -3):
        for dt in (2e-4, 2e-5, 0.01, 1):
            regime = Regime(1000, beta=beta, dt=dt)
            assert Regime.parse(regime.path()) == regime
            assert f"_b{beta}/" in f"{regime.path()}" and f"dt{dt}_" in f"{regime.path()}"


@pytest.mark.parametrize("name", ["data", "Re1000_fkx0fky4_r0.1/NoSGS/NX64/dt0.1_IC1", "Re1000_fkx0fky4_r0.1_b20/NX64/dt0.1_IC1", "dt0.1_IC1",
                                  "Re1000_fkx0fky4_r0.1_b20_alia/NoSGS/NX64/dt0.1_IC1", "Re1e3_fkx0fky4_r0.1_b20/NoSGS/NX64/dt0.1_IC1"])
def test_a_name_that_says_no_regime_is_one_line(name):
    with pytest.raises(StoreError) as error:
        Regime.parse(f"/scratch/{name}")
    assert "\n" not in str(error.value) and f"/scratch/{name}: the folder's name does not say" in str(error.value)


# The real tree -------------------------------------------------------------------------------------------------------

def test_real_frames_are_what_scipy_reads(real_run):
    store = open_store(real_run)
    assert len(store) == 1000 and store.frames[0] == 1001 and store.frames[-1] == 2000
    assert store.regime == Regime(1000, 0, 4, 0.1, 20, NX=64, dt=2e-4, IC=1)
    assert str(real_run).endswith(str(store.regime.path()))
    files = [loadmat(store.frame_path(n)) for n in store.frames]
    np.testing.assert_array_equal(store.read(store.frames, np.float64), [f["Omega"] for f in files])
    np.testing.assert_allclose(store.times, [f["time"].item() for f in files], atol=1e-9)


def test_real_restart_state_is_the_frame(real_run):
    store, state = open_store(real_run), read_state(real_run)
    assert state.number == 2000 and state.time == store.times[-1]
    np.testing.assert_allclose(np.fft.irfft2(state.omega1_hat), store.read([2000], np.float64)[0], atol=1e-12)
    assert read_state(real_run, 1999).number == 1999


def test_real_tree_packs_exactly_and_writes_back(real_run, tmp_path):
    store = open_store(real_run)
    for dtype in ("float32", "float64"):
        packed = pack(store, tmp_path / f"{dtype}.h5", dtype)
        np.testing.assert_array_equal(packed.read(store.frames, dtype), store.read(store.frames, dtype))
        np.testing.assert_array_equal(packed.times, store.times)
        assert packed.regime == store.regime and packed.regime.path() == store.regime.path() and not packed.check()
    writer = TreeWriter(tmp_path, store.regime)
    for n in store.frames[:20]:
        writer.append(store.times[n - 1001], store.read([n], np.float64)[0])
    again = open_store(writer.path)
    np.testing.assert_array_equal(again.read(range(1, 21), np.float64), store.read(store.frames[:20], np.float64))
    ours, theirs = (loadmat(s.frame_path(n)) for s, n in ((again, 1), (store, 1001)))
    assert ours.keys() == theirs.keys() and all(np.shape(ours[k]) == np.shape(theirs[k]) for k in ("Omega", "time"))
    labels = read_parameters(writer.path / "parameters.txt")
    assert labels.items() <= read_parameters(real_run / "parameters.txt").items() | {("SGS Model", "NoSGS")}


# Opening -------------------------------------------------------------------------------------------------------------

def test_v73_trees_are_read_with_their_axes(tree):
    for n in range(1, 41):
        omega = read_mat(path := tree.path / f"data/{n}.mat")["Omega"]
        path.unlink()
        with h5py.File(path, "w", userblock_size=512) as file:
            file["Omega"], file["time"] = omega.T, [[0.1 * n]]
    store = open_store(tree.path)
    np.testing.assert_array_equal(store.read([7], np.float64)[0], np.random.default_rng(6).standard_normal((16, 16)))
    np.testing.assert_allclose(store.times, 0.1 * np.arange(1, 41))


def test_opening_lists_the_folder_once_and_stats_no_frame(tree, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    store = open_store(tree.path)
    monkeypatch.setattr(os, "stat", lambda *a, **k: pytest.fail("a frame was looked at"))
    monkeypatch.setattr(os, "listdir", lambda *a, **k: pytest.fail("a folder was listed"))
    store.read(range(1, 41))
    assert len(listed) == 1


def test_every_truncation_is_a_frame_error(tree):
    path = tree.path / "data/3.mat"
    whole = path.read_bytes()
    for size in [0, 1, 64, 127, 128, 132, 136, 150, 180, 191, 192, 200, 1000, 192 + 8 * 256 - 1]:
        path.write_bytes(whole[:size])
        for numbers in ([3], [1, 3]):
            with pytest.raises(FrameError, match=r"3\.mat: (truncated|holds no Omega)") as error:
                open_store(tree.path).read(numbers)
            assert "\n" not in str(error.value)


def test_random_damage_never_raises_anything_else(tree):
    path, rng = tree.path / "data/3.mat", np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, 200, rng.integers(1, 6)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            open_store(tree.path).read([3])
        except FrameError as error:
            assert str(path) in str(error)


def test_a_folder_that_disagrees_with_its_parameters_is_refused(tree):
    text = (tree.path / "parameters.txt").read_text()
    (tree.path / "parameters.txt").write_text(text.replace("(beta): 20.0", "(beta): 10"))
    with pytest.raises(StoreError, match="says beta = 10, but the folder's name says 20.0"):
        open_store(tree.path)


def test_a_killed_run_s_last_frame_is_named_and_can_be_skipped(tree):
    (last := tree.path / "data/40.mat").write_bytes(last.read_bytes()[:300])
    with pytest.raises(FrameError, match="40.mat: truncated"):
        open_store(tree.path).times
    store = open_store(tree.path, skip_bad=True)
    assert len(store) == 39 and len(store.bad) == 1
    np.testing.assert_allclose(store.times, 0.1 * np.arange(1, 40))


# Packing -------------------------------------------------------------------------------------------------------------

def test_a_frame_spoilt_in_the_part_is_written_again(tree, tmp_path):
    target, store = tmp_path / "x.h5", open_store(tree.path)
    writer = PackedWriter(target, TINY, 40)
    for n in range(1, 21):
        writer.append(0.1 * n, store.read([n])[0])
    writer.close()
    with h5py.File(writer.part) as file:
        at = file["omega"].id.get_chunk_info_by_coord((15, 0, 0)).byte_offset
    with open(writer.part, "r+b") as file:
        file.seek(at)
        file.write(b"\7\7\7\7")
    (again := PackedWriter(target, TINY, 40)).close()
    assert again.count == 15
    np.testing.assert_array_equal(pack(tree.path, target).read(range(1, 41)), store.read(range(1, 41)))


def test_a_truncated_or_foreign_packed_file_is_one_line(tree, tmp_path):
    target = pack(tree.path).path
    whole = target.read_bytes()
    for size in (0, 100, 3000, len(whole) - 1):
        target.write_bytes(whole[:size])
        with pytest.raises(StoreError) as error:
            open_store(target)
        assert str(target) in str(error.value) and "\n" not in str(error.value)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(StoreError, match="not a packed store"):
        open_store(tmp_path / "other.h5")


def test_a_compressed_file_of_another_writer_is_read(tree, tmp_path):
    store = open_store(tree.path)
    frames = store.read(store.frames)
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file.create_dataset("omega", data=frames, chunks=(4, 16, 16), compression="gzip")
        file["frame"], file["time"] = store.frames, store.times
        file["checksum"] = np.array([zlib.crc32(f.tobytes()) for f in frames], "u4")
        file.attrs.update({"path": str(TINY.path()), "Re": 200, "fkx": 0, "fky": 4, "alpha": 0.1, "beta": 20.0, "sgs": "NoSGS", "NX": 16, "dt": 1e-2, "IC": 1, "dealias": True})
    theirs = open_store(tmp_path / "theirs.h5")
    np.testing.assert_array_equal(theirs.read([30, 2, 30]), frames[[29, 1, 29]])
    assert not theirs.check()


def test_a_packed_store_stays_small_in_memory(tmp_path):
    regime, frames = Regime(200, NX=128), 1500  # 98 MB
    writer = PackedWriter(tmp_path / PACKED, regime, frames)
    for n in range(frames):
        writer.append(n + 1.0, np.full((128, 128), n, "f4"))
    store = open_store(writer.finish())
    before = _resident()
    for start in range(1, frames, 50):
        store.read(range(start, start + 50))
    assert _resident() - before < 50 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Data of our own -----------------------------------------------------------------------------------------------------

KEYS = dict(NX=16, Re=100, beta=5.0, dt=0.002, n_frames=40, t_save=0.02, n_trajectories=2, spin_up=0.1)
GENERATE = """
import json, sys, time
import torch
torch.set_num_threads(1)
from turbvit_nb.data import generate as data
def slowly(items, **kw):
    for item in items:
        yield item
        time.sleep(0.03)
data.progress, data.KEEP = slowly, 0.0
data.generate(data.GenerateConfig(**json.loads(sys.argv[1])))
"""


def _child(keys: dict) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TURBVIT_PROGRESS": "0"}
    return subprocess.Popen([sys.executable, "-c", GENERATE, json.dumps(keys)], stderr=subprocess.PIPE, text=True, env=env)


def _contents(folder) -> list[np.ndarray]:
    return [open_store(run).read(range(1, 41), np.float64) for run in find_runs(folder)]


@pytest.mark.parametrize("scheme, store", [("exact", "packed"), ("py2d", "tree")])
def test_killed_generation_goes_on_to_the_same_bits(tmp_path, scheme, store):
    from turbvit_nb.data.generate import GenerateConfig, generate
    keys = KEYS | {"scheme": scheme, "store": store, "data_dir": str(tmp_path / "killed")}
    child, state = _child(keys), tmp_path / "killed" / "generate.state"
    while not state.exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    time.sleep(0.2)
    child.kill()
    child.wait()
    assert state.exists() and not (tmp_path / "killed" / "generate.json").exists()
    generate(GenerateConfig(**keys))
    generate(GenerateConfig(**keys | {"data_dir": str(tmp_path / "whole")}))
    np.testing.assert_array_equal(_contents(tmp_path / "killed"), _contents(tmp_path / "whole"))
    assert not state.exists()


def test_processes_that_want_the_same_data_make_it_once(tmp_path):
    children = [_child(KEYS | {"data_dir": str(tmp_path / "data")}) for _ in range(2)]
    assert [c.wait() for c in children] == [0, 0]
    assert len(find_runs(tmp_path / "data")) == 2
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.is_file()) == [".lock", "generate.json"]


def test_other_settings_are_refused(tmp_path):
    from turbvit_nb.data.generate import GenerateConfig, generate
    from turbvit_nb.lab.config import LabError
    keys = dict(data_dir=str(tmp_path / "data"), NX=16, Re=100, dt=0.01, n_frames=3, t_save=0.02)
    generate(GenerateConfig(**keys))
    generate(GenerateConfig(**keys))
    with pytest.raises(LabError, match=r"beta = 0 there, 5.0 wanted"):
        generate(GenerateConfig(**keys, beta=5.0))
    TreeWriter(tmp_path / "own", TINY).append(0.1, np.zeros((16, 16)))
    with pytest.raises(LabError, match=r"runs that \[generate\] did not make"):
        generate(GenerateConfig(**keys | {"data_dir": str(tmp_path / "own")}))


def test_generation_is_announced_in_one_line(tmp_path, monkeypatch, capsys):
    from turbvit_nb.data.generate import GenerateConfig, generate
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    monkeypatch.setenv("TURBVIT_DATA", str(tmp_path))
    keys = dict(data_dir="ours", NX=16, Re=100, dt=0.01, n_frames=3, t_save=0.02, n_trajectories=2)
    generate(GenerateConfig(**keys))
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"\[generate\] makes 2 × 3 frames of 16² in {tmp_path}/ours: 0.00614 MB, about \d+ s on this machine", said[0])
    generate(GenerateConfig(**keys))
    assert not capsys.readouterr().out


def test_generation_leaves_a_root_of_others_alone(tmp_path, monkeypatch):
    from turbvit_nb.data.generate import GenerateConfig, generate
    from turbvit_nb.lab.config import LabError
    TreeWriter(tmp_path / "results", TINY).append(0.1, np.zeros((16, 16)))
    monkeypatch.setenv("TURBVIT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    keys = dict(data_dir="ours", NX=16, Re=100, dt=0.01, n_frames=3, t_save=0.02)
    with pytest.raises(LabError, match=r"\(results\), and data_dir = \"ours\" would go beside them; .* or allow_foreign = true"):
        generate(GenerateConfig(**keys))
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    assert generate(GenerateConfig(**keys, allow_foreign=True)) == tmp_path / "ours"
    generate(GenerateConfig(**keys))  # what is there is used, whoever else is
    with pytest.raises(LabError, match=r"runs that \[generate\] did not make"):
        generate(GenerateConfig(**keys | {"data_dir": "results"}, allow_foreign=True))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    from turbvit_nb.data.generate import GenerateConfig, generate
    from turbvit_nb.lab.config import LabError
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="cannot be written .*; choose another data_dir"):
        generate(GenerateConfig(data_dir=str(tmp_path / "file" / "data"), NX=16, Re=100, n_frames=3, t_save=0.02))


def test_sections_are_checked_without_reading_a_frame(tmp_path, monkeypatch):
    from turbvit_nb.lab.config import Config, LabError
    from turbvit_nb.physics import py2d
    for ic in (1, 2):
        writer = TreeWriter(tmp_path, Regime(200, beta=20.0, NX=16, dt=1e-2, IC=ic))
        for n in range(12):
            writer.append(0.1 * (n + 1), np.zeros((16, 16)))
    monkeypatch.setattr(py2d, "read_frame", lambda *_: pytest.fail("a frame was read"))

    def told(**sections):
        "What each section's check says."
        config, said = Config({name: {"data_dir": str(tmp_path)} | keys for name, keys in sections.items()}), {}
        for name, section in config.sections.items():
            try:
                section.check(config, name)
            except LabError as error:
                said[name] = str(error)
        assert not config.used
        return said

    assert told(train_dataset={"frame_range": [[1, 7]]}, validation_dataset={"frame_range": [[7, 13]]}) == {}
    said = told(test_dataset={"frame_range": [[5, 9]]}, train_dataset={"frame_range": [[1, 7]]}, climo_dataset={"frame_range": [[1, 7]]})
    assert list(said) == ["test_dataset"] and said["test_dataset"].startswith("train_dataset and test_dataset share 2 frames, 5 to 6")
    assert list(told(train_dataset={"frame_range": [[1, 14]]}, validation_dataset={"frame_range": [[1, 3]], "skip_bad": True})) == ["train_dataset"]
    assert told(train_dataset={"frame_range": [[1, 7]], "trajectories": [1]}, validation_dataset={"frame_range": [[1, 7]], "trajectories": [2]}) == {}
