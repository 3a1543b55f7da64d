"""What several processes gain, and what activation checkpointing costs: the training step of a ViT, in turn within one run.

    python benchmarks/bench_ranks.py [SIDE] [TURNS]      on a quiet machine; minutes

Rows: one process of one thread, one process of two threads, two ranks of one thread each under torchrun, all with the same batch of 8 states of
SIDE² points, 2 unrolled steps; the two ranks with their weights spread; and one process with activation checkpointing. Columns: the median of the seconds per
step over the turns, with the smallest and largest, its ratio to the first row, what the first rank holds of weights, gradients and moments between two steps, and
the largest resident memory of a process less that before training. The states are noise: only the time is of interest."""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROWS = {  # name: ranks, threads, settings
    "one process, one thread": (1, 1, {}),
    "one process, two threads": (1, 2, {}),
    "two ranks, one thread each": (2, 1, {}),
    "two ranks, one thread each, weights spread": (2, 1, {"sharded": True}),
    "one process, one thread, activation checkpointing": (1, 1, {"activation_checkpointing": True}),
}


def work(side: int, settings: dict, target: Path) -> None:
    "A few steps of a training, timed, by this rank."
    from turbvit_nb.lab.learner import Callback
    from turbvit_nb.lab.ranks import part, ranks
    from turbvit_nb.lab.runs import open_run
    from turbvit_nb.lab.sharding import own_slice
    from turbvit_nb.lab.training import LoopConfig, fit
    from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, losses

    class Noise:
        "Eight states a batch, of which each rank takes its part."

        def __len__(self): return 6

        def epoch(self, epoch, skip=0):
            here, fields = part(8), torch.randn(8, 2, 3, side, side, generator=torch.Generator().manual_seed(0))[part(8)]
            for number in range(skip, 6):
                yield {"x": fields[:, :, :1], "y": fields[:, :, 1:], "cond": torch.zeros(here.stop - here.start, 5), "index": torch.arange(here.start, here.stop)}

    class Clock(Callback):
        times: list[float] = []
        spreads = True

        def before_step(self, learner): self.gradients = [p.grad for p in learner.weights.parameters() if p.grad is not None]

        def after_step(self, learner):
            moments = [value for kept in learner.optimizer.state.values() for value in kept.values()]
            self.held = sum(own_slice(value).nbytes for value in [*learner.weights.parameters(), *self.gradients, *moments]) / 2**20
            del self.gradients

        def after_batch(self, learner): self.times.append(time.perf_counter())

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (target.parent / "run.toml").write_text('device = "cpu"\n')
    run = open_run(target.parent / "run.toml", "train")
    model = create_emulator(ModelConfig(model_type="ViT", img_size=side, patch_size=8, embed_dim=192, depth=6, num_heads=6), Normaliser(mean=[0.0, 0.0], std=[1.0, 1.0]), step=1.0, input_step=1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(run, model, losses, Noise(), lambda learner: {}, lambda: {}, LoopConfig(epochs=1, precision="fp32", **settings), callbacks=[clock := Clock()], weights=model.network)
    if ranks().first:
        steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:])]
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        target.write_text(json.dumps({"seconds": statistics.median(steps), "state": clock.held, "MiB": memory}))


def main(side: int, turns: int) -> None:
    found = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(turns):
            for name, (world, threads, settings) in ROWS.items():
                torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
                target, env = Path(home) / "found.json", os.environ | {"OMP_NUM_THREADS": str(threads), "TURBVIT_PROGRESS": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
                subprocess.run([sys.executable, *torchrun, __file__, "work", str(side), json.dumps(settings), target], check=True, env=env, stderr=subprocess.DEVNULL)
                found[name].append(json.loads(target.read_text()))
    middle = {name: statistics.median(one["seconds"] for one in each) for name, each in found.items()}
    first = next(iter(middle.values()))
    print(f"ViT of {side}², patches of 8, batch of 8, 2 steps unrolled, fp32; {turns} turns\n")
    print("| | seconds a step | smallest, largest | over the first | state, MiB | resident, MiB |\n|---|---:|---:|---:|---:|---:|")
    for name, each in found.items():
        seconds = [one["seconds"] for one in each]
        print(f"| {name} | {middle[name]:.2f} | {min(seconds):.2f}, {max(seconds):.2f} | {middle[name] / first:.2f} | {each[0]['state']:.1f} | {statistics.median(one['MiB'] for one in each):.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(int(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 128, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
