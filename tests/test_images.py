"""Pictures as a job: the same bits after a stop, any source of pictures, and one line for a mistake, before any compute."""
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image

from same_bits import StopSoon, equal
from turbvit_nb.flow.images import load_images_model, shapes
from turbvit_nb.flow.scores import set_distances
from turbvit_nb.images import train_images
from turbvit_nb.inference import infer
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.runs import Stopped, open_run
from turbvit_nb.model import load_emulator


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, images: dict = {}, model: dict = {}, **flow) -> Path:
    "A config of a small job."
    made = {
        "output_dir": name, "seed": 3,
        "images": {"count": 160, "test_share": 0.2} | images,
        "model": dict(model_type="DiT", img_size=8, fields=["grey"], num_frames=0, patch_size=2, embed_dim=32, depth=2, num_heads=2) | model,
        "flow": dict(method="flow_matching", epochs=2, batch_size=16, precision="fp32") | flow,
    }
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps(made))
    return path


@pytest.mark.parametrize("method", ["flow_matching", "meanflow"])
def test_a_stop_in_mid_epoch_changes_no_bit(home, method):
    how = dict(method=method, label_dropout=0.2, ema=0.9)
    train_images(whole := open_run(config(home, f"whole_{method}", **how), "images"))
    path = config(home, f"halves_{method}", **how)
    with pytest.raises(Stopped):
        train_images(run := open_run(path, "images"), [StopSoon()])
    run.close()
    train_images(run := open_run(run.path, "images"))
    one, other = (read_checkpoint(r.checkpoints / "last.tar") for r in (whole, run))
    assert equal(one["model_state"], other["model_state"]) and equal(one["ema_state"], other["ema_state"])


def test_training_brings_what_is_drawn_nearer(home):
    run = open_run(config(home, "nearer", {"count": 500}, epochs=30, lr=4e-3, validate_every=10, solver="midpoint", steps=4), "images")
    learner, validation = train_images(run)
    best = load_images_model(run.checkpoints / "best.tar")
    noise = torch.randn_like(validation.images.images)
    far, near = (set_distances(made, validation.images.images) for made in (noise, best.draw(validation.images.labels)))
    assert near["energy_distance"] < 0.3 * far["energy_distance"] and near["frechet_distance"] < 0.3 * far["frechet_distance"]
    assert best.evaluations == 8 and load_images_model(run.checkpoints / "best.tar", solver="euler", steps=1).evaluations == 1


def test_pictures_without_labels_in_colour_from_a_folder(home):
    (folder := home / "pictures").mkdir()
    for n, image in enumerate(shapes(40, 12)[0]):
        grey = ((image[0].numpy() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(np.stack([grey, grey, 255 - grey], -1)).save(folder / f"{n}.png")
    keys = dict(images={"path": str(folder)}, model={"fields": ["red", "green", "blue"]}, epochs=1, batch_size=8)
    _, validation = train_images(run := open_run(config(home, "colour", **keys), "images"))
    drawn = load_images_model(run.checkpoints / "best.tar").draw(5)
    assert drawn.shape == (5, 3, 8, 8) and len(validation.images) == 8
    with pytest.raises(LabError, match="has no labels to drop"):
        train_images(open_run(config(home, "undropped", **keys, label_dropout=0.1), "images"))


def test_a_model_of_images_is_no_emulator_and_the_other_way_round(home):
    train_images(run := open_run(config(home, "pictures", epochs=1), "images"))
    run.close()
    with pytest.raises(LabError, match="draws pictures"):
        load_emulator(run.checkpoints / "best.tar")
    with pytest.raises(LabError, match="which is no emulator"):
        infer(open_run(config(home, "pictures", epochs=1), "inference"))
    torch.save({"model_state": {}}, other := home / "other.tar")
    with pytest.raises(LabError, match="holds no model of images"):
        load_images_model(other)


@pytest.mark.parametrize("keys, line", [
    (dict(model={"fields": ["u", "v"]}), r'write fields = \["grey"\]'),
    (dict(members=3), "flow.members is of flows"),
    (dict(method="crps"), "take flow_matching or meanflow"),
    (dict(monitor="crps"), "monitor = crps is not measured here"),
    (dict(guidance=2.0), "set label_dropout"),
    (dict(steps=0), "steps = 0"),
    (dict(model={"model_type": "ToldUNet"}), "where on a picture it is"),
    (dict(model={"model_type": "ViT", "num_frames": 1}), "cannot be told noise"),
    (dict(images={"test_share": 1.5}), "images.test_share = 1.5"),
])
def test_a_mistake_costs_one_line_before_any_run(home, keys, line):
    with pytest.raises(LabError, match=line):
        open_run(config(home, "wrong", **keys), "images")
    assert not (home / "runs" / "wrong").exists()


def test_classes_that_differ_from_the_set(home):
    run = open_run(config(home, "classes", model={"classes": 3}), "images")
    with pytest.raises(LabError, match="model.classes = 3, but shapes has 4"):
        train_images(run)
    assert load_config(run.path).section("images").count == 160
