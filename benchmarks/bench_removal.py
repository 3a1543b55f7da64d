"""What removing half of the heads and channels gains, beside masking them, and what a head and a channel cost.

    python benchmarks/bench_removal.py                    # 1,024 tokens × 192 × 8 blocks × 6 heads; and the reference ViT
    python benchmarks/bench_removal.py --rounds 15 --batch 8 --threads 1
    python benchmarks/bench_removal.py --prices           # and milliseconds of a head and a channel at 64 to 1,024 tokens

One step of each emulator in eager float32, its projection included, all in one process, taking turns. Ratios to the dense model
are medians over the rounds, with the quartiles in brackets; `possible` is the ratio of the operations that the cards count. The
masked model has the same zeros and the dense model's shapes.
"""
import argparse
from copy import deepcopy

import numpy as np
import torch

from turbvit_nb.compress.criteria import random
from turbvit_nb.compress.latency import channel_flops, head_flops, interleaved, measure_latency
from turbvit_nb.compress.masks import Masks, prunable
from turbvit_nb.compress.materialize import materialize
from turbvit_nb.compress.schedules import Step
from turbvit_nb.compress.selection import select
from turbvit_nb.compress.units import unit_named
from turbvit_nb.lab.plots import Table
from turbvit_nb.model import Emulator, ModelConfig, Normaliser, card, create_emulator

MODELS = {
    "1,024 tokens x 192 x 8 blocks x 6 heads": dict(img_size=64, patch_size=2, embed_dim=192, depth=8, num_heads=6),
    "reference ViT: 64 tokens x 192 x 4 blocks x 6 heads": dict(img_size=64, patch_size=8, embed_dim=192, depth=4, num_heads=6),
}
REMOVED = {"half the heads": ["head"], "half the channels": ["channel"], "half of both": ["head", "channel"]}


def built(**keys) -> Emulator:
    "An emulator whose last layer is not zero."
    emulator = create_emulator(ModelConfig(**keys), Normaliser([0.0, 0.0], [1.0, 1.0], [0.1, 0.1]))
    torch.nn.init.normal_(emulator.network.output.weight, std=0.1)
    return emulator.eval()


def variants(dense: Emulator) -> dict[str, Emulator]:
    "The dense emulator, smaller ones, and one that is only masked."
    found, scores = {"dense": dense}, random(dense)
    for name, words in REMOVED.items():
        pieces = unit_named(words).pieces(dense)
        masks = select(Masks.dense(prunable(dense)), scores, Step(1, 0.5, 0), pieces, "layer")
        if words[-1] == "channel" and len(words) == 2:
            found["half of both, only masked"] = masks.apply(deepcopy(dense))
        found[name] = materialize(dense, masks)
    return found


@torch.no_grad()
def compare(title: str, keys: dict, batch: int, rounds: int) -> None:
    "Print the ratios."
    torch.manual_seed(0)
    models = variants(built(**keys))
    x = torch.randn(batch, 2, 1, keys["img_size"], keys["img_size"])
    times = interleaved({name: lambda model=model: model(x) for name, model in models.items()}, rounds)
    rows, costs = [], {name: card(model) for name, model in models.items()}
    for name, spent in times.items():
        low, ratio, high = np.quantile(np.array(times["dense"]) / np.array(spent), [0.25, 0.5, 0.75])
        possible = costs["dense"]["flops"] / costs[name]["flops"]
        rows.append({
            "model": name, "ms": round(float(np.median(spent)), 1), "times faster": f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
            "possible": f"{possible:.2f}", "parameters": costs[name]["parameters"], "MFLOP": round(costs[name]["flops"] / 1e6),
        })
    print(Table(rows, f"{title}, batch {batch}, {torch.get_num_threads()} thread(s)"), "\n", flush=True)


def prices(batch: int, rounds: int) -> None:
    "Print what a head and a channel cost against the number of tokens."
    rows = []
    for patch in (8, 4, 2):
        emulator = built(img_size=64, patch_size=patch, embed_dim=192, depth=4, num_heads=6)
        table = measure_latency(emulator, batch, rounds)
        L, each = (64 // patch) ** 2, table.each["blocks"]
        told = head_flops(L, 192, 32) / channel_flops(L, 192)
        rows.append({
            "tokens": L, "µs of a head": round(1e3 * each["head"], 1), "µs of a channel": round(1e3 * each["channel"], 2),
            "a head in channels": round(each["head"] / each["channel"]), "by operations": round(told),
            "L² share of a head's operations": f"{L / (L + 2 * 192):.0%}", "µs of an attention besides": round(1e3 * each["attention"], 1),
            "µs of an MLP besides": round(1e3 * each["mlp"], 1),
        })
    print(Table(rows, f"prices of pieces, tokens of width 192, 4 blocks, batch {batch}, {torch.get_num_threads()} thread(s)"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prices", action="store_true", help="also time pieces at several numbers of tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for title, keys in MODELS.items():
        compare(title, keys, args.batch, args.rounds)
    if args.prices:
        prices(args.batch, args.rounds)


if __name__ == "__main__":
    main()
