"""Distillation: terms against truth, and the whole job: what it holds, what it refuses, and that a killed one ends with the same bits."""
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

from same_bits import equal
from turbvit_nb import distil as chapter
from turbvit_nb.compress.criteria import l1
from turbvit_nb.compress.distil import (
    Distil, DistillationConfig, answers, blocks, distillation, heard, layer_pairs, matched, projectors, spectral_error, unrolled,
)
from turbvit_nb.compress.masks import Masks, prunable
from turbvit_nb.compress.schedules import schedule
from turbvit_nb.compress.selection import select
from turbvit_nb.compress.units import unit_named
from turbvit_nb.distil import distil
from turbvit_nb.lab import runs
from turbvit_nb.lab.checkpoints import Identity, as_state, identify, results_in
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.files import read_checkpoint, write_checkpoint
from turbvit_nb.lab.jobs import steps
from turbvit_nb.lab.runs import Stopped, open_run, read_metrics
from turbvit_nb.lab.training import build_optimizer
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, emulator_state, load_emulator, rollout
from turbvit_nb.physics.py2d import PACKED, PackedWriter, Regime
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.train import build_batches, build_data, build_emulator, build_validation, fit_emulator


def small(**section) -> ModelConfig:
    return ModelConfig(**dict(model_type="ViT", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2) | section)


def emulator(seed: int, step: float = 0.1, **section):
    "An emulator that does something."
    torch.manual_seed(seed)
    keys = small(**section)
    made = create_emulator(keys, Normaliser([0.1] * len(keys.fields), [1.5] * len(keys.fields), [0.2] * len(keys.fields)), step=step)
    nn.init.normal_(made.network.output.weight, std=0.1)
    return made


# The terms


@pytest.mark.parametrize("section", [{}, dict(num_frames=2), dict(model_type="UNet", base_channels=8, depth=1), dict(
    model_type="EncoderDecoderViT", num_frames=2, num_out_frames=2, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2,
    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)])
def test_the_rollout_with_gradients_is_the_rollout(section):
    student, x = emulator(0, **section), torch.randn(2, 2, section.get("num_frames", 1), 16, 16)
    own = student.normaliser.denormalise(unrolled(student, x, 5))
    free = torch.stack(list(rollout(student, x, 5)), 2)
    assert own.requires_grad and torch.allclose(own, free, atol=1e-5) and torch.equal(answers(student, x, 5), free)


def test_the_spectral_term_knows_amplitudes_and_no_phases():
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(3, 2, 2, 16, 16, generator=generator, dtype=torch.float64)
    assert spectral_error(field, field).abs().max() < 1e-12
    assert spectral_error(field.roll((3, 5), (-2, -1)), field).abs().max() < 1e-12
    assert spectral_error(-field.flip(-1), field).abs().max() < 1e-12
    weights = torch.full_like(field, 1.7)
    ratio = 2 * (1.7 - 1) ** 2 / (1.7**2 + 1)  # the same in every shell
    assert torch.allclose(spectral_error(weights * field, field), torch.full((3,), ratio, dtype=torch.float64), rtol=1e-4)


def test_shells_beyond_the_teacher_s_cutoff_do_not_count():
    field = torch.randn(1, 2, 1, 16, 16, dtype=torch.float64)
    grid = Grid(16)
    low = grid.inverse(grid.transform(field) * (grid.k2 <= 25))
    assert spectral_error(field, low).item() < 0.5  # the shell at the edge is cut in two
    inner = grid.inverse(grid.transform(field) * (grid.shells <= 4))
    assert spectral_error(field, inner).item() < 1e-10 and spectral_error(inner, field).item() > 1.0


@pytest.mark.parametrize("kind", ["field", "absent"])
def test_the_slope_of_the_spectral_term_is_that_of_differences(kind):
    generator = torch.Generator().manual_seed(1)
    taught, along = (torch.randn(2, 2, 1, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    own = (torch.randn(taught.shape, generator=generator, dtype=torch.float64) if kind == "field" else 0 * taught).requires_grad_()
    (slope,) = torch.autograd.grad(spectral_error(own, taught).sum(), own)
    assert torch.isfinite(slope).all()
    if kind == "field":
        ahead, behind = (spectral_error(own + sign * 1e-6 * along, taught).sum() for sign in (1, -1))
        assert ((ahead - behind) / 2e-6).item() == pytest.approx((slope * along).sum().item(), rel=1e-6)


def test_no_projector_where_the_widths_agree_and_pairs_as_wanted():
    student, wide = emulator(0, depth=2), emulator(1, embed_dim=32, depth=4)
    assert not list(projectors([widths for _, widths in matched(student, emulator(2, depth=4))]).parameters())
    assert [tuple(p.weight.shape) for p in projectors([widths for _, widths in matched(student, wide)])] == [(32, 16)] * 2
    assert [pair for pair, _ in matched(student, wide, [(0, 3)])] == [(0, 3)]
    assert layer_pairs(3, 12) == [(0, 3), (1, 7), (2, 11)]


def test_a_block_is_heard_once_and_left_as_it_was():
    student, x = emulator(0, depth=2), torch.randn(2, 2, 1, 16, 16)
    before = student(x)
    with heard(blocks(student)) as outputs:
        assert torch.equal(student(x), before)
        kept = outputs[1]
        student(2 * x)
        assert outputs[1] is kept
    assert torch.equal(student(x), before) and not any(block._forward_hooks for block in blocks(student))


class Stub:
    device, autocast, batches, lr = torch.device("cpu"), None, range(1), 1e-3

    def __init__(self, model, batch):
        self.model, self.batch, self.loss, self.metrics = model, batch, torch.zeros(()), {}
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)


def test_a_teacher_may_look_at_fewer_frames_and_predict_more():
    student, two = emulator(0, num_frames=2), dict(num_frames=1, num_out_frames=3)
    teacher = emulator(1, model_type="EncoderDecoderViT", **two, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2,
                       decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    # the teacher's input is cut to what it looks at: 1 frame, then its own newest
    batch = {"x": torch.randn(2, 2, 2, 16, 16), "y": torch.randn(2, 2, 4, 16, 16), "cond": torch.ones(2, 5)}
    stub = Stub(student, dict(batch))
    teaching = Distil(teacher, 1.0, terms=dict(rollout=1.0), steps=4)
    teaching.before_fit(stub)
    teaching.before_batch(stub)
    assert torch.equal(stub.batch["y"], torch.stack(list(rollout(teacher, batch["x"][:, :, :1], 4)), 2))
    teaching.after_loss(stub)
    stub.loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


# The job. Travelling waves, a teacher trained on them, and students.


def waves(folder: Path) -> None:
    "Two packed runs of 60 frames: a few modes that travel at different speeds."
    side = np.arange(16) * 2 * np.pi / 16
    x, y = np.meshgrid(side, side, indexing="ij")
    for ic in (1, 2):
        rng, regime = np.random.default_rng(ic), Regime(Re=200, fky=4, alpha=0.1, beta=20.0, NX=16, dt=0.01, IC=ic)
        modes = [(kx, ky, *rng.normal(size=2)) for kx in range(1, 4) for ky in range(-2, 3)]
        writer = PackedWriter(folder / regime.path() / PACKED, regime, 60)
        for n in range(1, 61):
            writer.append(0.1 * n, sum(a * np.cos(kx * x + ky * y - 0.2 * n * kx + b) for kx, ky, a, b in modes))
        writer.finish()


def toml(path: Path, **sections) -> Path:
    path.write_text(tomli_w.dumps(sections))
    return path


DATA = dict(train_dataset=dict(data_dir="waves", frame_range=[[1, 41]]), validation_dataset=dict(data_dir="waves", frame_range=[[41, 61]]))
MODEL = dict(model_type="ViT", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
TUNE = dict(batch_size=16, lr=1e-3, rollout_steps=5, rollout_starts=2, unroll=2, epochs=2, precision="fp32")
TERMS = dict(distill_weight=0.5, hidden_weight=0.1, spectral_weight=0.1, rollout_steps=2, rollout_weight=0.5)
SILENT = dict(distill_weight=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Data, and checkpoints: a wide and deep teacher, a dense student, and one of whose weights half are gone."
    home, patch = tmp_path_factory.mktemp("distil"), pytest.MonkeyPatch()
    patch.setenv("TURBVIT_RUNS", str(home / "runs"))
    patch.setenv("TURBVIT_DATA", str(home / "data"))
    waves(home / "data" / "waves")
    for name, made in dict(big=emulator(1, embed_dim=32, depth=2), dense=emulator(2), two=emulator(2, depth=2)).items():
        write_checkpoint(home / f"{name}.tar", emulator_state(made) | {"identity": as_state(Identity(name))})
    pruned = emulator(3)
    dense, pieces = Masks.dense(prunable(pruned)), unit_named("weight").pieces(pruned)
    masks = select(dense, l1(pruned), schedule([0.5], [1])[0], pieces)
    masks.apply(pruned)
    optimizer = build_optimizer(pruned.network, chapter.TrainingConfig())
    identity = Identity("prune2_remaining_50.0", "pruned", 2, 50.0)
    state = emulator_state(pruned) | {"masks": masks.state(), "identity": as_state(identity), "optimizer_state": optimizer.state_dict()}
    write_checkpoint(home / "prune2_remaining_50.0.tar", state)
    yield home
    patch.undo()


@pytest.fixture(autouse=True)
def no_run_left_open():
    yield
    for run in list(runs._open.values()):
        run.close()


def start(home: Path, name: str, wanted: dict | None = None, tune: dict | None = None, **more):
    "A run that distils the big teacher into a new student."
    config = dict(output_dir=name) | DATA | dict(model=MODEL, distillation=dict(teacher_checkpoint=str(home / "big.tar")) | (wanted or TERMS))
    config |= dict(finetuning=TUNE | (tune or {})) | more
    return open_run(toml(home / f"{name}.toml", **{k: v for k, v in config.items() if v is not None}), "distil")


def result(path: Path) -> dict:
    state = read_checkpoint(path / "checkpoints" / "distilled.tar")
    return {key: value for key, value in state.items() if key not in ("run_id", "run_name")}


@pytest.fixture(scope="module")
def reference(home):
    "All four terms, and nothing happened."
    before = (home / "big.tar").read_bytes()
    run = start(home, "reference")
    rows = distil(run)
    run.finish()
    assert (home / "big.tar").read_bytes() == before
    return run.path, rows


def test_what_is_left(home, reference):
    path, rows = reference
    assert [p.stem for p in (path / "checkpoints").iterdir()] == ["distilled"]
    known = results_in(path / "checkpoints")["distilled"]
    assert (known.role, known.label, known.parent) == ("distilled", "distilled", str(home / "big.tar"))
    assert [row["name"] for row in rows] == ["teacher", "student, before", "student"]
    assert rows[2]["validation_loss"] < rows[1]["validation_loss"]
    student = load_emulator(path / "checkpoints" / "distilled.tar")
    assert [tuple(p.shape) for p in student.parameters()] == [tuple(p.shape) for p in emulator(0).parameters()]  # no projector in it
    logged = [row for row in read_metrics(path, stage="distil") if "loss" in row]
    assert len(logged) == 2 and all(row[f"distil_{term}"] > 0 for row in logged for term in ("hidden", "spectral", "rollout"))
    run = open_run(path, "distil")
    assert distil(run) == rows  # again: nothing is done


def test_the_teacher_is_not_trained_and_the_terms_pull(home):
    run = start(home, "watched")
    lesson = chapter.open_lesson(run)
    before = deepcopy(lesson.teacher.state_dict())
    lesson.fit()
    assert all(torch.equal(value, before[key]) for key, value in lesson.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in lesson.teacher.parameters()) and not lesson.teacher.training


def test_with_no_weight_it_is_finetuning_to_the_bit(home, reference):
    run = start(home, "silent", SILENT)
    distil(run)
    ours, known = result(run.path), identify(run.path / "checkpoints" / "distilled.tar")
    run.close()
    run = start(home, "plain", SILENT)  # by hand, with nothing of this chapter
    settings, (train_set, validation_set) = run.config.section("finetuning"), build_data(run)
    plain = build_emulator(run, train_set)
    learner = fit_emulator(run, plain, settings, build_batches(run, settings, train_set), build_validation(run, settings, train_set, validation_set))
    assert equal(ours["model_state"], plain.network.state_dict()) and equal(ours["optimizer_state"], learner.optimizer.state_dict())
    assert known.role == "control" and known.parent is None
    assert not equal(ours["model_state"], result(reference[0])["model_state"])


@pytest.mark.parametrize("step, accumulate, orderly", [(3, 1, False), (7, 1, True), (3, 2, True), (4, 1, True)])
def test_a_stopped_job_ends_with_the_same_bits(home, reference, monkeypatch, step, accumulate, orderly):
    tune = dict(accumulate=accumulate, batch_size=16)
    path = reference[0]
    if accumulate > 1:
        whole = start(home, "accumulated", tune=tune)
        distil(whole)
        path = whole.path
        whole.close()
    run = start(home, f"stopped{step}{accumulate}", tune=tune)

    def dies(self, learner):
        if learner.step == step:
            if not orderly:
                raise MemoryError
            learner.stop = "SIGTERM"

    with monkeypatch.context() as patch, pytest.raises(Stopped if orderly else MemoryError):
        patch.setattr(Distil, "after_batch", dies)
        distil(run)
    assert not run.has("distilled")
    run.close()
    run = open_run(run.path, "distil")
    distil(run)
    assert equal(result(run.path), result(path))


JOB = """
import sys, torch
from turbvit_nb.lab.runs import open_run
from turbvit_nb.distil import distil
torch.set_num_threads(1)
distil(open_run(sys.argv[1], "distil"))
"""


def test_a_killed_process_ends_with_the_same_bits(home, reference):
    config = dict(output_dir="killed", **DATA, model=MODEL, distillation=dict(teacher_checkpoint=str(home / "big.tar")) | TERMS, finetuning=TUNE)
    process = subprocess.Popen([sys.executable, "-c", JOB, str(toml(home / "killed.toml", **config))])
    folder, deadline = home / "runs" / "killed", time.monotonic() + 120
    while not (folder / "checkpoints" / "distil_last.tar").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (folder / "checkpoints" / "distil_last.tar").exists()
    run = open_run(folder, "distil")
    distil(run)
    assert equal(result(folder), result(reference[0]))


def test_a_pruned_student_keeps_its_zeros(home):
    run = start(home, "masked", model=None, checkpoint_file=str(home / "prune2_remaining_50.0.tar"))
    distil(run)
    state, student = result(run.path), load_emulator(run.path / "checkpoints" / "distilled.tar")
    masks, before = Masks(state["masks"]), load_emulator(home / "prune2_remaining_50.0.tar")
    assert masks.remaining() == round(masks.total / 2)
    assert all(bool((weight[pruned] == 0).all()) for weight, pruned in masks.matched(student))
    assert not equal(student.state_dict(), before.state_dict())
    known = identify(run.path / "checkpoints" / "distilled.tar")
    assert (known.role, known.stage, known.remaining, known.label) == ("distilled", 2, 50.0, "distilled 50 %")


def test_the_best_of_a_training_is_kept(home):
    run = start(home, "trained", finetuning=None, training=TUNE | dict(epochs=3, ema=0.5))
    distil(run)
    rows = [row["rollout_vrmse"] for row in read_metrics(run.path, stage="distil") if "rollout_vrmse" in row]
    assert result(run.path)["distillation"]["rows"][-1]["rollout_vrmse"] == pytest.approx(min(rows), abs=1e-6)


def test_a_student_begins_with_its_teacher(home):
    wanted = dict(teacher_checkpoint=str(home / "two.tar"), init="teacher")
    run = start(home, "inherited", wanted, tune=dict(epochs=0))
    rows = distil(run)
    teacher, student = load_emulator(home / "two.tar"), load_emulator(run.path / "checkpoints" / "distilled.tar")
    del teacher.network.blocks[1]
    x = torch.randn(2, 2, 1, 16, 16)
    assert torch.equal(student(x), teacher(x)) and rows[1]["validation_loss"] == rows[2]["validation_loss"]


def test_teachers_of_other_kinds(home):
    unet = emulator(4, model_type="UNet", base_channels=8, depth=1)
    write_checkpoint(home / "unet.tar", emulator_state(unet))
    run = start(home, "from_unet", dict(teacher_checkpoint=str(home / "unet.tar"), spectral_weight=0.1), dict(epochs=1))
    assert len(distil(run)) == 3


def test_mistakes_take_one_line_before_anything_runs(home):
    for name, made in dict(slow=emulator(0, step=0.2), omega=emulator(0, fields=["omega"]), unet=emulator(4, model_type="UNet", base_channels=8, depth=1),
                           large=emulator(0, img_size=32), frames=emulator(0, num_frames=2)).items():
        write_checkpoint(home / f"{name}.tar", emulator_state(made))
    teacher = lambda name, **more: dict(teacher_checkpoint=str(home / f"{name}.tar")) | more
    cases = [
        (dict(wanted=teacher("nowhere")), "teacher_checkpoint = .*nowhere.tar is not there"),
        (dict(wanted=teacher("slow")), "is for step 0.2, the student for 0.1"),
        (dict(wanted=teacher("omega")), "is for fields omega, the student for u, v"),
        (dict(wanted=teacher("large")), "is for size 32×32, the student for 16×16"),
        (dict(wanted=teacher("frames")), "looks at 2 frames, the student at 1; give the student num_frames = 2"),
        (dict(wanted=teacher("unet", hidden_weight=0.1)), "the network of the teacher has no blocks"),
        (dict(wanted=teacher("big", hidden_weight=0.1), model=dict(model_type="UNet", img_size=16, base_channels=8, depth=1)), "the network of the student has no blocks"),
        (dict(wanted=teacher("big", hidden_weight=0.1, hidden_layers=[[0, 2]])), "the teacher has no block 2, its blocks are 0 to 1"),
        (dict(wanted=teacher("big", hidden_layers=[[0, 1]])), "hidden_layers has no effect"),
        (dict(wanted=teacher("big"), model=None), "there is no student: give a checkpoint_file, or a .model."),
        (dict(wanted=teacher("big", init="teacher")), "does not fit the model"),
        (dict(wanted=teacher("two", init="teacher"), model=None, checkpoint_file=str(home / "dense.tar")), "init = \"teacher\" is for a new student"),
        (dict(wanted=teacher("big"), finetuning=None), "needs a .finetuning. section"),
        (dict(wanted=dict(distill_weight=0.5, teacher_checkpoint=None)), "distillation.teacher_checkpoint is missing"),
    ]
    for i, (extra, message) in enumerate(cases):
        wanted = {key: value for key, value in extra["wanted"].items() if value is not None}
        config = dict(output_dir=f"mistake{i}") | DATA | dict(model=MODEL, distillation=wanted, finetuning=TUNE) | {k: v for k, v in extra.items() if k != "wanted"}
        with pytest.raises(LabError, match=message) as caught:
            distil(open_run(toml(home / f"mistake{i}.toml", **{k: v for k, v in config.items() if v is not None}), "distil"))
        assert "\n" not in str(caught.value) and not list((home / "runs" / f"mistake{i}").glob("checkpoints/*"))


def test_run_all_leaves_the_teacher_to_pruning(home):
    distil_only = dict(output_dir="asked", **DATA, model=MODEL, distillation=TERMS, finetuning=TUNE, inference=dict(inference_length=10))
    pruning = dict(importance_metric="l1", prune_schedule=[0.5], epoch_schedule=[1])
    both = distil_only | dict(output_dir="both", pruning=pruning)
    due = lambda config: [step.chapter.stage for step in steps(toml(home / "steps.toml", **config)) if step.due]
    assert due(distil_only) == ["distil", "inference"] and due(both) == ["prune", "inference"]


def test_pruning_is_taught_by_the_same_callback(home):
    "`distillation` is what chapter 03 calls: the dense model where no teacher is named, and nothing without a weight."
    run = start(home, "both", dict(hidden_weight=0.1))
    (teaching,) = distillation(run, emulator(0), default=home / "dense.tar")
    assert isinstance(teaching, Distil) and teaching.weight == 0.5 and teaching.terms == {"hidden": 0.1}
    assert not DistillationConfig(**SILENT).teaches
