"""Which recipe wins the rollout at equal training time? The table of chapter 02.

    OMP_NUM_THREADS=1 python benchmarks/bench_recipe.py --seconds 120
    OMP_NUM_THREADS=1 python benchmarks/bench_recipe.py --only patch8 batch8 --seconds 60

Every variant trains on the same data for the same processor time: its steps are timed first, and the length of
its epochs follows. Processor time, on one thread, because it is the same on a busy machine. Scores are of free rollouts from 16 starts on a trajectory that was not trained on.
"""
import argparse
import tempfile
import time
from pathlib import Path

import torch

from turbvit_nb.lab.learner import Learner
from turbvit_nb.lab.runs import open_run, seed_everything
from turbvit_nb.lab.training import autocast_dtype, build_optimizer
from turbvit_nb.model import losses
from turbvit_nb.train import build_batches, build_data, build_emulator, train

DATA = """
seed = {seed}
[generate]
data_dir = "re1000_64"
Re = 1000
fkx = 0
fky = 4
alpha = 0.1
beta = 20.0
NX = 64
dt = 0.005
n_trajectories = 8
n_frames = 1000
t_save = 0.06
spin_up = 60.0
seed = 0
scheme = "exact"
store = "packed"
[model]
model_type = "ViT"
img_size = 64
patch_size = 4
embed_dim = 128
depth = 4
num_heads = 4
[train_dataset]
data_dir = "re1000_64"
trajectories = [1, 2, 3, 4, 5, 6, 7]
frame_range = [[1, 1001]]
[validation_dataset]
data_dir = "re1000_64"
trajectories = [8]
frame_range = [[1, 1001]]
[training]
epochs = 20
validate_every = 20
batch_size = 16
lr = 1e-3
warmup_epochs = 1.0
rollout_steps = 60
rollout_starts = 16
"""
OFF = ["training.unroll=1", "training.augment=false", "model.project=false", "training.input_noise=0.0"]
SMALL = ["model.patch_size=8", "model.embed_dim=192", "model.num_heads=6"]
EIGHT = [*SMALL, "training.batch_size=8", "training.lr=2e-3"]
VARIANTS = {  # name: overrides; each of the first eight adds one thing to the one before, "noise" aside
    "legacy": [*OFF, "model.target=absolute", "model.legacy_token_layout=true"],
    "increment": OFF,
    "noise": [*OFF[:-1], "training.input_noise=0.05"],
    "unrolled": OFF[1:],
    "projected": [OFF[1], "model.cutoff=1.5"],
    "cutoff": [OFF[1]],
    "symmetries": [],
    "patch8": SMALL,
    "batch8": [*SMALL, "training.batch_size=8"],
    "lr2e-3": EIGHT,
    "noise8": [*EIGHT, "training.input_noise=0.02"],
    "unroll8": [*EIGHT, "training.unroll=8", "training.unroll_start=0.8"],
    "early": [*EIGHT, "training.unroll_start=0.3"],
    "late": [*EIGHT, "training.unroll_start=0.8"],
    "ema": [*EIGHT, "training.ema=0.99"],
    "unet": ["model.model_type=UNet", "model.base_channels=32", "model.depth=2", "training.batch_size=8", "training.lr=2e-3"],
}


def seconds_per_step(run, targets: int) -> float:
    "Median processor time of a training step on samples with so many targets."
    settings, (data, _) = run.config.section("training"), build_data(run)
    emulator = build_emulator(run, data)
    data.targets = targets
    batches = build_batches(run, settings.model_copy(update={"steps_per_epoch": 12}), data)
    times = []
    autocast = autocast_dtype(settings.precision, run.device)
    learner = Learner(emulator, losses, batches, build_optimizer(emulator.network, settings), autocast=autocast)
    for learner.batch in batches.epoch(0):
        start = time.process_time()
        learner._batch()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


def study(overrides: list[str], seconds: float, seed: int) -> dict:
    "Train one variant for `seconds` and score it."
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "recipe.toml"
        config.write_text(DATA.format(seed=seed))
        run = open_run(config, stage="train", overrides=overrides)
        settings = run.config.section("training")
        single, unrolled = seconds_per_step(run, 1), seconds_per_step(run, settings.unroll)
        share = 1 - settings.unroll_start if settings.unroll > 1 else 0.0
        steps = seconds / ((1 - share) * single + share * unrolled)
        run = open_run(config, stage="train", overrides=[*overrides, f"training.steps_per_epoch={max(1, round(steps / 20))}"])
        seed_everything(seed)
        start = time.process_time()
        train(run)
        took = time.process_time() - start
        last = [line for line in run.metrics() if "rollout_acc" in line][-1]
        return last | {"steps": last["step"], "took": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training per variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s), {arguments.seconds:g} s of processor time each, seed {arguments.seed}")
    print("| variant | steps | one-step MSE | ACC at 10 / 20 / 40 | horizon | CPU s |\n|---|---|---|---|---|---|")
    for name in arguments.only:
        got = study(VARIANTS[name], arguments.seconds, arguments.seed)
        accs = " / ".join(f"{got[f'acc_{lead}']:.2f}" for lead in (10, 20, 40))
        horizon = "> 60" if got["horizon"] > 60 else f"{got['horizon']:.0f}"
        print(f"| {name} | {got['steps']} | {got['validation_loss']:.4f} | {accs} | {horizon} | {got['took']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
