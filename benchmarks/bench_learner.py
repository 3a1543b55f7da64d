"""What the learner costs beyond forward, backward and optimizer: a step beside that of a bare loop, on the same batch.

    python benchmarks/bench_learner.py --steps 10 --rounds 3

Ratios are of processor time, which other users of the machine disturb less than the time on the wall.
"""
import argparse
import statistics
import time

import torch
from torch import nn

from turbvit_nb.lab.learner import EMA, Callback, Checkpoint, ClipGradient, Cosine, Learner, Log, StopOnSignal, WallClock, Warmup
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, losses


class Fixed:
    "The same batch again and again: the data set is not what is measured."

    def __init__(self, batch: dict, steps: int):
        self.batch, self.steps = batch, steps

    def __len__(self):
        return self.steps

    def epoch(self, epoch, skip=0):
        for _ in range(skip, self.steps):
            yield dict(self.batch)


def main() -> None:
    "Measure and print one table."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the fastest counts")
    parser.add_argument("--size", type=int, default=64, help="points per side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = ModelConfig(img_size=a.size, embed_dim=a.dim, depth=a.depth, num_heads=4)
    emulator = create_emulator(config, Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1]), step=0.06)
    field = torch.randn(a.batch, 2, 1, a.size, a.size)
    batch = {"x": field, "y": field[:, :, 0] + 0.1, "cond": torch.zeros(a.batch, 5)}
    decayed = [p for p in emulator.parameters() if p.ndim > 1], [p for p in emulator.parameters() if p.ndim < 2]

    def adamw(**kind) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": decayed[0]}, {"params": decayed[1], "weight_decay": 0.0}], lr=1e-5, **kind)

    def bare(optimizer) -> float:
        start = time.process_time()
        for _ in range(a.steps):
            losses(emulator, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (time.process_time() - start) / a.steps

    def learned(optimizer, callbacks: list[Callback]) -> float:
        learner = Learner(emulator, losses, Fixed(batch, a.steps), optimizer, callbacks, weights=emulator.network)
        start = time.process_time()
        learner.fit()
        return (time.process_time() - start) / a.steps

    nothing = lambda *args, **kwargs: None
    everything = lambda: [Warmup(1.0), Cosine(), StopOnSignal(), WallClock(1.0), Log(nothing), Checkpoint(nothing), ClipGradient(1.0)]
    cases = {
        "bare loop, AdamW fused": lambda: bare(adamw(fused=True)),
        "bare loop, AdamW foreach": lambda: bare(adamw(foreach=True)),
        "learner, no callbacks": lambda: learned(adamw(fused=True), []),
        "learner, schedule, clip, log, checkpoint": lambda: learned(adamw(fused=True), everything()),
        "the same and EMA": lambda: learned(adamw(fused=True), [*everything(), EMA()]),
    }
    times = {name: [] for name in cases}
    bare(adamw(fused=True))
    for _ in range(a.rounds):
        for name, case in cases.items():
            times[name].append(case())
    base = min(times["bare loop, AdamW fused"])
    print(f"{sum(p.numel() for p in emulator.parameters()):,} parameters, {a.batch} × {a.size}², {a.threads} threads")
    print(f"{'':42s} {'cpu ms':>8s} {'median':>8s} {'ratio':>6s}")
    for name, values in times.items():
        print(f"{name:42s} {1e3 * min(values):8.1f} {1e3 * statistics.median(values):8.1f} {min(values) / base:6.3f}")


if __name__ == "__main__":
    main()
