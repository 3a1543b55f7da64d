"""The model as others use it: compiled, in parallel, in half precision, of every kind and role, from old checkpoints, beside other counters."""
import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from turbvit_nb.lab.checkpoints import ROLES, Identity, as_state, identify
from turbvit_nb.lab.config import Config, LabError
from turbvit_nb.lab.files import write_checkpoint
from turbvit_nb.layers.attention import attending, plain_attention
from turbvit_nb.layers.convolution import CircularConv
from turbvit_nb.layers.embed import TubeletConv
from turbvit_nb.model import (
    NETWORKS, ModelConfig, Normaliser, card, create_emulator, create_model, emulator_from_state, emulator_state, load_emulator, load_legacy, losses, rollout,
)
from turbvit_nb.physics.py2d import Regime, TreeWriter
from turbvit_nb.physics.spectral import Grid

sys.path.insert(0, str(Path(__file__).parent))
from own_kinds import Program, Swirling
from same_bits import group_of_one

SMALL = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, base_channels=8) | {
    f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in dict(embed_dim=32, depth=1, num_heads=2).items()
}
COND = torch.tensor([1000.0, 0, 4, 0.1, 20])


def flows(*shape, N=32):
    "Random smooth velocities (…, 2, N, N)."
    grid = Grid.of(torch.empty(N, N))
    return grid.velocity(grid.inverse(grid.transform(torch.randn(*shape, N, N)) * torch.exp(-grid.k2 / 8)) * N)


def a_batch(B=4, T=1, K=2):
    return {"x": flows(B, T).transpose(1, 2), "y": flows(B, K).transpose(1, 2), "cond": COND.expand(B, 5)}


FORECASTING = [name for name, kind in NETWORKS.items() if not kind.section.draws]


@pytest.fixture(params=[*FORECASTING, "ViT in windows", "EncoderDecoderViT in windows"])
def emulator(request):
    torch.manual_seed(0)
    model_type, windowed = request.param.removesuffix(" in windows"), request.param.endswith(" in windows")
    em = create_emulator(ModelConfig(model_type=model_type, window=4 * windowed, **SMALL), Normaliser([0.1, 0.0], [1.0, 2.0], [0.3, 0.2]), step=0.1)
    nn.init.normal_(em.network.output.weight, std=0.05)
    return em


def test_every_parameter_gets_a_gradient(emulator):
    losses(emulator, a_batch()).mean().backward()
    assert [name for name, p in emulator.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_few_steps_of_training_in_half_precision(emulator):
    batch, optimizer, values = a_batch(), torch.optim.AdamW(emulator.parameters(), 3e-3), []
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(emulator, batch).mean()
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_gradient_against_finite_differences(emulator):
    emulator, batch = emulator.double(), {key: value.double() for key, value in a_batch(2).items()}
    losses(emulator, batch).mean().backward()
    torch.manual_seed(1)
    for p in [p for name, p in emulator.named_parameters() if name.endswith("weight")][::5]:
        direction, e = torch.randn_like(p), 1e-6
        with torch.no_grad():
            sides = [losses(emulator, batch).mean() for shift in (e, -2 * e) if p.add_(direction, alpha=shift) is p]
            p.add_(direction, alpha=e)
        assert torch.isclose((sides[0] - sides[1]) / (2 * e), (p.grad * direction).sum(), rtol=1e-4, atol=1e-8)


def test_per_sample_gradients_sum_to_the_batch_gradient(emulator):
    batch, weights = a_batch(3), {name: p.detach() for name, p in emulator.named_parameters()}

    def one(weights, sample):
        model = lambda *args: torch.func.functional_call(emulator, weights, args)
        return losses(model, {key: value[None] for key, value in sample.items()})[0]

    with attending(emulator, plain_attention):
        each = torch.func.vmap(torch.func.grad(one), (None, 0))(weights, batch)
    losses(emulator, batch).sum().backward()
    for name, p in emulator.named_parameters():
        assert torch.allclose(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-5), name


def test_compiles_in_one_piece(emulator):
    batch = a_batch()
    expected = losses(emulator, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(emulator, backend="aot_eager", fullgraph=True)
        assert torch.allclose(losses(compiled, batch), expected, rtol=1e-4)
    torch.compiler.reset()


def test_data_parallel(emulator, tmp_path):
    batch = a_batch()
    with group_of_one(tmp_path):
        parallel = DistributedDataParallel(emulator)
        together = losses(parallel, batch)
        together.mean().backward()
        together = together.detach()
        del parallel
    assert torch.equal(together, losses(emulator, batch))
    state = {f"module.{key}": value for key, value in emulator.network.state_dict().items()}
    again = emulator_from_state(emulator_state(emulator) | {"model_state": state})
    assert torch.equal(losses(again.train(emulator.training), batch), losses(emulator, batch))


def test_copies_and_checkpoints_are_the_same_emulator(emulator, tmp_path):
    x = flows(2, 1).transpose(1, 2)
    torch.save(emulator_state(emulator), tmp_path / "best.tar")
    expected = torch.stack(list(rollout(emulator, x, 3, cond=COND.expand(2, 5))))
    for other in (copy.deepcopy(emulator), load_emulator(tmp_path / "best.tar")):
        assert torch.equal(torch.stack(list(rollout(other, x, 3, cond=COND.expand(2, 5)))), expected)


def test_a_long_rollout_stays_without_divergence(emulator):
    *_, last = rollout(emulator, flows(1, 1).transpose(1, 2), 100, cond=COND[None])
    assert Grid.of(last).divergence(last).abs().max() < 1e-4 * max(1, last.abs().max().item())


def test_the_same_seed_builds_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_model(**SMALL).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_card_against_torch_pruning():
    from torch_pruning.utils import count_ops_and_params

    for kind in ("ViT", "UNet"):
        emulator = create_emulator(ModelConfig(model_type=kind, **SMALL), Normaliser([0.0, 0.0], [1.0, 1.0]))
        ours = card(emulator)
        products = (ours["flops"] - ours["attention_flops"]) // 2  # torch-pruning counts no attention, but biases and norms
        for module in emulator.network.modules():  # and no subclass of the layers it knows
            if isinstance(module, CircularConv):
                module.__class__ = nn.Conv2d
            if isinstance(module, TubeletConv):
                products -= 64 * module.weight.numel()
        macs, parameters = count_ops_and_params(emulator.network, torch.zeros(1, 2, 1, 32, 32))
        assert parameters == ours["parameters"]
        assert products < macs < 1.05 * products


def test_card_of_the_paper_size():
    "The ViT of the study: parameters and operations by hand."
    costs = card(create_emulator(ModelConfig(img_size=64), Normaliser([0.0, 0.0], [1.0, 1.0])))
    L, D, depth = 256, 128, 4
    assert costs["attention_flops"] == depth * 4 * L**2 * D
    assert costs["flops"] == depth * (24 * L * D**2 + 4 * L**2 * D) + 2 * L * (32 * D) + 2 * L * 9 * D * 32
    assert costs["prunable"] == depth * 12 * D**2 + 32 * D + 9 * D * 32


def of_role(role: str):
    "An emulator as a checkpoint of this role may hold it."
    if role in ("latent", "generative"):
        return Swirling(size=32, points=16, step=0.1)
    if role == "deployed":
        return Program(size=32, step=0.1)
    uneven = dict(block_heads=[2, 0], block_mlp=[0, 50]) if role == "materialised" else {}
    torch.manual_seed(1)
    emulator = create_emulator(ModelConfig(**SMALL | uneven), Normaliser([0.1, 0.0], [1.0, 2.0], [0.3, 0.2]), step=0.1)
    nn.init.normal_(emulator.network.output.weight, std=0.05)
    return emulator


@pytest.mark.parametrize("role", ROLES)
def test_a_checkpoint_of_every_role_loads_and_goes_on_to_the_same_bits(role, tmp_path):
    emulator, path = of_role(role).eval(), tmp_path / "some.tar"
    write_checkpoint(path, emulator_state(emulator) | {"identity": as_state(Identity("some", role=role))})
    again = load_emulator(path)
    assert type(again) is type(emulator) and identify(path).role == role
    assert [getattr(again, n) for n in ("fields", "step", "num_frames", "out_frames", "size", "stochastic")] == [
        getattr(emulator, n) for n in ("fields", "step", "num_frames", "out_frames", "size", "stochastic")]
    x = flows(2, 1).transpose(1, 2)[:, : len(emulator.fields)]
    seeded = lambda: torch.Generator().manual_seed(7)
    straight = [torch.stack(list(rollout(e, x, 5, members=2, generator=seeded()))) for e in (emulator, again)]
    assert straight[0].shape == (5, 2, 2, len(emulator.fields), 32, 32) and torch.equal(*straight)
    alike = torch.equal(straight[0][:, :, 0], straight[0][:, :, 1])
    assert alike != emulator.stochastic


def test_the_global_random_numbers_are_not_touched():
    emulator, x = Swirling(size=32, points=16, step=0.1), flows(1, 1).transpose(1, 2)
    before = torch.get_rng_state()
    one, two = (torch.stack(list(rollout(emulator, x, 3, members=2))) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(one, two)


@pytest.mark.parametrize("kind", FORECASTING)
def test_checkpoints_of_before_there_were_kinds(kind, tmp_path):
    "They have no builder, and the keys of every network."
    emulator = create_emulator(ModelConfig(model_type=kind, **SMALL), Normaliser([0.1, 0.0], [1.0, 2.0], [0.3, 0.2]), step=0.1)
    nn.init.normal_(emulator.network.output.weight, std=0.05)
    state = emulator_state(emulator)
    everything = {"dropout": 0.0, "conditions": ["Re", "fkx", "fky", "alpha", "beta"], "tubelet_size": 1, "base_channels": 8,
                  "decoder_embed_dim": 32, "patch_size": 4, "legacy_token_layout": False, "embed_dim": 32, "num_heads": 2}
    state["model"] = everything | {key: value for key, value in state.pop("model").items() if not key.startswith("block_")}
    del state["builder"]
    torch.save(state, tmp_path / "best.tar")
    x = flows(2, 1).transpose(1, 2)
    assert torch.equal(load_emulator(tmp_path / "best.tar")(x, COND.expand(2, 5)), emulator.eval()(x, COND.expand(2, 5)))


def test_a_kind_that_is_not_imported_is_named(tmp_path):
    write_checkpoint(tmp_path / "flow.tar", emulator_state(Swirling(size=32, points=16)))
    code = f"from turbvit_nb.model import load_emulator; load_emulator({str(tmp_path / 'flow.tar')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "holds the kind of emulator 'swirling', which is not known here: import own_kinds first" in done.stderr


def test_a_module_named_in_a_file_is_imported_only_from_this_package(tmp_path):
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    state = emulator_state(Swirling(size=32, points=16))
    for module in ("evil", "turbvit_nb.model; import evil", "turbvit_nb..evil", "turbvit_nb.no.such.module"):
        write_checkpoint(tmp_path / "flow.tar", state | {"builder": {"kind": "evil", "module": module}})
        code = f"from turbvit_nb.model import load_emulator; load_emulator({str(tmp_path / 'flow.tar')!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert "'evil', which is not known here" in done.stderr and not (tmp_path / "ran").exists(), done.stderr


def test_a_config_that_starts_from_another_model(tmp_path):
    torch.save(emulator_state(of_role("dense")), tmp_path / "dense.tar")
    torch.save(emulator_state(of_role("materialised")), tmp_path / "small.tar")
    own = {key: SMALL[key] for key in ("img_size", "embed_dim", "depth", "num_heads")}

    def check(file, **keys):
        config = Config({"checkpoint_file": str(tmp_path / file), "model": own | keys})
        config.section("model").check(config, "model")

    check("dense.tar", model_type="ViT", base_channels=64)
    check("small.tar", block_heads=[2, 0], block_mlp=[0, 50])
    check("small.tar")  # widths that are left open are the checkpoint's
    for file, keys, message in (
        ("dense.tar", {"embed_dim": 64}, "embed_dim is 32 there and 64"),
        ("dense.tar", {"model_type": "ReViT"}, "model_type is ViT there and ReViT"),
        ("small.tar", {"block_heads": [1, 1]}, r"block_heads is \[2, 0\] there and \[1, 1\]"),
    ):
        with pytest.raises(LabError, match=message):
            check(file, **keys)
    (tmp_path / "none.tar").write_bytes(b"no checkpoint")
    with pytest.raises(LabError, match="none.tar"):
        check("none.tar")


@pytest.mark.parametrize("frames, input_step", [(1, 1), (2, 2), (2, 1)])
def test_frames_that_cannot_be_followed_are_refused_at_the_second_step(frames, input_step):
    emulator = create_emulator(ModelConfig(num_frames=frames, **SMALL), Normaliser([0.0, 0.0], [1.0, 1.0]), step=2.0, input_step=float(input_step))
    x, go = flows(1, frames).transpose(1, 2), lambda steps: len(list(rollout(emulator, x, steps)))
    assert go(1) == 1
    if frames > 1 and input_step == 1:
        with pytest.raises(LabError, match="set input_step = target_step"):
            go(2)
    else:
        assert go(2) == 2


@pytest.fixture(params=[1, 2])
def old_run(tmp_path, request):
    "A run folder of the earlier project, and a tree of data with its statistics."
    T = request.param
    regime = Regime(1000, fkx=0, fky=4, alpha=0.1, beta=20, NX=16, dt=2e-4, IC=1)
    run = tmp_path / "results" / regime.path()
    writer = TreeWriter(tmp_path / "results", regime)
    for n in range(1, 7):
        writer.append(0.06 * n, np.random.default_rng(n).standard_normal((16, 16)))
    (run / "stats").mkdir()
    np.save(run / "stats" / "mean_full_field.npy", np.array([0.25, -0.5]))
    np.save(run / "stats" / "std_full_field.npy", np.array([1.5, 2.0]))
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "config.toml").write_text(f"""
[model]
model_type = "ViT"
img_size = 16
patch_size = 4
embed_dim = 16
depth = 1
num_heads = 2
num_frames = {T}
[train_dataset]
data_dir = "{run / 'data'}"
frame_range = [[1, 7]]
target_step = 2
input_step = 2
num_frames = {T}
""")
    torch.manual_seed(0)
    network = create_model(img_size=16, embed_dim=16, depth=1, num_heads=2, num_frames=T, target="absolute", legacy_token_layout=True)
    seen = torch.arange(0, 16, T)  # the channels that the earlier project's last convolution saw
    weights = network.state_dict() | {"patchrecovery.conv.weight": network.output.weight.detach()[:, seen].clone()}
    with torch.no_grad():
        network.output.weight[:, [d for d in range(16) if d % T]] = 0
    path = tmp_path / "old" / "checkpoints" / "best.tar"
    torch.save({"epoch": 3, "model_state": weights, "optimizer_state": {}}, path)
    return path, network, run


def test_a_legacy_checkpoint_in_its_run_folder(old_run):
    path, network, run = old_run
    emulator, x = load_emulator(path), torch.randn(2, 2, network.config["num_frames"], 16, 16)
    mean, std = (torch.tensor(v)[:, None, None, None] for v in ([0.25, -0.5], [1.5, 2.0]))
    assert torch.allclose(emulator(x), network((x - mean) / std) * std + mean, atol=1e-5)
    assert abs(emulator.step - 0.12) < 1e-12
    assert (emulator.target, emulator.project, emulator.training) == ("absolute", False, False)
    assert [frame.shape for frame in rollout(emulator, x, 3)] == [(2, 2, 16, 16)] * 3
    write_checkpoint(path.with_name("today.tar"), emulator_state(emulator))  # trained on, it is a checkpoint of today
    assert torch.equal(load_emulator(path.with_name("today.tar"))(x), emulator(x))


def test_a_legacy_checkpoint_without_statistics(old_run):
    path, _, run = old_run
    (run / "stats" / "mean_full_field.npy").unlink()
    with pytest.raises(LabError, match="has no stats/mean_full_field.npy"):
        load_emulator(path)
    (path.parents[1] / "config.toml").unlink()
    with pytest.raises(LabError, match="holds weights only"):
        load_emulator(path)


def test_a_legacy_checkpoint_that_does_not_fit(old_run):
    path = old_run[0]
    with pytest.raises(LabError, match=r"best.tar does not fit the model: blocks.1.attn.proj.bias is missing; .* and 9 more"):
        load_legacy(path, img_size=16, embed_dim=16, depth=2, num_heads=2, num_frames=old_run[1].config["num_frames"])
    with pytest.raises(LabError, match=r"cut short|damaged|tensors"):
        path.write_bytes(path.read_bytes()[:500])
        load_emulator(path)
