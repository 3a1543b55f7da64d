"""Nothing is lost: every stage is killed, at random moments and at system calls that write, and goes on to the same bits; a full disk takes nothing away."""
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest
from kills import STAGES, STRACE, Server, contents, server
from same_bits import equal

from turbvit_nb.lab.doctor import GRAVE, examined
from turbvit_nb.lab.runs import read_metrics

pytestmark = pytest.mark.skipif(STRACE is None, reason="no strace on the PATH: it ends a job at a system call")


DATA = ("write", "pwrite64", "fallocate")


@dataclass(frozen=True)
class Reference:
    "What a stage begins with and ends with, undisturbed."

    before: Path  # a folder of runs
    after: dict[str, object]
    seconds: float
    calls: list[str]  # system calls that write, in their order

    def call(self, part: float) -> dict:
        "A death at one of them, after this part of the stage."
        n = int(part * len(self.calls))
        return {"kill": {self.calls[n]: self.calls[:n + 1].count(self.calls[n])}}

    def moment(self, part: float) -> dict:
        "A death at a moment, after this part of the stage."
        return {"after": max(part * self.seconds, 0.001)}

    def full(self, chance: random.Random) -> dict:
        "A disk that is full from one of the calls that write data on."
        n = chance.choice([i for i, call in enumerate(self.calls) if call in DATA])
        return {"full": {call: self.calls[:n].count(call) + 1 for call in DATA}}


class World:
    "A server, data, and the undisturbed runs, made when they are asked for."

    def __init__(self, folder: Path, serving: Server):
        self.folder, self.server, self.references = folder, serving, {}
        self.data = folder / "data"
        made = serving.life("generate", folder / "none", self.data, count=True)
        assert made["code"] == 0, made
        self.made = Reference(folder / "none", contents(self.data), made["seconds"], made["calls"])

    def before(self, name: str) -> Path:
        "A folder of runs that have been through what comes before a stage."
        if not STAGES[name].before:
            return self.folder / "none"
        self.reference(last := STAGES[name].before[-1])
        return self.folder / f"{last}_done"

    def reference(self, name: str) -> Reference:
        "The undisturbed stage."
        if name not in self.references:
            before, done = self.before(name), self.folder / f"{name}_done"
            shutil.copytree(before, done) if before.exists() else done.mkdir()
            how = self.server.life(name, done, self.data, count=True)
            assert how["code"] == 0, how
            self.references[name] = Reference(before, contents(done), how["seconds"], how["calls"])
        return self.references[name]

    def begin(self, name: str, folder: Path) -> Path:
        "A fresh folder of runs, ready for a stage."
        before = self.reference(name).before
        home = folder / "runs"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(before, home) if before.exists() else home.mkdir()
        return home


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with server() as serving:
        yield World(tmp_path_factory.mktemp("kills"), serving)


def differences(a: dict, b: dict) -> list[str]:
    "The files that are not the same."
    return sorted(name for name in a.keys() | b.keys() if not (name in a and name in b and equal(a[name], b[name])))


def lives(world: World, name: str, home: Path, *deaths: dict) -> list[dict]:
    "A stage that dies several times, is resumed each time, and then has come to the same end as undisturbed; `turbvit doctor` finds nothing damaged on the way."
    ends, hurt = [], []
    for how in [*deaths, {}]:
        ends.append(world.server.life(name, home, world.data, **how))
        folders = [home / folder for folder in STAGES[name].folders if (home / folder).exists()]
        hurt += [finding for folder in folders for finding in examined(folder, lambda items, desc: items) if finding.grade == GRAVE]
    said = f"{name} after {deaths}: {ends}"
    assert ends[-1]["code"] == 0 and not hurt, f"{said}; {hurt}"
    assert differences(contents(home), world.reference(name).after) == [], said
    return ends


@pytest.mark.parametrize("name", ["train", "prune", "inference", "flow", "sweep"])  # the others in the soak, again and again
def test_killed_at_a_call_and_at_a_moment(name, world, tmp_path):
    home, reference, chance = world.begin(name, tmp_path), world.reference(name), random.Random(name)
    ends = lives(world, name, home, reference.call(chance.random()), reference.moment(chance.random()))
    assert ends[0]["code"] == -9, ends


def ran_out(end: dict) -> bool:
    "Whether a life ended in the one line about a full disk."
    return end["code"] == 1 and end["words"].startswith("user: ") and "no room to write" in end["words"]


@pytest.mark.parametrize("name", ["train", "inference"])
def test_full_disk(name, world, tmp_path):
    home, reference = world.begin(name, tmp_path), world.reference(name)
    ends = lives(world, name, home, reference.full(random.Random(name)))
    assert ran_out(ends[0]), ends


def test_generation_killed(world, tmp_path):
    "Data that the solver makes."
    chance, made = random.Random(1), world.made
    for how in (made.call(chance.random()), made.moment(chance.random()), made.full(chance), {}):
        end = world.server.life("generate", tmp_path, tmp_path / "data", **how)
    assert end["code"] == 0
    assert differences(contents(tmp_path / "data"), made.after) == []


def some_deaths(reference: Reference) -> list[dict]:
    "Two to four, at calls and at moments, each in what the one before left to do."
    chance, left, deaths = random.Random(), 1.0, []
    for _ in range(chance.randint(2, 4)):
        part = chance.uniform(0, left)
        deaths.append(chance.choice((reference.call, reference.moment))(part))
        left -= part
    return deaths


def killed(ends: list[dict]) -> int:
    "How many lives ended by SIGKILL: one that was to be killed at a late moment may have been done before."
    return sum(end["code"] == -9 for end in ends)


@pytest.mark.soak
@pytest.mark.parametrize("round", range(7))
@pytest.mark.parametrize("name", STAGES)
def test_killed_again_and_again(name, round, world, tmp_path, record_property):
    "What is random is random; the message of a failure says how it died."
    home, deaths = world.begin(name, tmp_path), some_deaths(world.reference(name))
    record_property("kills", (name, killed(lives(world, name, home, *deaths))))


@pytest.mark.soak
@pytest.mark.parametrize("round", range(7))
def test_generation_killed_again_and_again(round, world, tmp_path, record_property):
    deaths = some_deaths(world.made)
    ends = [world.server.life("generate", tmp_path, tmp_path / "data", **how) for how in [*deaths, {}]]
    assert ends[-1]["code"] == 0 and differences(contents(tmp_path / "data"), world.made.after) == [], (deaths, ends)
    record_property("kills", ("generate", killed(ends)))


@pytest.mark.soak
@pytest.mark.parametrize("round", range(3))
@pytest.mark.parametrize("name", STAGES)
def test_disk_full_again_and_again(name, round, world, tmp_path, record_property):
    home, reference, chance = world.begin(name, tmp_path), world.reference(name), random.Random()
    full = reference.full(chance)
    end = lives(world, name, home, full)[0]
    assert ran_out(end), (full, end)
    record_property("kills", ("full disks", 1))


def test_killed_after_its_last_step(world, tmp_path):
    "The learning rate in the state of the optimizer is that of the last step, even where the resumed process takes none."
    home = world.begin("prune", tmp_path)
    lives(world, "prune", home, {"kill": {"fsync": 21}})


def test_killed_between_a_stage_and_its_line_in_the_log(world, tmp_path):
    "The checkpoint of a stage of pruning is there, what is logged of it is not: it is logged when the job goes on."
    home = world.begin("prune", tmp_path)
    assert world.server.life("prune", home, world.data, kill={"write": 14})["code"] == -9
    assert list((home / "r/checkpoints").glob("prune1_remaining_*.tar")) and not read_metrics(home / "r", prune_stage=1)
    lives(world, "prune", home)


SAME_INSTANT = """
import sys, time
from turbvit_nb.lab.runs import open_run
time.sleep(max(float(sys.argv[1]) - time.time(), 0))
run = open_run("configs/smoke/train.toml", "train", ["run=both"])
run.log(step=1, loss=0.5)
time.sleep(2)
run.finish()
print("done")
"""


def test_of_jobs_that_start_in_the_same_instant_one_runs(tmp_path):
    "The others are told who is there, or that it has been done."
    environment = os.environ | {"TURBVIT_RUNS": str(tmp_path)}
    at = str(time.time() + 12)
    jobs = [subprocess.Popen([sys.executable, "-c", SAME_INSTANT, at], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [job.communicate(timeout=120) for job in jobs]
    assert [out for out, _ in said].count("done\n") == 1, said
    refused = [errors for out, errors in said if not out]
    assert all("is being written by process" in errors or "already holds stage train" in errors for errors in refused), refused
    assert len(read_metrics(tmp_path / "both")) == 1


def test_a_stage_does_not_go_on_with_other_data(world, tmp_path):
    "Refused in one line before anything is done; with the data put back it goes on to the same bits."
    home, data, reference = world.begin("train", tmp_path), tmp_path / "data", world.reference("train")
    shutil.copytree(world.data, data)
    assert world.server.life("train", home, data, kill={"rename": reference.calls.count("rename") - 2})["code"] == -9
    frames = next(data.rglob("*IC1/frames.h5"))
    with h5py.File(frames, "r+") as file:
        name = max(file, key=lambda name: file[name].size)
        file[name][0] = file[name][0][::-1]
    refused = world.server.life("train", home, data)
    assert refused["code"] == 1 and "train was begun with other data than [train_dataset] names now" in refused["words"], refused
    shutil.copy(next(world.data.rglob("*IC1/frames.h5")), frames)
    lives(world, "train", home)
