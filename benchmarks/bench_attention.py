"""What attention in windows is worth: a training step of a ViT with patches of 4 at 64², 128² and 256², over all tokens and in windows.

    python benchmarks/bench_attention.py                              # one thread of the CPU, batches of 1
    python benchmarks/bench_attention.py --device cuda --batch 8 --precision bf16

Every step (forward, backward, AdamW) of every size and kind is timed in a process of its own, the kinds taking turns, so that a slow minute of
the machine meets all of them. Columns: the median over the turns of the median seconds of a step, with the smallest and largest turn; the
median of the ratios within each turn, all tokens over windows; the largest memory of the process (of the GPU: what was allocated) less that before
training; and the operations of one sample, with their ratio. The fields are noise: only the time is of interest. With `--plain` attention
holds its table of weights in memory, as it does where derivatives are taken in forward mode.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from turbvit_nb.lab.tables import Table

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu")
parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
parser.add_argument("--window", type=int, default=8, help="tokens per side of a window")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
parser.add_argument("--plain", action="store_true", help="the kernel that is written out")
parser.add_argument("--steps", type=int, default=4, help="that count, after one that does not")
parser.add_argument("--turns", type=int, default=3)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine and one thread")
parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)  # size and window of a process of its own


def memory(device: str) -> float:
    "MiB: the most so far."
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(args: argparse.Namespace, size: int, window: int) -> dict[str, float]:
    "A few steps of training."
    from turbvit_nb.layers.attention import attending, attention, plain_attention
    from turbvit_nb.model import ModelConfig, Normaliser, card, create_emulator, losses

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ModelConfig(img_size=size, patch_size=4, embed_dim=192, depth=4, num_heads=6, window=window)
    emulator = create_emulator(config, Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1]))
    emulator = emulator.to(args.device)
    optimizer = torch.optim.AdamW(emulator.parameters(), 1e-4)
    batch = {"x": torch.randn(args.batch, 2, 1, size, size), "y": torch.randn(args.batch, 2, size, size), "cond": torch.ones(args.batch, 5)}
    batch, before, times = {key: value.to(args.device) for key, value in batch.items()}, memory(args.device), []
    with attending(emulator, plain_attention if args.plain else attention):
        for _ in range(1 + args.steps):
            start = CLOCKS[args.clock]()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = losses(emulator, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(CLOCKS[args.clock]() - start)
    most = memory(args.device) - before
    return {"seconds": statistics.median(times[1:]), "MiB": most, "flops": card(emulator)["flops"]}


def main(args: argparse.Namespace) -> None:
    kinds = {"all tokens": 0, f"windows of {args.window}": args.window}
    found = {(size, kind): [] for size in args.sizes for kind in kinds}
    for turn in range(args.turns):
        for size, kind in (list(reversed(found)) if turn % 2 else found):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(size), str(kinds[kind])]
            found[size, kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    rows = []
    for (size, kind), each in found.items():
        of = lambda key, kind=kind, size=size: [one[key] for one in found[size, kind]]
        over = lambda key, size=size: statistics.median(a[key] / b[key] for a, b in zip(*(found[size, kind] for kind in kinds)))
        first = kind == "all tokens"
        rows.append({
            "points": f"{size}²", "tokens": (size // 4) ** 2, "attention": kind, "seconds": f"{statistics.median(of('seconds')):.3g} [{min(of('seconds')):.3g}, {max(of('seconds')):.3g}]",
            "times faster": "" if first else f"{over('seconds'):.2f}", "MiB": round(statistics.median(of("MiB"))), "times less": "" if first else f"{over('MiB'):.2f}",
            "GFLOP": f"{of('flops')[0] / 1e9:.2f}", "times fewer": "" if first else f"{over('flops'):.2f}",
        })
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(Table(rows, f"a training step, batch {args.batch}, {args.precision}, {'plain' if args.plain else 'default'} kernel, {where}, {args.turns} turns of {args.clock} time, torch {torch.__version__}"))


if __name__ == "__main__":
    args = parser.parse_args()
    if args.one:
        print(json.dumps(work(args, *args.one)))
    else:
        main(args)
