"""Generative emulators as a job: the same bits after a stop, members in inference, scores as of an ensemble, one line for a mistake."""
import re
from pathlib import Path

import pytest
import tomli_w
import torch

from same_bits import StopSoon, equal
from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.deploy import deploy_run
from turbvit_nb.distil import distil
from turbvit_nb.flow.generative import Generative
from turbvit_nb.flow.job import train_flow
from turbvit_nb.inference import infer
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run
from turbvit_nb.model import ModelConfig, Normaliser, card, create_emulator, emulator_state, load_emulator
from turbvit_nb.prune import prune
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.study.entries import cost

FRAMES = {"data_dir": "flow", "target_step": 2, "input_step": 2}
NETWORKS = {
    "DiT": dict(patch_size=4, embed_dim=16, depth=1, num_heads=2),
    "ToldUNet": dict(base_channels=8, depth=1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, network: str = "ToldUNet", model: dict = {}, **flow) -> Path:
    "A config of a small job."
    made = {
        "output_dir": name, "seed": 3,
        "generate": dict(data_dir="flow", Re=200, NX=16, dt=0.01, n_trajectories=1, n_frames=80, t_save=0.1),
        "model": dict(model_type=network, img_size=16, target="absolute") | NETWORKS.get(network, {}) | model,
        "train_dataset": FRAMES | {"frame_range": [[1, 31]]},
        "validation_dataset": FRAMES | {"frame_range": [[31, 51]]},
        "test_dataset": FRAMES | {"frame_range": [[51, 81]]},
        "flow": dict(epochs=2, batch_size=8, rollout_steps=3, rollout_starts=2, rollout_members=2, precision="fp32") | flow,
        "inference": dict(checkpoints=["best*"], inference_length=6, chunk_size=3, n_starts=2, members=2),
        "analysis": dict(checkpoints=["best*"], max_leadtime=4, n_ensembles=4, members=3, ceiling=False, linear=False),
    }
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps(made))
    return path


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["flow_matching", "meanflow", "improved_meanflow", "crps"])
def test_every_method_trains_every_network(home, network, method):
    learner, validation = train_flow(run := open_run(config(home, f"{network}_{method}", network, method=method, epochs=1), "flow"))
    best = load_emulator(run.checkpoints / "best.tar")
    assert (type(best), best.method, best.step, best.evaluations) == (Generative, method, 0.2, 1)
    assert best.network.output.weight.abs().max() > 0
    scores = run.metrics("flow")[-1]
    assert {"crps", "spread_skill", "small_scales", "validation_loss"} <= scores.keys() and 0 < scores["crps"] < 10


@pytest.mark.parametrize("how", [dict(method="meanflow", label_dropout=0.2), dict(method="crps", unroll=2, unroll_start=0.5, whiten=False)])
def test_a_stopped_job_ends_with_the_same_bits(home, how):
    whole = open_run(config(home, f"whole_{how['method']}", ema=0.9, **how), "flow")
    train_flow(whole)

    path = config(home, f"halves_{how['method']}", ema=0.9, **how)
    with pytest.raises(Stopped):
        train_flow(run := open_run(path, "flow"), [StopSoon()])
    run.close()
    train_flow(run := open_run(run.path, "flow"))
    one, other = (read_checkpoint(r.checkpoints / "last.tar") for r in (whole, run))
    assert equal(one["model_state"], other["model_state"]) and equal(one["ema_state"], other["ema_state"])


def test_members_and_samplers_go_through_inference_and_analysis(home):
    path = config(home, "drawn", method="flow_matching", samplers=["midpoint 2"])
    train_flow(run := open_run(path, "flow"))
    run.close()
    rollouts = infer(run := open_run(path, "inference"))
    run.close()
    assert {name: len(found) for name, found in rollouts.items()} == {"best": 4, "best_midpoint2": 4}
    first, second = (r.read() for r in rollouts["best"][:2])
    assert not (first == second).all() and first.shape == (6, 2, 16, 16)
    again = {name: [r.read() for r in found] for name, found in open_rollouts(run.path).items()}
    assert all((a == b.read()).all() for name in again for a, b in zip(again[name], rollouts[name]))
    assert load_emulator(run.checkpoints / "best_midpoint2.tar").evaluations == 4
    one, four = (cost(load_emulator(run.checkpoints / f"{name}.tar")) for name in ("best", "best_midpoint2"))
    assert four["flops"] == 4 * one["flops"] > 0
    assert (one["evaluations per time unit"], four["evaluations per time unit"]) == (5, 20)
    scores = short_analysis(open_run(path, "short_analysis"))
    assert all("crps" in data for data in scores.values())


def test_an_emulator_draws_about_another(home):
    mean = create_emulator(
        ModelConfig(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2), Normaliser([0, 0], [1.0, 1.0], [0.1, 0.1]), step=0.2,
    )
    torch.save(emulator_state(mean), start := home / "mean.tar")
    train_flow(run := open_run(config(home, "about", method="meanflow", around=str(start), epochs=1), "flow"))
    best = load_emulator(run.checkpoints / "best.tar")
    assert best.evaluations == 2 and (best.scale > 0).all()
    alone = {name: card(emulator)["flops"] for name, emulator in (("mean", mean), ("both", best))}
    best.around = None
    assert alone["both"] == alone["mean"] + card(best)["flops"]
    best = load_emulator(run.checkpoints / "best.tar")
    assert all(torch.equal(a, b) for a, b in zip(best.around.state_dict().values(), mean.state_dict().values()))


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    "All numbers of a module."
    return [*module.state_dict().values()]


@pytest.mark.parametrize("network, how, pruned", [
    ("DiT", dict(method="crps"), ["unit=['head', 'channel']", "importance_metric=taylor"]),
    ("ToldUNet", dict(method="meanflow", around="mean.tar"), ["importance_metric=fisher", "compensate=obs"]),
])
def test_what_draws_is_pruned_like_any_other(home, network, how, pruned):
    "Its small model draws the same, and the emulator about which it draws stays as it is."
    mean = create_emulator(ModelConfig(img_size=16, **NETWORKS["DiT"]), Normaliser([0, 0], [1.0, 1.0], [0.1, 0.1]), step=0.2)
    torch.save(emulator_state(mean), home / "mean.tar")
    train_flow(run := open_run(config(home, "whole", network, epochs=1, **how), "flow"))
    run.close()
    plan = ["prune_schedule=[0.5]", "epoch_schedule=[1]", "score_batches=2", *pruned]
    tuned = ["finetuning.batch_size=8", "finetuning.rollout_steps=3", "finetuning.rollout_starts=2", "finetuning.precision=fp32", "finetuning.unroll=2"]
    rows = prune(run := open_run(run.path, "prune", overrides=[*(f"pruning.{key}" for key in plan), *tuned]))
    assert 0 < rows[-1]["finetuned"]["crps"] < 10 and rows[-1]["finetuned"]["spread_skill"] > 0
    kept = load_emulator(run.checkpoints / f"{rows[-1]['name']}.tar")
    masks = read_checkpoint(run.checkpoints / f"{rows[-1]['name']}.tar")["masks"]
    assert all(not kept.get_parameter(name)[~mask.bool()].any() for name, mask in masks.items()) and rows[-1]["percent"] < 95
    if network == "DiT":
        assert rows[-1]["small"]["difference"] < 1e-4 and rows[-1]["small"]["parameters"] < rows[-1]["parameters"]
    else:
        assert all(torch.equal(a, b) for a, b in zip(weights(kept.around), weights(mean), strict=True))
        assert not any("around" in name for name in masks)


@pytest.mark.parametrize("changes, told", [
    (["pruning.importance_metric=gauss_newton"], "gauss_newton is for squared errors"),
    (["distillation.distill_weight=0.5"], "leave [distillation] out"),
    (["finetuning.compile=true"], "goes neither through compiled code nor"),
])
def test_what_cannot_be_asked_of_its_pruning_is_one_line(home, changes, told):
    train_flow(run := open_run(config(home, "drawn", method="meanflow", epochs=1, steps_per_epoch=1), "flow"))
    run.close()
    with pytest.raises(LabError, match=re.escape(told)) as error:
        prune(open_run(run.path, "prune", overrides=["pruning.importance_metric=l1", "pruning.prune_schedule=[0.5]", "pruning.epoch_schedule=[1]", *changes]))
    assert "\n" not in str(error.value)


def test_what_draws_is_no_student_and_no_program(home):
    train_flow(run := open_run(config(home, "drawn", method="meanflow", epochs=1, steps_per_epoch=1), "flow"))
    run.close()
    start = str(run.checkpoints / "best.tar")
    with pytest.raises(LabError, match="holds an emulator that draws, which has no teacher"):
        distil(run := open_run(run.path, "distil", overrides=[f"checkpoint_file={start}", "finetuning.epochs=1", "distillation.distill_weight=0.5"]))
    run.close()
    with pytest.raises(LabError, match="best.tar draws what comes next: a program has no noise"):
        deploy_run(open_run(run.path, "deploy", overrides=["deploy.repeats=3"]))


def test_an_emulator_to_draw_about_that_is_not_there_is_named(home):
    with pytest.raises(LabError, match="flow.around = nowhere.tar is not there"):
        train_flow(open_run(config(home, "nowhere", around="nowhere.tar"), "flow"))


@pytest.mark.parametrize("changes, told", [
    ({"network": "ViT", "model": dict(patch_size=4, embed_dim=16, depth=1, num_heads=2)}, "cannot be told noise"),
    ({"guidance": 3.0}, "set label_dropout"),
    ({"method": "flow"}, "method"),
    ({"compile": True}, "leave compile out"),
    ({"samplers": ["euler 0"]}, "at least one step"),
    ({"samplers": ["leapfrog 2"]}, "is none of euler"),
    ({"equal": 1.5}, "equal"),
    ({"unroll": 2}, "only the members of CRPS"),
])
def test_a_mistake_is_one_line_before_anything_runs(home, changes, told):
    with pytest.raises(LabError) as error:
        settings = load_config(config(home, "wrong", **changes))
        for name, section in settings.sections.items():
            section.check(settings, name)
    assert told in str(error.value) and "\n" not in str(error.value)
