"""The trainings of `test_ranks.py`, done by as many ranks as torchrun starts: python ranked.py FOLDER NAME …"""
import hashlib
import sys
from pathlib import Path

import torch

from turbvit_nb.classes import train_classes
from turbvit_nb.compress.criteria import CRITERIA
from turbvit_nb.compress.reconstruction import input_grams
from turbvit_nb.condition import train_condition
from turbvit_nb.datasets import Batches
from turbvit_nb.distil import distil
from turbvit_nb.flow.job import train_flow
from turbvit_nb.images import train_images
from turbvit_nb.lab.config import nbs_dir
from turbvit_nb.lab.learner import Callback
from turbvit_nb.lab.ranks import ranks
from turbvit_nb.lab.runs import open_run
from turbvit_nb.latent.job import train_latent
from turbvit_nb.model import load_emulator, losses
from turbvit_nb.prune import prune
from turbvit_nb.train import build_data, train

SHORT = ["epochs=3", "steps_per_epoch=6", "batch_size=8", "precision=fp32"]
FULL = ("unroll=2", "unroll_start=0.3", "input_noise=0.1", "ema=0.9", "clip=0.05", "accumulate=2")
of = lambda section, *keys: [f"{section}.{key}" for key in (*SHORT, *keys)]
SPARSE = ("method=adaptive", "target_activation=0.5")
JOBS = {  # name: stage, what does it, its config, changes
    "everything": ("train", train, "train", of("training", *FULL)),
    "spread": ("train", train, "train", of("training", *FULL, "sharded=true", "activation_checkpointing=true")),
    "other_seed": ("train", train, "train", ["seed=7", *of("training", *FULL)]),
    "dropout": ("train", train, "train", ["model={model_type='UNet', img_size=32, base_channels=8, depth=2, dropout=0.2}", *of("training")]),
    "pruned": ("prune", prune, "prune", ["checkpoint_file={everything}", *of("finetuning")[1:], "pruning.prune_schedule=[0.3, 0.3]", "pruning.epoch_schedule=[1, 1]"]),
    "heads": ("prune", prune, "prune", ["checkpoint_file={everything}", *of("finetuning")[1:], "pruning.prune_schedule=[0.5]", "pruning.epoch_schedule=[1]",
                                        "pruning.importance_metric=leave_one_out", "pruning.unit=head", "pruning.compensate=ridge"]),
    "taught": ("distil", distil, "distil", ["distillation.teacher_checkpoint={everything}", *of("finetuning", "unroll=1")]),
    "matching": ("flow", train_flow, "flow", of("flow", "method=flow_matching", "label_dropout=0.2")),
    "mean": ("flow", train_flow, "flow", of("flow", "method=meanflow")),
    "crps": ("flow", train_flow, "flow", of("flow", "method=crps", "samplers=[]", "unroll=2", "unroll_start=0.3")),
    "coder": ("latent", train_latent, "latent", of("latent", "drop=0.3")),
    "pictures": ("images", train_images, "images", of("flow")),
    "classes": ("classes", train_classes, "classes", of("classes", "flip=true", "network=vit")),
    "conditioner": ("condition", train_condition, "condition", of("condition", "noise=0.1", "dropout=0.2")),
    "blocks": ("sparse", train, "sparse", of("training") + ["sparse.method=blocks", "sparse.score_every=2"]),
    "fresh": ("sparse", train, "sparse", of("training", "input_noise=0.1") + [*(f"sparse.{key}" for key in SPARSE), "sparse.score=fresh"]),
    "stale": ("sparse", train, "sparse", of("training") + [f"sparse.{key}" for key in SPARSE]),
    "importance": ("sparse", train, "sparse", of("training") + ["sparse.method=importance", "sparse.score=fresh", "sparse.target_activation=0.5"]),
}
SCORED = ("taylor", "fisher", "gauss_newton", "wanda", "sparsegpt", "head_gates")


class Disturbed(Callback):
    "In the second epoch the last rank, and no other, is told to stop."

    spreads = True

    def after_batch(self, learner) -> None:
        if ranks().rank == ranks().world - 1 and learner.step == 9:
            learner.stop = "a signal to the last rank"


def trained(folder: Path) -> Path:
    "The model that others start from, the same for any number of ranks."
    return folder.parent / "warm" / "runs" / "everything" / "checkpoints" / "best.tar"


def config(name: str, folder: Path) -> tuple[Path, list[str]]:
    "The config of a job, and what is changed in it."
    file, changes = JOBS[name][2:]
    start = trained(folder)
    return nbs_dir() / "configs" / "smoke" / f"{file}.toml", [
        f"output_dir={folder}/runs/{name}", "device=cpu", *(change.replace("{everything}", str(start)) for change in changes)]


def scores(folder: Path) -> None:
    "Store what the criteria say of the trained model, and a hash of the half that each would keep."
    run = open_run(config("everything", folder)[0], "essay", [f"output_dir={folder}/runs/scores", "device=cpu"])
    emulator = load_emulator(trained(folder))
    dataset, found = build_data(run, emulator)[0], {}
    batches = lambda: (batch for batch, _ in zip(Batches(dataset, 8, seed=5).epoch(0), range(4)))
    for name in SCORED:
        each = torch.cat([score.double().flatten() for score in CRITERIA[name](emulator, batches(), losses, seed=1).values()])
        kept = each >= each.median()
        found |= {name: each, f"{name} hash": hashlib.sha256(kept.numpy().tobytes()).hexdigest()}
    found["grams"] = torch.cat([gram.flatten() for gram in input_grams(emulator, batches(), losses).values()])
    run.save("scores", found)
    run.finish()


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        if name == "scores":
            scores(folder)
            continue
        if name in ("stops", "stops_spread", "goes_on", "goes_on_spread"):  # the same training, disturbed, and taken up again
            file, changes = config("everything", folder)
            spread, again = f"training.sharded={str('spread' in name).lower()}", "goes_on" in name
            run = open_run(folder / "runs" / "disturbed", "train", [spread]) if again else open_run(file, "train", [f"output_dir={folder}/runs/disturbed", *changes[1:], spread])
            train(run, [] if again else [Disturbed()])
            run.finish()
            continue
        stage, work, *_ = JOBS[name]
        file, changes = config(name, folder)
        run = open_run(file, stage, changes)
        work(run)
        run.finish()
