"""Classifiers that choose their pictures: the same bits after a stop, folders and their defects, other packages' networks, one line for a mistake."""
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from torch import nn

from same_bits import StopSoon, equal
from turbvit_nb.classes import build_classes, flipped, train_classes
from turbvit_nb.flow.images import shapes
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run, read_metrics
from turbvit_nb.sparse.classes import create_classifier, load_classifier
from turbvit_nb.sparse.selection import Selection


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, sparse: dict | None = None, **classes) -> Path:
    "A config of a small job."
    asked = dict(count=120, img_size=8, width=4, epochs=3, batch_size=8, lr=3e-3, warmup_epochs=0.5, precision="fp32") | classes
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps({"output_dir": name, "seed": 2, "classes": asked} | ({} if sparse is None else {"sparse": sparse})))
    return path


@pytest.mark.parametrize("sparse", [
    None, dict(method="infobatch"), dict(method="blocks"), dict(method="stratified", target_activation=0.5),
    dict(method="adaptive", target_activation=0.5, score="fresh", entropy="classes", entropy_weight=0.5),
], ids=lambda sparse: "none" if sparse is None else sparse["method"])
def test_a_stop_in_mid_epoch_changes_no_bit(home, sparse):
    how = dict(flip=True, accumulate=2, ema=0.9, patience=9, wrong_labels=0.1)
    train_classes(whole := open_run(config(home, "whole", sparse, **how), "classes"))
    with pytest.raises(Stopped):
        train_classes(run := open_run(config(home, "halves", sparse, **how), "classes"), [StopSoon(9)])
    run.close()
    train_classes(run := open_run(run.path, "classes"))
    one, other = (read_checkpoint(r.checkpoints / "last.tar") for r in (whole, run))
    assert equal(one["model_state"], other["model_state"]) and equal(one["ema_state"], other["ema_state"])
    told = json.loads((run.path / "history.json").read_text())
    assert told["epoch"] == [1, 2, 3] and len(told["val_accuracy"]) == 3 and ("activation" in told) == (sparse is not None)
    assert told["train_loss"] == [row["loss"] for row in read_metrics(run.path, stage="classes") if "loss" in row]


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_it_learns_what_shapes_are(home, network):
    run = open_run(config(home, network, count=800, network=network, width=16, depth=2 if network == "vit" else 1, epochs=16), "classes")
    learner, validation = train_classes(run)
    best = load_classifier(run.checkpoints / "best.tar")
    assert validation.scores(best)["accuracy"] > 0.6                      # of four classes


def pictures(folder: Path, classes: dict[str, int]) -> Path:
    "A folder of files, a folder per class."
    drawn, labels = shapes(200, 8)
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(drawn[labels == label][:count]):
            Image.fromarray(((picture[0] + 1) * 127.5).byte().numpy()).save(folder / name / f"{i}.png")
    return folder


def test_folders_and_their_defects(home, monkeypatch):
    told = []
    monkeypatch.setattr("turbvit_nb.flow.images.note", told.append)
    folder = pictures(home / "set", {"disc": 12, "square": 9})
    run = open_run(config(home, "folder", path=str(folder), test_share=0.25), "classes")
    train_set, held_back = build_classes(run)
    assert (len(train_set), len(held_back), train_set.flows) == (16, 5, ["disc", "square"])
    for name in ("bad1", "bad2"):
        (folder / "disc" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(LabError, match=r"bad1.png is damaged .*; so are 1 more of 23 files in"):
        build_classes(run)
    run.close()
    train_set, held_back = build_classes(open_run(config(home, "patient", path=str(folder), test_share=0.25, skip_bad=True), "classes"))
    assert len(train_set) + len(held_back) == 21
    assert "left out 2 of 23 files, the first because" in told[0]
    for made, said in (({"disc": 5}, "has one class, disc: there is nothing to tell apart"), ({}, "holds no image")):
        (home / "one").mkdir(exist_ok=True)
        with pytest.raises(LabError, match=said):
            build_classes(open_run(config(home, f"few{len(made)}", path=str(pictures(home / f"one{len(made)}", made) if made else home / "one")), "classes"))
    flat = home / "flat"
    flat.mkdir()
    Image.new("L", (8, 8)).save(flat / "a.png")
    with pytest.raises(LabError, match="has no classes: put its files into one folder per class"):
        build_classes(open_run(config(home, "flat_one", path=str(flat)), "classes"))


def test_copies_are_found_and_wrong_labels_are_run_after(home):
    "By loss, a copy is trained on less often than the others, and a wrong label more."
    run = open_run(config(home, "found", dict(method="blocks", block=1), count=600, width=8, epochs=12, wrong_labels=0.1, duplicates=0.4), "classes")
    learner, _ = train_classes(run)
    train_set = learner.batches.dataset
    chosen = next(callback for callback in learner.callbacks if isinstance(callback, Selection))
    used = chosen.scores.used[chosen.scores.cover(train_set.places())]
    _, place, count = np.unique(train_set.images.flatten(1).numpy(), axis=0, return_inverse=True, return_counts=True)
    copied = count[place.ravel()] > 1
    right, _ = build_classes(open_run(config(home, "right", count=600, duplicates=0.4), "classes"))
    wrong = (train_set.labels != right.labels).numpy()
    assert 0.08 < wrong.mean() < 0.12 and 0.38 < copied.mean() < 0.46
    assert used[wrong].mean() > 1.5 * used[~wrong].mean()
    assert used[copied & ~wrong].mean() < used[~copied & ~wrong].mean()


def test_networks_of_other_packages(monkeypatch):
    for network, package in (("timm:resnet18", "timm"), ("hf:some/model", "transformers")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(LabError, match=rf"network = {network} needs the package {package}, which does not import here .*: pip install {package}, or take resnet or vit"):
            create_classifier(network, img_size=8, channels=1, classes=3)
    asked = {}
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, **how: asked.update(how, name=name) or nn.Sequential(nn.Flatten(), nn.Linear(64, how["num_classes"]))
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert create_classifier("timm:resnet18", img_size=8, channels=1, classes=3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert asked == {"name": "resnet18", "num_classes": 3, "in_chans": 1}

    class Model(nn.Module):
        def forward(self, pixel_values):
            return types.SimpleNamespace(logits=pixel_values.flatten(1)[:, :3])

    library = types.ModuleType("transformers")
    library.AutoConfig = types.SimpleNamespace(from_pretrained=lambda name, **how: asked.update(how, name=name))
    library.AutoModelForImageClassification = types.SimpleNamespace(from_config=lambda config: Model())
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert create_classifier("hf:some/model", img_size=8, channels=1, classes=3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert asked["num_labels"] == 3 and asked["image_size"] == 8


def test_minutes_end_a_training_that_counts_as_done(home):
    run = open_run(config(home, "short", epochs=500, max_minutes=0.02), "classes")
    learner, _ = train_classes(run)
    assert learner.done and learner.epoch < 500 and run.has("best")


def test_half_of_the_pictures_are_mirrored():
    x = torch.arange(4000.0).view(1000, 1, 1, 4)
    found = flipped({"x": x, "label": torch.zeros(1000)}, np.random.default_rng(0))["x"]
    same, mirrored = (found == x).flatten(1).all(1), (found == x.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 0.45 < same.float().mean() < 0.55


@pytest.mark.parametrize("sparse, classes, said", [
    (None, dict(channels=2), "classes.channels = 2: a picture has one channel or three"),
    (dict(method="reducible", target_activation=0.5, teacher="x/best.tar"), {}, "sparse: method = reducible asks a better emulator"),
    (dict(method="adaptive", target_activation=0.5, score="fresh", entropy="residual", entropy_weight=1.0), {}, "sparse: entropy = residual is not of this training"),
    (dict(min_active=9), {}, "min_active = 9 is more than a batch holds: classes.batch_size = 8"),
    (None, dict(wrong_labels=1.5), "classes.wrong_labels = 1.5"),
])
def test_a_mistake_is_one_line(home, sparse, classes, said):
    with pytest.raises(LabError) as told:
        load_config(config(home, "wrong", sparse, **classes)).check()
    assert said in str(told.value) and "\n" not in str(told.value)
