"""Coders of frames as a job: the same bits after a stop, codes on file that give the frames back, better than its anchor, one line for a mistake."""
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from same_bits import StopSoon, equal
from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.compare import compare
from turbvit_nb.datasets import training_sets
from turbvit_nb.flow.job import train_flow
from turbvit_nb.inference import infer
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run
from turbvit_nb.latent.coder import load_coder
from turbvit_nb.latent.emulator import LatentEmulator
from turbvit_nb.latent.generative import LatentGenerative
from turbvit_nb.latent.job import build_coder, keep_latents, train_latent
from turbvit_nb.model import load_emulator, rollout
from turbvit_nb.physics.py2d import open_store
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.prune import prune
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, **latent) -> Path:
    "A config of a small job."
    frames = {"data_dir": "flow"}
    made = {
        "output_dir": name, "seed": 3,
        "generate": dict(data_dir="flow", Re=200, NX=16, dt=0.01, n_trajectories=1, n_frames=80, t_save=0.1),
        "train_dataset": frames | {"frame_range": [[1, 51]]},
        "validation_dataset": frames | {"frame_range": [[51, 81]]},
        "latent": dict(levels=[[2, 4], [4, 3]], width=8, epochs=2, batch_size=8, samples=16, precision="fp32") | latent,
    }
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps(made))
    return path


@pytest.mark.parametrize("how", [{}, {"variational": False, "bound": 4.0}, {"fields": ["u", "v"], "num_frames": 2, "levels": [[2, 12], [4, 9]], "drop": 0.5}, {"spectral_norm": True}])
def test_a_stop_in_mid_epoch_changes_no_bit(home, how):
    how = how | {"ema": 0.9}
    train_latent(whole := open_run(config(home, "whole", **how), "latent"))
    path = config(home, "halves", **how)
    with pytest.raises(Stopped):
        train_latent(run := open_run(path, "latent"), [StopSoon()])
    run.close()
    train_latent(run := open_run(run.path, "latent"))
    one, other = (read_checkpoint(r.checkpoints / "last.tar") for r in (whole, run))
    assert equal(one["model_state"], other["model_state"]) and equal(one["ema_state"], other["ema_state"])


def test_training_beats_the_anchor_and_its_codes_give_the_frames_back(home):
    run = open_run(config(home, "better", epochs=30, lr=4e-3, validate_every=10, sigma=0.05), "latent")
    learner, validation = train_latent(run)
    best = load_coder(run.checkpoints / "best.tar", run.device)
    untrained = build_coder(run, training_sets(run.config, ["omega"], 1)[0])
    mine, anchor = (validation.scores(coder) for coder in (best, untrained))
    assert mine["vrmse_omega"] < 0.95 * anchor["vrmse_omega"] and mine["validation_loss"] < anchor["validation_loss"]
    assert mine["nats_0"] > 0.5 and mine["vrmse_omega"] < mine["main_vrmse_omega"]
    paths, best = keep_latents(run), best.cpu()
    with np.load(paths["train_dataset"]) as train, np.load(paths["validation_dataset"]) as kept:
        assert abs(train["code_0"].mean((0, 2, 3))).max() < 1e-3 and abs(train["code_1"].std((0, 2, 3)) - 1).max() < 1e-2
        codes = [torch.from_numpy(kept[f"code_{i}"] * kept[f"scale_{i}"] + kept[f"mean_{i}"]).float() for i in range(2)]
        frames = training_sets(run.config, ["omega"], 1)[1]
        x = frames.__getitems__(list(range(len(frames))))["x"]
        assert (kept["frame"] == frames.frame).all() and len(codes[0]) == len(x)
    torch.testing.assert_close(best.decode(codes), best.decode(best.encode(x)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("latent, told", [
    (dict(levels=[[2, 4], [8, 3]]), "sides doubling from the coarsest on"),
    (dict(levels=[[8, 4], [16, 3]]), "of frames of 16² points codes can lie on 8², 4², 2², 1², not on 16²"),
    (dict(levels=[[2, 5]]), "the code on 2² points can have 1 to 4 channels"),
])
def test_levels_that_do_not_fit_are_one_line(home, latent, told):
    with pytest.raises(LabError, match=told.replace("²", ".")):
        train_latent(open_run(config(home, "wrong", **latent), "latent"))


@pytest.mark.parametrize("latent, told", [
    (dict(bound=2.0), "set latent.variational = false with it"), (dict(drop=0.5, variational=False), "latent.drop draws codes from their priors"), (dict(ramp=[0.9, 0.1]), "the first not after the second"),
    (dict(levels=[[2, 4, 1]]), "latent.levels"), (dict(width=12), "latent.width"), (dict(errr="mse"), "latent.errr"),
])
def test_wrong_keys_are_one_line(home, latent, told):
    with pytest.raises(LabError, match=told):
        load_config(config(home, "keys", **latent)).check()


def test_a_coder_is_no_emulator_and_an_emulator_no_coder(home):
    train_latent(run := open_run(config(home, "coder", epochs=1), "latent"))
    with pytest.raises(LabError, match="holds a coder of frames, which is no emulator"):
        load_emulator(run.checkpoints / "best.tar")


def emulator_config(home: Path, coder: str, **model) -> Path:
    "A config of an emulator that steps in the codes of a coder."
    frames = {"data_dir": "flow"}
    made = {
        "output_dir": "stepping", "seed": 3,
        "generate": dict(data_dir="flow", Re=200, NX=16, dt=0.01, n_trajectories=1, n_frames=80, t_save=0.1),
        "train_dataset": frames | {"frame_range": [[1, 41]]},
        "validation_dataset": frames | {"frame_range": [[41, 61]]},
        "test_dataset": frames | {"frame_range": [[61, 81]]},
        "model": dict(img_size=16, patch_size=2, embed_dim=16, depth=1, num_heads=2, fields=["omega"], coder=coder) | model,
        "training": dict(epochs=2, batch_size=8, rollout_steps=3, rollout_starts=2, precision="bf16", unroll=2, input_noise=0.01),
        "pruning": dict(importance_metric="l1", prune_schedule=[0.5], epoch_schedule=[1]),
        "finetuning": dict(batch_size=8, rollout_steps=3, rollout_starts=2, precision="fp32"),
        "inference": dict(checkpoints=["best"], inference_length=6, chunk_size=3, n_starts=2),
        "analysis": dict(max_leadtime=4, n_ensembles=4, ceiling=False, linear=False),
    }
    path = home / "stepping.toml"
    path.write_text(tomli_w.dumps(made))
    return path


def test_an_emulator_in_codes_is_trained_pruned_rolled_out_and_scored(home):
    train_latent(run := open_run(config(home, "coder", epochs=2), "latent"))
    run.close()
    path = emulator_config(home, "coder/checkpoints/best.tar")
    learner, _ = train(run := open_run(path, "train"))
    run.close()
    best = load_emulator(run.checkpoints / "best.tar")
    assert (type(best), best.size, best.network.config["img_size"], best.step) == (LatentEmulator, 16, 8, 0.1)
    assert learner.step and not any("coder" in name for name, p in best.named_parameters() if p.requires_grad)
    prune(run := open_run(path, "prune"))
    run.close()
    pruned = load_emulator(run.checkpoints / "prune1_remaining_50.0.tar")
    coders = [one.coder.state_dict().values() for one in (best, pruned)]
    assert all(torch.equal(a, b) for a, b in zip(*coders)) and not pruned.network.output.weight.all()
    whole = infer(run := open_run(path, "inference"))["best"][0].read()
    run.close()
    again = torch.cat(list(rollout(best, torch.from_numpy(vorticity_of(run.path)), 6)))[:, 0]
    torch.testing.assert_close(Grid.of(again).velocity(again), torch.from_numpy(whole), atol=1e-4, rtol=1e-3)
    shutil.copytree(run.path, seldom := home / "runs" / "seldom", ignore=shutil.ignore_patterns("inference", "status.json"))
    (home / "seldom.toml").write_text((seldom / "config.toml").read_text().replace('output_dir = "stepping"', 'output_dir = "seldom"'))
    run = open_run(home / "seldom.toml", "inference", overrides=["inference.save_every=2"])
    np.testing.assert_allclose(infer(run)["best"][0].read(), whole[1::2], atol=1e-4, rtol=1e-3)
    run.close()
    scores = short_analysis(run := open_run(path, "short_analysis"))
    assert set(scores) == {"best", "prune1_remaining_50.0"} and all(np.isfinite(data.acc.sel(forecast="emulator")).all() for data in scores.values())


def test_an_emulator_that_draws_in_codes_goes_through_the_chapters(home):
    "CRPS through two steps about an emulator in the same codes; about one in others it is one line."
    train_latent(run := open_run(config(home, "coder", epochs=1), "latent"))
    run.close()
    train(run := open_run(emulator_config(home, "coder/checkpoints/best.tar"), "train"))
    run.close()
    made = tomllib.loads((home / "stepping.toml").read_text()) | {"output_dir": "drawing"}
    del made["training"], made["pruning"], made["finetuning"]
    made["model"] |= {"model_type": "ToldUNet", "base_channels": 8, "depth": 1, "target": "absolute"}
    for key in ("embed_dim", "num_heads"):
        del made["model"][key]
    made["inference"]["members"] = made["analysis"]["members"] = 2
    made["flow"] = dict(
        method="crps", around="stepping/checkpoints/best.tar", epochs=2, batch_size=8, unroll=2, unroll_start=0.5,
        rollout_steps=3, rollout_starts=2, rollout_members=2, precision="fp32",
    )
    (home / "drawing.toml").write_text(tomli_w.dumps(made))
    train_flow(run := open_run(home / "drawing.toml", "flow"))
    run.close()
    best = load_emulator(run.checkpoints / "best.tar")
    assert (type(best), best.evaluations, best.fields, best.step) == (LatentGenerative, 2, ("omega",), 0.1)
    run = open_run(home / "drawing.toml", "inference")
    first, second = (r.read() for r in infer(run)["best"][:2])
    run.close()
    assert not (first == second).all() and first.shape == (6, 2, 16, 16)
    assert np.isfinite(short_analysis(open_run(home / "drawing.toml", "short_analysis"))["best"].crps).all()
    train_latent(run := open_run(config(home, "other", epochs=1, lr=1e-3), "latent"))
    run.close()
    made["model"]["coder"] = "other/checkpoints/best.tar"
    (home / "drawing.toml").write_text(tomli_w.dumps(made | {"output_dir": "astray"}))
    with pytest.raises(LabError, match="does not step in the codes of this coder"):
        train_flow(open_run(home / "drawing.toml", "flow"))


def vorticity_of(folder: Path) -> np.ndarray:
    "The first start of the rollouts of a run, (1, 1, 1, N, N)."
    start = open_rollouts(folder)["best"][0].header["start"]
    return open_store(start["data"]).read([start["frame"]])[:, None, None]


@pytest.mark.parametrize("model, told", [
    (dict(coder="nowhere.tar"), "model.coder = nowhere.tar is not there"),
    (dict(fields=["u", "v"]), "the model has fields u, v, the frames 16"),
])
def test_a_coder_that_does_not_fit_is_one_line(home, model, told):
    train_latent(run := open_run(config(home, "coder", epochs=1), "latent"))
    run.close()
    with pytest.raises(LabError, match=told):
        train(open_run(emulator_config(home, **{"coder": "coder/checkpoints/best.tar"} | model), "train"))


def test_coders_stand_beside_emulators_in_a_comparison(home):
    "A coder has no analyses to miss; its errors, and those of linear codes, are those that its run measured."
    _, validation = train_latent(run := open_run(config(home, "coder", epochs=1, variational=False), "latent"))
    run.finish(numbers=64, pod_in_blocks_vrmse_omega=9.0, **validation.scores(load_coder(run.checkpoints / "best.tar", run.device)))
    run.close()
    train(run := open_run(emulator_config(home, "coder/checkpoints/best.tar"), "train"))
    run.close()
    short_analysis(run := open_run(run.path, "short_analysis"))
    run.close()
    path = home / "beside.toml"
    path.write_text('output_dir = "beside"\n[compare]\nruns = ["coder", "stepping"]\nrounds = 0\nleads = [2]\n')
    entries, missing, said = compare(run := open_run(path, "compare"))
    told = json.loads((run.path / "comparison.json").read_text())
    assert [entry.run for entry in entries] == ["stepping"] and not any("coder" in one for one in missing)
    assert said[0].about == "codes" and "64 numbers" in said[0].sentence and said[0].mark == "better"
    assert told["coders"][0]["POD in blocks"] == "9.000" and told["coders"][0]["kind"] == "autoencoder"
