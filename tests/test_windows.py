"""Attention in windows as a whole network has it: against a mask over all tokens, its symmetries, its cost, its pruning, its checkpoints."""
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.utils.flop_counter import FlopCounterMode

from turbvit_nb.compress.gates import gated, sites
from turbvit_nb.compress.masks import Masks, prunable
from turbvit_nb.compress.materialize import materialize
from turbvit_nb.compress.units import unit_named
from turbvit_nb.lab.config import Config, LabError
from turbvit_nb.lab.files import write_checkpoint
from turbvit_nb.lab.training import LoopConfig, _taken
from turbvit_nb.layers.attention import Attention, Windows, attending, plain_attention
from turbvit_nb.model import ModelConfig, Normaliser, card, check_start, create_emulator, create_model, emulator_state, load_emulator, losses
from turbvit_nb.physics.spectral import Grid

COND = torch.tensor([[1000.0, 0, 4, 0.1, 20]])
SIZES = dict(embed_dim=16, depth=3, num_heads=4, mlp_ratio=1.0)
TOWERS = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in dict(embed_dim=16, depth=2, num_heads=2).items()}
NETWORKS = {
    "ViT": dict(**SIZES), "ReViT": dict(model_type="ReViT", num_frames=2, **SIZES),
    "EncoderDecoderViT": dict(model_type="EncoderDecoderViT", num_frames=4, tubelet_size=2, num_out_frames=2, **TOWERS),
    "DiT": dict(model_type="DiT", **SIZES),
}


def alive(network: nn.Module) -> nn.Module:
    "With random weights where there are zeros, in double precision."
    for p in network.parameters():
        if p.ndim == 1 or not p.any():
            nn.init.normal_(p, std=0.2)
    return network.double()


def made(name: str, window: int, size: int = 32) -> nn.Module:
    "A network of weights that do not depend on the windows."
    torch.manual_seed(0)
    return alive(create_model(**dict(img_size=size, patch_size=4, window=window, target="absolute") | NETWORKS[name]))


def answer(network: nn.Module, x: torch.Tensor, when: float = 0.7) -> torch.Tensor:
    "What a network says of frames (B, C, T, N, N); one that draws has the newest twice, as noise too."
    cond, time = COND.double().expand(len(x), 5), torch.full((len(x),), when, dtype=x.dtype)
    return network(x, cond, **(dict(noisy=x[:, :, :1].sin(), r=time / 2, t=time) if network.config["model_type"] == "DiT" else {}))


def frames(network: nn.Module, B: int = 2, seed: int = 1) -> torch.Tensor:
    size = (B, 2, network.config["num_frames"], *[network.config["img_size"]] * 2)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def together(block: int, rows: int, side: int, times: int) -> torch.Tensor:
    "Pair by pair, whether two tokens are in one window of a block: both have as many whole windows above and to the left."
    move = side // 2 if block % 2 else 0
    tokens = [((row + move) % rows // side, (column + move) % rows // side) for _, row, column in product(range(times), range(rows), range(rows))]
    return torch.tensor([[a == b for b in tokens] for a in tokens])


def see_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    "Attention over all tokens with an explicit mask, which has every derivative."
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_attention_over_all_tokens_with_a_mask(name, side):
    "Answers, gradients, and derivatives in forward mode; the names and shapes of the parameters are those without windows."
    local, whole = made(name, side), made(name, 0)
    whole.load_state_dict(local.state_dict())
    for path, layer in whole.named_modules():
        if isinstance(layer, Attention):
            times = 2 if path.startswith("encoder") else 1
            layer.attend = partial(see_only, mask=together(int(path.split(".")[1]), 8, side, times))
    x = frames(local)
    assert torch.allclose(answer(local, x), answer(whole, x), atol=1e-12)
    assert not torch.allclose(answer(local, x), answer(made(name, 0), x), atol=1e-3)
    for one, other in zip(*(torch.autograd.grad(answer(net, x).square().sum(), list(net.parameters()), allow_unused=True) for net in (local, whole))):
        assert one is other is None or torch.allclose(one, other, atol=1e-9)
    with attending(local, plain_attention):
        slopes = [jvp(partial(answer, net), (x,), (frames(local, seed=2),)) for net in (local, whole)]
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(*slopes))


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_of_the_whole_domain_are_full_attention(name):
    "The same bits by the section, the same numbers where windows are made of it all the same, wherever they are cut."
    full, covering = made(name, 0), made(name, 8)
    x = frames(full)
    assert full.config == covering.config and torch.equal(answer(full, x), answer(covering, x))
    for path, layer in covering.named_modules():
        if isinstance(layer, Attention):
            layer.windows = Windows((2 if path.startswith("encoder") else 1, 8, 8), 8, 3)
    assert torch.allclose(answer(covering, x), answer(full, x), atol=1e-12)


def in_physical_units(name: str, window: int, size: int = 32, **keys) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(**dict(img_size=size, patch_size=4, window=window) | NETWORKS[name] | keys)
    emulator = create_emulator(config, Normaliser([0.0, 0.0], [1.0, 2.0], [0.5, 0.5]), step=0.1)
    return alive(emulator)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "DiT"])
def test_shifts_by_whole_windows_go_through_and_no_divergence_comes(name):
    "An emulator without places, with its projection: windows of 4 patches of 4 points."
    emulator = in_physical_units(name, 4)
    for key, places in emulator.network.named_buffers():
        if "pos_embed" in key:
            places.zero_()
    x = frames(emulator.network)
    y = emulator(x, COND.double().expand(2, 5))
    apart = lambda *by: (emulator(x.roll(by, (-2, -1)), COND.double().expand(2, 5)) - y.roll(by, (-2, -1))).abs().max()
    assert max(apart(16, 0), apart(0, -16), apart(16, 16)) < 1e-10
    assert min(apart(4, 0), apart(0, 8)) > 1e-4
    assert Grid.of(y).divergence(y.transpose(1, 2)).abs().max() < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_grow_with_the_tokens(name):
    "By torch's own count of the products that are carried out: four and sixteen times the tokens are so many times the work of each sample."
    counts = {}
    for window, size in product((4, 0), (32, 64, 128)):
        network = made(name, window, size)
        with attending(network, plain_attention), FlopCounterMode(display=False) as counter, torch.no_grad():
            answer(network, frames(network, 1))
        counts[window, size] = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]  # attention alone makes products in batches
    assert counts[4, 128] == 4 * counts[4, 64] == 16 * counts[4, 32]
    assert counts[0, 128] == 16 * counts[0, 64] == 256 * counts[0, 32]


def test_the_card_counts_what_is_computed():
    for name, window, heads in product(["ViT", "ReViT", "EncoderDecoderViT"], (2, 4, 0), (None, [1, 0])):
        told = "encoder_block_heads" if name.startswith("Enc") else "block_heads"
        emulator = in_physical_units(name, window, **{told: heads and heads + [1] * (told == "block_heads")})
        with attending(emulator, plain_attention), FlopCounterMode(display=False) as counter, torch.no_grad():
            emulator(frames(emulator.network, 1), COND.double())
        assert card(emulator)["flops"] == counter.get_total_flops(), (name, window, heads)
        assert card(emulator)["attention_flops"] == counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


@pytest.mark.parametrize("name", ["ViT", "ReViT", "EncoderDecoderViT"])
def test_heads_that_are_removed_are_heads_behind_gates_at_zero(name, tmp_path):
    emulator = in_physical_units(name, 4)
    x, cond = frames(emulator.network), COND.double().expand(2, 5)
    of, draw = sites(emulator, ("head",)), torch.Generator().manual_seed(3)
    gates = [(torch.rand(site.count, generator=draw) < 0.5).double() for site in of]
    for site in of:
        nn.init.zeros_(site.first.bias)  # a head behind a gate adds no constant either
    pieces = unit_named("head").pieces(emulator)
    small = materialize(emulator, Masks(pieces.spread(torch.cat(gates) > 0)))
    with gated(of, gates):
        behind = emulator(x, cond)
    assert torch.allclose(small(x, cond), behind, atol=1e-12) and not torch.allclose(behind, emulator(x, cond), atol=1e-3)
    assert [m.num_heads for m in small.modules() if isinstance(m, Attention)] == [int(gate.sum()) for gate in gates]
    assert [m.windows for m in small.modules() if isinstance(m, Attention)] == [m.windows for m in emulator.modules() if isinstance(m, Attention)]

    write_checkpoint(tmp_path / "small.tar", emulator_state(small.float()))
    again = load_emulator(tmp_path / "small.tar")
    assert again.network.config["window"] == 4 and torch.equal(again(x.float(), cond.float()), small.eval()(x.float(), cond.float()))
    assert sum(p.numel() for p in prunable(again).values()) < sum(p.numel() for p in prunable(emulator).values())


@pytest.mark.parametrize("settings", [dict(activation_checkpointing=True), dict(compile=True)])
def test_training_computes_the_same_however_it_is_asked(settings, monkeypatch):
    "Layers computed again in the backward pass, and a compiled forward pass, give the gradients they gave."
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile(forward, backend="aot_eager", fullgraph=True))
    emulator = in_physical_units("ViT", 4)
    x = frames(emulator.network)
    batch = {"x": x, "y": x[:, :, 0].roll(1, -1), "cond": COND.double().expand(2, 5)}
    plain, other = (
        torch.autograd.grad(errors(emulator, batch).mean(), list(emulator.parameters()))
        for errors in (losses, _taken(emulator.network, losses, LoopConfig(**settings)))
    )
    torch.compiler.reset()
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(plain, other, strict=True))


def test_half_precision_is_near_full_precision():
    emulator = in_physical_units("ViT", 4).float()
    x = frames(emulator.network).float()
    exact = emulator.predict(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = emulator.predict(x)
    assert 1e-5 < (half - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 2e-2


def test_a_checkpoint_of_full_attention_starts_windows_of_the_whole_domain_and_no_others(tmp_path):
    write_checkpoint(tmp_path / "full.tar", emulator_state(in_physical_units("ViT", 0).float()))
    model = dict(img_size=32, patch_size=4) | SIZES
    start = lambda **keys: check_start(Config({"checkpoint_file": str(tmp_path / "full.tar")}), ModelConfig(**model | keys))
    start()
    start(window=8)
    with pytest.raises(LabError, match="does not fit the model: window is 0 there and 4 in \\[model\\]$"):
        start(window=4)
    older = emulator_state(in_physical_units("ViT", 0).float())
    del older["model"]["window"]  # from before there were windows
    write_checkpoint(tmp_path / "older.tar", older)
    assert load_emulator(tmp_path / "older.tar").network.config["window"] == 0


@pytest.mark.parametrize("keys, told", [
    (dict(window=6), "model.window = 6: windows of 6 tokens do not fill the 16 of a side: there are 2, 4, 8, 0 (all tokens)"),
    (dict(window=5), "model.window = 5: windows of 5 tokens cannot be shifted by half of one: there are 2, 4, 8, 0 (all tokens)"),
    (dict(window=32), "model.window = 32: windows of 32 tokens do not fill the 16 of a side: there are 2, 4, 8, 0 (all tokens)"),
    (dict(window=-2), "model.window = -2: must be greater than or equal to 0"),
    (dict(window=4, patch_size=5), "[model] img_size = 64 is not divisible by patch_size = 5"),
])
@pytest.mark.parametrize("name", ["ViT", "EncoderDecoderViT", "DiT"])
def test_a_window_that_does_not_fit_is_one_line(name, keys, told):
    with pytest.raises(LabError) as caught:
        ModelConfig.parse(dict(model_type=name, img_size=64) | keys, "model")
    assert str(caught.value) == told
