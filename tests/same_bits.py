"""Whether two states are the same, to the last bit; a stop on the way; and a process group of one."""
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from turbvit_nb.lab.learner import Callback, Learner


def equal(a: object, b: object) -> bool:
    "Bit for bit, through dicts and lists."
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class StopSoon(Callback):
    "Stops after so many batches."

    def __init__(self, step: int = 3):
        self.step = step

    def after_batch(self, learner: Learner) -> None:
        if learner.step == self.step:
            learner.stop = "asked to"


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    "A process group of this process alone. Whatever wraps a model with it is deleted inside: a wrapper that outlives its group can wait for ever when it goes."
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
