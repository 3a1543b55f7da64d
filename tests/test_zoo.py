"""The zoo from the command line: listed, measured by several processes, killed and gone on with, asked, and mistakes that cost one line."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from turbvit_nb.cli import app
from turbvit_nb.data.generate import GenerateConfig, generate
from turbvit_nb.emulators.files import load_emulator
from turbvit_nb.lab.config import load_config
from turbvit_nb.lab.sweeps import read_sweep
from turbvit_nb.zoo.measures import Zoo, left, measured, practice_runs, read_zoo
from turbvit_nb.zoo.recommend import given_parameters, keep_weights, recommend, table_of
from turbvit_nb.zoo.weights import weight_vector

SETTINGS = """
[zoo]
leads = [1, 3, 5]
starts = 4
free_frames = 60
probe_frames = 4
probe_steps = 3
short_run = 20
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "Runs of known order, a config, and frames of a flow that the zoo does not have."
    folder = tmp_path_factory.mktemp("zoo")
    practice_runs(folder, strengths=(0.0, 0.03, 1.0), reynolds=(30, 100))
    generate(GenerateConfig(data_dir=str(folder / "my_frames"), Re=50, fky=2, NX=16, n_frames=24, t_save=0.2, spin_up=10.0, seed=3))
    (folder / "zoo.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBVIT_RUNS", str(folder / "runs"))
        says("index", folder / "zoo.toml")
        says("measure", "-j", 1)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    "A copy of the runs to change, without a zoo; the data stay where they are."
    shutil.copytree(made / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("zoo"))
    monkeypatch.setenv("TURBVIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def zoo(place, made) -> Zoo:
    "The same with a zoo that was listed and measured in one process."
    shutil.copytree(made / "runs/zoo", place / "runs/zoo")
    says("index", made / "zoo.toml")
    return read_zoo()


def turbvit(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def says(*words) -> str:
    "What a command of the zoo says that goes well."
    found = turbvit("zoo", *words)
    assert found.exit_code == 0, found.output
    return found.output


def fails(*words) -> str:
    "The one line of a command that does not."
    found = turbvit(*words)
    assert found.exit_code == 1 and "Traceback" not in found.output, found.output
    return " ".join(found.output.split())


def plain(zoo: Zoo) -> dict:
    "All measurements, without what the clock says."
    held = {(model.name, flow.name): measured(zoo, model, flow) for model in zoo.models for flow in zoo.flows}
    return {pair: {name: value for name, value in one.items() if name != "seconds"} for pair, one in held.items()}


def test_from_runs_to_a_recommendation(zoo, made):
    "index, measure, list, recommend: the known order comes out, and a model over the budget does not."
    assert "6 models of 2 families and 1 networks, 2 flows, 12 of 12 pairs measured" in says("index", made / "zoo.toml")
    listed = says("list")
    assert all(name in listed for name in ("noise_0.03_1/best", "Re100_k2_r0.1_b0_N16_dt0.2", "train"))
    answer = turbvit("recommend", "--data", made / "my_frames", "--count", 6).output
    order = [line.split()[1] for line in answer.splitlines() if "noise_" in line]
    assert order[0].startswith("noise_0_") and order[-1].startswith("noise_1_") and len(order) == 6
    assert all("noise_1_" not in line for line in turbvit("recommend", "--data", made / "my_frames", "--want", "climate", "--count", 2).output.splitlines()[2:])
    small = turbvit("recommend", "--no-data", "--re", 30, "--fky", 2, "--max-mb", 0.06, "--count", 6).output
    assert "noise_0.03" not in small and "measured in this flow" in small and "noise_0_" in small


@pytest.mark.soak
def test_two_processes_measure_what_one_does(zoo, warm):
    "Several processes give the same numbers, and so does one that was killed and went on."
    alone = plain(zoo)
    shutil.rmtree(zoo.path / "measures")
    command = [sys.executable, "-m", "turbvit_nb.cli", "zoo", "measure", "-j", "2"]
    job = subprocess.Popen(command, env=os.environ, start_new_session=True)
    until = time.monotonic() + 120
    whole = lambda: len(list(zoo.path.glob("measures/*/Re*.json")))
    while not whole() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    there = whole()
    assert 0 < there < 12 and sum(map(len, left(zoo).values())) == 12 - there
    subprocess.run([warm, *command[1:]], env=os.environ, check=True)
    assert left(zoo) == {} and plain(zoo) == alone


def test_what_a_table_says(zoo):
    "The labels are those of the files; a blow-up is below everything, and costs are known."
    table = table_of(zoo)
    for m, model in enumerate(zoo.models):
        for r, flow in enumerate(zoo.flows):
            held = measured(zoo, model, flow)
            assert table.labels["forecast"][m, r] == pytest.approx(np.mean(held["forecast"][0]["acc"]))
            blown = any(run["survived"] < 1 for run in held["climate"][0])
            assert blown == table.blown[m, r] == np.isneginf(table.labels["climate"][m, r])
    assert np.all(table.costs["MB"] > 0) and np.all(table.costs["GFLOP per time unit"] > 0)


def test_weights_and_blow_ups(zoo):
    "Weights are read once and are in every table then; a recommendation says how likely a blow-up is, and who says so."
    assert table_of(zoo).vectors is None
    keep_weights(zoo)
    table, file = table_of(zoo), zoo.path / "weights.npz"
    assert table.vectors.shape == (6, 8192) and table.vectors.dtype == np.float16 and np.isfinite(table.vectors).all()
    one = weight_vector(load_emulator(zoo.models[3].path)).numpy()
    np.testing.assert_allclose(table.vectors[3], one, rtol=1e-3, atol=1e-7)
    before = file.read_bytes()
    keep_weights(zoo)
    assert file.read_bytes() == before
    answer = recommend(zoo, given_parameters(zoo, Re=100, fky=2), count=6)
    assert all(0 <= line.blowup <= 1 and line.foresight == "largest enstrophy (not judged yet; run 15_zoo)" for line in answer)


def test_the_sweep_finds_what_it_names():
    "A run of each part of the sweep of the big zoo has a config that holds, and the checkpoints that it starts from are made by earlier runs."
    sweep = read_sweep("configs/zoo/sweep.toml")
    needed = sweep.needs
    made = {"pruned": {"zoo_models/vit_64_4_4"}, "distilled": {"zoo_models/vit_96_4_4"}, "latent": {"zoo_coders"}}
    for point in {point.part: point for point in reversed(sweep.points)}.values():
        config = load_config(point.base, point.overrides)
        flow = point.values["train_dataset.data_dirs"]
        assert config.section("train_dataset").data_dirs == config.section("validation_dataset").data_dirs == flow
        waits = {need.split()[0] for need in needed[f"{point.run} {point.chapters[0].name}"]}
        for start in made.get(point.part, ()):
            assert any(run.startswith(start) and run.endswith(flow[0]) for run in waits)
    assert sum(1 + (point.part == "pruned") for point in sweep.points if point.part != "coder") == 106  # models: a pruned run leaves two, a coder is none


def test_a_model_that_has_changed_is_measured_anew(zoo, place, made):
    "Its key is of what the file holds; the others stay."
    first, other = (place / "runs" / name / "checkpoints/best.tar" for name in ("noise_0_0", "noise_1_1"))
    shutil.copy(other, first)
    (zoo.path / "latency.json").unlink(missing_ok=True)
    assert "noise_0_0" not in turbvit("recommend", "--data", made / "my_frames", "--count", 6).output
    says("index", made / "zoo.toml")
    renewed = {model.run: model.key for model in read_zoo().models}
    assert renewed["noise_0_0"] == renewed["noise_1_1"]  # it is that model now, which is measured
    assert left(read_zoo()) == {} and plain(read_zoo()).keys() == plain(zoo).keys()
    shutil.rmtree(zoo.path / "measures" / renewed["noise_1_1"])
    assert left(read_zoo()).keys() == {renewed["noise_1_1"]}


def test_mistakes_cost_one_line(place, made):
    "An empty zoo, no zoo, bad budgets and wishes, other grids, damaged files."
    assert "there is no zoo" in fails("recommend", "--data", made / "my_frames")
    assert "there is no zoo" in fails("zoo", "measure")
    assert "is no TOML file" in fails("zoo", "index", "nowhere")
    (place / "none.toml").write_text('[zoo]\nruns = ["nothing_*"]\n')
    assert "nothing_* is the name of no run" in fails("zoo", "index", place / "none.toml")
    (place / "out.toml").write_text('[zoo]\nfolder = "../elsewhere"\n')
    assert "leads out of" in fails("zoo", "index", place / "out.toml") and not (place / "elsewhere").exists()
    says("index", made / "zoo.toml")
    assert "nothing is measured" in fails("recommend", "--data", made / "my_frames")
    says("measure", "-j", 1)
    asked = ["recommend", "--data", made / "my_frames"]
    assert "there is no wish 'weather'" in fails(*asked, "--want", "weather")
    assert "the nearest is noise_" in fails(*asked, "--max-mb", 1e-6)
    assert "a budget is positive" in fails(*asked, "--max-ms", -1)
    assert "--no-data --re" in fails("recommend") and "--no-data --re" in fails(*asked, "--no-data", "--re", 30)
    assert "no model of the zoo fits 64² points" in fails("recommend", "--no-data", "--re", 30, "--size", 64)
    assert "no data folder" in fails("recommend", "--data", "my_frames_too")
    catalogue = place / "runs/zoo/zoo.json"
    catalogue.write_text(catalogue.read_text()[:500])
    assert "damaged" in fails("zoo", "list")


def test_the_frames_of_a_measurement_are_new_to_all(zoo):
    "No start lies in a run of data that a model was taught on."
    seen = {run for model in zoo.models for run in model.taught}
    assert seen and all(run not in seen for flow in zoo.flows for run in flow.runs)
    held = json.loads(zoo.file(zoo.models[0], zoo.flows[0]).read_text())
    assert held["frames"][1:] == list(zoo.flows[0].runs)
