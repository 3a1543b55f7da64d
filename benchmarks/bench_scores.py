"""Per-sample gradients for the Fisher and Taylor scores: all at once in chunks (vmap), one by one, and a plain batch gradient.

The plain gradient is what training pays for the same samples; it does not give per-sample scores and stands here as the unit.
    python benchmarks/bench_scores.py --size 64 --dim 128 --depth 4
"""
import argparse
import resource
import time

import torch

from turbvit_nb.compress.criteria import sample_mean
from turbvit_nb.compress.masks import prunable
from turbvit_nb.model import ModelConfig, Normaliser, create_emulator, losses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="ViT", help="model_type")
parser.add_argument("--size", type=int, default=64, help="points per side")
parser.add_argument("--patch", type=int, default=4)
parser.add_argument("--dim", type=int, default=128)
parser.add_argument("--depth", type=int, default=4)
parser.add_argument("--leads", type=int, default=1, help="unrolled steps")
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
section = ModelConfig(model_type=args.model, img_size=args.size, patch_size=args.patch, embed_dim=args.dim, depth=args.depth)
emulator = create_emulator(section, Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1])).to(args.device)
torch.nn.init.normal_(emulator.network.output.weight, std=0.02)
shape = (args.samples, 2, args.size, args.size)
batch = {"x": torch.randn(shape).unsqueeze(2), "y": torch.randn(shape).unsqueeze(2).repeat(1, 1, args.leads, 1, 1), "cond": torch.ones(args.samples, 5)}
batch = {name: value.to(args.device) for name, value in batch.items()}
weights = list(prunable(emulator).values())


def timed(function) -> float:
    "Seconds of the faster of two calls, after one to warm up."
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


unit = timed(lambda: torch.autograd.grad(losses(emulator, batch).mean(), weights))
print(f"{args.model} {args.size}², {sum(w.numel() for w in weights):,} prunable weights, {args.samples} samples, {args.threads} threads, {args.device}")
print(f"{'way':<22}{'samples/s':>11}{'× plain':>9}")
print(f"{'plain batch gradient':<22}{args.samples / unit:>11.1f}{1:>9.2f}")
for chunk in args.chunks:
    seconds = timed(lambda: sample_mean(emulator, [batch], losses, torch.square, chunk))
    print(f"{'one by one' if chunk == 1 else f'mapped, chunk {chunk}':<22}{args.samples / seconds:>11.1f}{seconds / unit:>9.2f}")
print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
