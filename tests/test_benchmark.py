"""The benchmark: peers in a process of their own, their numbers beside ours, and what is said to a user's mistake."""
import json
import os
import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
import tomli_w
import torch

from turbvit_nb.benchmark import job as benchmarking
from turbvit_nb.benchmark import peers as peering
from turbvit_nb.benchmark.analysis import lab_numbers
from turbvit_nb.benchmark.job import Benchmark, benchmark
from turbvit_nb.benchmark.keys import BenchmarkConfig
from turbvit_nb.benchmark.loader import write_frames
from turbvit_nb.benchmark.peers import There, absent, open_host
from turbvit_nb.benchmark.report import findings, read_results
from turbvit_nb.benchmark.solver import METHODS, LabSolver, flow_of, on_grid, start_fields
from turbvit_nb.benchmark.turns import as_json, take_turns
from turbvit_nb.lab.config import LabError, load_config, nbs_dir, read_toml
from turbvit_nb.lab.runs import Stopped, open_run

SMOKE = nbs_dir() / "configs" / "smoke" / "benchmark.toml"


@pytest.fixture
def data(tmp_path):
    "The job makes its own."
    return tmp_path


@pytest.fixture(scope="module")
def host():
    "Where the peers are: `$TURBVIT_PEERS`, or this process."
    opened = open_host(None, 1)
    yield opened
    opened.close()


def need(host, name):
    "The host, if it has the peer; else the test is skipped."
    if name not in host.about():
        pytest.skip(f"{name} is not installed: set TURBVIT_PEERS to a Python that has it")
    return host


@pytest.mark.parametrize("name", METHODS)
def test_solvers_solve_the_same_flow(host, name):
    "From the same fields, after the same time, with both steppers of the peer."
    c = BenchmarkConfig(Re=10, fky=2, grids=[32], flows=2, spin_up=4)
    omega = start_fields(c)
    ours = LabSolver(32, **flow_of(c))
    ours.load(omega.numpy())
    truth = torch.from_numpy(ours.after(1.0, 100))
    assert (truth - omega).norm() > 0.05 * omega.norm()  # the fields have moved
    for method in METHODS[name][1]:
        side = need(host, name).make(METHODS[name][0], points=48, method=method, **flow_of(c))
        host.call(side, "load", omega=omega.numpy())
        there = torch.from_numpy(host.call(side, "after", time=1.0, steps=400))
        assert (on_grid(there, 32) - truth).norm() < 1e-4 * truth.norm(), method


def test_dask_tells_the_same_numbers(host, tmp_path):
    "Mean, variance, spectrum and counts of the same file."
    _, packed = write_frames(tmp_path, 32, 70)
    side = need(host, "dask").make("benchmark.analysis:DaskAnalysis", path=str(packed))
    ours, theirs = lab_numbers(packed), host.call(side, "numbers")
    assert ours["counts"].sum() == 70 * 32**2 and np.array_equal(ours["counts"], theirs["counts"])
    for name, value in theirs.items():
        assert abs(ours[name] - value).max() < 1e-4 * abs(value).max(), name


def test_fno_learns_in_the_same_loop(host):
    "The peer's network is trained, and has the weights that its own library counts."
    model = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    c = BenchmarkConfig(batch_size=2, fno_modes=8, fno_width=8, fno_layers=2)
    side = need(host, "neuraloperator").make("benchmark.training:TrainingSteps", kind="fno", model=model, benchmark=c.model_dump(), device="cpu")
    host.call(side, "run", steps=2)
    assert host.call(side, "weights") > 2 * 2 * 8 * 8 * 8 * 5  # two layers of complex 8 × 8 × (8 × 5 modes)


def test_a_process_of_its_own_does_as_this_one():
    "Answers, arrays and errors go through the pipe; afterwards nothing is left."
    there = There(sys.executable, 1)
    folder = there.folder.name
    side = there.make("benchmark.solver:LabSolver", points=16, Re=10.0, alpha=0.1, fky=2)
    omega = start_fields(BenchmarkConfig(Re=10, fky=2, grids=[16], flows=1, spin_up=1))
    there.call(side, "load", omega=omega.numpy())
    here = LabSolver(16, 10.0, 0.1, 2)
    here.load(omega.numpy())
    assert np.array_equal(there.call(side, "after", time=0.2, steps=5), here.after(0.2, 5))
    with pytest.raises(LabError, match="nothing_like_it"):
        there.call(side, "nothing_like_it")
    there.close()
    assert there.process.returncode == 0 and not os.path.exists(folder)


def test_a_peer_process_that_dies_costs_one_line():
    "Its last words, or that it ended."
    there = There(sys.executable, 1)
    there.process.kill()
    there.process.wait()
    with pytest.raises(LabError, match="the process of the peers ended"):
        there.about()
    there.close()


def test_a_python_without_the_lab_costs_one_line(tmp_path):
    "The line names key, Python, trouble and remedy."
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho \"ModuleNotFoundError: No module named 'pydantic'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(LabError) as told:
        There(str(python), 1)
    said = str(told.value)
    assert said.startswith(f"benchmark.peers = {python}: ModuleNotFoundError: No module named 'pydantic'; it needs the lab") and "\n" not in said


def test_a_job_without_peers_says_who_is_missing(home, monkeypatch):
    "All other sides run; the lines are in the results, and every race has its own side and its limit."
    monkeypatch.delenv("TURBVIT_PEERS", raising=False)
    monkeypatch.setattr(peering, "PEERS", {"jax-cfd": "no_such_module"})
    told = read_toml(SMOKE) | {"output_dir": "alone"}
    told["benchmark"] |= {"sizes": [16], "skill_seconds": 0.0}
    file = home / "benchmark.toml"
    file.write_text(tomli_w.dumps(told))
    run = open_run(file, "benchmark")
    benchmark(run)
    run.finish()
    found = read_results(run.path / "benchmark.json")
    assert [line.split()[2] for line in found.missing] == ["torch-cfd", "jax-cfd", "neuraloperator", "dask"]
    assert {race.subject for race in found.races} == {"solver", "loader", "training", "rollout", "analysis"}
    assert all({race.ours, race.limit} <= race.times.keys() for race in found.races)
    assert findings(found)[-4:] == found.missing and not found.skill


def live(config, stopped=True):
    "Go on with a job, until it has kept one thing more or to its end: the run, and what it has kept."
    def keep(job):
        kept(job)
        if stopped:
            raise Stopped("stopped by SIGTERM")

    kept, run = Benchmark.keep, open_run(config, "benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Benchmark, "keep", keep)
        try:
            benchmark(run)
            run.finish()
        except Stopped as error:
            run.interrupted(error)
            run.close()
    return run, read_results(run.path / "benchmark.json")


def measured(found):
    "Everything that a clock or an error said."
    times = {f"{race.subject} {race.size}": as_json(race)["times"] for race in found.races}
    seconds = {name: list(values) for name, values in found.seconds.items()}
    return times | seconds | {point: point.error for point in found.points} | {(row["network"], row["seed"], row["step"]): row for row in found.skill}


def test_a_stopped_job_goes_on_and_measures_nothing_twice(home, monkeypatch, capsys):
    "It is stopped as often as it keeps something; on another machine it begins anew."
    monkeypatch.delenv("TURBVIT_PEERS", raising=False)
    monkeypatch.setattr(peering, "PEERS", {})
    told = read_toml(SMOKE) | {"output_dir": "stopped"}
    told["benchmark"] |= {"sizes": [16, 20], "grids": [16], "spin_up": 0.5, "skill_seeds": [0, 1]}
    (file := home / "benchmark.toml").write_text(tomli_w.dumps(told))
    run, found = live(file)
    lives = [measured(found)]
    for _ in range(12):  # after the errors of a solver: its steps at two sizes, four subjects at two sizes, two trainings
        assert run.status["benchmark"]["state"] == "stopped"
        run, found = live(run.path)
        lives.append(measured(found))
    for before, after in pairwise(lives):
        assert len(before) < len(after) and not [key for key in before if after[key] != before[key]]
    run, found = live(run.path, stopped=False)
    assert run.status["benchmark"]["state"] == "done" and measured(found) == lives[-1] and found.costs
    monkeypatch.setattr(benchmarking, "machine", lambda: "another machine")
    monkeypatch.setenv("TURBVIT_PROGRESS", "1")
    run, found = live(run.path)
    assert "now another machine" in capsys.readouterr().out and len(measured(found)) == len(lives[0])


def test_a_stop_does_not_wait_for_the_peers(monkeypatch):
    "A process in the middle of something long is ended."
    monkeypatch.setattr(peering, "PATIENCE", 0.2)
    there = There(sys.executable, 1)
    side = there.make("benchmark.solver:LabSolver", points=16, Re=10.0, alpha=0.1, fky=2)
    there.call(side, "load", omega=np.ones((1, 16, 16)))
    there.process.stdin.write(json.dumps({"do": "call", "given": [side, "after"], "named": {"time": 1e6, "steps": 10**9}}) + "\n")
    there.process.stdin.flush()
    there.close()
    assert there.process.returncode == -signal.SIGKILL and not os.path.exists(there.folder.name)


def test_ratio_of_a_thing_to_itself_is_one():
    "On a clock that counts work, however the machine's speed changes from round to round."
    now, speed = [0.0], iter(np.exp(np.random.default_rng(0).normal(size=10_000)).repeat(6))

    def job():
        now[0] += next(speed)

    times = take_turns({"a": job, "again": job}, 200, 1e-9, lambda: now[0])
    ratio = np.quantile(times["again"] / times["a"], (0.25, 0.5, 0.75))
    assert ratio[0] <= 1 <= ratio[2]


@pytest.mark.parametrize("keys, said", [
    ({"sizes": [64, 32]}, "from the smallest to the largest"),
    ({"subjects": ["solvers"]}, "benchmark.subjects"),
    ({"rounds": 1}, "benchmark.rounds"),
    ({"eror": 1}, "benchmark.eror is not a key"),
])
def test_mistakes_in_the_section(tmp_path, keys, said):
    "One line that names the key."
    file = tmp_path / "wrong.toml"
    file.write_text(tomli_w.dumps({"benchmark": keys}))
    with pytest.raises(LabError) as told:
        load_config(file)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_absent_peers_are_told_with_the_remedy():
    assert absent(["dask"], {}) == ["left out: dask is not installed; pip install dask into an environment that has the lab, and name its Python: benchmark.peers"]
