"""What an emulator's step costs in bfloat16 beside float32, and how much the answer differs.

    python benchmarks/bench_precision.py                 # 64² points, batches of 1, 8 and 64
    python benchmarks/bench_precision.py --rounds 9 --batch 8 --threads 1

Both precisions take turns in one process. The ratio is the median over the rounds, quartiles in brackets; the difference is the
root mean square over that of the answer, of untrained networks.
"""
import argparse

import numpy as np
import torch

from turbvit_nb.compress.latency import interleaved
from turbvit_nb.lab.tables import Table
from turbvit_nb.model import Emulator, Normaliser, create_model

NETWORKS = {
    "UNet, 32 channels, patches of 2": dict(model_type="UNet", patch_size=2, base_channels=32, depth=2),
    "UNet, 32 channels": dict(model_type="UNet", base_channels=32, depth=2),
    "ViT, 256 tokens x 128 x 4 blocks": dict(model_type="ViT", patch_size=4, embed_dim=128, depth=4, num_heads=4),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)

rows = []
for name, network in NETWORKS.items():
    torch.manual_seed(0)
    made = create_model(img_size=args.size, target="absolute", **network)
    emulators = {how: Emulator(made, Normaliser([0.0, 0.0], [1.0, 1.0]), target="absolute", precision=how).eval() for how in ("fp32", "bf16")}
    for batch in args.batch:
        x = torch.randn(batch, 2, 1, args.size, args.size)
        with torch.no_grad():
            exact, fast = (emulators[how].predict(x) for how in ("fp32", "bf16"))

            def step_of(how: str):
                return lambda: emulators[how].predict(x)

            times = interleaved({how: step_of(how) for how in emulators}, args.rounds)
        ratio = np.quantile(times["fp32"] / times["bf16"], (0.25, 0.5, 0.75))
        off = (exact - fast).square().mean().sqrt() / exact.square().mean().sqrt()
        rows.append({"network": name, "batch": batch, "fp32, ms a sample": f"{np.median(times['fp32']) / batch:.2f}",
                     "fp32 ÷ bf16": f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]", "difference": f"{off:.4f}"})
print(Table(rows, f"{args.size}² points, {args.threads} thread(s)"))
