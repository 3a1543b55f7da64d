"""Pruning: masks that no wrapper sees, and the whole job with its crashes."""
import json
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn

from same_bits import equal, group_of_one
from turbvit_nb import prune as chapter
from turbvit_nb.compress.criteria import CRITERIA, SCORES_STRUCTURE, l1, sample_mean
from turbvit_nb.compress.masks import HoldMasks, Masks, prunable
from turbvit_nb.compress.schedules import Step
from turbvit_nb.compress.selection import select
from turbvit_nb.compress.units import unit_named
from turbvit_nb.lab import runs
from turbvit_nb.lab.checkpoints import Identity, as_state, identify, results_in
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.files import read_checkpoint, write_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run, read_metrics
from turbvit_nb.model import ModelConfig, Normaliser, card, create_emulator, load_emulator, losses, rollout
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime
from turbvit_nb.prune import Stages, open_stages, prune, read_pruning
from turbvit_nb.train import train


class Stub:
    "As much of a learner as a callback needs."

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def halved(model: nn.Module) -> Masks:
    return select(Masks.dense(prunable(model)), l1(model), Step(1, 0.5, 1), unit_named("weight").pieces(model))


def advance(model: nn.Module, hold: HoldMasks, optimizer: torch.optim.Optimizer, steps: int) -> None:
    "Steps with the callbacks where the learner calls them."
    learner, x = Stub(model, optimizer), torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    hold.before_fit(learner)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        hold.after_backward(learner)
        optimizer.step()
        hold.after_step(learner)


def zeros(model: nn.Module, masks: Masks) -> bool:
    "Whether every pruned weight is exactly zero, and not minus zero."
    return all(bool((p[pruned] == 0).all()) and not bool(p[pruned].signbit().any()) for p, pruned in masks.matched(model))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
])
def test_no_optimizer_revives_a_pruned_weight(make):
    model = network()
    masks, optimizer = halved(model), make(model.parameters())
    advance(model, HoldMasks(Masks.dense(prunable(model)), model), optimizer, 5)  # build up momentum first
    advance(model, HoldMasks(masks, model), optimizer, 20)
    assert zeros(model, masks)


def test_a_compiled_model_follows_the_masks():
    model = network()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 2, 8, 8)
    before = compiled(x)
    masks = halved(model)
    masks.apply(model)
    assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), before)
    advance(compiled, HoldMasks(masks, model), torch.optim.AdamW(compiled.parameters()), 3)  # its names carry a prefix
    assert zeros(model, masks)


def test_a_distributed_wrapper_follows_the_masks(tmp_path):
    model = network()
    masks = halved(model)
    with group_of_one(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model)
        advance(wrapped, HoldMasks(masks, model), torch.optim.AdamW(wrapped.parameters()), 3)
        del wrapped
    assert zeros(model, masks) and zeros(deepcopy(model), masks)


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable(model)) == ["0.weight"]


@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - SCORES_STRUCTURE))
def test_scores_leave_the_model_alone(name):
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters())
    advance(model, HoldMasks(Masks.dense(prunable(model)), model), optimizer, 2)
    before = deepcopy(model.state_dict())
    optimizer.zero_grad()
    batch = {"x": torch.randn(4, 2, 8, 8), "y": torch.randn(4, 4), "index": torch.arange(4)}
    squared = lambda new, wanted: (new - wanted).square().sum(1)
    losses = lambda model, batch, error=squared: error(model(batch["x"]), batch["y"]) / 4
    scores = CRITERIA[name](model, [batch], losses, optimizer=optimizer, seed=0, chunk=3)
    assert {k: v.shape for k, v in scores.items()} == {k: v.shape for k, v in prunable(model).items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["ViT", "ReViT", "EncoderDecoderViT", "UNet"])
def test_mapped_gradients_are_those_of_the_samples(kind):
    torch.manual_seed(0)
    small = dict(embed_dim=16, depth=1, num_heads=2, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2,
                 decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, base_channels=8)
    emulator = create_emulator(ModelConfig(model_type=kind, img_size=16, **small), Normaliser([0.0, 0.0], [1.0, 1.0]))
    nn.init.normal_(emulator.network.output.weight, std=0.1)
    batch = {"x": torch.randn(5, 2, 1, 16, 16), "y": torch.randn(5, 2, 2, 16, 16), "cond": torch.rand(5, 5) + 1}
    mapped, single = (sample_mean(emulator, [batch], losses, torch.square, chunk) for chunk in (5, 1))
    for name, mean in single.items():
        assert torch.allclose(mapped[name], mean, rtol=1e-3, atol=1e-6 * float(mean.max())), name


# The job. A data set of travelling waves, a small model trained on it, and runs that prune it.

def waves(folder: Path) -> None:
    "Two packed runs of 60 frames: a few modes that travel at different speeds."
    side = np.arange(16) * 2 * np.pi / 16
    x, y = np.meshgrid(side, side, indexing="ij")
    for ic in (1, 2):
        rng, regime = np.random.default_rng(ic), Regime(Re=200, fky=4, alpha=0.1, beta=20.0, NX=16, dt=0.01, IC=ic)
        modes = [(kx, ky, *rng.normal(size=2)) for kx in range(1, 4) for ky in range(-2, 3)]
        path = folder / regime.path() / PACKED
        writer = PackedWriter(path, regime, 60)
        for n in range(1, 61):
            writer.append(0.1 * n, sum(a * np.cos(kx * x + ky * y - 0.2 * n * kx + b) for kx, ky, a, b in modes))
        writer.finish()


def toml(path: Path, **sections) -> Path:
    "A config file."
    path.write_text(tomli_w.dumps(sections))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Data, a folder of runs, and a dense model in `runs/dense`."
    home, patch = tmp_path_factory.mktemp("prune"), pytest.MonkeyPatch()
    patch.setenv("TURBVIT_RUNS", str(home / "runs"))
    patch.setenv("TURBVIT_DATA", str(home / "data"))
    waves(home / "data" / "waves")
    run = open_run(toml(home / "train.toml", output_dir="dense", **sections(), training=finetuning(epochs=3, checkpoint_period=1)), "train")
    train(run)
    run.finish()
    yield home
    patch.undo()


@pytest.fixture(autouse=True)
def no_run_left_open():
    yield
    for run in list(runs._open.values()):
        run.close()


def sections() -> dict:
    data = dict(data_dir="waves")
    return dict(
        model=dict(model_type="ViT", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2),
        train_dataset=data | dict(frame_range=[[1, 41]]), validation_dataset=data | dict(frame_range=[[41, 61]]),
    )


def finetuning(**more) -> dict:
    return dict(batch_size=16, lr=1e-3, rollout_steps=5, rollout_starts=2, unroll=2) | more


def pruning(**more) -> dict:
    return but(dict(importance_metric="taylor", prune_schedule=[0.2, 0.25], epoch_schedule=[1, 2], score_batches=2) | more)


def but(keys: dict) -> dict:
    "Without those that are None."
    return {key: value for key, value in keys.items() if value is not None}


def start(home: Path, name: str, more: dict | None = None, tune: dict | None = None, **extra):
    "A run that prunes the dense model."
    config = dict(output_dir=name, checkpoint_file="dense/checkpoints/best.tar") | sections() | extra
    config |= dict(pruning=pruning(**more or {}), finetuning=finetuning(**tune or {}))
    return open_run(toml(home / f"{name}.toml", **config), "prune")


FINAL = "prune2_remaining_60.0"


@pytest.fixture(scope="module")
def reference(home):
    "A run that nothing happened to."
    run = start(home, "reference")
    rows = prune(run)
    run.finish()
    return run.path, rows


def test_a_checkpoint_per_stage(reference):
    path, rows = reference
    assert sorted(p.stem for p in (path / "checkpoints").iterdir()) == ["prune1_remaining_80.0", FINAL]
    total = 0
    for row in rows[1:]:
        checkpoint = path / "checkpoints" / f"{row['name']}.tar"
        emulator, masks = load_emulator(checkpoint), Masks(read_checkpoint(checkpoint)["masks"])
        assert masks.total - masks.remaining() == round((1 - round(row["percent"]) / 100) * masks.total)
        assert zeros(emulator, masks) and list(masks) == list(prunable(emulator))
        assert sum(int((p == 0).sum()) for p in prunable(emulator).values()) == masks.total - masks.remaining()
    moments = read_checkpoint(checkpoint)["optimizer_state"]["state"]
    assert sum(int((m["exp_avg_sq"] == 0).sum()) for m in moments.values()) >= masks.total - masks.remaining()
    assert [row["epochs"] for row in rows] == [0, 1, 2] and rows[0]["percent"] == 100
    assert len([line for line in read_metrics(path, stage="prune") if "prune_stage" in line]) == 2


def test_masks_only_grow(reference):
    path, _ = reference
    first, second = (Masks(read_checkpoint(p)["masks"]) for p in sorted((path / "checkpoints").iterdir()))
    assert all(not (second[name] & ~first[name]).any() for name in first)


def same_end(run_path: Path, reference_path: Path) -> None:
    "Both ended with the same bits."
    ours, theirs = (read_checkpoint(path / "checkpoints" / f"{FINAL}.tar") for path in (run_path, reference_path))
    assert ours.pop("run_name") == run_path.name and theirs.pop("run_name") == reference_path.name
    assert ours.pop("run_id") != theirs.pop("run_id")
    assert equal(ours, theirs)


def test_a_job_killed_between_two_stages(home, reference, monkeypatch):
    run = start(home, "between")
    take = Stages.take

    def dies(self, pruning, step):
        if step.index == 2:
            raise MemoryError
        take(self, pruning, step)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Stages, "take", dies)
        prune(run)
    run.close()
    run = open_run(run.path, "prune")
    prune(run)
    same_end(run.path, reference[0])


@pytest.mark.parametrize("stage, step, orderly", [(1, 2, False), (2, 5, False), (2, 6, True), (2, 2, True)])
def test_a_job_killed_in_a_stage(home, reference, monkeypatch, stage, step, orderly):
    run = start(home, f"within{stage}{step}{orderly}")
    after_batch, seen = HoldMasks.after_batch, []

    def dies(self, learner):
        seen.append(learner.step)
        if seen.count(1) == stage and learner.step == step:
            if not orderly:
                raise MemoryError
            learner.stop = "SIGTERM"

    with monkeypatch.context() as patch, pytest.raises(Stopped if orderly else MemoryError):
        patch.setattr(HoldMasks, "after_batch", dies)
        prune(run)
    assert HoldMasks.after_batch is after_batch and not run.has(FINAL)
    run.close()
    run = open_run(run.path, "prune")
    prune(run)
    same_end(run.path, reference[0])


JOB = """
import sys, torch
from turbvit_nb.lab.runs import open_run
from turbvit_nb.prune import prune
torch.set_num_threads(1)
prune(open_run(sys.argv[1], "prune"))
"""


def test_a_process_killed_while_finetuning(home, reference):
    config = dict(output_dir="killed", checkpoint_file="dense/checkpoints/best.tar", pruning=pruning(), finetuning=finetuning())
    process = subprocess.Popen([sys.executable, "-c", JOB, str(toml(home / "killed.toml", **sections(), **config))])
    folder, deadline = home / "runs" / "killed", time.monotonic() + 60
    while not (folder / "checkpoints" / "prune2_last.tar").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    prune(open_run(folder, "prune"))
    same_end(folder, reference[0])


def test_accumulated_gradients_stay_pruned_and_resume(home, monkeypatch):
    "Asked to stop between two batches of one step of the optimizer, after the third of four."
    more, tune = dict(prune_schedule=[0.5], epoch_schedule=[2]), dict(accumulate=2, batch_size=16)
    run, after_batch = start(home, "accumulated", more, tune), HoldMasks.after_batch
    prune(run)
    checkpoint = run.checkpoints / "prune1_remaining_50.0.tar"
    assert zeros(load_emulator(checkpoint), Masks(read_checkpoint(checkpoint)["masks"]))
    again = start(home, "accumulated_stopped", more, tune)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(HoldMasks, "after_batch", lambda self, learner: setattr(learner, "stop", "SIGTERM") if learner.step == 3 else None)
        prune(again)
    assert again.load("prune1_last")["step"] == 4 and HoldMasks.after_batch is after_batch
    again.close()
    prune(open_run(again.path, "prune"))
    ours, theirs = (read_checkpoint(each / "checkpoints" / checkpoint.name)["model_state"] for each in (again.path, run.path))
    assert equal(ours, theirs)


def test_a_finished_job_can_be_called_again(reference):
    path, rows = reference
    run = open_run(path, "prune")
    before = (path / "checkpoints" / f"{FINAL}.tar").stat().st_mtime_ns
    assert prune(run) == rows and (path / "checkpoints" / f"{FINAL}.tar").stat().st_mtime_ns == before


def test_the_control_keeps_everything(home, reference):
    control = start(home, "control", dict(prune_schedule=[0.0, 0.0], importance_metric="l1"))
    rows = prune(control)
    control.finish()
    assert [row["name"] for row in rows[1:]] == ["prune1_remaining_100.0", "prune2_remaining_100.0"]
    assert rows[1]["pruned"] == rows[0]["finetuned"] != rows[1]["finetuned"]
    run = start(home, "beside", dict(control="control"))
    assert {epochs: row["name"] for epochs, row in chapter.control_rows(run).items()} == {0: "best", 1: rows[1]["name"], 3: rows[2]["name"]}


@pytest.mark.parametrize("metric", sorted(CRITERIA.keys() - SCORES_STRUCTURE))
def test_every_criterion_scores_weights(home, metric):
    run = start(home, f"by_{metric}", dict(importance_metric=metric, prune_schedule=[0.5], epoch_schedule=[0], scope="layer"))
    rows = prune(run)
    assert rows[1]["name"] == "prune1_remaining_50.0" and all(abs(d - 0.5) < 1e-9 for d in rows[1]["density"].values())


def test_gradients_know_what_matters(home):
    "Half of the weights in one shot, no finetuning: what each criterion leaves of the dense model's skill."
    def loss(metric):
        run = start(home, f"shot_{metric}", dict(importance_metric=metric, prune_schedule=[0.5], epoch_schedule=[0], score_batches=4))
        dense, pruned = prune(run)
        return pruned["pruned"]["validation_loss"] / dense["finetuned"]["validation_loss"]

    ratios = {metric: loss(metric) for metric in ("taylor", "fisher", "gauss_newton", "squisher", "l1", "random")}
    assert max(ratios[m] for m in ("taylor", "fisher", "gauss_newton", "squisher")) < min(ratios["l1"], ratios["random"]), ratios


def test_averaged_weights_are_handed_on_and_pruned(home):
    run = start(home, "averaged", tune=dict(ema=0.9))
    prune(run)
    checkpoint = run.checkpoints / f"{FINAL}.tar"
    assert zeros(load_emulator(checkpoint), Masks(read_checkpoint(checkpoint)["masks"]))


def test_a_teacher_changes_the_outcome_and_resumes(home, reference):
    run = start(home, "taught", distillation=dict(distill_weight=0.9))
    prune(run)
    ours, theirs = (read_checkpoint(path / "checkpoints" / f"{FINAL}.tar")["model_state"] for path in (run.path, reference[0]))
    assert not equal(ours, theirs)


def test_a_pruned_model_is_pruned_further(home, reference):
    run = start(home, "further", dict(prune_schedule=[0.5], epoch_schedule=[0]), checkpoint_file=str(reference[0] / "checkpoints" / f"{FINAL}.tar"))
    assert prune(run)[-1]["name"] == "prune1_remaining_30.0"


def test_mistakes_take_one_line_before_any_stage(home, tmp_path):
    state = read_checkpoint(home / "runs" / "dense" / "checkpoints" / "best.tar")
    bare = tmp_path / "bare.tar"
    write_checkpoint(bare, {k: v for k, v in state.items() if k != "optimizer_state"})
    wider = sections() | {"model": sections()["model"] | {"num_frames": 2}}
    cases = [
        (dict(more=dict(importance_metric="squisher"), checkpoint_file=str(bare)), "squisher needs the second moment"),
        (dict(checkpoint_file="nothing.tar"), "checkpoint_file = nothing.tar is not there"),
        (dict(distillation=dict(teacher_checkpoint="nowhere.tar")), "teacher_checkpoint = nowhere.tar is not there"),
        (dict(**wider), r"does not fit the model: num_frames is 1 there and 2 in \[model\]"),
    ]
    for i, (extra, message) in enumerate(cases):
        with pytest.raises(LabError, match=message.replace("(", r"\(")) as caught:
            prune(start(home, f"mistake{i}", **extra))
        assert "\n" not in str(caught.value) and not list((home / "runs" / f"mistake{i}").glob("checkpoints/prune*"))


# What the checkpoints say


def test_checkpoints_say_what_they_are(home, reference):
    path, rows = reference
    first, second = results_in(path / "checkpoints").values()
    assert (first.name, first.role, first.stage, first.parent) == (rows[1]["name"], "pruned", 1, "dense/checkpoints/best.tar")
    assert (second.label, second.stage, second.parent, second.remaining) == ("60 %", 2, first.name, rows[2]["percent"])
    trained = {p.stem: identify(p) for p in (home / "runs" / "dense" / "checkpoints").glob("*.tar")}
    assert {name: (i.role, i.stage, i.result) for name, i in trained.items()} == {
        "best": ("dense", 0, True), **{name: ("dense", 0, False) for name in ("last", "epoch0001", "epoch0002", "epoch0003")}}


def test_what_a_stage_keeps_for_a_resume_is_no_result(home, monkeypatch):
    monkeypatch.setattr(Stages, "tidy", lambda self, pruning, step: None)
    run = start(home, "untidy", dict(prune_schedule=[0.5], epoch_schedule=[1]))
    prune(run)
    known = {path.stem: identify(path) for path in run.checkpoints.glob("*.tar")}
    assert {name: i.result for name, i in known.items()} == {"prune1_best": False, "prune1_last": False, "prune1_remaining_50.0": True}
    assert {(i.role, i.stage) for i in known.values()} == {("pruned", 1)} and list(results_in(run.checkpoints)) == ["prune1_remaining_50.0"]
    assert load_emulator(run.checkpoints / "prune1_last.tar").size == 16


def test_twelve_stages_stand_in_the_order_of_their_making(home):
    "Nothing is trained; files are found by what they say, whatever their names."
    run = start(home, "long", dict(prune_schedule=[0.1] * 12, epoch_schedule=[0] * 12))
    pruning = read_pruning(run.start_checkpoint())
    pruning.identity, pieces = Identity("best"), unit_named("weight").pieces(pruning.emulator)
    for index in range(1, 13):
        step = Step(index, 1 - 0.9**index, 0)
        pruning.masks = select(pruning.masks, l1(pruning.emulator), step, pieces)
        assert pruning.after(step).parent == pruning.identity.name
        pruning.identity = pruning.after(step)
        pruning.rows = [*pruning.rows, {"stage": index, "epochs": 0, "percent": pruning.percent, "name": pruning.identity.name}]
        write_checkpoint(run.checkpoints / f"{pruning.identity.name}.tar", pruning.state() | {"identity": as_state(pruning.identity)})
    write_checkpoint(run.checkpoints / "prune3_last.tar", {"identity": as_state(Identity("x", "pruned", 3, result=False))})
    assert [i.stage for i in results_in(run.checkpoints).values()] == list(range(1, 13))
    stages = Stages(run, None, None)
    found = [stages.checkpoint(Step(index, 0.0, 0)) for index in range(1, 14)]
    assert [identify(path).stage for path in found[:12]] == list(range(1, 13)) and found[12] is None
    assert found[1].stem.startswith("prune2_") and found[9].stem.startswith("prune10_")


def test_masks_that_remove_almost_nothing_are_no_control(home):
    "99.96 % is 100.0 in a name and not the same as all."
    run = start(home, "nearly")
    pruning = read_pruning(run.start_checkpoint())
    assert pruning.after(Step(1, 0.0, 0)).role == "control"
    first = next(iter(pruning.masks.values()))
    first.view(-1)[0] = False
    identity = pruning.after(Step(1, 0.0, 0))
    assert identity.role == "pruned" and identity.name in ("prune1_remaining_100.0", "prune1_remaining_99.9")


def test_older_checkpoints_are_known_by_their_names(home, reference):
    "A run whose stages were saved before checkpoints said what they are: found, resumed and shown as before."
    folder = shutil.copytree(reference[0], home / "runs" / "older")
    control = start(home, "older_control", dict(prune_schedule=[0.0] * 11, epoch_schedule=[0] * 11, importance_metric="l1"))
    rows = prune(control)
    control.finish()
    for path in [*folder.glob("checkpoints/*.tar"), *control.checkpoints.glob("*.tar")]:
        state = read_checkpoint(path)
        write_checkpoint(path, {key: value for key, value in state.items() if key not in ("identity", "run_id", "run_name")})
    (folder / "checkpoints" / f"{FINAL}.tar").unlink()  # the second stage is done again, from the first
    run = open_run(folder, "prune")
    assert prune(run) == reference[1]
    run.close()
    run = start(home, "beside_older", dict(control="older_control"))
    assert chapter.control_rows(run)[0]["stage"] == 11 and len(rows) == 12


def test_a_pruning_leaves_the_stages_of_another_alone(home):
    shared = dict(checkpoint_dir="stages")
    first = start(home, "owner", dict(prune_schedule=[0.5], epoch_schedule=[0]), **shared)
    prune(first)
    first.finish()
    with pytest.raises(LabError, match=r"holds prune1_remaining_50.0.tar of the run owner; give each run a checkpoint_dir"):
        start(home, "guest", dict(prune_schedule=[0.2], epoch_schedule=[0]), **shared)
    assert len(prune(open_run(first.path, "prune"))) == 2


# Heads, channels, blocks, and what is small then


def structure(**more) -> dict:
    return dict(unit=["head", "channel"], scope="unit", prune_schedule=[0.25, 1 / 3]) | more


@pytest.fixture(scope="module")
def small(home):
    "A run that removed half of the heads and channels in two stages."
    run = start(home, "small", structure())
    rows = prune(run)
    run.finish()
    return run.path, rows


def files(run_path: Path) -> dict[str, Path]:
    return {path.stem: path for path in (run_path / "checkpoints").glob("*.tar")}


def test_a_small_model_beside_its_masked_twin(small):
    path, rows = small
    known = results_in(path / "checkpoints")
    assert [(i.role, i.stage) for i in known.values()] == [("pruned", 1), ("materialised", 1), ("pruned", 2), ("materialised", 2)]
    *_, twin, thin = known.values()
    assert (thin.parent, thin.label, twin.label) == (twin.name, f"small {twin.label}", rows[2]["name"].split("_")[-1].removesuffix(".0") + " %")
    emulators = {name: load_emulator(files(path)[name]) for name in (twin.name, thin.name)}
    x, cond = torch.randn(3, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5)
    states = [torch.cat(list(rollout(e, x, 4, cond=cond))) for e in emulators.values()]
    assert (states[0] - states[1]).abs().max() < 1e-5 * states[0].std() * 10
    config = emulators[thin.name].network.config
    assert (config["block_heads"], config["block_mlp"]) == ([1], [32])
    assert rows[2]["left"] == {"head": {"network.blocks.0.attn": 1}, "channel": {"network.blocks.0.mlp": 32}}
    costs = [card(e)["flops"] for e in emulators.values()]
    block = 24 * 16 * 16**2 + 4 * 16**2 * 16  # of 16 tokens of width 16, half of which has gone
    assert (rows[2]["flops"], rows[2]["small"]["flops"]) == (costs[0], costs[1]) == (costs[0], costs[0] - block // 2)
    assert rows[2]["small"]["difference"] < 1e-5 and rows[2]["small"]["name"] == thin.name


def test_a_small_model_that_was_missed_is_made_later(small):
    path, rows = small
    name = rows[1]["small"]["name"]
    before = read_checkpoint(files(path)[name])
    files(path)[name].unlink()
    assert prune(open_run(path, "prune")) == rows
    assert equal(before, read_checkpoint(files(path)[name]))


def same_small(ours: Path, theirs: Path) -> None:
    "Two runs ended with the same checkpoints, to the bit."
    assert files(ours).keys() == files(theirs).keys()
    for name, path in files(ours).items():
        one, other = ({k: v for k, v in read_checkpoint(p).items() if k not in ("run_id", "run_name")} for p in (path, files(theirs)[name]))
        assert equal(one, other), name


@pytest.mark.parametrize("more", [
    dict(structure(compensate="ridge")),
    dict(importance_metric="sparsegpt"),
    dict(retraining="weight_rewind", rewind_to="epoch1"),
    dict(unit="2:4", prune_schedule=[0.25, 1 / 3], retraining="lr_rewind", compensate="obs"),
], ids=["ridge", "sparsegpt", "rewound", "pattern"])
def test_whatever_is_combined_goes_on_to_the_same_bits(home, monkeypatch, more, request):
    name = request.node.callspec.id
    whole = start(home, f"whole_{name}", more, device="cpu")  # a GPU adds in another order each time
    prune(whole)
    run, finish = start(home, f"stopped_{name}", more, device="cpu"), Stages.take

    def dies(self, learner):
        if learner.step == 5 and learner.epochs == 2:  # in the second epoch of the second stage
            raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(HoldMasks, "after_batch", dies)
        prune(run)
    run.close()
    assert Stages.take is finish
    prune(open_run(run.path, "prune"))
    same_small(run.path, whole.path)


def test_a_process_killed_in_a_stage_of_heads_with_compensation(home):
    "SIGKILL while finetuning the second stage."
    more = structure(compensate="obs", epoch_schedule=[0, 2])
    whole = start(home, "heads_whole", more, device="cpu")  # a GPU adds in another order each time
    prune(whole)
    config = dict(device="cpu", output_dir="heads_killed", checkpoint_file="dense/checkpoints/best.tar", pruning=pruning(**more), finetuning=finetuning())
    process = subprocess.Popen([sys.executable, "-c", JOB, str(toml(home / "heads_killed.toml", **sections(), **config))])
    folder, deadline = home / "runs" / "heads_killed", time.monotonic() + 60
    while not (folder / "checkpoints" / "prune2_last.tar").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    prune(open_run(folder, "prune"))
    same_small(folder, whole.path)


@pytest.mark.parametrize("metric", sorted(CRITERIA))
def test_every_criterion_scores_heads(home, metric):
    run = start(home, f"heads_by_{metric}", dict(importance_metric=metric, unit="head", prune_schedule=[0.5], epoch_schedule=[0]))
    dense, row = prune(run)
    assert sum(row["left"]["head"].values()) == 1 and run.has(row["small"]["name"])


def test_pruning_goes_on_from_a_small_model_and_from_its_twin(home, small):
    path, rows = small
    for name, gone in ((rows[2]["name"], 0.5), (rows[2]["small"]["name"], 0.0)):
        more = dict(unit="channel", prune_schedule=None, target=0.75, epoch_schedule=[1])
        run = start(home, f"from_{name}", more, checkpoint_file=str(files(path)[name]))
        row = prune(run)[-1]
        left = row["left"]["channel"]["network.blocks.0.mlp"]
        assert left == (16 if gone else 8) and load_emulator(files(run.path)[row["small"]["name"]]).network.config["block_mlp"] == [left]
        run.close()


def test_num_iterations_are_rounds_of_pruning_heads(home):
    run = start(home, "rounds", dict(num_iterations=2, prune_schedule=0.5, epoch_schedule=0, importance_metric="l1"))
    rows = prune(run)
    assert [row["left"] for row in rows] == [{"head": {"network.blocks.0.attn": n}} for n in (2, 1, 0)]
    assert load_emulator(files(run.path)[rows[2]["small"]["name"]]).network.config["block_heads"] == [0]


def test_a_target_is_approached_along_a_cubic(home):
    more = dict(prune_schedule=None, target=0.8, steps=3, shape="cubic", epoch_schedule=0, importance_metric="l1")
    run = start(home, "cubic", more)
    assert [round(row["percent"], 1) for row in prune(run)] == [100.0, *(round(100 - 80 * (1 - (1 - k / 3) ** 3), 1) for k in (1, 2, 3))]


def test_measured_milliseconds_are_kept_and_used_again(home):
    "A table that says a head costs as much as all channels: the heads go, again after a crash, and nothing is measured twice."
    more = structure(scope="ms", prune_schedule=None, target=0.6, epoch_schedule=1, importance_metric="random")
    run = start(home, "timed", more)
    stages = open_stages(run, run.start_checkpoint())
    pruning = read_pruning(run.start_checkpoint())
    prices = stages.prices(pruning, stages.pieces(pruning))
    table = json.loads((run.path / "latency.json").read_text())
    assert len(prices) == 66 and (prices > 0).all() and table["batch_size"] == 8
    table["each"]["blocks"] |= {"head": 64.0, "channel": 1e-3}
    (run.path / "latency.json").write_text(json.dumps(table))
    before = (run.path / "latency.json").stat().st_mtime_ns
    row = prune(run)[-1]
    spent = 64 * (2 - row["left"]["head"]["network.blocks.0.attn"]) + 1e-3 * (64 - row["left"]["channel"]["network.blocks.0.mlp"])
    assert row["left"]["head"]["network.blocks.0.attn"] == 1 and spent <= 0.6 * (128 + 0.064)
    assert (run.path / "latency.json").stat().st_mtime_ns == before


def test_masks_of_another_run_are_taken_over(home, small):
    "Zero-shot: the masks are those of the file, the weights those of the dense model, and no score is looked at."
    path, rows = small
    file = files(path)[rows[2]["name"]]
    theirs = read_checkpoint(file)
    gone = 1 - unit_named(["head", "channel"]).pieces(load_emulator(file)).gone(Masks(theirs["masks"]))
    over = dict(importance_metric=None, masks_from=str(file), unit=["head", "channel"], prune_schedule=None, targets=[1 - gone], epoch_schedule=0)
    run = start(home, "taken_over", over)
    name = prune(run)[1]["name"]
    ours, dense = run.load(name), read_checkpoint(home / "runs/dense/checkpoints/best.tar")
    assert equal(ours["masks"], theirs["masks"])
    assert all(equal(ours["model_state"][k], w * ours["masks"].get(f"network.{k}", 1)) for k, w in dense["model_state"].items())


def test_what_cannot_be_carried_out_is_one_line_before_the_run_is_made(home, small):
    path, rows = small
    half = str(files(path)[rows[2]["name"]])
    cases = [
        (dict(unit="head", prune_schedule=None, target=0.25), dict(checkpoint_file=half), "target = 0.25, but 0.5 is gone already: what is pruned does not return"),
        (dict(prune_schedule=None, targets=[0.5, 0.3]), {}, "targets fall from 0.5 to 0.3: what is pruned does not return"),
        (dict(unit="2:4", prune_schedule=[0.6], epoch_schedule=1), {}, "unit = '2:4' can have a fraction of 0, 0.25, 0.5 gone, and step 1 wants 0.6"),
        (dict(unit="3:7", prune_schedule=[0.5], epoch_schedule=1), {}, "which do not make groups of 7"),
        (dict(scope="ms"), {}, "scope = ms is for heads, channels and blocks: unit = weight saves no time"),
        (dict(importance_metric="leave_one_out"), {}, "leave_one_out scores heads and channels, not unit = weight"),
        (dict(retraining="weight_rewind"), {}, "retraining = weight_rewind and rewind_to belong together"),
        (dict(retraining="weight_rewind", rewind_to="epoch9"), {}, "rewind_to = epoch9: no such checkpoint in .*, which has epoch0001, epoch0002, epoch0003"),
        (dict(retraining="weight_rewind", rewind_to="epoch3"), {}, "rewind_to = epoch0003 is epoch 3 of 3: there is nothing left to train"),
        (dict(retraining="lr_rewind", epoch_schedule=9), {}, "epoch_schedule has 9 epochs, the training had 3"),
        (dict(unit="head"), dict(model=sections()["model"] | dict(num_heads=3)), "embed_dim = 16 is not divisible by num_heads = 3"),
        (dict(num_iterations=5), {}, "num_iterations is for 5 steps and prune_schedule for 2"),
    ]
    for more, extra, message in cases:
        with pytest.raises(LabError, match=message) as caught:
            start(home, "impossible", more, **extra)
        assert "\n" not in str(caught.value) and not (home / "runs" / "impossible").exists(), message


def test_a_run_that_removed_weights_does_not_go_on_with_heads(home, reference):
    "An older file with num_iterations, which was ignored: its stages removed single weights."
    folder = shutil.copytree(reference[0], home / "runs" / "changed")
    (folder / "checkpoints" / f"{FINAL}.tar").unlink()
    with pytest.raises(LabError, match="prune1_remaining_80.0 of this run removed unit = weight, the config means head; set pruning.unit"):
        prune(open_run(folder, "prune", overrides=["pruning.unit='head'", "pruning.materialize=true"]))
