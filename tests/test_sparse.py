"""Trainings that choose their samples: the same bits after a stop, in every chapter that trains; counted costs; flows apart; one line for a mistake."""
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from same_bits import StopSoon, equal
from turbvit_nb.datasets import training_sets
from turbvit_nb.distil import distil
from turbvit_nb.flow.job import train_flow
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.jobs import steps
from turbvit_nb.lab.runs import Stopped, open_run, read_metrics
from turbvit_nb.latent.job import train_latent
from turbvit_nb.methods import read_methods
from turbvit_nb.model import load_emulator
from turbvit_nb.prune import prune
from turbvit_nb.sparse.arms import against
from turbvit_nb.sparse.job import train_sparsely
from turbvit_nb.sparse.report import control_rows
from turbvit_nb.train import train

LOOP = dict(batch_size=6, unroll=1, rollout_steps=4, rollout_starts=3, precision="fp32")
FLOW = dict(NX=16, dt=0.01, t_save=0.1, n_trajectories=2, n_frames=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "Two flows, of Re 20 and Re 400."
    from turbvit_nb.data.generate import GenerateConfig, generate

    home, keep = tmp_path_factory.mktemp("data"), pytest.MonkeyPatch()
    keep.setenv("TURBVIT_DATA", str(home))
    for name, Re in (("easy", 20), ("hard", 400)):
        generate(GenerateConfig(data_dir=name, Re=Re, **FLOW))
    keep.undo()
    return home


def config(home: Path, name: str, sparse: dict | None, training: dict | None = {}, **more) -> Path:
    "A config of a small job on both flows: two runs of the easy one, one of the hard one."
    frames = {"data_dirs": ["easy", "hard"], "trajectories": {"easy": [1, 2], "hard": [1]}}
    made = {
        "output_dir": name, "seed": 3,
        "model": dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, dropout=0.1),
        "train_dataset": frames | {"frame_range": [[1, 31]]},
        "validation_dataset": frames | {"frame_range": [[31, 61]]},
        "training": None if training is None else dict(epochs=3, warmup_epochs=0.5, lr=2e-3, **LOOP) | training,
        "sparse": sparse,
    } | more
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in made.items() if value is not None}))
    return path


METHODS = {
    "blocks": dict(method="blocks"), "blocks, weighted": dict(method="blocks", reweight=0.5, power=0.5), "stratified": dict(method="stratified"),
    "importance": dict(method="importance", target_activation=0.6), "infobatch": dict(method="infobatch"), "uniform": dict(method="uniform", target_activation=0.5),
    "adaptive": dict(method="adaptive", target_activation=0.5), "fresh": dict(method="adaptive", target_activation=0.5, score="fresh"),
    "fresh importance": dict(method="importance", target_activation=0.5, score="fresh"), "quantile": dict(method="adaptive", target_activation=0.5, controller="quantile"),
    "residual": dict(method="adaptive", target_activation=0.5, score="fresh", entropy="residual", entropy_weight=0.5),
    "scored": dict(method="blocks", score_every=2), "last lead": dict(method="adaptive", target_activation=0.5, score="fresh", lead="last"), "auto": {}, "last": dict(method="blocks", full_last=0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_stop_in_mid_epoch_changes_no_bit(home, name):
    "With noise, symmetries, accumulation and averaged weights; longer samples from the second epoch on."
    how = dict(unroll=2, unroll_start=0.3, input_noise=0.01, accumulate=2, ema=0.9)
    train_sparsely(whole := open_run(config(home, "whole", METHODS[name], how), "sparse"))
    path = config(home, "halves", METHODS[name], how)

    for step in (3, 9, 16):                                                       # within every epoch
        with pytest.raises(Stopped):
            train_sparsely(run := open_run(path, "sparse"), [StopSoon(step)])
        path = run.path
        run.close()
    train_sparsely(run := open_run(run.path, "sparse"))
    one, other = (read_checkpoint(r.checkpoints / "last.tar") for r in (whole, run))
    for part in ("model_state", "ema_state", "optimizer_state"):
        assert equal(one[part], other[part]), part
    mine, theirs = one["callbacks"]["Selection"], other["callbacks"]["Selection"]
    score, again = (state["scores"].pop("score").numpy() for state in (mine, theirs))
    np.testing.assert_array_equal(score, again)
    assert equal(mine, theirs)
    assert "threshold" in read_metrics(run.path, stage="sparse")[-1] or METHODS[name].get("method") != "adaptive"


def test_without_choice_it_is_the_training_without_the_section(home):
    train(plain := open_run(config(home, "plain", None), "train"))
    train(alike := open_run(config(home, "alike", dict(method="uniform")), "train"))
    one, other = (read_checkpoint(run.checkpoints / "last.tar") for run in (plain, alike))
    assert equal(one["model_state"], other["model_state"])


def test_the_flows_are_told_apart_and_the_cost_is_counted(home):
    run = open_run(config(home, "counted", dict(method="stratified"), dict(unroll=2, unroll_start=0.3)), "sparse")
    learner, validation, selection, spent = train_sparsely(run)
    dataset = selection.inner.dataset
    dataset.targets = 1
    assert dataset.flows == ["Re 20", "Re 400"]
    assert np.bincount(dataset.places()["flow"]).tolist() == [2 * 29, 29]
    rows = [row for row in read_metrics(run.path, stage="sparse") if "loss" in row]
    assert {"validation_loss Re 20", "validation_loss Re 400", "validation_loss_99"} <= rows[-1].keys()
    flow, used = dataset.places()["flow"], selection.scores.used[selection.scores.cover(dataset.places())]
    assert abs(used[flow == 0].sum() - used[flow == 1].sum()) <= 3 * 2          # to a sample an epoch
    epochs = [29 * 3 // 6 * 6, *[28 * 3 // 6 * 6 * 2] * 2]                       # samples, and both leads of longer ones
    assert selection.trained == sum(epochs)
    assert rows[-1]["passes"] == 3 * sum(epochs) + 3 * 87
    assert selection.scored == 3 * 87                                            # the headroom: a gradient of every sample
    assert spent.seconds > 0 and rows[-1]["spent_seconds"] == spent.seconds


def test_scores_are_losses_of_their_samples(home):
    "What is known after a scoring pass is what the model answers."
    run = open_run(config(home, "scores", dict(method="blocks", score_every=1), dict(epochs=1, lr=1e-12, augment=False)), "sparse")
    learner, _, selection, _ = train_sparsely(run)
    dataset, model = selection.inner.dataset, learner.model.eval()
    batch = dataset.__getitems__(np.arange(len(dataset)))
    with torch.no_grad():
        loss = model(batch["x"], batch["cond"], batch["y"]).double().numpy()
    score = selection.scores.score[selection.scores.cover(dataset.places())]
    assert np.corrcoef(np.log(loss), np.log(score))[0, 1] > 0.9                  # dropout, and a mean that runs


def test_a_hard_flow_is_found_without_labels(home):
    run = open_run(config(home, "found", dict(method="blocks"), dict(epochs=8, augment=False)), "sparse")
    _, _, selection, _ = train_sparsely(run)
    dataset = selection.inner.dataset
    flow, used = dataset.places()["flow"], selection.scores.used[selection.scores.cover(dataset.places())]
    assert used[flow == 1].mean() > 1.5 * used[flow == 0].mean()


def test_a_better_model_says_what_can_be_learnt(home):
    train(teacher := open_run(config(home, "teacher", None, dict(epochs=6)), "train"))
    how = dict(method="reducible", target_activation=0.5, teacher="teacher/checkpoints/best.tar")
    for score in ("stale", "fresh"):
        run = open_run(config(home, f"pupil_{score}", how | {"score": score}), "sparse")
        _, _, selection, _ = train_sparsely(run)
        dataset, better = selection.inner.dataset, load_emulator(teacher.checkpoints / "best.tar")
        batch = dataset.__getitems__([0, 40, 80])
        with torch.no_grad():
            np.testing.assert_allclose(selection.left[[0, 40, 80]], better(batch["x"], batch["cond"], batch["y"]), rtol=1e-5)
    missing = config(home, "missing", how | {"teacher": "nobody/best.tar"})
    with pytest.raises(LabError, match="sparse.teacher = nobody/best.tar is not there"):
        train_sparsely(open_run(missing, "sparse"))


def test_every_training_takes_the_section(home):
    "Finetuning, distillation, a coder and a generative emulator; one that is stopped goes on."
    train(open_run(config(home, "dense", None), "train"))
    start, half = {"checkpoint_file": "dense/checkpoints/best.tar"}, dict(method="adaptive", target_activation=0.5, score="fresh")
    finetuning = dict(epochs=2, lr=1e-3, **LOOP)
    rows = prune(run := open_run(config(home, "pruned", half, training=None, pruning=dict(importance_metric="l1", prune_schedule=[0.2], epoch_schedule=[2]), finetuning=finetuning, **start), "prune"))
    assert len(rows) == 2
    assert {"activation", "passes"} <= [row for row in read_metrics(run.path, stage="prune") if "activation" in row][-1].keys()
    distil(run := open_run(config(home, "taught", half, training=None, distillation=dict(teacher="dense/checkpoints/best.tar", distill_weight=0.5), finetuning=finetuning, **start), "distil"))
    assert any("activation" in row for row in read_metrics(run.path, stage="distil"))
    loop = dict(epochs=2, batch_size=6, precision="fp32")
    coder = dict(levels=[[2, 4]], width=8, samples=16, **loop)
    drawing = dict(model=dict(model_type="DiT", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2), flow=dict(method="meanflow", rollout_steps=2, rollout_starts=2, rollout_members=2, **loop))
    for name, stage, job, sections in (("coded", "latent", train_latent, dict(latent=coder, model=None)), ("drawn", "flow", train_flow, drawing)):
        unsure = [half | dict(entropy="variance", entropy_weight=0.5)] if stage == "flow" else []
        for i, sparse in enumerate([half, dict(method="infobatch"), *unsure]):
            job(run := open_run(config(home, f"{name}_{i}", sparse, training=None, **sections), stage))
            assert any("activation" in row for row in read_metrics(run.path, stage=stage))


def test_what_a_config_asks_for(home):
    "With [sparse], [training] belongs to 13; without it, to 02."
    state = lambda path: {step.chapter.stage: step.state for step in steps(path)}
    with_it, without = state(config(home, "with", dict(method="blocks"))), state(config(home, "without", None))
    assert (with_it["sparse"], with_it["train"]) == ("to do", "left out: [training] belongs to [sparse]")
    assert (without["sparse"], without["train"]) == ("left out: no [sparse] in the config", "to do")


def test_a_control_is_found(home):
    assert control_rows("nobody") == []
    train_sparsely(run := open_run(config(home, "control", dict(method="uniform")), "sparse"))
    assert [row["epoch"] for row in control_rows("control")] == [1, 2, 3]
    assert control_rows("control")[-1]["passes"] == 3 * 3 * 84


@pytest.mark.parametrize("sections, said", [
    (dict(sparse=dict(target_activation=0.0)), "sparse.target_activation = 0.0"),
    (dict(sparse=dict(method="adaptive", target_activation=0.5, ki=-1.0)), "sparse.ki = -1.0"),
    (dict(sparse=dict(min_active=7)), "sparse: min_active = 7 is more than a batch holds: training.batch_size = 6"),
    (dict(sparse=dict(lead="last")), "sparse: lead = last is a score of unrolled emulators"),
    (dict(sparse={}, training=None), "sparse: there is no training to choose samples for"),
    (dict(sparse=dict(method="adaptive", target_activation=0.5, entropy="classes", entropy_weight=1.0)), "sparse: entropy = classes is not of this training"),
])
def test_a_mistake_is_one_line(home, sections, said):
    with pytest.raises(LabError) as told:
        load_config(config(home, "wrong", **sections)).check()
    assert said in str(told.value) and "\n" not in str(told.value)


def test_trajectories_by_folder(home):
    dataset = training_sets(load_config(config(home, "mixed", None)), ["omega"], 1)[0]
    assert [(regime.Re, regime.IC) for regime in dataset.regimes] == [(20, 1), (20, 2), (400, 1)]
    wrong = {"data_dirs": ["easy", "hard"], "frame_range": [[1, 31]], "trajectories": {"soft": [1]}}
    with pytest.raises(LabError, match="train_dataset: trajectories names soft, which is not among the data folders: easy, hard"):
        training_sets(load_config(config(home, "unknown", None, train_dataset=wrong)), ["omega"], 1)


SWEEP = """
[sweep]
name = "arms"
part = "uniform"
base = "arms.toml"
run = "{part}_{seed}"
chapters = ["13_sparse"]
overrides = ["sparse.method=uniform"]
[sweep.grid]
seed = [0, 1]
[[sweep.also]]
part = "blocks_15"
overrides = ["sparse.method=blocks"]
[sweep.also.grid]
seed = [0, 1]
"""


def test_the_arms_of_a_sweep(home):
    "Three of four runs are done; the fourth is named, and the arms are paired by seed."
    base, sweep = config(home, "arms", {}, dict(epochs=1)), home / "sweep.toml"
    sweep.write_text(SWEEP)
    for name, method, seed in (("uniform_0", "uniform", 0), ("uniform_1", "uniform", 1), ("blocks_15_0", "blocks", 0)):
        run = open_run(base, "sparse", [f"output_dir={name}", f"sparse.method={method}", f"seed={seed}"])
        train_sparsely(run)
        run.finish()
    asked = home / "methods.toml"
    asked.write_text(tomli_w.dumps({"output_dir": "report", "methods": {"sweep": str(sweep)}}))
    arms, reference, keys, missing = read_methods(run := open_run(asked, "methods"))
    run.close()
    assert list(arms) == ["uniform", "blocks 15"] and reference is arms["uniform"] and missing == ["blocks_15_1"]
    assert {"validation_loss", "validation_loss_99", "validation_loss Re 20", "validation_loss Re 400", "rollout_vrmse", "horizon Re 400"} <= set(keys)
    value, low, high = against(arms["blocks 15"], reference, "validation_loss")
    last = [[row for row in read_metrics(home / "runs" / name, stage="sparse") if "loss" in row][-1]["validation_loss"] for name in ("blocks_15_0", "uniform_0")]
    assert value == pytest.approx(last[0] / last[1]) and np.isnan([low, high]).all()
    for keys, said in ((dict(reference="unifrom"), "methods.reference = unifrom is no arm with a run that is done; there are uniform, blocks 15; did you mean uniform?"),
                       (dict(metrics=["accuracy"]), "methods.metrics: accuracy is not measured in all runs"), (dict(sweep=None), "methods.sweep is missing")):
        asked.write_text(tomli_w.dumps({"output_dir": f"wrong{len(said)}", "methods": {key: value for key, value in ({"sweep": str(sweep)} | keys).items() if value}}))
        with pytest.raises(LabError) as told:
            read_methods(open_run(asked, "methods"))
        assert said in str(told.value)
