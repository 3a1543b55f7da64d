"""Files and names made by somebody with bad intentions: nothing of them is run, nothing is written outside the run, nothing kills the process.

What is legitimate: an absolute `output_dir` or `checkpoint_dir`, and a folder of a run that is a link (a larger disk) are the user's right;
so are spaces, quotes, dollars, leading dashes and any script in the name of a run. What is not: `..` in a relative one, line breaks and
other control characters, a name longer than the system takes; a log or a lock that is a link; a sweep whose names of runs leave the folder of runs.
"""
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fuzzing import SEED, Canary, damages, hashes, in_child, judged
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from scipy.io import savemat
from test_fuzz import FLOW, PACK, QUEUE, ROLLOUT, RUN, SWEEP, dose, home, place  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from turbvit_nb.cli import app
from turbvit_nb.climate.rollouts import open_rollout
from turbvit_nb.emulators.files import load_emulator
from turbvit_nb.flow.images import picture
from turbvit_nb.forecast.reading import read_short
from turbvit_nb.inspection import inspect_path
from turbvit_nb.lab.config import LabError, load_config, plain_line, run_folder, runs_dir
from turbvit_nb.lab.files import read_arrays, read_checkpoint, result_file
from turbvit_nb.lab.index import read_scorecard, run_rows
from turbvit_nb.lab.jobs import Chapter, Job, unopened
from turbvit_nb.lab.queue import QueueConfig, arrays, chapter_script, read_queue
from turbvit_nb.lab.runs import folder_of, open_run, stages
from turbvit_nb.lab.status import status_rows
from turbvit_nb.lab.sweeps import read_sweep
from turbvit_nb.latent.arrays import read_array
from turbvit_nb.physics.importers import import_frames
from turbvit_nb.physics.py2d import PackedStore, Regime, open_store, read_mat
from turbvit_nb.study.costs import read_latency

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
GB = 1 << 30
LOOSE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
NASTY = ["../x", "/etc/x", "a/../../x", ".", "..", "", " ", "-rf", "--help", "a b", "a'b", 'a"b', "$(touch canary)", "`touch canary`", ";touch canary", "a\nb",
         "a\0b", "~", "~nobody/x", "x" * 300, "größe", "😀", "a%jb", "*", "[a]", "a\tb", "\x1b[2J", "\udc80", "{{7*7}}", "{seed}", "!!python/object:os.system", "a\\b", "a,b", "#", "&", "|cat", "con", "a//b", "./a", "runs/a", "runs/../../a"]
names = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), st.lists(st.sampled_from(NASTY), min_size=2, max_size=3).map("/".join))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, -(10**400), 2**63, *NASTY[:8]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)


def often(examples: int):
    "So many examples, the same ones unless a seed was given."
    return lambda test: seed(SEED)(settings(max_examples=examples, deadline=None, database=None, suppress_health_check=LOOSE)(test))


def places(value: object, here: tuple = ()) -> list[tuple]:
    "The ways to every part of a record."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(way for key, part in inner for way in places(part, (*here, key)))]


def put(value: object, way: tuple, new: object) -> object:
    "The record with another part at that place; nothing where `new` is ..., which leaves the part out."
    if not way:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(way) == 1:
        copy.pop(way[0])
    else:
        copy[way[0]] = put(value[way[0]], way[1:], new)
    return copy


def mutants(record: object):
    "Records that differ in one part, which may be missing."
    ways = places(record)
    return st.tuples(st.sampled_from(ways), st.just(...) | values).map(lambda both: put(record, both[0], None if both[1] is ... and not both[0] else both[1]))


def listed(folder: Path) -> None:
    "What lists say of a run."
    stages(folder), run_rows(folder, folder.parent), status_rows([folder]), inspect_path(folder)


RECORDS = {
    "status": (f"{RUN}/status.json", lambda path: listed(path.parent)),
    "rollout": (f"{ROLLOUT}/rollout.json", lambda path: (open_rollout(path.parent).read(), inspect_path(path.parent), inspect_path(path.parents[3]))),
    "latency": (f"{RUN}/latency.json", lambda path: read_latency(path.parent)),
    "comparison": (f"{RUN}/comparison.json", lambda path: read_scorecard(path.parent)),
    "unopened": (".02_prune.unfinished.ipynb", lambda path: unopened(path.parent)),
    "chapter": ("20_own.ipynb", lambda path: Chapter(path).parameters),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_any_shape(name, dose, place):
    path, read = place / RECORDS[name][0], RECORDS[name][1]

    @often(15 * dose)
    @given(mutants(json.loads(path.read_text())))
    def check(record):
        path.write_text(json.dumps(record))
        assert judged(lambda: read(path), path.name, "") == ""

    check()


def test_metrics_of_any_shape(dose, place):
    path = place / RUN / "metrics.jsonl"

    @often(15 * dose)
    @given(st.lists(values, max_size=4))
    def check(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in [{"stage": "train", "loss": 1.0}, *rows]))
        status = json.loads((place / RUN / "status.json").read_text())
        status["stages"]["train"].pop("summary", None)
        (place / RUN / "status.json").write_text(json.dumps(status))
        assert judged(lambda: listed(place / RUN), path.name) == ""

    check()


def test_a_checkpoint_of_any_shape(dose, place):
    path = place / RUN / "checkpoints/best.tar"
    state = read_checkpoint(path)
    plain = {key: value for key, value in state.items() if key not in ("model_state", "ema_state", "optimizer_state")}

    @often(15 * dose)
    @given(mutants({key: value for key, value in plain.items() if not torch.is_tensor(value)}))
    def check(changed):
        torch.save({"model_state": state["model_state"]} | changed if isinstance(changed, dict) else changed, path)
        assert judged(lambda: (load_emulator(path), inspect_path(path), inspect_path(place / RUN)), path.stem) == ""

    check()


def test_a_config_of_any_values(dose, place):
    plain = load_config(place / "vit.toml").to_dict()
    tomls = values.filter(lambda value: value is not None)

    @often(25 * dose)
    @given(st.sampled_from([way for way in places(plain) if way]), tomls)
    def check(way, value):
        text = ".".join(map(str, way[:2]))
        given = json.dumps(value, ensure_ascii=False)
        assert judged(lambda: load_config(place / "vit.toml", [f"{text}={given}"]), "") == ""

    check()


# ---- what would run code

def payloads(folder: Path, canary: Path) -> dict[str, tuple]:
    "Files that would run code if they were unpickled or evaluated, and what reads each."
    evil, files = Canary(canary), {}
    objects = np.empty(1, object)
    objects[0] = evil
    np.save(folder / "o.npy", objects, allow_pickle=True)
    np.savez(folder / "o.npz", omega=objects, images=objects)
    torch.save({"model_state": evil}, folder / "zip.tar")
    torch.save({"model_state": evil}, folder / "old.tar", _use_new_zipfile_serialization=False)
    (folder / "bare.tar").write_bytes(pickle.dumps(evil))
    (folder / "bare.pt").write_bytes(pickle.dumps({"model_state": evil}, protocol=2))
    module = torch.jit.script(torch.nn.Linear(2, 2))
    module.save(folder / "script.tar")
    with h5py.File(folder / "attr.h5", "w") as file:
        file["omega"] = np.zeros((4, 16, 16))
        file.attrs["Re"] = np.void(pickle.dumps(evil))
        file["omega"].attrs["pickled"] = np.void(pickle.dumps(evil))
    shutil.copy(folder / "attr.h5", folder / "attr.nc")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch " + bytes(canary) + b") (w) file\n%%EOF\n")
    read = lambda path: result_file(path, read_arrays, "")
    for path in folder.iterdir():
        kinds = {".npy": [read, read_array, inspect_path], ".npz": [read, read_array, inspect_path], ".png": [picture], ".h5": [read_array, inspect_path], ".nc": [inspect_path, read_array]}
        files[path.name] = (path, kinds.get(path.suffix, [read_checkpoint, load_emulator, inspect_path]))
    return files


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    canary, folder = tmp_path / "canary", tmp_path / "files"
    folder.mkdir(), (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch '{canary}'\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    files = payloads(folder, canary)
    for name, (path, readers) in files.items():
        for read in readers:
            assert judged(lambda: read(path), path.name) == "", name
        if path.suffix in (".npy", ".npz", ".tar", ".pt", ".png"):
            for read in readers:
                with pytest.raises(LabError):
                    read(path)
    assert not canary.exists()
    pickle.loads((folder / "bare.tar").read_bytes())  # the trap is one
    assert canary.exists()


def test_text_is_not_evaluated(place, tmp_path):
    for text in ['output_dir = "{{ 7 * 7 }}"', 'output_dir = "!!python/object/apply:os.system [touch canary]"', "output_dir = \"__import__('os').system('touch canary')\"", 'output_dir = "$(touch canary)`touch canary`"']:
        (place / "t.toml").write_text(text + "\n")
        assert folder_of(load_config(place / "t.toml")).name in text
    (place / "t.toml").write_text("output_dir: !!python/object/apply:os.system [touch canary]\n")
    with pytest.raises(LabError, match="is not valid TOML"):
        load_config(place / "t.toml")
    assert not list(place.rglob("canary"))


# ---- what asks for too much

def bombs(folder: Path) -> None:
    "Small files that ask for terabytes, and what 400 MB of zeros are when they are compressed."
    np.save(folder / "wide.npy", np.zeros(1))
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (1 << 42,)}
    with open(folder / "wide.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(folder / "wide.npz", "w") as packed:
        packed.write(folder / "wide.npy", "omega.npy")
    zeros = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (3, 1 << 12, 1 << 12)}
    with zipfile.ZipFile(folder / "zeros.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed, packed.open("omega.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, zeros)
        for _ in range(96):
            file.write(bytes(1 << 22))
    for name in ("wide.h5", "wide.nc"):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("omega", (1 << 20, 1 << 12, 1 << 12), "f8", chunks=(1, 64, 64), compression="gzip")
            file.create_dataset("time", (1 << 20,), "f8", chunks=(64,))
            if name == "wide.nc":
                for i, axis in enumerate(("time", "x", "y")):
                    file.require_dataset(axis, ((1 << 20, 1 << 12, 1 << 12)[i],), "f8").make_scale(axis)
                    file["omega"].dims[i].attach_scale(file[axis])
    with h5py.File(folder / "pack.h5", "w") as file:
        file.attrs.update(Re=100, fkx=0, fky=4, alpha=0.1, beta=0.0, sgs="NoSGS", NX=16, dt=0.01, IC=1, dealias=True)
        file.create_dataset("omega", (1 << 40, 16, 16), "f4", chunks=(1, 16, 16))
        for name, kind in {"frame": "i8", "time": "f8", "checksum": "u4"}.items():
            file.create_dataset(name, (1 << 40,), kind, chunks=(64,))
    with h5py.File(folder / "v73.mat", "w", userblock_size=512) as file:
        file.create_dataset("Omega", (1 << 20, 1 << 20), "f8", chunks=(64, 64))
    savemat(folder / "v5.mat", {"Omega": np.zeros((4, 4))})
    data = bytearray((folder / "v5.mat").read_bytes())
    at = data.index(np.array([4, 4], "i4").tobytes())
    data[at : at + 8] = np.array([1 << 30, 1 << 30], "i4").tobytes()
    (folder / "v5.mat").write_bytes(data)
    torch.save({"model_state": {"w": torch.zeros(1).expand(1 << 42)}}, folder / "wide.tar")
    torch.save({"model_state": {"w": torch.zeros(1 << 18)}}, folder / "small.tar")
    with zipfile.ZipFile(folder / "small.tar") as small, zipfile.ZipFile(folder / "zeros.tar", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for member in small.infolist():
            packed.writestr(member.filename, small.read(member))
        with packed.open("small/data/9", "w", force_zip64=True) as file:
            for _ in range(96):
                file.write(bytes(1 << 22))


def test_a_file_that_asks_for_too_much(tmp_path):
    bombs(tmp_path)
    assert all(path.stat().st_size < 20e6 for path in tmp_path.iterdir())
    target = tmp_path / "out.h5"
    imported = lambda path: import_frames(path, target, FLOW, axes="txy", t_save=0.1)
    arrays_of = lambda path: result_file(path, read_arrays, "")
    readers = {".npy": [arrays_of, read_array, imported], ".npz": [arrays_of, read_array, imported], ".h5": [lambda path: read_array(path, "omega"), imported, inspect_path, PackedStore],
               ".nc": [inspect_path, lambda path: read_array(path, "omega")], ".mat": [read_mat], ".tar": [read_checkpoint, load_emulator, inspect_path]}
    tasks = [(path, read) for path in sorted(tmp_path.iterdir()) if path.name != "small.tar" for read in readers[path.suffix]]
    faults = in_child(lambda number: judged(lambda: tasks[number][1](tasks[number][0]), tasks[number][0].name), len(tasks), room=GB // 4, seconds=60)
    assert {tasks[number][0].name: fault for number, fault in faults.items()} == {}
    assert not target.exists()


# ---- what went wrong once

def written(path: Path, data: bytes | str) -> Path:
    "The file with that in it."
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def tarred(path: Path, **more) -> Path:
    "The checkpoint with something else in it."
    torch.save(read_checkpoint(path) | more, path)
    return path


def framed(place: Path, name: str, data: bytes) -> Path:
    "A frame of a tree under that name."
    return written(place / "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/data" / name, data)


def with_attribute(file_path: Path, **more) -> Path:
    "An HDF5 file that says something else."
    with h5py.File(file_path, "a") as file:
        file.attrs.update(more)
    return file_path


run_of = lambda place, **entry: written(place / RUN / "status.json", json.dumps({"stages": {"train": entry}}))
imported = lambda path: import_frames(path, path.with_name("out.h5"), FLOW, axes="txy", t_save=0.1)
AT = "2026-01-01T00:00:00+00:00"
FAULTS = {  # what it is: how it is made, what reads it
    "TOML of a thousand brackets": (lambda p: written(p / "t.toml", "a = " + "[" * 5000), load_config),
    "TOML with a number of 5000 digits": (lambda p: written(p / "t.toml", "seed = " + "9" * 5000), load_config),
    "a date where a number belongs": (lambda p: written(p / "t.toml", "seed = 2026-01-01"), load_config),
    "TOML in another encoding": (lambda p: written(p / "t.toml", b"# \xff"), load_config),
    "a folder called x.toml": (lambda p: ((p / "t.toml").mkdir(), p / "t.toml")[1], read_queue),
    "a home of nobody": (lambda p: Path("~nobody_of_that_name/x"), load_config),
    "status in another encoding": (lambda p: written(p / RUN / "status.json", b'{"stages": {"\xff": 1}}'), lambda path: stages(path.parent)),
    "a stage without a beginning": (lambda p: run_of(p, state="done"), lambda path: listed(path.parent)),
    "a stage without a state": (lambda p: run_of(p, started=AT), lambda path: listed(path.parent)),
    "a time that is none": (lambda p: run_of(p, state="done", started="noon", changed="noon"), lambda path: listed(path.parent)),
    "a time without its zone": (lambda p: run_of(p, state="done", started=AT, changed="2026-01-01T00:00:00"), lambda path: listed(path.parent)),
    "a figure of 400 digits": (lambda p: run_of(p, state="done", started=AT, summary={"n": 10**400}), lambda path: listed(path.parent)),
    "a log in another encoding": (lambda p: written(p / RUN / "metrics.jsonl", b"\xff\n"), lambda path: listed(path.parent)),
    "a log of lists": (lambda p: written(p / RUN / "metrics.jsonl", "[1]\n"), lambda path: listed(path.parent)),
    "generate.json cut short": (lambda p: written(p / "data/flow/generate.json", "{"), lambda path: CliRunner().invoke(app, ["generate", "g.toml"]).exit_code),
    "an unfinished notebook cut short": (lambda p: written(p / RUN / ".03_prune.unfinished.ipynb", "{"), lambda path: unopened(path.parent)),
    "a notebook without cells": (lambda p: written(p / "20_own.ipynb", "{}"), lambda path: Chapter(path).parameters),
    "parameters that are no Python": (lambda p: written(p / "20_own.ipynb", json.dumps({"cells": [{"metadata": {"tags": ["parameters"]}, "source": "config ="}]})), lambda path: Chapter(path).parameters),
    "a rollout's record cut short": (lambda p: written(p / ROLLOUT / "rollout.json", "{"), lambda path: inspect_path(path.parents[3])),
    "a chunk of no number": (lambda p: (shutil.copy(p / ROLLOUT / "1.npy", p / ROLLOUT / "1 copy.npy"), p / ROLLOUT)[1], lambda path: open_rollout(path).read()),
    "chunks of two sizes": (lambda p: (np.save(p / ROLLOUT / "4.npy", np.zeros((3, 2, 8, 8), "f4")), p / ROLLOUT / "4.npy")[1], lambda path: open_rollout(path.parent).read()),
    "a chunk whose header does not end": (lambda p: written(p / ROLLOUT / "1.npy", b"\x93NUMPY\1\0\x10\0{'descr': ('<f4\n"), lambda path: open_rollout(path.parent)),
    "a zip whose directory lies before the file": (lambda p: written(p / "a.npz", (p / "a.npz").read_bytes()[200:]), inspect_path),
    "an .npz with a wrong byte": (lambda p: written(p / "z.npz", (p / "z.npz").read_bytes().replace(b"omega.npy", b"omega\xffnpy", 1)), lambda path: read_array(path, "omega")),
    "NetCDF 3 without its end": (lambda p: written(p / "b.nc", (p / "b.nc").read_bytes()[:7]), inspect_path),
    "HDF5 with a wrong group": (lambda p: written(p / "a.h5", (p / "a.h5").read_bytes().replace(b"SNOD", b"SNOE")), inspect_path),
    "an attribute that is no number": (lambda p: with_attribute(p / "a.h5", Re=np.inf), imported),
    "a frame of 1e200": (lambda p: (np.save(p / "a.npy", np.full((4, 16, 16), 1e200)), p / "a.npy")[1], imported),
    "a pack of another size": (lambda p: with_attribute(p / PACK, NX=32, path="Re100_fkx0fky4_r0.1_b20.0/NoSGS/NX32/dt0.1_IC1"), PackedStore),
    "a pack of a flow that is none": (lambda p: with_attribute(p / PACK, path="Re0_fkx0fky4_r0.1_b20.0/NoSGS/NX16/dt0.1_IC1"), PackedStore),
    "a frame of a number beyond all": (lambda p: framed(p, "99999999999999999999.mat", b"").parent, lambda path: open_store(path).frames),
    "a folder of a grid beyond all": (lambda p: (shutil.copytree(p / "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16", p / "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16000000"), p / "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16000000/dt0.01_IC1")[1], inspect_path),
    "a Reynolds number beyond all": (lambda p: written(p / "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/parameters.txt", "Reynolds Number (Re): 1e999"), lambda path: open_store(path.parent)),
    "a time of many numbers": (lambda p: (savemat(p / "t.mat", {"Omega": np.zeros((16, 16)), "time": np.arange(3.0)}), framed(p, "1.mat", (p / "t.mat").read_bytes()))[1], lambda path: open_store(path.parent).times),
    "a checkpoint of a list": (lambda p: (torch.save([1], p / "x.tar"), p / "x.tar")[1], lambda path: (read_checkpoint(path), inspect_path(path))),
    "a pickle cut short": (lambda p: written(p / "older.tar", (p / "older.tar").read_bytes()[:30]), read_checkpoint),
    "an identity that is no table": (lambda p: tarred(p / RUN / "checkpoints/best.tar", identity=3), lambda path: (listed(path.parents[1]), inspect_path(path))),
    "a stage of pruning that is a word": (lambda p: tarred(p / RUN / "checkpoints/best.tar", identity={"role": "pruned", "stage": "x"}), lambda path: (listed(path.parents[1]), inspect_path(path))),
    "a builder of no kind": (lambda p: tarred(p / RUN / "checkpoints/best.tar", builder={"kind": [1]}), load_emulator),
    "a model without its size": (lambda p: tarred(p / RUN / "checkpoints/best.tar", model={"model_type": "ViT"}), load_emulator),
    "a scorecard of words": (lambda p: written(p / RUN / "comparison.json", '{"rows": [{"label": "a", "horizon": "far"}]}'), lambda path: read_scorecard(path.parent)),
    "a scorecard without an interval": (lambda p: written(p / RUN / "comparison.json", '{"rows": [{"label": "a", "horizon": 3.0}]}'), lambda path: read_scorecard(path.parent)),
    "an analysis by nobody": (lambda p: (shutil.copy(p / RUN / "short_analyses/best.nc", p / RUN / "short_analyses/x.nc"), with_attribute(p / RUN / "short_analyses/x.nc", checkpoint_stage="x"))[1], lambda path: read_short(path.parents[1])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_went_wrong_once(fault, place):
    make, read = FAULTS[fault]
    path = make(place)
    assert judged(lambda: read(path), path.name, "seed = ") == ""


# ---- names

@pytest.mark.parametrize("key", ["output_dir", "run", "checkpoint_dir"])
def test_a_run_is_where_it_may_be(key, dose, place):
    inside = runs_dir().absolute()

    @often(60 * dose)
    @given(names)
    @example("a/../../x")
    def check(name):
        try:
            config = load_config(place / "vit.toml", [f"{key}={json.dumps(name, ensure_ascii=False)}"])
        except LabError as error:
            assert plain_line(str(error)) == str(error)
            return
        folder = run_folder(getattr(config.top, key) or "none")
        assert plain_line(name) == name
        assert Path(name).expanduser().is_absolute() and key != "run" or Path(os.path.normpath(folder)).is_relative_to(inside) and (folder != inside or key == "checkpoint_dir")

    check()


def test_the_runs_of_a_sweep_are_below_the_folder_of_runs(dose, place):
    inside = runs_dir().absolute()

    @often(60 * dose)
    @given(names, names, names)
    def check(sweep, run, value):
        text = SWEEP.replace('"study"', json.dumps(sweep)).replace('"study/{seed}"', json.dumps(run + "{seed}")).replace("[1, 2]", f"[1, {json.dumps(value)}]")
        (place / "s.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            study = read_sweep(place / "s.toml")
        except LabError as error:
            assert plain_line(str(error)) == str(error)
            return
        for folder in [study.folder, *(point.folder for point in study.points)]:
            assert Path(os.path.normpath(folder)).is_relative_to(inside) and Path(os.path.normpath(folder)) != inside
        scripts(place, [script for script, _ in arrays(study, study.points, QueueConfig(system="slurm"))], dict(SLURM_ARRAY_TASK_ID="1"), study=study)

    check()


STUB = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$SAID"\nprintf "\\n" >> "$SAID"\nexit 75\n'


def scripts(place: Path, made: list, environment: dict, study=None) -> list[list[str]]:
    "What the program is told by scripts that are run, each with a program in its place that is stopped in time."
    (place / "bin").mkdir(exist_ok=True)
    (place / "bin/turbvit").write_text(STUB)
    (place / "bin/turbvit").chmod(0o755)
    said = place / "said"
    said.unlink(missing_ok=True)
    own = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SAID": str(said)} | environment
    for script in made:
        for queue in (QueueConfig(system="slurm", setup=["true"]), QueueConfig(system="pbs")):
            text = script.texts(queue, place)[script.path]
            (place / "s.sh").write_text(text, encoding="utf-8")
            assert subprocess.run(["bash", "-n", place / "s.sh"], capture_output=True).returncode == 0
            asked = [line for line in text.split("\n") if line.startswith(("#SBATCH", "#PBS"))]
            assert all(str(place) not in line or "queue/" in line for line in asked)
        if study is None or script.name.endswith("-1"):
            (place / "s.sh").write_text(script.texts(QueueConfig(system="slurm"), place)[script.path], encoding="utf-8")
            if study is not None:
                script.folder.mkdir(parents=True, exist_ok=True)
                (script.folder / f"{script.name}.runs").write_text("".join(f"{point.run}\n" for point in study.points))
            done = subprocess.run(["bash", place / "s.sh"], env=own, cwd=place, capture_output=True)
            assert done.returncode == 75, done.stderr
    assert not list(place.rglob("canary"))
    return [[word.decode() for word in line.split(b"\0")[:-1]] for line in said.read_bytes().split(b"\n")[:-1]] if said.exists() else []


def test_names_do_not_reach_the_shell(dose, place):
    @often(12 * dose)
    @given(names.filter(lambda name: name.isprintable() and "/" not in name and 0 < len(name.encode()) < 100 and name not in (".", "..")), st.sampled_from(NASTY))
    @example("$(touch canary)", "a'b")
    def check(name, value):
        chapter, folder = place / f"{name}.ipynb", place / "runs" / name
        shutil.copy(place / "20_own.ipynb", chapter)
        override = f"training.note={json.dumps(value if value.isprintable() else 'x')}"
        script = chapter_script(Chapter(chapter), folder, place / "vit.toml", [override], QueueConfig(system="slurm"), [Chapter(chapter)])
        said = scripts(place, [script], {})
        assert said[0] == ["run", str(chapter), str(place / "vit.toml"), "--set", override]
        chapter.unlink()
        assert (folder / "queue" / f".{name}.begun").exists()
        shutil.rmtree(folder)

    check()


def test_what_a_queue_is_told_is_one_line(place):
    for line in ('queue = "a\\nrm -rf x"', 'account = "a\\nb"', 'lines = ["--x\\ntouch canary"]'):
        (place / "q.toml").write_text(line + "\n" + QUEUE)
        with pytest.raises(LabError, match="q.toml: "):
            read_queue(place / "q.toml")


def test_a_regime_is_no_way_out(place, tmp_path):
    for sgs in ("../../x", "/x", "..", "", "a/b", "a\nb", "a\0"):
        with pytest.raises(ValueError, match="sgs is the name of a folder"):
            Regime(Re=100, sgs=sgs)
    np.save(tmp_path / "f.npy", np.random.default_rng(0).standard_normal((4, 16, 16)))
    ran = CliRunner().invoke(app, ["import", str(tmp_path / "f.npy"), str(tmp_path / "out"), "--axes", "txy", "--t-save", "0.1", *(word for key, value in FLOW.items() for word in ("-f", f"{key}={value}")), "-f", "sgs=../../../../up"])
    assert ran.exit_code == 1 and "sgs is the name of a folder" in ran.output and sorted(tmp_path.iterdir()) == [tmp_path / "f.npy", tmp_path / "place"]


def test_a_link_in_a_run_is_not_written_through(place, tmp_path):
    mine = tmp_path / "mine"
    for name in (".lock", "metrics.jsonl"):
        mine.write_text("mine\n")
        (place / RUN / name).unlink()
        (place / RUN / name).symlink_to(mine)
        with pytest.raises(LabError, match="is a link to .*mine, which is not written through"):
            run = open_run(place / RUN, "train")
            try:
                run.log(step=1)
            finally:
                run.close()
        assert mine.read_text() == "mine\n"
        (place / RUN / name).unlink()


# ---- the command line

COMMANDS = {
    "config.toml": [["check", RUN], ["run", "02_train", RUN], ["resume", RUN, "02_train"], ["submit", RUN, "--dry-run", "--queue", "queue.toml", "--stages", "02_train"]],
    "status.json": [["status"], ["inspect", RUN], ["resume", RUN], ["run", "all", RUN]],
    "metrics.jsonl": [["status", RUN], ["inspect", RUN]],
    "checkpoints/best.tar": [["inspect", f"{RUN}/checkpoints/best.tar"], ["inspect", RUN]],
    "inference/best/1/rollout.json": [["inspect", RUN], ["inspect", ROLLOUT], ["gif", RUN, "--frames", "2", "-o", "x.gif"]],
    "inference/best/1/1.npy": [["gif", RUN, "--frames", "2", "-o", "x.gif"]],
    "short_analyses/best.nc": [["inspect", f"{RUN}/short_analyses/best.nc"], ["explore", RUN, "-o", "x.html"]],
    "../../vit.toml": [["check", "vit.toml"], ["submit", "vit.toml", "--dry-run", "--queue", "queue.toml"]],
    "../../sweep.toml": [["sweep", "sweep.toml", "--dry-run"]],
    "../../queue.toml": [["submit", "vit.toml", "--set", "output_dir=new", "--dry-run", "--queue", "queue.toml"]],
    f"../../{PACK}": [["inspect", PACK, "--full"], ["pack", PACK, "copy.h5"], ["check", "vit.toml"]],
    "../../v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1/data/1.mat": [["inspect", "v5"], ["pack", "v5/Re100_fkx0fky4_r0.1_b0/NoSGS/NX16/dt0.01_IC1", "copy.h5"]],
}


def kept(folder: Path) -> dict[str, str]:
    "The content of a folder, less what says that somebody is at work."
    return {file: digest for file, digest in hashes(folder).items() if Path(file).name not in (".lock", ".job")}


def told(words: list[str], folder: Path) -> str:
    "Empty where a command did its work, or failed in one line and changed no file; else what is wrong."
    before, ran = kept(folder), CliRunner().invoke(app, words)
    if not isinstance(ran.exception, (SystemExit, type(None))):
        return f"{words}: {ran.exception!r}"
    errors = [line for line in ran.output.splitlines() if line.startswith(("error:", "mistake:"))]
    if "Traceback" in ran.output or ran.exit_code and not errors:
        return f"{words}: {ran.output[-500:]}"
    changed = {file for file, digest in before.items() if kept(folder).get(file) != digest}
    return f"{words}: changed {changed}" if ran.exit_code and changed else ""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_damaged_file_fails_in_one_line_and_harms_nothing(name, dose, place, monkeypatch):
    def planned(job):
        raise LabError("this job would begin")

    monkeypatch.setattr(Job, "run", planned)
    monkeypatch.setattr("turbvit_nb.examine.SECONDS", 0.0)
    path = place / RUN / name
    cases = [(case, words) for case in damages(path.read_bytes(), 3 + 2 * dose, f"command {name}") for words in COMMANDS[name]]

    def task(number: int) -> str:
        case, words = cases[number]
        path.write_bytes(case)
        for made in ("x.gif", "x.html", "copy.h5", "copy.h5.part"):
            (place / made).unlink(missing_ok=True)
        return told(words, place / "runs") or told(words, place / "data")

    assert in_child(task, len(cases), room=4 * GB, seconds=60) == {}


@pytest.mark.parametrize("words", [["check"], ["inspect"], ["status"], ["resume"], ["run", "02_train"], ["gif"], ["explore"], ["submit", "--dry-run", "--queue", "queue.toml"], ["sweep", "--dry-run"], ["pack"], ["generate"]], ids=lambda words: words[0])
def test_a_command_on_a_name_that_is_none(words, place):
    for name in NASTY:
        if name in ("", ".", "..", "~", "./a") or name.startswith("-") or "\0" in name:  # a folder that is there, an option, what no shell can say
            continue
        ran = CliRunner().invoke(app, [*words, name, *(["x.h5"] if words == ["pack"] else [])])
        assert isinstance(ran.exception, (SystemExit, type(None))), (name, ran.exception)
        assert ran.exit_code and "Traceback" not in ran.output and len([line for line in ran.output.splitlines() if line.startswith(("error:", "mistake:"))]) == 1, (name, ran.output)
