"""One shot, no finetuning: skill of a trained model right after pruning, for every criterion, scope and fraction.

A config without output_dir trains its own model first (about 15 s for the smoke one):
    python benchmarks/bench_criteria.py configs/smoke/prune.toml --set training.epochs=20
    python benchmarks/bench_criteria.py my_prune.toml --set checkpoint_file='"demo/checkpoints/best.tar"'
    python benchmarks/bench_criteria.py my_prune.toml --unit head channel --scopes unit --compensate none ridge
"""
import argparse

import torch

from turbvit_nb.compress.criteria import CRITERIA, SCORES_STRUCTURE
from turbvit_nb.compress.schedules import Step
from turbvit_nb.compress.selection import SCOPES
from turbvit_nb.compress.units import unit_named
from turbvit_nb.lab.runs import open_run
from turbvit_nb.lab.tables import Table
from turbvit_nb.prune import Stages, open_stages, read_pruning
from turbvit_nb.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("config", nargs="?", default="configs/smoke/prune.toml")
parser.add_argument("--set", nargs="*", default=["training.epochs=20"], help="overrides")
parser.add_argument("--fractions", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="to prune")
parser.add_argument("--unit", nargs="+", default=["weight"], help="one, or several for a mix")
parser.add_argument("--scopes", nargs="+", choices=sorted(SCOPES), help="default: global, layer and, for weights, row")
parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA), help="default: all that score the unit")
parser.add_argument("--compensate", nargs="+", choices=["none", "obs", "ridge"], default=["none"])
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()

torch.set_num_threads(args.threads)
run = open_run(args.config, "bench", overrides=args.set)
if run.scratch:
    train(run)
dense, structure = run.start_checkpoint(), unit_named(args.unit).removable
stages = open_stages(run, dense)
scopes = args.scopes or ["global", "layer"] + ["row"] * (args.unit == ["weight"])
criteria = args.criteria or [name for name in CRITERIA if structure or name not in SCORES_STRUCTURE]


def after(stages: Stages, fraction: float, **chosen) -> dict[str, float]:
    "Skill right after pruning."
    wanted = run.config.sections["pruning"].model_copy(update={"unit": args.unit} | chosen)
    run.config.sections["pruning"] = wanted
    return stages.mask(read_pruning(dense, run.device), Step(1, fraction, 0))["pruned"]


rows = [{"criterion": "dense", "scope": "", "mended": "", "gone %": 0.0} | stages.validation.skill(read_pruning(dense, run.device).emulator)]
for fraction in args.fractions:
    for metric in criteria:
        for scope in scopes:
            for way in args.compensate:
                shown = {"criterion": metric, "scope": scope, "mended": way, "gone %": 100 * fraction}
                rows.append(shown | after(stages, fraction, importance_metric=metric, scope=scope, compensate=way))
print(Table(rows))
