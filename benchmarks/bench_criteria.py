"""One shot, no finetuning: skill of a trained model right after pruning, for every criterion, scope and fraction.

A config without output_dir trains its own model first (about 15 s for the smoke one):
    python benchmarks/bench_criteria.py configs/smoke/prune.toml --set training.epochs=20
    python benchmarks/bench_criteria.py my_prune.toml --set checkpoint_file='"demo/checkpoints/best.tar"'
"""
import argparse

import torch

from turbvit_nb.compress.criteria import CRITERIA
from turbvit_nb.compress.schedules import SCOPES, Step
from turbvit_nb.lab.plots import Table
from turbvit_nb.lab.runs import open_run
from turbvit_nb.prune import Stages, open_stages, read_pruning
from turbvit_nb.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("config", nargs="?", default="configs/smoke/prune.toml")
parser.add_argument("--set", nargs="*", default=["training.epochs=20"], help="overrides")
parser.add_argument("--fractions", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="to prune")
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()

torch.set_num_threads(args.threads)
run = open_run(args.config, "bench", overrides=args.set)
if run.scratch:
    train(run)
dense = run.start_checkpoint()
stages = open_stages(run, dense)


def after(stages: Stages, metric: str, scope: str, fraction: float) -> dict[str, float]:
    "Skill right after pruning."
    chosen = {"importance_metric": metric, "scope": scope}
    run.config.sections["pruning"] = run.config.sections["pruning"].model_copy(update=chosen)
    return stages.mask(read_pruning(dense, run.device), Step(1, fraction, 0))["pruned"]


rows = [{"criterion": "dense", "scope": "", "pruned %": 0.0} | stages.validation.skill(read_pruning(dense, run.device).emulator)]
for fraction in args.fractions:
    for metric in CRITERIA:
        for scope in SCOPES:
            rows.append({"criterion": metric, "scope": scope, "pruned %": 100 * fraction} | after(stages, metric, scope, fraction))
print(Table(rows))
