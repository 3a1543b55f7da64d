"""Solutions of a simulation: codes and surrogates as jobs, the same bits after a stop, files of the user's own, one line for a mistake."""
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from same_bits import StopSoon, equal
from turbvit_nb.arrays import keep_codes, train_surrogate
from turbvit_nb.condition import best_surrogate, train_condition
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run
from turbvit_nb.latent.arrays import PROBLEMS, problem, read_solutions, relative_errors
from turbvit_nb.latent.conditioners import TrajectoryPOD, gaussian_process, interpolated, radial
from turbvit_nb.latent.trajectories import load_trajectories


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "Pulses as a user has them: an array, a CSV, and pictures that tell the speed."
    folder = tmp_path_factory.mktemp("data")
    values, p, names = problem("pulse", 30)
    np.save(folder / "u.npy", values[:, ::2, ::10])
    (folder / "p.csv").write_text(",".join(names) + "\n" + "\n".join(",".join(map(repr, row.tolist())) for row in p) + "\n")
    places = np.arange(16)
    bars = np.exp(-((places - 16 * p[:, :1]) ** 2) / 8)[:, :, None] * np.ones(16) * p[:, 1, None, None]
    np.save(folder / "pictures.npy", bars.astype(np.float32))
    return folder


def config(home: Path, name: str, arrays: dict = {}, condition: dict | None = None, **surrogate) -> Path:
    "A config of a small job."
    loop = dict(epochs=2, batch_size=6, precision="fp32", warmup_epochs=0.5)
    made = {
        "output_dir": name, "seed": 3, "arrays": {key: value for key, value in ({"path": "u.npy", "parameters": "p.csv"} | arrays).items() if value is not None},
        "surrogate": loop | {"codes": [4, 3], "width": 8, "modes": 16} | surrogate,
    } | ({} if condition is None else {"condition": loop | {"width": 16} | condition})
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps(made))
    return path


def same_after_a_stop(home: Path, stage: str, work, last: str, **how) -> None:
    "A job, and the same job stopped after three batches and resumed, end with the same weights."
    work(whole := open_run(config(home, "whole", **how), stage))
    path = config(home, "halves", **how)
    with pytest.raises(Stopped):
        work(run := open_run(path, stage), [StopSoon()])
    run.close()
    work(run := open_run(run.path, stage))
    one, other = (read_checkpoint(r.checkpoints / f"{last}.tar") for r in (whole, run))
    assert equal(one["model_state"], other["model_state"]) and equal(one["ema_state"], other["ema_state"])


@pytest.mark.parametrize("how", [{}, {"variational": False}, {"drop": 0.5, "free": 0.1, "error": "huber"}])
def test_a_stop_in_a_coders_training_changes_no_bit(home, how):
    same_after_a_stop(home, "arrays", train_surrogate, "last", ema=0.9, **how)


@pytest.mark.parametrize("how", [
    {"noise": 0.1, "dropout": 0.2}, {"mode": "end_to_end", "mixup": 0.4}, {"stem": "cnn", "dropout": 0.1}, {"stem": "vit", "patch": 4, "mode": "end_to_end"},
])
def test_a_stop_in_a_conditioners_training_changes_no_bit(home, how):
    arrays = {"pictures": "pictures.npy"} if "stem" in how else {}
    same_after_a_stop(home, "condition", train_condition, "condition_last", arrays=arrays, condition={"coder": "pod", "ema": 0.9, **how})


def test_a_coder_learns_and_its_codes_are_kept(home):
    run = open_run(config(home, "learnt", epochs=150, width=32, lr=3e-3, variational=False, validate_every=50), "arrays")
    train_surrogate(run)
    train_set, _, test = read_solutions(run.config.section("arrays"), 3)
    best, pod = load_trajectories(run.checkpoints / "best.tar"), TrajectoryPOD(train_set.values, 7, 16)
    error = lambda coding: float(relative_errors(coding.decode(coding.encode(train_set.values)), train_set.values).mean())
    assert error(best) < 0.7 * error(pod)
    with np.load(keep_codes(run)) as kept:
        assert abs(kept["train_codes"].mean(0)).max() < 1e-3 and abs(kept["train_codes"].std(0) - 1).max() < 1e-2
        assert kept["names"].tolist() == ["c", "gamma", "w"] and kept["sizes"].tolist() == [4, 3]
        codes = torch.from_numpy(kept["test_codes"] * kept["scale"] + kept["mean"]).float()
    torch.testing.assert_close(best.decode(codes), best.decode(best.encode(test.values)), rtol=1e-3, atol=1e-4)


def test_both_jobs_of_one_config_and_what_they_learn(home):
    path = config(home, "both", epochs=4, condition=dict(epochs=150, width=64, lr=3e-3, validate_every=50, mode="end_to_end"))
    train_surrogate(run := open_run(path, "arrays"))
    run.close()
    coder = read_checkpoint(run.checkpoints / "best.tar")["model_state"]
    train_condition(run := open_run(path, "condition"))
    model, (train_set, _, test) = best_surrogate(run)
    assert equal(dict(model.coding.state_dict()), dict(coder))                     # the decoder is as it was
    mine = relative_errors(model(train_set.about), train_set.values).mean()
    nearest = relative_errors(train_set.values.roll(1, 0), train_set.values).mean()
    assert mine < 0.5 * nearest and {file.name for file in run.checkpoints.glob("*best.tar")} == {"best.tar", "condition_best.tar"}


def test_pictures_tell_what_parameters_tell(home):
    path = config(home, "seen", {"pictures": "pictures.npy"}, dict(stem="cnn", coder="pod", epochs=120, lr=3e-3, validate_every=40))
    train_condition(run := open_run(path, "condition"))
    model, (train_set, _, _) = best_surrogate(run)
    mean = relative_errors(train_set.values.mean(0, keepdim=True).expand_as(train_set.values), train_set.values).mean()
    assert relative_errors(model(train_set.about), train_set.values).mean() < 0.6 * mean


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_interpolation_is_that_of_the_libraries(home):
    "Radial functions go through what is known; processes are those of scikit-learn, number by number."
    train_set, _, test = read_solutions(load_config(config(home, "seen")).section("arrays"), 3)
    pod = TrajectoryPOD(train_set.values, 4, 16)
    back = interpolated(pod, train_set, train_set, radial)
    torch.testing.assert_close(back, pod.decode(pod.encode(train_set.values)), rtol=1e-3, atol=1e-4)
    z = pod.encode(train_set.values)
    mine = gaussian_process(train_set.about, z, test.about)
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(3), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-4, (1e-8, 1.0))
    alone = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0).fit(train_set.about.double(), z[:, 2].double())
    np.testing.assert_allclose(mine[:, 2], alone.predict(test.about.double().numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "climate"])  # which takes the solver a while
def test_solutions_held_out_are_nobody_elses(name):
    values, p, names = problem(name, 12)
    assert values.shape == (12, 50, 1000) and np.isfinite(values).all() and p.shape == (12, len(names))
    ranges = np.array(list(PROBLEMS[name][1].values()))
    assert (p >= ranges[:, 0]).all() and (p <= ranges[:, 1]).all()


@pytest.mark.parametrize("stem", ["cnn", "vit"])
def test_how_a_flow_goes_on_is_predicted_from_its_picture(home, stem):
    "Vorticity at time 0 to all codes of what follows; an mlp of pictures is one line."
    asked = dict(arrays={"path": "vortices", "count": 12, "parameters": None}, condition=dict(coder="pod", stem=stem, mode="end_to_end"), codes=[4])
    train_condition(run := open_run(config(home, f"flows_{stem}", **asked), "condition"))
    best, (_, _, test) = best_surrogate(run)
    assert test.about.shape == (2, 1, 32, 32) and best(test.about).shape == test.values.shape == (2, 21, 1024)
    asked["condition"] = dict(coder="pod", stem="mlp")
    with pytest.raises(LabError, match="set cnn or vit for pictures"):
        load_config(config(home, "flows_mlp", **asked)).check()


@pytest.mark.parametrize("how, told", [
    (dict(codes=[30]), "codes of 30 numbers need more than 30 training solutions"), (dict(codes=[2] * 6), "which leaves 1: set surrogate.codes"),
    (dict(arrays={"path": "nowhere.npy"}), "nowhere.npy is not there"), (dict(arrays={"parameters": "u.npy"}), "u.npy is not a CSV that can be read"),
])
def test_solutions_that_do_not_fit_are_one_line(home, how, told):
    with pytest.raises(LabError, match=told):
        train_surrogate(open_run(config(home, "wrong", **how), "arrays"))


@pytest.mark.parametrize("condition, arrays, told", [
    (dict(), {}, "no coder at .*: turbvit run 11_arrays trains one"),
    (dict(coder="other/checkpoints/best.tar"), {}, "was trained on . of the 6 solutions that are held out: give both the same seed"),
    (dict(coder="other/checkpoints/best.tar"), {"path": "wake", "parameters": "p.csv", "count": 30}, "is a coder of 25 times × 100 nodes, the arrays have 50 × 1000"),
    (dict(coder="pod", stem="vit", patch=5), {"pictures": "pictures.npy"}, "condition.patch = 5 does not divide pictures of 16 points"),
    (dict(coder="pod", stem="cnn"), {}, "give arrays.pictures"),
    (dict(coder="pod"), {"parameters": None}, "there is nothing to predict solutions from"),
])
def test_a_conditioner_that_does_not_fit_is_one_line(home, condition, arrays, told):
    train_surrogate(run := open_run(config(home, "other", epochs=1), "arrays"))
    run.close()
    arrays = {key: value for key, value in ({"path": "u.npy", "parameters": "p.csv"} | arrays).items() if value is not None}
    path = config(home, "wrong", condition=condition)
    text = {"output_dir": "wrong", "seed": 4} | {name: tomllib.loads(path.read_text())[name] for name in ("surrogate", "condition")} | {"arrays": arrays}
    path.write_text(tomli_w.dumps(text))
    with pytest.raises(LabError, match=told):
        train_condition(open_run(path, "condition"))


def test_a_conditioner_belongs_to_its_coder(home):
    path = config(home, "own", epochs=1, condition={})
    train_surrogate(run := open_run(path, "arrays"))
    run.close()
    train_condition(run := open_run(path, "condition"))
    best_surrogate(run)
    state = torch.load(run.checkpoints / "best.tar", weights_only=True)
    torch.save(state | {"more": 1}, run.checkpoints / "best.tar")
    with pytest.raises(LabError, match="was trained for the codes of another coder"):
        best_surrogate(run)
