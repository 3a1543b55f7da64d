"""What a deployed step costs: ratios to the dense emulator as torch runs it in float32, dense and with half of all heads and MLP channels removed.

    python benchmarks/bench_deploy.py                         # the reference ViT: 64², patch 8, 192 × 4 blocks × 6 heads, batch 8, one thread
    python benchmarks/bench_deploy.py --patch 2 --depth 8     # 1,024 tokens
    python benchmarks/bench_deploy.py --compiled --clock wall

All programs take a step in turns, round after round. `--clock cpu` counts processor time, which on one thread is not disturbed by what
else the machine does; `--clock wall` is what a user waits for. Weights are random, inputs a random flow with a steep spectrum, on which
int8 is calibrated too: the errors, root mean square over the standard deviation of the field, are of the arithmetic and not of a trained model.
"""
import argparse
import time

import numpy as np
import torch

from turbvit_nb.compress.backends import BACKENDS, deploy
from turbvit_nb.compress.latency import interleaved
from turbvit_nb.deploy import step_error
from turbvit_nb.lab.tables import Table
from turbvit_nb.model import Emulator, ModelConfig, Normaliser, create_emulator, evaluating
from turbvit_nb.networks.transformers import FEATURES
from turbvit_nb.physics.spectral import grid

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def untrained(**model) -> Emulator:
    "An emulator of random weights, whose increments are a few per cent of the field."
    torch.manual_seed(0)
    emulator = create_emulator(ModelConfig(**model), Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1])).eval()
    torch.nn.init.normal_(emulator.network.output.weight, std=0.02)
    return emulator


def flow(n: int, N: int) -> torch.Tensor:
    "Random velocities (n, 2, 1, N, N) of unit variance."
    g = grid(N, "cpu", torch.float32)
    omega = torch.randn(n, N, N, generator=torch.Generator().manual_seed(1))
    uv = g.velocity(g.inverse(g.transform(omega) / (1 + g.k2 / 16) ** 2))
    return (uv / uv.std())[:, :, None]


def step(emulator, batch: dict):
    "A function that does one step."

    def run():
        with evaluating(emulator):
            return emulator(**batch)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="points per side")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="also by torch's compiler, about a minute each")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base = dict(img_size=args.size, patch_size=args.patch, embed_dim=192, depth=args.depth, num_heads=6)
    removed = dict(block_heads=[3] * args.depth, block_mlp=[384] * args.depth)
    batch = {"x": flow(args.batch, args.size), "cond": torch.ones(args.batch, len(FEATURES))}
    steps, rows = {}, {}
    for form, more in (("dense", {}), ("half removed", removed)):
        emulator = untrained(**base, **more)
        steps[form, "eager fp32"], rows[form, "eager fp32"] = step(emulator, batch), {}
        for backend, one in BACKENDS.items():
            for precision in one.precisions if args.compiled or backend != "compiled" else ():
                program = deploy(emulator, backend, precision, [batch])
                name = form, f"{backend} {precision}"
                kept = sum(tensor.nbytes for tensor in program.kept.values())
                rows[name] = {"MB": round(kept / 1e6, 1), "rms error": f"{step_error(program, emulator, batch)[0]:.0e}"}
                steps[name] = step(program, batch)
    taken = interleaved(steps, args.repeats, clock=CLOCKS[args.clock])
    reference, table = taken["dense", "eager fp32"], []
    for (form, program), own in taken.items():
        ratios = {"by least": round(reference.min() / own.min(), 2), "by median": round(float(np.median(reference / own)), 2)}
        table.append({"model": form, "program": program, "least ms": round(own.min(), 1)} | ratios | rows[form, program])
    what = f"{args.size}², {(args.size // args.patch) ** 2} tokens × 192 × {args.depth} × 6, batch {args.batch}, {args.threads} thread(s), {args.clock} time"
    print(Table(table, f"{what}; ratios to dense eager fp32"))


if __name__ == "__main__":
    main()
