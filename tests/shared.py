"""The stages of `test_shared.py`, done by as many ranks as torchrun starts: python shared.py CONFIG STAGE …"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import own_kinds  # registers a kind that draws

from turbvit_nb.datasets import ensure_data
from turbvit_nb.inference import RolloutJob, infer
from turbvit_nb.lab.config import load_config
from turbvit_nb.lab.runs import open_run
from turbvit_nb.long_analysis import long_analysis
from turbvit_nb.short_analysis import short_analysis

STAGES = {"inference": infer, "short_analysis": short_analysis, "long_analysis": long_analysis}


def dying(job: RolloutJob, state: str) -> None:
    "Save, and be killed after the second chunk."
    _save(job, state)
    if job.step >= 10:
        os._exit(9)


if __name__ == "__main__":
    config, *stages = sys.argv[1:]
    if stages[-1] == "dies":
        _save, RolloutJob.save, stages = RolloutJob.save, dying, stages[:-1]
    ensure_data(load_config(Path(config)))
    for stage in stages:
        run = open_run(config, stage)
        STAGES[stage](run)
        run.finish()
