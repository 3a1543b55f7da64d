"""A study of compression as a whole: planted answers found again from files, and tiny real runs timed, grouped and judged."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
import torch

from turbvit_nb.compare import compare, study_of
from turbvit_nb.compress.masks import Masks, prunable
from turbvit_nb.lab.checkpoints import Identity, attributes, as_state
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.files import write_checkpoint
from turbvit_nb.lab.results import write_netcdf
from turbvit_nb.lab.runs import open_run
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, emulator_state
from turbvit_nb.study.costs import measure_latency
from turbvit_nb.study.entries import CompareConfig, gather
from turbvit_nb.study.findings import Study, featured, study_findings
from turbvit_nb.study.points import PLANTED, change, planted_entry, planted_study


@pytest.fixture
def data(tmp_path):
    "No data are needed."
    return tmp_path


def put(home, entry):
    "What an entry's analyses would have left in its run folder."
    folder = home / "runs" / entry.run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(tomli_w.dumps({"output_dir": entry.run} | dict(entry.setting)))
    about = {"checkpoint": entry.checkpoint} | attributes(entry.identity)
    write_netcdf(entry.scores.assign_attrs(about), folder / "short_analyses" / f"{entry.checkpoint}.nc", lambda variable: False)


def judged(home, runs, *keys):
    "The job on some runs."
    file = home / "compare.toml"
    file.write_text(f'output_dir = "study"\ndevice = "cpu"\n[compare]\nruns = {json.dumps(runs)}\nleads = [5, 10]\n' + "\n".join(keys))
    run = open_run(file, "compare")
    entries, missing, said = compare(run)
    study = study_of(run, entries)
    run.finish()
    return entries, missing, said, study, json.loads((home / "runs/study/comparison.json").read_text())


def test_planted_answers_are_found_again_from_files(home):
    "Best criterion, 2 % threshold, damage at small scales, and that zeros are not faster."
    planted = [e for e in planted_study(3, {"taylor": PLANTED["taylor"], "random": PLANTED["random"]}) if "w64" not in e.run]
    for entry in planted:
        put(home, entry)
    known = {f"{e.run}/{e.checkpoint}": {"facts": e.facts, "speed-up": e.facts["speed-up"], "ms": 20 / e.facts["speed-up"]} for e in planted}
    (home / "runs/study").mkdir()
    (home / "runs/study/latency.json").write_text(json.dumps({"models": known}))
    entries, missing, said, study, told = judged(home, sorted({e.run for e in planted}))
    assert len(entries) == 3 * (1 + 1 + 5 + 10 + 1) and len(study.points) == 18 and study.seeds == 3
    assert any("checkpoint (hence no cost)" in what for what in missing)  # kept in latency.json
    words = {part.sentence for part in said}
    far = next(w for w in words if w.startswith("Unit weight: taylor goes furthest, "))
    assert 78 < float(far.split("furthest, ")[1].split()[0]) < 82
    marks = {part.sentence.split("”")[0].strip("“"): part.mark for part in said if part.about == "belief"}
    assert marks["Sparse models are faster"] == "fails" and marks["Any criterion is better than chance"] == "holds"
    assert marks["A large model pruned beats a small one trained dense, at equal latency"] == "holds"
    assert marks["The smallest scales go first"] == "holds" and marks["Pruning improves a model"] == "unknown"
    assert len(told["rows"]) == len(entries) and len(told["scorecard"]) == len(featured(study)) <= 10
    assert {point["family"] for point in told["study"]["points"]} == {"dense", "small dense", "control", "pruned"}
    best = next(point for point in told["study"]["points"] if point["label"] == "taylor 20 %")
    assert best["change from control"]["low"] < -0.02 < best["change from control"]["high"] and best["change from control"]["pairs"] == 3
    assert best["measures"]["latency"]["value"] == 1.0
    assert "rivals" in told["study"]["tables"] and json.dumps(told)


def tiny(width, seed):
    "An emulator that nobody trained."
    torch.manual_seed(seed)
    section = ModelConfig(img_size=16, patch_size=4, embed_dim=width, depth=1, num_heads=2)
    emulator = create_emulator(section, Normaliser([0.0, 0.0], [1.0, 1.0]), step=0.05)
    torch.nn.init.normal_(emulator.network.output.weight)
    return emulator


def stored(home, entry, emulator, masks=None):
    "The entry with a checkpoint that holds it."
    put(home, entry)
    state = emulator_state(emulator) | {"identity": as_state(entry.identity)} | ({"masks": masks.state()} if masks else {})
    (home / "runs" / entry.run / "checkpoints").mkdir(exist_ok=True)
    write_checkpoint(home / "runs" / entry.run / "checkpoints" / f"{entry.checkpoint}.tar", state)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Checkpoints of a large and a small dense model and of pruned ones, two seeds."
    home = tmp_path_factory.mktemp("made")
    for seed in range(2):
        parent = {"checkpoint_file": f"large_{seed}/checkpoints/best.tar"}
        stored(home, planted_entry(f"large_{seed}", "best", seed, 1.0), tiny(64, seed))
        stored(home, planted_entry(f"narrow_{seed}", "best", seed, 0.8, model={"embed_dim": 16, "depth": 1}), tiny(16, seed))
        for metric, left in (("l1", 50.0), ("taylor", 50.0), ("control", 100.0)):
            emulator, name = tiny(64, seed), f"prune1_remaining_{left}"
            masks = Masks.dense(prunable(emulator))
            if left < 100:
                rng = torch.Generator().manual_seed(7 * seed + len(metric))
                masks = Masks({key: (torch.randperm(mask.numel(), generator=rng) % 2 == 0).view(mask.shape) for key, mask in masks.items()})
                masks.apply(emulator)
            pruning = {"importance_metric": metric.replace("control", "l1"), "epoch_schedule": [1]}
            entry = planted_entry(f"{metric}_{seed}", name, seed, 1.0, 1 - left / 100, **parent, pruning=pruning)
            stored(home, entry, emulator, masks)
    return home / "runs"


@pytest.fixture
def measured(made, home):
    "The names of those runs, in a folder of the test's own."
    shutil.copytree(made, home / "runs")
    return [f"{name}_{seed}" for name in ("large", "narrow", "l1", "taylor", "control") for seed in range(2)]


def test_latency_is_measured_once_and_costs_are_counted(home, measured):
    keys = ["batch_size = 2", "threads = 1", "rounds = 5"]
    entries, missing, said, study, told = judged(home, measured, *keys)
    file = home / "runs/study/latency.json"
    first = json.loads(file.read_text())
    assert first["conditions"] == {"batch_size": 2, "threads": 1, "device": "cpu", "reference": "large_0/best"} and first["machine"]
    assert len(first["models"]) == 10 and first["models"]["large_0/best"]["speed-up"] == 1.0
    named = {point.label: point for point in study.points}
    assert {"dense", "dense 16×1", "l1 50 %", "taylor 50 %", "control 1"} == set(named)
    half, whole = named["l1 50 %"].summary("bytes")[0], named["dense"].summary("bytes")[0]
    assert 0.5 < half / whole < 0.6  # a bit and half a number for each weight
    assert named["l1 50 %"].left == pytest.approx(0.5, abs=0.02)
    again = lambda **keys: measure_latency(SimpleNamespace(path=home / "runs/study", device="cpu"), entries, CompareConfig(threads=1, rounds=5, **keys))
    assert again(batch_size=2) == first
    shutil.rmtree(home / "runs/narrow_1/checkpoints")
    lost = next(entry for entry in entries if entry.run == "narrow_1")
    lost.facts = {}
    assert again(batch_size=2) == first and lost.facts["ms"] == first["models"]["narrow_1/best"]["ms"] and lost.facts["parameters"]
    other = again(batch_size=1)
    assert other["conditions"]["batch_size"] == 1 and len(other["models"]) == 9 and other == json.loads(file.read_text())
    rows = told["study"]["tables"]["masks"]["rows"]  # random masks agree no more than chance
    assert len(rows) == 1 and abs(float(rows[0]["above chance (σ)"])) < 4


def test_seeds_are_paired_and_one_seed_has_no_interval(home, measured):
    entries, _ = gather({name: home / "runs" / name for name in measured})
    study = Study(entries)
    partners = study.controls
    assert len(partners) == 4 and all(e.seed == c.seed and c.role == "control" for e, c in partners.items())
    assert all(start.run == f"large_{e.seed}" for e, start in study.starts.items())
    alone = Study([e for e in entries if e.seed == 0])
    value, low, high, pairs = change(alone.family("pruned")[0], alone.controls, "horizon", True)
    assert pairs == 1 and np.isfinite(value) and np.isnan([low, high]).all()
    marks = {part.mark for part in study_findings(alone) if part.about == "belief"}
    assert marks <= {"unknown", "fails"}


def test_a_handful_of_single_models_is_no_study(home, measured):
    *_, study, told = judged(home, [name for name in measured if name.endswith("0")], "rounds = 0")
    assert study is None and "study" not in told and len(told["scorecard"]) == 5
    assert not (home / "runs/study/latency.json").exists()


def test_mistakes_cost_one_line(home, measured):
    with pytest.raises(LabError, match="compare.reference = lagre_0 is no run with a dense model; among these, large_0, large_1"):
        judged(home, measured, 'reference = "lagre_0"')
    shutil.rmtree(home / "runs/study")
    with pytest.raises(LabError, match="compare.batch_size"):
        judged(home, measured, "batch_size = 0")


def test_a_sweep_names_its_runs(home, measured):
    pytest.importorskip("turbvit_nb.lab.sweeps")
    (home / "base.toml").write_text("[training]\nepochs = 1\n")
    (home / "some.toml").write_text('''[sweep]
name = "some"
base = "base.toml"
run = "large_{seed}"
chapters = ["02_train"]
[sweep.grid]
seed = [0, 1, 2]
''')
    entries, missing, _, study, told = judged(home, ["narrow_0"], f'sweep = "{home / "some.toml"}"', "rounds = 0")
    assert [e.run for e in entries] == ["large_0", "large_1", "narrow_0"] and study is not None
    assert any(what.startswith("large_2 has no analyses") for what in missing)  # not made yet
    shutil.rmtree(home / "runs/study")
    with pytest.raises(LabError, match="no sweep nothing"):
        judged(home, ["narrow_0"], 'sweep = "nothing"')
