"""What a step of training costs by the method of `[flow]`, and what a forward-mode derivative costs beside a plain evaluation.

    python benchmarks/bench_flow.py                       # 64² points, a UNet and a DiT, float32 and bfloat16
    python benchmarks/bench_flow.py --rounds 9 --batch 8 --threads 1 --clock cpu

Loss and gradient of one batch, all in one process, taking turns. Ratios to flow matching are medians over the rounds, quartiles in
brackets. MeanFlow differentiates forwards where r < t, in float32 whatever the precision; half of its samples have r = t unless
`equal` says otherwise. CRPS trains two members of every sample.
"""
import argparse
import time

import numpy as np
import torch

from turbvit_nb.compress.latency import interleaved
from turbvit_nb.flow.generative import Generative, drawn_losses
from turbvit_nb.flow.teaching import draws_for
from turbvit_nb.lab.tables import Table
from turbvit_nb.model import ModelConfig, Normaliser, create_model

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NETWORKS = {
    "ToldUNet, 32 channels, patches of 2": dict(model_type="ToldUNet", patch_size=2, base_channels=32, depth=2),
    "DiT, 64 tokens x 192 x 4 blocks": dict(model_type="DiT", patch_size=8, embed_dim=192, depth=4, num_heads=6),
}
METHODS = {  # name: method, and the share of samples with r = t
    "flow matching": ("flow_matching", 1.0), "MeanFlow, half with r < t": ("meanflow", 0.5), "MeanFlow, all with r < t": ("meanflow", 0.0),
    "improved MeanFlow, half with r < t": ("improved_meanflow", 0.5), "CRPS of two members": ("crps", 1.0),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--clock", choices=CLOCKS, default="wall")
args = parser.parse_args()
torch.set_num_threads(args.threads)


def step_of(network: dict, method: str, equal: float, precision: torch.dtype):
    "A function that does one loss and gradient."
    torch.manual_seed(0)
    made = create_model(**ModelConfig(img_size=args.size, target="absolute", **network).model_dump())
    emulator = Generative(made, Normaliser([0.0, 0.0], [1.0, 1.0]), target="absolute", method=method)
    x, y = torch.randn(args.batch, 2, 1, args.size, args.size), torch.randn(args.batch, 2, args.size, args.size)
    batch = {"x": x, "y": y, "cond": torch.ones(args.batch, 5)}
    batch |= draws_for(emulator, x, torch.Generator().manual_seed(0), equal=equal)
    if method != "crps" and 0 < equal < 1:  # exactly so many
        batch["r"] = torch.where(torch.arange(args.batch) < equal * args.batch, batch["t"], 0.5 * batch["t"])

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = drawn_losses(emulator, batch).mean()
        loss.backward()
        emulator.zero_grad(set_to_none=True)

    return step


rows = []
for title, network in NETWORKS.items():
    for precision in (torch.float32, torch.bfloat16):
        steps = {name: step_of(network, *how, precision) for name, how in METHODS.items()}
        times = interleaved(steps, args.rounds, warmup=1, clock=CLOCKS[args.clock])
        for name, ms in times.items():
            low, middle, high = np.quantile(ms / times["flow matching"], (0.25, 0.5, 0.75))
            told = {"network": title, "precision": str(precision).removeprefix("torch."), "method": name}
            rows.append(told | {"ms": float(np.median(ms)), "over flow matching": f"{middle:.2f} [{low:.2f}, {high:.2f}]"})
print(Table(rows, f"Loss and gradient of {args.batch} samples of {args.size}² points, {args.threads} thread"))
