"""What precision and compilation are worth on a device: milliseconds of a training step and of an answer, and memory, of networks at 64² and 256².

    python benchmarks/bench_device.py                            # the GPU, where there is one
    python benchmarks/bench_device.py --sizes 64 --batch 8 --compile

All ways take turns in one process on a device that does nothing else. The ratio to float32 is the median over the rounds, quartiles in
brackets; on a GPU float32 is full float32, in convolutions too. A training step is forward, backward and AdamW; an answer is without
gradients. The difference is of the answers, the root mean square over that of float32's.
"""
import argparse
from collections.abc import Callable

import numpy as np
import torch

from turbvit_nb.compress.latency import interleaved
from turbvit_nb.lab.ranks import resolve_device
from turbvit_nb.lab.tables import Table
from turbvit_nb.model import create_model

NETWORKS = {
    "UNet, 32 channels": dict(model_type="UNet", patch_size=2, base_channels=32, depth=2),
    "ViT, 192 x 4 blocks": dict(model_type="ViT", patch_size=8, embed_dim=192, depth=4, num_heads=6),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="auto")
parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--compile", action="store_true", help="also compiled, in bfloat16")
args = parser.parse_args()
device = resolve_device(args.device)


def timed(work: Callable[[], object]) -> Callable[[], None]:
    "The same, ten times, and the device has finished."
    def call() -> None:
        for _ in range(10):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def ways(config: dict, size: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    "By way: a training step, and an answer."
    x = torch.randn(args.batch, 2, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    train, answer = {}, {}
    for name in ["fp32", "bf16", *(["bf16, compiled"] if args.compile else [])]:
        torch.manual_seed(0)
        network = create_model(img_size=size, **config).to(device)
        torch.nn.init.normal_(list(network.parameters())[-1], std=0.1)  # the last weights begin at zero
        forward = torch.compile(network.forward) if "compiled" in name else network.forward
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def see(forward=forward, name=name) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in name):
                return forward(x).float()

        def step(see=see, optimizer=optimizer) -> None:
            see().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        answer[name], train[name] = torch.no_grad()(see), step
    return train, answer


rows = []
for title, config in NETWORKS.items():
    for size in args.sizes:
        train, answer = ways(config, size)
        outs = {name: see() for name, see in answer.items()}
        times = {kind: interleaved({name: timed(work) for name, work in works.items()}, args.rounds) for kind, works in (("step", train), ("answer", answer))}
        for name in train:
            row = {"network": title, "points": f"{size}²", "": name}
            for kind, found in times.items():
                ratio = np.quantile(found["fp32"] / found[name], (0.5, 0.25, 0.75))
                row |= {f"{kind}, ms": f"{np.median(found[name]) / 10:.2f}", f"{kind}, x": f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"}
            off = (outs[name] - outs["fp32"]).square().mean().sqrt() / outs["fp32"].square().mean().sqrt()
            rows.append(row | {"difference": f"{off:.4f}"})
what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
print(Table(rows, f"{what}, batches of {args.batch}, torch {torch.__version__}"))
