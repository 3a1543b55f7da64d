"""Is the counted cost of choosing samples its measured time? Trainings of the same emulator, side by side and in turn.

    python benchmarks/bench_sparse.py [RUNS]      on a quiet machine; a few minutes

Each row: forward passes counted (1 a score, 3 a step), seconds measured, and their quotient over that of uniform sampling, which would be 1 if the
counting were exact; the measurement of the headroom, a fixed price, is left out. The data are those of nbs/configs/sparse/easy.toml and hard.toml, made where they are missing."""
import sys
import tempfile
from pathlib import Path

import torch

from turbvit_nb.data.checks import ensure_data
from turbvit_nb.lab.config import find_config, load_config
from turbvit_nb.lab.runs import open_run
from turbvit_nb.sparse.job import train_sparsely

ARMS = {
    "uniform": ["sparse.method=uniform"],
    "blocks": ["sparse.method=blocks"],
    "adaptive, stale, half": ["sparse.method=adaptive", "sparse.target_activation=0.5"],
    "adaptive, fresh, half": ["sparse.method=adaptive", "sparse.target_activation=0.5", "sparse.score=fresh"],
    "adaptive, fresh, a quarter": ["sparse.method=adaptive", "sparse.target_activation=0.25", "sparse.score=fresh"],
    "importance, fresh, half": ["sparse.method=importance", "sparse.target_activation=0.5", "sparse.score=fresh"],
}


def main(turns: int) -> None:
    torch.set_num_threads(1)
    for name in ("easy", "hard"):
        ensure_data(load_config(find_config(f"configs/sparse/{name}.toml")))
    spent = {name: [0, 0.0] for name in ARMS}
    with tempfile.TemporaryDirectory() as home:
        for turn in range(turns):
            for name, sets in ARMS.items():
                folder = Path(home) / f"{name}_{turn}".replace(" ", "_").replace(",", "")
                run = open_run(find_config("configs/sparse/mixture.toml"), "sparse", [*sets, "training.epochs=3", "training.warmup_epochs=0.5", "sparse.headroom_samples=2", f"output_dir={folder}"])
                _, _, chosen, cost = train_sparsely(run)
                spent[name][0] += chosen.passes
                spent[name][1] += cost.seconds
                run.close()
    per = lambda name: spent[name][1] / spent[name][0]
    print("| arm | forward passes | seconds | seconds a pass, over uniform |\n|---|---:|---:|---:|")
    for name, (passes, seconds) in spent.items():
        print(f"| {name} | {passes:,} | {seconds:.1f} | {per(name) / per('uniform'):.3f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
