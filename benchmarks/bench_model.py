"""Milliseconds per training step (forward, backward, AdamW) of the four networks, in float32 and under bfloat16 autocast.

    python benchmarks/bench_model.py                      # 64², batch 16, one thread
    python benchmarks/bench_model.py --threads 2 --unroll 4

The number is the least of several steps. `--clock cpu` counts processor time, which on one thread is not disturbed by what else
the machine does; `--clock wall` is what a user waits for. Below the networks: the ViT with each attention kernel, and the layers
that are computed otherwise than torch would, beside torch's own.
"""
import argparse
import time

import torch
from torch import nn

from turbvit_nb.lab.tables import Table
from turbvit_nb.layers.attention import attending, attention, fused_attention, plain_attention
from turbvit_nb.layers.convolution import CircularConv
from turbvit_nb.layers.embed import TubeletConv
from turbvit_nb.model import NETWORKS, ModelConfig, Normaliser, card, create_emulator, losses

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def least(function, clock: str, repeats: int) -> float:
    "Milliseconds of the fastest of `repeats` calls, after two that do not count."
    times = []
    for _ in range(repeats + 2):
        start = CLOCKS[clock]()
        function()
        times.append(1e3 * (CLOCKS[clock]() - start))
    return min(times[2:])


def step(emulator, batch: dict, half: bool):
    "A function that does one training step."
    optimizer = torch.optim.AdamW(emulator.parameters(), 1e-4)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = losses(emulator, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


class Transpose(nn.Module):
    "(B, D, L) → (B, L, D)."

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def backward(layer: nn.Module, x: torch.Tensor):
    "A function that does one forward and backward pass of a layer."
    return lambda: layer(x).sum().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="points per side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--unroll", type=int, default=1, help="leads in the loss")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    B, N = args.batch, args.size
    normaliser = Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1])
    batch = {"x": torch.randn(B, 2, 1, N, N), "y": torch.randn(B, 2, args.unroll, N, N), "cond": torch.ones(B, 5)}
    timed = lambda function: least(function, args.clock, args.repeats)

    rows = []
    for kind in (name for name, kind in NETWORKS.items() if not kind.section.draws):
        emulator = create_emulator(ModelConfig(model_type=kind, img_size=N), normaliser)
        full, half = (timed(step(emulator, batch, h)) for h in (False, True))
        costs = card(emulator)
        rate = 3 * args.unroll * B * costs["flops"] / full / 1e6
        rows.append({"network": kind, "parameters": costs["parameters"], "fp32 ms": round(full), "bf16 ms": round(half), "fp32/bf16": round(full / half, 2), "fp32 GFLOP/s": round(rate)})
    print(Table(rows, f"training step, {N}x{N}, batch {B}, {args.unroll} lead(s), {args.threads} thread(s), {args.clock} time"), "\n")

    emulator, rows = create_emulator(ModelConfig(img_size=N), normaliser), []
    for kernel in (fused_attention, plain_attention, attention):
        with attending(emulator, kernel):
            full, half = (timed(step(emulator, batch, h)) for h in (False, True))
        rows.append({"attention in the ViT": kernel.__name__, "fp32 ms": round(full), "bf16 ms": round(half)})
    print(Table(rows), "\n")

    tubelet, circular = TubeletConv(2, 128, (1, 4, 4)), CircularConv(64, 64)
    x, h = (torch.randn(B, *shape, requires_grad=True) for shape in ((2, 1, N, N), (64, N // 2, N // 2)))
    torch_conv3d = nn.Sequential(nn.Conv3d(2, 128, (1, 4, 4), stride=(1, 4, 4)), nn.Flatten(2), Transpose(), nn.LayerNorm(128))
    torch_circular = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular")
    pairs = {"tubelets, LayerNorm": (nn.Sequential(tubelet, nn.LayerNorm(128)), torch_conv3d, x), "circular 3x3": (circular, torch_circular, h)}
    rows = []
    for name, (ours, theirs, data) in pairs.items():
        a, b = timed(backward(ours, data)), timed(backward(theirs, data))
        rows.append({"layer, forward and backward": name, "ours ms": round(a, 2), "torch ms": round(b, 2), "torch/ours": round(b / a, 2)})
    print(Table(rows))


if __name__ == "__main__":
    main()
