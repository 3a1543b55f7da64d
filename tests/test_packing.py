"""Packing a tree: kills at every effect and at random instants, two at once, full disks, memory, system calls; loading from what was packed."""
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from turbvit_nb.data.batches import Batches
from turbvit_nb.data.frames import DatasetConfig, open_dataset
from turbvit_nb.data.packing import pack, verify
from turbvit_nb.lab.files import only_writer
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime, StoreError, TreeWriter, open_store

TINY = Regime(200, beta=20.0, NX=16, dt=1e-2)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TURBVIT_PROGRESS": "0"}


def make_tree(root: Path, frames: int, NX: int = 16, distinct: int = 10) -> Path:
    "A run of noise: some files, and links to them."
    writer = TreeWriter(root, Regime(200, beta=20.0, NX=NX, dt=1e-2))
    for n in range(distinct):
        writer.append(0.1 * (n + 1), np.random.default_rng(n).standard_normal((NX, NX)))
    for n in range(distinct + 1, frames):
        os.link(writer.path / f"data/{n % distinct + 1}.mat", writer.path / f"data/{n}.mat")
    writer.last = frames - 1
    writer.append(0.1 * frames, np.random.default_rng(frames).standard_normal((NX, NX)))
    return writer.path


@pytest.fixture
def tree(tmp_path) -> Path:
    "Three hundred frames."
    return make_tree(tmp_path, 300)


def command(*words: object, **kw) -> subprocess.CompletedProcess:
    "`turbvit` in a process of its own."
    program = "import sys; from turbvit_nb.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, env=ENV, timeout=300, **kw)


# Kills ---------------------------------------------------------------------------------------------------------------

# A process that packs and is killed at one of its effects on the disk: a write (of which the half is done), a sync, a rename, a removal.
DYING = '''
import os, random, signal, sys
from turbvit_nb.data import packing
from turbvit_nb.physics import py2d

source, target, seed, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
packing.BLOCK, py2d.PackedWriter.SYNC = 7 * 8 * 16 * 16, 50 * 4 * 16 * 16  # many small steps
die = lambda: os.kill(os.getpid(), signal.SIGKILL)


def mortal(k):
    "Have the process die at its effect number `k`."
    left, whole = [k], {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "unlink")}

    def wrapped(name):
        def effect(*args, **kw):
            left[0] -= 1
            if left[0] == 0 and name == "pwrite":
                whole["pwrite"](args[0], args[1][:len(args[1]) // 2], args[2])
            if left[0] == 0:
                die()
            done = whole[name](*args, **kw)
            if left[0] == 1 and name == "replace" and random.random() < 0.5:
                die()  # just after
            return done
        return effect

    for name in whole:
        setattr(os, name, wrapped(name))


rng, kills = random.Random(seed), 0
while True:
    if not (child := os.fork()):
        mortal(first + kills if first else rng.randint(1, 60))
        packing.pack(source, target, readers=2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1
    if os.path.exists(target):  # whole or not there, at every instant
        packing.verify(target, source)
print(kills)
'''


def dies(source: Path, target: Path, seed: int, first: int = 0) -> int:
    "How often a pack was killed until it was done."
    done = subprocess.run([sys.executable, "-c", DYING, str(source), str(target), str(seed), str(first)], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("seed", range(3))
def test_a_pack_killed_at_any_effect_goes_on_to_the_same_bytes(tree, tmp_path, seed):
    whole = pack(tree, tmp_path / "whole.h5").path.read_bytes()
    assert dies(tree, tmp_path / "killed.h5", seed) >= 3
    assert (tmp_path / "killed.h5").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["killed.h5", "whole.h5"]  # no lock, no part


def test_a_pack_killed_at_its_first_effects_goes_on(tree, tmp_path):
    "The file laid out, named, locked: one kill at each of the first effects, one after the other."
    assert dies(tree, tmp_path / "killed.h5", 0, first=1) >= 10
    assert (tmp_path / "killed.h5").read_bytes() == pack(tree, tmp_path / "whole.h5").path.read_bytes()


def killed_at_random(source: Path, target: Path, delays: list[float]) -> list[int]:
    "The real command, killed from outside some seconds after it has begun to write; the frames that were done each time."
    program, part, done = "import sys; from turbvit_nb.cli import main; sys.exit(main())", target.with_name(f"{target.name}.part"), []
    for delay in delays:
        child = subprocess.Popen([sys.executable, "-c", program, "pack", str(source), str(target)], env=ENV, stdout=subprocess.DEVNULL)
        lock = target.with_name(f".{target.name}.lock")
        before = lock.stat().st_mtime_ns if lock.exists() else 0
        while child.poll() is None and (not lock.exists() or lock.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not target.exists() or verify(target, source)
        if part.exists():
            with h5py.File(part, locking=False) as file:
                done.append(int((file["frame"][()] > 0).sum()))
    assert command("pack", source, target).returncode == 0
    return done


@pytest.mark.soak
def test_ten_thousand_frames_killed_at_random_instants(tmp_path):
    tree, rng = make_tree(tmp_path, 10_000, NX=64), random.Random(0)
    whole = pack(tree, tmp_path / "whole.h5")
    done = killed_at_random(tree, tmp_path / "killed.h5", [0.0, *(rng.uniform(0, 0.4) for _ in range(7))])
    assert done == sorted(done) and len(set(done)) >= 4, done  # each went on where the one before had stopped
    assert (tmp_path / "killed.h5").read_bytes() == whole.path.read_bytes()
    assert verify(tmp_path / "killed.h5", tree) == f"10000 frames match their checksums and the files of {tree}"


def test_going_on_reads_what_the_disk_may_lack_and_not_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(PackedWriter, "SYNC", 100 * 4 * 16 * 16)
    writer = PackedWriter(tmp_path / PACKED, TINY, 1000)
    writer.extend(np.arange(1.0, 1000), np.zeros((999, 16, 16)), range(1, 1000))
    writer.close()
    writer = PackedWriter(tmp_path / PACKED, TINY, 1000)
    assert (writer.count, writer._synced) == (999, 999)
    for n in range(990, 1000):
        writer.rewind(n - 1)
        writer.extend([1.0] * (1000 - n), np.ones((1000 - n, 16, 16)), range(n, 1000))
    writer.close()
    before = _io("rchar")
    writer = PackedWriter(tmp_path / PACKED, TINY, 1000)
    assert writer.count == 999 and _io("rchar") - before < 120 * 4 * 16 * 16 + 40_000  # tables and header, not a million bytes
    writer.append(1.0, np.ones((16, 16)))
    assert not open_store(writer.finish()).check()


# Two at once ---------------------------------------------------------------------------------------------------------

def test_a_second_pack_of_a_target_is_one_line(tree, tmp_path):
    with only_writer(target := tmp_path / "x.h5"):
        said = command("pack", tree, target)
    assert said.returncode == 1 and re.fullmatch(rf"error: \S*x\.h5 is being written by process {os.getpid()} on \S+; wait for it to end, or stop it\n", said.stderr), said.stderr
    assert command("pack", tree, target).returncode == 0 and verify(target, tree)


RACE = '''
import os, sys, time
from turbvit_nb.data import packing
from turbvit_nb.lab.config import LabError
source, target, start = sys.argv[1], sys.argv[2], time.time() + 0.3
children = []
for _ in range(6):
    if not (child := os.fork()):
        time.sleep(max(0, start - time.time()))
        try:
            packing.pack(source, target, readers=1)
        except (LabError, ValueError) as error:
            os._exit(7 if "is being written by" in str(error) else 8)
        os._exit(0)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
'''


def test_of_packs_that_start_together_one_writes(tree, tmp_path):
    whole = pack(tree, tmp_path / "whole.h5").path.read_bytes()
    for n in range(4):
        codes = subprocess.run([sys.executable, "-c", RACE, str(tree), str(target := tmp_path / f"{n}.h5")], capture_output=True, text=True, env=ENV, timeout=300).stdout.split()
        assert set(codes) <= {"0", "7"} and "0" in codes, codes
        assert target.read_bytes() == whole
    assert not [p for p in tmp_path.iterdir() if "lock" in p.name or "part" in p.name]


# What goes wrong -----------------------------------------------------------------------------------------------------

def test_a_full_disk_is_one_line_and_loses_nothing(tree, tmp_path, monkeypatch):
    target, pwrite, left = tmp_path / "x.h5", os.pwrite, [200_000]

    def filling(handle, data, at):
        "A disk of 200 kB, on which 300 do not find room."
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = pwrite(handle, data[:left[0]], at)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", filling)
    monkeypatch.setattr("turbvit_nb.data.packing.BLOCK", 20 * 8 * 16 * 16)
    with pytest.raises(StoreError, match=r"x\.h5\.part: No space left on device; the 180 frames before are kept, make room and run again$"):
        pack(tree, target)
    monkeypatch.undo()
    writer = PackedWriter(target, TINY, 300)
    writer.close()
    assert writer.count == 180 and not target.exists()
    assert pack(tree, target).path.read_bytes() == pack(tree, tmp_path / "whole.h5").path.read_bytes()


def test_a_disk_too_full_to_begin_is_one_line_and_leaves_nothing(tree, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    said = command("pack", tree, tmp_path / "x.h5", preexec_fn=limit)
    assert said.returncode == 1 and re.fullmatch(r"error: \S*x\.h5\.part: cannot be written \(File too large\); make room or name another target\n", said.stderr), said.stderr
    assert not [p for p in tmp_path.iterdir() if "x.h5" in p.name]


@pytest.mark.parametrize("spoil, said", [
    (lambda path: path.unlink(), "no such frame; copy what is missing, or pack without it with --skip-bad"),
    (lambda path: _cut(path, 700), "truncated or damaged (700 bytes of at least"),
    (lambda path: _cut(path, 0), "truncated or damaged (0 bytes, no MAT header)"),
    (lambda path: _replace(path, 32), "Omega has shape (32, 32), but the run is NX16"),
])
def test_a_frame_in_the_middle_that_is_no_frame_is_named(tree, tmp_path, spoil: Callable, said: str):
    frame, target = tree / "data/151.mat", tmp_path / "x.h5"
    spoil(frame)
    failed = command("pack", tree, target)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and f"151.mat: {said}" in failed.stderr and not target.exists()
    done = command("pack", tree, target, "--skip-bad")
    assert done.returncode == 0 and done.stdout.count("left out") == 1 and f"151.mat: {said.split(';')[0]}" in done.stdout
    assert 151 not in open_store(target).frames and len(open_store(target)) == 299 and verify(target, tree)


def _cut(path: Path, size: int):
    "The first bytes of a frame, in a file of its own."
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)


def _replace(path: Path, NX: int):
    "A frame of another grid."
    other = TreeWriter(path.parents[6] / "other", Regime(200, NX=NX))
    other.append(0.1, np.zeros((NX, NX)))
    path.unlink()
    shutil.copy(other.path / "data/1.mat", path)


def test_verify_names_what_is_wrong(tree):
    pack(tree)
    assert command("pack", tree, "--verify").stdout == f"good: 300 frames match their checksums and the files of {tree}\n"
    _replace(tree / "data/77.mat", 16)
    store = open_store(tree)
    with open(tree / PACKED, "r+b") as file:
        file.seek(store._start + store._size * 99 + 5)
        file.write(b"\1\2\3")
    failed = command("pack", tree, "--verify")
    both = f"frame 100: its bytes do not match its checksum; frame 77: differs from {tree}/data/77.mat"
    assert failed.returncode == 1 and failed.stderr == f"error: {tree}/{PACKED}: 2 of 300 frames are wrong: {both}\n"
    assert command("pack", tree / PACKED, "--verify").stderr == failed.stderr  # the tree beside it is found


def test_pack_refuses_what_it_cannot_keep(tree, tmp_path):
    for dtype in ("int8", "float16", "complex64", "nonsense"):
        with pytest.raises(StoreError, match=f"dtype = {dtype}: a packed store keeps float32"):
            pack(tree, tmp_path / "new.h5", dtype)
    with pytest.raises(StoreError, match=r"frames\.npz: a packed store is an HDF5 file; call it frames\.h5"):
        pack(tree, tmp_path / "frames.npz")
    assert not list(tmp_path.glob("*.h5*")) and not list(tmp_path.glob("*.npz*"))


@pytest.mark.parametrize("there, wanted", [("float32", "float64"), ("float64", "float32")])
def test_a_pack_of_another_precision_is_not_called_done(tree, tmp_path, there, wanted):
    target = tmp_path / "frames.h5"
    before = pack(tree, target, there).path.read_bytes()
    with pytest.raises(StoreError, match=f"is there in {there}, and {wanted} is wanted; remove it or name another target"):
        pack(tree, target, wanted)
    assert target.read_bytes() == before and pack(tree, target, there).dtype == there

# Cost ----------------------------------------------------------------------------------------------------------------

def _io(what: str) -> int:
    "A counter of /proc/self/io."
    return int(re.search(rf"^{what}: (\d+)$", Path("/proc/self/io").read_text(), re.M)[1])


class Calls:
    "Counts what the process asks of names on the disk."

    def __init__(self, monkeypatch, folder: Path):
        self.asked = []
        for name in ("stat", "lstat", "scandir", "listdir", "open", "access"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name), str(folder)))

    def _counted(self, name: str, call: Callable, folder: str) -> Callable:
        def counted(path, *args, **kw):
            if not isinstance(path, int) and os.fspath(path).startswith(folder):
                self.asked.append((name, os.fspath(path)))
            return call(path, *args, **kw)
        return counted

    def take(self, *names: str) -> int:
        "How many of these there were since the last look."
        found = [path for name, path in self.asked if name in names]
        self.asked = []
        return len(found)


@pytest.mark.parametrize("frames", [100, 300])
def test_a_tree_is_listed_once_and_a_batch_opens_what_it_reads(tmp_path, monkeypatch, frames):
    tree = make_tree(tmp_path, frames)
    calls = Calls(monkeypatch, tree)
    dataset = open_dataset(DatasetConfig(data_dir=str(tree), frame_range=[[1, frames + 1]], mode="read"))
    assert [name for name, path in calls.asked if path.endswith("/data")].count("scandir") == 1
    assert calls.take("stat", "lstat", "scandir", "listdir", "access", "open") < 20  # however many frames there are
    for batch in Batches(dataset, 8, prefetch=0).epoch(0):
        numbers = np.unique(dataset.frame[batch["index"]][:, None] + dataset.offsets)
        opened = [path for name, path in calls.asked if name == "open"]
        assert sorted(opened) == sorted(f"{tree}/data/{n}.mat" for n in numbers) and calls.take("stat", "lstat", "scandir", "listdir", "access") == 0
    target = pack(tree).path
    calls.take()
    dataset = open_dataset(DatasetConfig(data_dir=str(target), frame_range=[[1, frames + 1]], mode="mmap"))
    calls.take()
    assert len(list(Batches(dataset, 8).epoch(0))) > 10 and not calls.asked  # the file is open


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace on the PATH")
def test_the_system_is_asked_once_for_each_file(tree, tmp_path):
    program = "import sys; from turbvit_nb.physics.py2d import open_store; s = open_store(sys.argv[1]); s.read(s.frames)"
    traced = ["strace", "-f", "-y", "-o", str(log := tmp_path / "log"), "-e", "trace=%file,%desc", sys.executable, "-c", program, str(tree)]
    if subprocess.run(traced, env=ENV, capture_output=True).returncode:
        pytest.skip("strace may not look at processes here")
    lines = log.read_text().splitlines()
    named = Counter(m[1] for line in lines if (m := re.search(r"\b(\w+)\(.*?data/\d+\.mat", line)))
    assert named == {"openat": 300, "read": 600, "close": 300}  # no size asked for, no second look
    assert 1 <= sum("getdents" in line and "/data>" in line for line in lines) <= 3  # one listing, in a few calls


def test_packing_asks_no_more_of_the_system_for_more_frames(tmp_path, monkeypatch):
    asked = []
    for frames in (100, 300):
        tree = make_tree(tmp_path / f"{frames}", frames)
        calls = Calls(monkeypatch, tree)
        pack(tree, tmp_path / f"{frames}.h5")
        opened = sum(name == "open" and path.endswith(".mat") for name, path in calls.asked)
        asked.append(len(calls.asked) - opened)
        assert opened == frames + 2  # times come from the first and the last
        monkeypatch.undo()
    assert asked[0] == asked[1] < 10


MEMORY = '''
import resource, sys
from turbvit_nb.data.packing import pack
pack(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''


def peak(tree: Path, target: Path) -> float:
    "MiB that a process needs to pack a tree, at its peak."
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tree), str(target)], capture_output=True, text=True, env=ENV, timeout=300, check=True)
    return int(done.stdout) / 1024


def test_packing_needs_no_more_memory_for_more_frames(tmp_path):
    few, many = (peak(make_tree(tmp_path / f"{n}", n, NX=64), tmp_path / f"{n}.h5") for n in (400, 1600))
    assert many - few < 8  # of 50 MiB more on the disk as float64


@pytest.mark.soak
def test_packing_ten_thousand_frames_in_the_memory_of_a_thousand(tmp_path):
    few, many = (peak(make_tree(tmp_path / f"{n}", n, NX=64), tmp_path / f"{n}.h5") for n in (1_000, 10_000))
    assert many - few < 8  # of 300 MiB more


# Loading -------------------------------------------------------------------------------------------------------------

LOADING = '''
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from turbvit_nb.data.batches import Batches
from turbvit_nb.data.frames import DatasetConfig, open_dataset
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024
mode, passes = sys.argv[2], int(sys.argv[3])
dataset = open_dataset(DatasetConfig(data_dir=sys.argv[1], frame_range=[[1, int(sys.argv[4]) + 1]], mode=mode))
points = []
for epoch in range(passes):
    for batch in Batches(dataset, 32, prefetch=int(sys.argv[5])).epoch(epoch): pass
    points.append(resident())
print(*points)
'''


def growth(path: Path, mode: str, passes: int, frames: int, prefetch: int) -> float:
    """MiB by which the most memory in the second half of some passes over a data set exceeds that in the first half. Freed arrays go back to
    the system at once: what malloc keeps for later wobbles by tens of MiB with threads, and would hide a leak as large."""
    words = [sys.executable, "-c", LOADING, str(path), mode, str(passes), str(frames), str(prefetch)]
    env = ENV | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    points = list(map(float, subprocess.run(words, capture_output=True, text=True, env=env, timeout=600, check=True).stdout.split()))
    return max(points[passes // 2:]) - max(points[:passes // 2])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("mode", ["mmap", "read"])
def test_passes_over_a_data_set_leave_nothing_in_memory(tmp_path, mode, prefetch):
    "Pages of files that the system keeps are not the process's: a process that has read all of them is as small as before."
    tree = make_tree(tmp_path, 400, NX=64)
    where = pack(tree, tmp_path / "x.h5").path if mode == "mmap" else tree
    assert growth(where, mode, 6, 400, prefetch) < 3  # of 6.5 MB a pass in float32


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["mmap", "read"])
def test_long_passes_leave_nothing_in_memory(tmp_path, mode):
    tree = make_tree(tmp_path, 10_000, NX=64)
    where = pack(tree, tmp_path / "x.h5").path if mode == "mmap" else tree
    assert growth(where, mode, 6, 10_000, 2) < 8  # of 164 MB a pass in float32


def test_a_batch_of_random_frames_costs_the_disk_these_frames(tmp_path):
    target = pack(make_tree(tmp_path, 800, NX=64), tmp_path / "x.h5").path
    with open(target, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store, rng = open_store(target), np.random.default_rng(0)
    before, asked, frames = _io("read_bytes"), _io("rchar"), 0
    for _ in range(4):
        first = rng.choice(np.arange(1, 800, 8), 8, replace=False)
        numbers = np.sort(np.concatenate([first, first + 1]))
        store.read(numbers)
        frames += len(np.unique(numbers))
    asked, read, size = _io("rchar") - asked, _io("read_bytes") - before, 4 * 64**2
    assert frames * size <= asked < frames * size + 10_000  # /proc/self/io itself is read as well
    assert read <= 1.01 * frames * size + 8192, f"{read / (frames * size):.2f} times what was needed"  # 0 on a file system in memory
