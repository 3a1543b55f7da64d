"""What removing half of the heads and channels gains, beside masking them, and what a head and a channel cost.

    python benchmarks/bench_removal.py                    # 1,024 tokens × 192 × 8 blocks × 6 heads; and the reference ViT
    python benchmarks/bench_removal.py --rounds 15 --batch 8 --threads 1
    python benchmarks/bench_removal.py --clock cpu        # where the machine is busy: processor time of one thread
    python benchmarks/bench_removal.py --prices           # and milliseconds of a head and a channel at 64 to 1,024 tokens

One step of each emulator in eager float32, its projection included, all in one process, taking turns. Ratios to the dense model
are medians over the rounds, with the quartiles in brackets; `possible` is the ratio of the operations that the cards count. The
masked model has the same zeros and the dense model's shapes. The last rows are what else is said to make sparse or large models fast:
90 % of the weights zero in compressed sparse rows (CSR), and bfloat16.
"""
import argparse
import time
import warnings
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from turbvit_nb.compress.criteria import random
from turbvit_nb.compress.latency import channel_flops, head_flops, interleaved, measure_latency
from turbvit_nb.compress.masks import Masks, prunable
from turbvit_nb.compress.materialize import materialize
from turbvit_nb.compress.schedules import Step
from turbvit_nb.compress.selection import select
from turbvit_nb.compress.units import unit_named
from turbvit_nb.lab.tables import Table
from turbvit_nb.model import Emulator, ModelConfig, Normaliser, card, create_emulator

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
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


class SparseLinear(nn.Module):
    "A linear layer whose weight is kept in compressed sparse rows."

    def __init__(self, linear: nn.Linear):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return (self.weight @ flat.T).T.reshape(*x.shape[:-1], -1) + self.bias


def in_sparse_rows(model: nn.Module) -> nn.Module:
    "The model with all its linear layers in CSR."
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, SparseLinear(child))
    return model


class InBfloat16(nn.Module):
    "The model under autocast."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def sparse(dense: Emulator) -> Emulator:
    "A copy with 90 % of the weights of every layer zero."
    weights = unit_named("weight").pieces(dense)
    return select(Masks.dense(prunable(dense)), random(dense), Step(1, 0.1, 0), weights, "layer").apply(deepcopy(dense))


def variants(dense: Emulator) -> dict[str, nn.Module]:
    "The dense emulator, smaller ones, those that are only masked, and other ways to compute."
    found, scores = {"dense": dense}, random(dense)
    for name, words in REMOVED.items():
        pieces = unit_named(words).pieces(dense)
        masks = select(Masks.dense(prunable(dense)), scores, Step(1, 0.5, 0), pieces, "layer")
        if words[-1] == "channel" and len(words) == 2:
            found["half of both, only masked"] = masks.apply(deepcopy(dense))
        found[name] = materialize(dense, masks)
    found["90 % of the weights, only masked"] = sparse(dense)
    found["90 % of the weights, in CSR"] = in_sparse_rows(sparse(dense))
    return found | {"dense, bfloat16": InBfloat16(dense), "half of both, bfloat16": InBfloat16(found["half of both"])}


@torch.no_grad()
def compare(title: str, keys: dict, batch: int, rounds: int, clock: str) -> None:
    "Print the ratios."
    torch.manual_seed(0)
    models = variants(built(**keys))
    x = torch.randn(batch, 2, 1, keys["img_size"], keys["img_size"])
    times = interleaved({name: lambda model=model: model(x) for name, model in models.items()}, rounds, clock=CLOCKS[clock])
    plain = {name: getattr(model, "model", model) for name, model in models.items()}
    plain["90 % of the weights, in CSR"] = plain["90 % of the weights, only masked"]
    rows, costs = [], {name: card(model) for name, model in plain.items()}
    for name, spent in times.items():
        low, ratio, high = np.quantile(times["dense"] / spent, [0.25, 0.5, 0.75])
        possible = costs["dense"]["flops"] / costs[name]["flops"]
        rows.append({
            "model": name, "ms": round(float(np.median(spent)), 1), "times faster": f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
            "possible": f"{possible:.2f}", "parameters": costs[name]["parameters"], "MFLOP": round(costs[name]["flops"] / 1e6),
        })
    print(Table(rows, f"{title}, batch {batch}, {torch.get_num_threads()} thread(s), {clock} time"), "\n", flush=True)


def prices(batch: int, rounds: int, clock: str) -> None:
    "Print what a head and a channel cost against the number of tokens."
    rows = []
    for patch in (8, 4, 2):
        emulator = built(img_size=64, patch_size=patch, embed_dim=192, depth=4, num_heads=6)
        table = measure_latency(emulator, batch, rounds, CLOCKS[clock])
        L, each = (64 // patch) ** 2, table.each["blocks"]
        told = head_flops(L, 192, 32) / channel_flops(L, 192)
        rows.append({
            "tokens": L, "µs of a head": round(1e3 * each["head"], 1), "µs of a channel": round(1e3 * each["channel"], 2),
            "a head in channels": round(each["head"] / each["channel"]), "by operations": round(told),
            "L² share of a head's operations": f"{L / (L + 2 * 192):.0%}", "µs of an attention besides": round(1e3 * each["attention"], 1),
            "µs of an MLP besides": round(1e3 * each["mlp"], 1),
        })
    print(Table(rows, f"prices of pieces, tokens of width 192, 4 blocks, batch {batch}, {torch.get_num_threads()} thread(s), {clock} time"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine and one thread")
    parser.add_argument("--prices", action="store_true", help="also time pieces at several numbers of tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for title, keys in MODELS.items():
        compare(title, keys, args.batch, args.rounds, args.clock)
    if args.prices:
        prices(args.batch, args.rounds, args.clock)


if __name__ == "__main__":
    main()
