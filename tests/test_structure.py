"""Units, selection, the physically smaller model and the price of its pieces, on random masks of several networks."""
import json
from copy import deepcopy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from turbvit_nb.compress.latency import costs, kept_latency
from turbvit_nb.compress.masks import HoldMasks, Masks, prunable
from turbvit_nb.compress.materialize import kept_indices, materialize, small_masks
from turbvit_nb.compress.schedules import Step
from turbvit_nb.compress.selection import SCOPES, select
from turbvit_nb.compress.units import UNITS, unit_named
from turbvit_nb.flow.generative import Generative
from turbvit_nb.lab.config import LabError
from turbvit_nb.lab.training import LoopConfig, build_optimizer
from turbvit_nb.layers.attention import Block
from turbvit_nb.model import (
    Emulator, ModelConfig, Normaliser, card, create_emulator, create_model, emulator_state, load_emulator, losses,
)

COND = [1000.0, 0.0, 4.0, 0.1, 20.0]
NETWORKS = {
    "ViT": dict(embed_dim=16, depth=2, num_heads=4, mlp_ratio=1.5),
    "wide heads": dict(embed_dim=12, depth=3, num_heads=2, mlp_ratio=1.0, patch_recovery="linear"),
    "already uneven": dict(embed_dim=16, depth=3, num_heads=4, block_heads=[3, 0, 1], block_mlp=[5, 9, 0], patch_recovery="conv"),
    "in windows": dict(embed_dim=16, depth=2, num_heads=4, mlp_ratio=1.5, window=2),
    "ReViT": dict(model_type="ReViT", embed_dim=16, depth=2, num_heads=4, conditions=["Re", "beta"], num_frames=2),
    "EncoderDecoderViT": dict(
        model_type="EncoderDecoderViT", num_frames=2, num_out_frames=2, encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=4,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, mlp_ratio=1.0),
    "two towers in windows": dict(
        model_type="EncoderDecoderViT", num_frames=2, encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=4,
        decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2, mlp_ratio=1.0, window=2),
}
some = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])


def an_emulator(name: str, dtype=torch.float64) -> Emulator:
    "A small emulator whose biases and last layer are alive."
    torch.manual_seed(0)
    keys = dict(img_size=16, patch_size=4) | NETWORKS[name]
    emulator = create_emulator(ModelConfig(**keys), Normaliser([0.0, 0.0], [1.0, 2.0], [0.5, 0.5]), step=0.1)
    for p in [*(p for p in emulator.parameters() if p.ndim == 1), emulator.network.output.weight]:
        nn.init.normal_(p, std=0.3)
    return emulator.to(dtype)


def flow(emulator: Emulator, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    "Frames and flow parameters."
    p, g = next(emulator.parameters()), torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, emulator.num_frames, 16, 16, generator=g, dtype=torch.float64)
    return x.to(p), torch.tensor([COND] * n).to(p)


def random_masks(emulator: Emulator, seed: int, share: float, words: list[str], extra: float = 0.0) -> Masks:
    "Each piece gone with a chance, and besides it each single weight with another."
    g = torch.Generator().manual_seed(seed)
    pieces = unit_named(words).pieces(emulator)
    masks = pieces.spread(torch.rand(len(pieces), generator=g) >= share)
    return Masks({name: mask & (torch.rand(mask.shape, generator=g) >= extra) for name, mask in masks.items()})


@some
@given(
    name=st.sampled_from(list(NETWORKS)), words=st.sampled_from([["head"], ["channel"], ["head", "channel"], ["block"], ["row"]]),
    seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), extra=st.sampled_from([0.0, 0.5]),
    multiple=st.sampled_from([1, 2, 8]), double=st.booleans(),
)
def test_the_small_model_computes_what_the_masked_one_does(name, words, seed, share, extra, multiple, double):
    "On any masks, in both precisions; its input unchanged, its masks those of what stays, its widths multiples."
    emulator = an_emulator(name, torch.float64 if double else torch.float32)
    masks, (x, cond) = random_masks(emulator, seed, share, words, extra), flow(emulator)
    before = {key: value.clone() for key, value in emulator.state_dict().items()}
    small = materialize(emulator, masks, multiple=multiple)
    assert all(torch.equal(value, before[key]) for key, value in emulator.state_dict().items())
    masked = masks.apply(deepcopy(emulator))
    with torch.no_grad():
        scale = emulator(x, cond).abs().max().clamp(min=1)
        assert (small(x, cond) - masked(x, cond)).abs().max() <= scale * (1e-12 if double else 1e-5)

    kept = kept_indices(emulator, masks, multiple)
    fewer = small_masks(masks, kept)
    fewer.matched(small)
    folded = (".fc2.bias", ".proj.bias")
    for key, value in kept.take(dict(masked.named_parameters())).items():
        assert key.endswith(folded) or torch.equal(small.get_parameter(key), value)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in emulator.parameters())
    for new, old in zip(blocks_of(small), blocks_of(emulator), strict=True):
        n, head_width = new.mlp.fc1.out_features, new.attn.proj.in_features
        assert n % multiple == 0 or n == old.mlp.fc1.out_features
        assert head_width % multiple == 0 or head_width == old.attn.proj.in_features


def blocks_of(emulator: Emulator) -> list[Block]:
    "The blocks of all towers."
    return [m for m in emulator.network.modules() if isinstance(m, Block)]


@pytest.mark.parametrize("name", NETWORKS)
def test_through_a_file(name, tmp_path):
    "A checkpoint of a small model is one like any other, and what is loaded can be cut again."
    emulator = an_emulator(name, torch.float32)
    small = materialize(emulator, random_masks(emulator, 3, 0.5, ["head", "channel"])).eval()
    torch.save(emulator_state(small), tmp_path / "small.tar")
    again, (x, cond) = load_emulator(tmp_path / "small.tar"), flow(emulator)
    assert torch.equal(again(x, cond), small(x, cond))
    assert again.network.config == small.network.config
    less = random_masks(again, 4, 0.5, ["channel"])
    torch.testing.assert_close(materialize(again, less)(x, cond), less.apply(again)(x, cond), rtol=1e-5, atol=1e-5)
    assert card(small)["flops"] < card(emulator)["flops"]


@pytest.mark.parametrize("words, share", [(["head"], 0.5), (["channel"], 1.0), (["head", "channel"], 0.5), (["block"], 0.7)])
def test_one_that_draws_is_cut_like_any_other(words, share, tmp_path):
    "A diffusion transformer, whose blocks are scaled by what they are told: of the same noise the same member, also from a file."
    torch.manual_seed(0)
    config = ModelConfig(model_type="DiT", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=4, mlp_ratio=1.5)
    emulator = Generative(create_model(**config.model_dump()), Normaliser([0.0, 0.0], [1.0, 2.0], [0.5, 0.5]), step=0.1).double()
    for p in emulator.network.parameters():
        nn.init.normal_(p, std=0.2)
    masks, (x, cond) = random_masks(emulator, 3, share, words), flow(emulator)
    small, masked = materialize(emulator, masks), masks.apply(deepcopy(emulator))
    member = lambda one: one(x, cond, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (member(small) - member(masked)).abs().max() <= 1e-11 * member(masked).abs().max()
        assert (member(emulator) - member(masked)).abs().max() > 1e-3 * member(masked).abs().max()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in emulator.parameters())
    small = small.float().eval()
    torch.save(emulator_state(small), tmp_path / "small.tar")
    again, x, cond = load_emulator(tmp_path / "small.tar"), x.float(), cond.float()
    assert torch.equal(member(again), member(small)) and again.network.config == small.network.config


def some_steps(emulator: Emulator, masks: Masks, state: dict | None, steps: int = 2) -> dict:
    "AdamW with the masks held; its state."
    optimizer, hold = build_optimizer(emulator.network, LoopConfig(lr=1e-3)), HoldMasks(masks, emulator)
    if state is not None:
        optimizer.load_state_dict(state)

    class Learner:
        pass

    learner, (x, cond) = Learner(), flow(emulator, 3)
    learner.optimizer = optimizer
    y = x[:, :, :1].roll(1, -1).expand(-1, -1, emulator.out_frames, -1, -1)
    hold.before_fit(learner)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(emulator, {"x": x, "y": y, "cond": cond}).mean().backward()
        hold.after_backward(learner)
        optimizer.step()
        hold.after_step(learner)
    return optimizer.state_dict()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_training_goes_on_as_the_masked_model_would(name, share):
    "Moments and weights of the small model are those of the masked one, step for step; with whole blocks gone too."
    emulator = an_emulator(name)
    masks = random_masks(emulator, 7, share, ["head", "channel"], extra=0.2)
    state = some_steps(emulator, masks, None)
    small, cut = materialize(emulator, masks, state)
    kept = kept_indices(emulator, masks)
    x, cond = flow(emulator)
    torch.testing.assert_close(small(x, cond), emulator(x, cond), rtol=1e-11, atol=1e-11)
    some_steps(emulator, masks, state)
    after = some_steps(small, small_masks(masks, kept), cut)
    assert {float(moments["step"]) for moments in after["state"].values()} <= {2.0, 4.0}
    torch.testing.assert_close(small(x, cond), emulator(x, cond), rtol=1e-9, atol=1e-9)
    live = lambda key: ".attn." not in key and ".mlp." not in key and ".norm1" not in key and ".norm2" not in key
    for key, value in kept.take(dict(emulator.named_parameters())).items():
        if live(key) or share < 1:
            torch.testing.assert_close(small.get_parameter(key), value, rtol=1e-9, atol=1e-9)


def test_against_torch_pruning():
    "Its graph of dependencies finds the same rows and columns; weights, outputs and multiplications agree."
    import torch_pruning as tp

    emulator = an_emulator("ViT", torch.float32)
    masks = random_masks(emulator, 5, 0.5, ["head", "channel"])
    kept = kept_indices(emulator, masks)
    small = materialize(emulator, masks)
    tower, x = deepcopy(emulator.network.blocks), torch.randn(1, 16, 16)
    graph = tp.DependencyGraph().build_dependency(tower, example_inputs=x)
    for i, block in enumerate(tower):
        heads, channels = kept.heads[f"network.blocks.{i}.attn"], kept.channels[f"network.blocks.{i}.mlp"]
        assert 0 < len(heads) < 4 and 0 < len(channels) < 24, "choose another seed"
        gone = [4 * h + j for h in set(range(4)) - set(heads.tolist()) for j in range(4)]
        graph.get_pruning_group(block.attn.proj, tp.prune_linear_in_channels, idxs=gone).prune()
        gone = sorted(set(range(24)) - set(channels.tolist()))
        graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, idxs=gone).prune()
        block.attn.num_heads = len(heads)
    theirs, ours = tower.state_dict(), small.network.blocks.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    torch.testing.assert_close(tower(x), small.network.blocks(x))
    counts = [tp.utils.count_ops_and_params(net, x) for net in (tower, small.network.blocks)]
    assert counts[0] == counts[1]


@some
@given(
    name=st.sampled_from(["ViT", "EncoderDecoderViT", "already uneven"]), seed=st.integers(0, 99),
    words=st.sampled_from([*UNITS, ["head", "channel"]]), scope=st.sampled_from(list(SCOPES)),
    targets=st.lists(st.floats(0, 1), min_size=1, max_size=3).map(sorted),
)
def test_exactly_so_many_and_never_back(name, seed, words, scope, targets):
    "In every scope, along any schedule, with new scores at every step."
    emulator = an_emulator(name, torch.float32)
    pieces, g = unit_named(words).pieces(emulator), torch.Generator().manual_seed(seed)
    if scope == "row" and words != "weight":
        with pytest.raises(LabError, match="scope = 'row' compares the single weights"):
            select(Masks.dense(prunable(emulator)), random_scores(emulator, g), Step(1, 0.5, 0), pieces, scope)
        return
    cost, masks = 0.5 + torch.rand(len(pieces), generator=g), Masks.dense(prunable(emulator))
    for index, target in enumerate(targets, 1):
        before, step = masks, Step(index, target, 0)
        masks = select(masks, random_scores(emulator, g), step, pieces, scope, cost)
        assert all(not (masks[key] & ~before[key]).any() for key in masks)
        alive = pieces.alive(masks)
        assert all(torch.equal(masks[key], mask) for key, mask in pieces.spread(alive).items())
        if scope == "ms":
            short = target * cost.sum() - cost[~alive].sum()
            assert -1e-5 * cost.sum() <= short <= cost.max() + 1e-5
        else:
            for group in SCOPES[scope](pieces):
                assert (~alive[group]).sum(1).eq(step.count(group.shape[1])).all()


def random_scores(emulator: Emulator, g: torch.Generator) -> dict[str, torch.Tensor]:
    "Scores with many ties."
    return {key: torch.randint(0, 4, p.shape, generator=g).float() for key, p in prunable(emulator).items()}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "4:8"])
def test_n_of_m_in_every_group(pattern):
    "Every m consecutive inputs of the blocks' layers keep n, along the way there too; the other layers stay dense."
    stay, among = map(int, pattern.split(":"))
    emulator, g = an_emulator("ViT"), torch.Generator().manual_seed(0)
    pieces, masks = unit_named(pattern).pieces(emulator), Masks.dense(prunable(emulator))
    for index, gone in enumerate(range(among - stay + 1), 1):
        masks = select(masks, random_scores(emulator, g), Step(index, gone / among, 0), pieces)
        for key, mask in masks.items():
            left = mask.flatten(1).unflatten(1, (-1, among)).sum(-1)
            assert left.eq(among - gone if ".blocks." in key else among).all(), key


def test_a_table_of_prices_is_kept(tmp_path):
    "Every tower has prices; a second look reads the same ones; a file of another network is refused."
    emulator = an_emulator("EncoderDecoderViT", torch.float32)
    table = kept_latency(tmp_path / "run" / "latency.json", emulator, batch_size=1, rounds=1)
    assert kept_latency(tmp_path / "run" / "latency.json", emulator, batch_size=1) == table
    assert set(table.each) == {"encoder", "decoder"} and table.tokens == {"encoder": 32, "decoder": 16}
    assert set(json.loads((tmp_path / "run" / "latency.json").read_text())) >= {"each", "batch_size", "threads"}
    mix = unit_named(["head", "channel"]).pieces(emulator)
    spent = costs(table, mix)
    assert (spent > 0).all() and len(spent) == len(mix)
    masks = select(Masks.dense(prunable(emulator)), {k: p.detach().abs() for k, p in prunable(emulator).items()}, Step(1, 0.5, 0), mix, "ms", spent)
    assert spent[~mix.alive(masks)].sum() <= 0.5 * spent.sum() * (1 + 1e-6)
    with pytest.raises(LabError, match="measured for another network"):
        kept_latency(tmp_path / "run" / "latency.json", an_emulator("ViT"), batch_size=1)


def test_a_head_is_removed_with_its_constant():
    "Dead values whose bias lives add a constant, whatever queries and keys do."
    emulator = an_emulator("ViT")
    weight = emulator.network.blocks[0].attn.qkv.weight
    masks = Masks.dense(prunable(emulator))
    masks["network.blocks.0.attn.qkv.weight"][32:40] = False  # the values of heads 0 and 1
    small, (x, cond) = materialize(emulator, masks), flow(emulator)
    assert small.network.config["block_heads"] == [2, 4] and weight[32:40].any()
    torch.testing.assert_close(small(x, cond), masks.apply(deepcopy(emulator))(x, cond), rtol=1e-12, atol=1e-12)
