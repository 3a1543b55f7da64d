"""Training that does not know what it trains: an autoencoder in a run folder, killed and resumed; shared folders."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from same_bits import equal
from turbvit_nb.lab.checkpoints import identify, results_in
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.files import read_checkpoint, write_checkpoint
from turbvit_nb.lab.learner import Callback
from turbvit_nb.lab.runs import Stopped, open_run, read_metrics, stages
from turbvit_nb.lab.training import LoopConfig, fit

JOB = """
import os, signal, sys
import torch
from torch import nn
from turbvit_nb.lab.learner import Callback
from turbvit_nb.lab.runs import open_run
from turbvit_nb.lab.training import LoopConfig, fit

torch.set_num_threads(1)


class Vectors:
    "Nine batches of 16 an epoch: vectors on a plane in 12 dimensions."

    def __len__(self): return 9

    def epoch(self, epoch, skip=0):
        plane = torch.randn(2, 12, generator=torch.Generator().manual_seed(-1))
        for i in range(skip, 9):
            yield {"x": torch.randn(16, 2, generator=torch.Generator().manual_seed(100 * epoch + i)) @ plane}


class Die(Callback):
    def after_backward(self, learner):
        if learner.step == int(sys.argv[2]): os.kill(os.getpid(), getattr(signal, sys.argv[3]))


class Often(Callback):
    "Save `last` after every batch, so that a kill leaves a state within an epoch."
    def before_fit(self, learner):
        next(c for c in learner.callbacks if type(c).__name__ == "Checkpoint").minutes = 0.0


run = open_run(sys.argv[1], "squeeze")
model = nn.Sequential(nn.Linear(12, 2), nn.Dropout(0.1), nn.Linear(2, 12))  # dropout: the global generator
errors = lambda model, batch: (model(batch["x"]) - batch["x"]).square().mean(1)
held_out = next(Vectors().epoch(99))
validate = lambda learner: {"error": errors(learner.model, held_out).mean().item()}
settings = LoopConfig(epochs=5, lr=0.02, ema=0.9, accumulate=2, precision="fp32", checkpoint_period=2)
learner = fit(run, model, errors, Vectors(), validate, lambda: {"layers": [12, 2, 12]}, settings,
              monitor="error", callbacks=[Die(), Often()])
run.finish(error=learner.metrics["error"])
"""


pytestmark = pytest.mark.usefixtures("warm_jobs")


def job(home: Path, *arguments: str) -> tuple[int, str]:
    "Run the job; exit code and what it said on standard error."
    env = os.environ | {"TURBVIT_RUNS": str(home / "runs")}
    done = subprocess.run([sys.executable, "-c", JOB, *arguments], cwd=home, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


def plain(folder: Path) -> dict:
    "All checkpoints of a run without what tells one run, or one minute, from another."
    states = {path.stem: read_checkpoint(path) for path in sorted((folder / "checkpoints").glob("*.tar"))}
    for state in states.values():
        del state["run_id"], state["run_name"], state["callbacks"]["Log"]
    return states


@pytest.fixture
def home(place):
    return place


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The folder of a job that nobody disturbed."
    home = tmp_path_factory.mktemp("straight")
    (home / "straight.toml").write_text('output_dir = "straight"\nseed = 2\ndevice = "cpu"\n')
    code, errors = job(home, "straight.toml", "-1", "-")
    assert code == 0, errors
    return home / "runs" / "straight"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_what_is_no_emulator_resumes_to_the_same_bits(home, straight, how):
    "Killed, or asked to stop, between two batches of one step of the optimizer: step 21 is the fourth batch of the third epoch."
    (home / "killed.toml").write_text('output_dir = "killed"\nseed = 2\ndevice = "cpu"\n')
    code, errors = job(home, "killed.toml", "22" if how == "SIGKILL" else "20", how)
    folder = home / "runs" / "killed"
    assert code != 0 and stages(folder)["squeeze"]["state"] == {"SIGKILL": "killed"}.get(how, "stopped")
    left = read_checkpoint(folder / "checkpoints" / "last.tar")
    assert (left["batch_index"], left["step"]) == (4, 22)
    code, errors = job(home, "runs/killed", "-1", "-")
    assert code == 0, errors
    assert equal(plain(folder), plain(straight))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(f)] for f in (folder, straight)]
    assert rows[0] == rows[1]


def test_its_checkpoints_say_what_they_are(straight):
    known = {path.stem: identify(path) for path in (straight / "checkpoints").glob("*.tar")}
    assert {name: (i.role, i.result) for name, i in known.items()} == {
        "best": ("dense", True), "last": ("dense", False), "epoch0002": ("dense", False), "epoch0004": ("dense", False)}
    assert list(results_in(straight / "checkpoints")) == ["best"]
    assert read_checkpoint(straight / "checkpoints" / "best.tar")["layers"] == [12, 2, 12]


# In this process


class Rows:
    "Batches of `size` rows of 48, in an order of their own."

    def __init__(self, size: int):
        self.size, self.x = size, torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 48 // self.size

    def epoch(self, epoch, skip=0):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(self.size)[skip:]:
            yield {"x": self.x[rows]}


def errors(model, batch):
    return (model(batch["x"]) - batch["x"]).square().mean(1)


def small(home: Path, name: str, size: int = 16, losses=errors, callbacks=(), top: str = "", **keys) -> nn.Module:
    "A linear autoencoder, trained in `runs/<name>`."
    file = home / f"{name}.toml"
    file.write_text(f'output_dir = "{name}"\ndevice = "cpu"\n{top}')
    run = open_run(home / "runs" / name if (home / "runs" / name).exists() else file, "squeeze")
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    settings = LoopConfig(**dict(epochs=4, precision="fp32", batch_size=size) | keys)
    try:
        fit(run, model, losses, Rows(size), lambda learner: {}, lambda: {}, settings, callbacks=callbacks)
    finally:
        run.close()
    return model


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_batches_are_one_large_batch(home, parts):
    large, in_parts = small(home, "large", 24), small(home, "parts", 24 // parts, accumulate=parts)
    for a, b in zip(large.parameters(), in_parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_a_stop_within_a_step_waits_for_its_end_and_goes_on_with_a_number_that_fits(home):
    class Stop(Callback):
        def after_batch(self, learner):
            if learner.step == 7:
                learner.stop = "SIGTERM"

    with pytest.raises(Stopped, match="stopped by SIGTERM at epoch 1.50 of 4"):
        small(home, "stopped", 8, accumulate=3, callbacks=[Stop()])
    with pytest.raises(LabError, match="batch 3 of an epoch lies within a step of the optimizer of accumulate = 2; resume with the number"):
        small(home, "stopped", 8, accumulate=2)
    for a, b in zip(small(home, "stopped", 8, accumulate=3).parameters(), small(home, "whole", 8, accumulate=3).parameters()):
        assert torch.equal(a, b)


def test_a_loss_may_keep_its_own_precision(home):
    seen = []

    def losses(model, batch):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return errors(model, batch)

    small(home, "half", losses=losses, precision="bf16", epochs=1)
    run = open_run(_toml(home, "own"), "squeeze")
    settings, model = LoopConfig(epochs=1, precision="bf16"), nn.Linear(4, 4)
    fit(run, model, losses, Rows(16), lambda learner: {}, lambda: {}, settings, autocast=False)
    assert seen == [torch.bfloat16] * 3 + [None] * 3


def _toml(home: Path, name: str, top: str = "") -> Path:
    file = home / f"{name}.toml"
    file.write_text(f'output_dir = "{name}"\ndevice = "cpu"\n{top}')
    return file


def test_a_compiled_model_learns_the_same_and_keeps_its_names(home, monkeypatch):
    compile, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda forward: calls.append(forward) or compile(forward, backend="eager"))
    plain, compiled = small(home, "plain"), small(home, "compiled", compile=True)
    assert calls == [compiled.forward] and "forward" not in vars(compiled)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a, b)
    state = read_checkpoint(home / "runs" / "compiled" / "checkpoints" / "last.tar")["model_state"]
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_checkpoint_of_an_earlier_version_is_resumed(home):
    "It has neither an identity nor an owner nor a count of the optimizer's steps."
    class Stop(Callback):
        def after_epoch(self, learner):
            if learner.epoch == 2:
                learner.stop = "SIGTERM"

    with pytest.raises(Stopped):
        small(home, "older", callbacks=[Stop()], ema=0.9)
    last = home / "runs" / "older" / "checkpoints" / "last.tar"
    state = read_checkpoint(last)
    write_checkpoint(last, {key: value for key, value in state.items() if key not in ("identity", "run_id", "run_name", "updates")})
    for a, b in zip(small(home, "older", ema=0.9).parameters(), small(home, "left_alone", ema=0.9).parameters()):
        assert torch.equal(a, b)


# Two runs, one folder of checkpoints


SHARED = 'checkpoint_dir = "ck"\n'


def test_a_run_leaves_the_checkpoints_of_another_alone(home):
    small(home, "first", top=SHARED, checkpoint_period=1)
    folder = home / "runs" / "ck"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    refused = f"{folder} holds the checkpoints of run first \\((best|epoch0001).tar\\); give this run another checkpoint_dir"
    with pytest.raises(LabError, match=refused) as caught:
        small(home, "second", top=SHARED)
    assert "\n" not in str(caught.value) and before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "last.tar").unlink()  # the best of another is not overwritten either
    with pytest.raises(LabError, match=refused):
        small(home, "third", top=SHARED)
    small(home, "other", top='checkpoint_dir = "ck_of_other"\n')


def test_a_run_goes_on_from_its_own_in_a_shared_folder(home):
    class Stop(Callback):
        def after_batch(self, learner):
            if learner.step == 4:
                learner.stop = "SIGTERM"

    with pytest.raises(Stopped):
        small(home, "mine", top=SHARED, callbacks=[Stop()])
    (home / "runs" / "mine").rename(home / "runs" / "renamed")
    for a, b in zip(small(home, "renamed", top=SHARED).parameters(), small(home, "alone").parameters()):
        assert torch.equal(a, b)


def test_older_checkpoints_belong_to_the_run_that_had_begun(home):
    "Files of an earlier version do not say whose they are."
    small(home, "first", top=SHARED)
    for path in (home / "runs" / "ck").iterdir():
        state = read_checkpoint(path)
        write_checkpoint(path, {key: value for key, value in state.items() if key not in ("identity", "run_id", "run_name")})
    file = home / "runs" / "first" / "status.json"
    file.write_text(json.dumps({"stages": json.loads(file.read_text())["stages"]}))
    small(home, "first", top=SHARED)
    with pytest.raises(LabError, match="holds the checkpoints of another run"):
        small(home, "second", top=SHARED)


def test_two_that_begin_at_once_do_not_overwrite_each_other(home):
    class Rival(Callback):
        order = -99

        def before_fit(self, learner):
            state = {"run_id": "other", "run_name": "rival"}
            write_checkpoint(home / "runs" / "ck" / "last.tar", state)

    with pytest.raises(LabError, match="holds the checkpoints of run rival"):
        small(home, "slow", top=SHARED, callbacks=[Rival()])


def test_a_stage_that_is_refused_may_begin_again_with_another_folder(home):
    small(home, "first", top=SHARED)
    with pytest.raises(LabError):
        small(home, "second", top=SHARED)
    run = open_run(_toml(home, "second", 'checkpoint_dir = "elsewhere"\n'), "squeeze")
    assert run.checkpoints == home / "runs" / "elsewhere"
