"""On a GPU: the same answers, losses and gradients as on a CPU, in bfloat16 and compiled too, up to 256 points per side; jobs that stop and go on."""
import os
from pathlib import Path

import pytest
import tomli_w
import torch

from same_bits import StopSoon
from turbvit_nb.data.generate import GenerateConfig, generate
from turbvit_nb.flow.generative import Generative, drawn_losses
from turbvit_nb.flow.job import train_flow
from turbvit_nb.flow.teaching import draws_for
from turbvit_nb.inference import infer
from turbvit_nb.lab.files import read_checkpoint
from turbvit_nb.lab.ranks import resolve_device
from turbvit_nb.lab.runs import Stopped, open_run
from turbvit_nb.latent.job import keep_latents, train_latent
from turbvit_nb.model import Emulator, ModelConfig, Normaliser, create_model, load_emulator, rollout
from turbvit_nb.physics.py2d import find_runs, open_store
from turbvit_nb.short_analysis import short_analysis
from turbvit_nb.sparse.job import train_sparsely
from turbvit_nb.train import train

DEVICE = os.environ.get("TURBVIT_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU")
resolve_device("auto")  # as every job does: float32 is float32
NETWORKS = {
    "ViT": dict(patch_size=8, embed_dim=64, depth=2, num_heads=4), "UNet": dict(base_channels=16, depth=2),
    "DiT": dict(patch_size=8, embed_dim=64, depth=2, num_heads=4), "ToldUNet": dict(base_channels=16, depth=2),
    "ViT in windows": dict(patch_size=8, embed_dim=64, depth=2, num_heads=4, window=4),
    "DiT in windows": dict(patch_size=8, embed_dim=64, depth=2, num_heads=4, window=4),
}


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    "The root mean square difference over that of the second."
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def made(name: str, size: int = 64, kind: type = Emulator, **how) -> Emulator:
    "An emulator whose weights are not those of the start, which say nothing."
    torch.manual_seed(0)
    network = create_model(**ModelConfig(model_type=name.removesuffix(" in windows"), img_size=size, target="absolute", **NETWORKS[name]).model_dump())
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return kind(network, Normaliser([0.0, 0.0], [1.0, 1.0]), target="absolute", **how)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("network", ["ViT", "ViT in windows", "UNet"])
def test_answers_and_gradients_are_those_of_the_cpu(network, size):
    x = torch.randn(2, 2, 1, size, size)
    here, there = made(network, size), made(network, size).to(DEVICE)
    one, other = here(x), there(x.to(DEVICE))
    assert other.device.type == DEVICE and off(other, one) < 1e-4
    for y in (one, other):
        y.square().mean().backward()
    assert all(off(q.grad, p.grad) < 1e-3 for p, q in zip(here.parameters(), there.parameters()) if p.grad is not None and p.grad.norm() > 1e-6)
    fast = made(network, size, precision="bf16").to(DEVICE).eval()
    with torch.inference_mode():
        assert 0 < off(fast(x.to(DEVICE)), one) < 3e-2


@pytest.mark.parametrize("network", ["ViT", "ViT in windows", "UNet"])
def test_compiled_it_is_the_same_network(network):
    there = made(network).to(DEVICE)
    x, compiled = torch.randn(4, 2, 1, 64, 64, device=DEVICE), torch.compile(there.network.forward)
    plain, fused = there.network(x), compiled(x)
    assert off(fused, plain) < 1e-4
    slope = [torch.autograd.grad(y.square().mean(), list(there.network.parameters()), allow_unused=True) for y in (plain, fused)]
    assert all(off(a, b) < 1e-3 for b, a in zip(*slope) if a is not None and b.norm() > 1e-6)


@pytest.mark.parametrize("network", ["DiT", "DiT in windows", "ToldUNet"])
@pytest.mark.parametrize("method", ["flow_matching", "meanflow", "improved_meanflow", "crps"])
def test_losses_of_what_draws_are_those_of_the_cpu(network, method):
    emulator, draw = made(network, kind=Generative, method=method), torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 2, 1, 64, 64), "y": torch.randn(4, 2, 64, 64), "cond": torch.ones(4, 5)}
    batch |= draws_for(emulator, batch["x"], draw, equal=0.5)
    one = drawn_losses(emulator, batch)
    there = {name: None if value is None else value.to(DEVICE) for name, value in batch.items()}
    other = drawn_losses(emulator.to(DEVICE), there)
    assert off(other, one) < 1e-3
    other.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in emulator.network.output.parameters())
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        cast = drawn_losses(emulator, there)
    assert off(cast, one) < 0.05
    members = torch.stack(list(rollout(emulator, there["x"], 2, 3, there["cond"])))
    assert members.isfinite().all() and not torch.allclose(members[:, :, 0], members[:, :, 1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def config(home: Path, name: str, **sections) -> Path:
    "A config of a small job on the device."
    frames = {"data_dir": "flow", "target_step": 2, "input_step": 2}
    loop = dict(epochs=2, batch_size=8, precision="fp32")
    made = {
        "output_dir": name, "seed": 3, "device": DEVICE,
        "generate": dict(data_dir="flow", Re=200, NX=16, dt=0.01, n_trajectories=2, n_frames=80, t_save=0.1, device=DEVICE),
        "model": dict(model_type="ViT", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2),
        "train_dataset": frames | {"frame_range": [[1, 41]]}, "validation_dataset": frames | {"frame_range": [[41, 61]]},
        "test_dataset": frames | {"frame_range": [[61, 81]]},
        "inference": dict(checkpoints=["best*"], inference_length=6, chunk_size=3, n_starts=2),
        "analysis": dict(checkpoints=["best*"], max_leadtime=4, n_ensembles=4, ceiling=False, linear=False),
    }
    kinds = {"training": dict(rollout_steps=3, rollout_starts=2), "flow": dict(rollout_steps=3, rollout_starts=2, rollout_members=2), "latent": dict(samples=16)}
    made |= {section: loop | kinds.get(section, {}) | keys if section in kinds else made.get(section, {}) | keys for section, keys in sections.items()}
    path = home / f"{name}.toml"
    path.write_text(tomli_w.dumps(made))
    return path


def test_data_are_those_of_the_cpu_for_a_while(tmp_path):
    asked = dict(Re=200, NX=16, solve_NX=32, dt=0.01, n_trajectories=2, n_frames=5, t_save=0.1)
    read = lambda device: [torch.as_tensor(open_store(run).read(range(1, 6))) for run in find_runs(generate(GenerateConfig(data_dir=str(tmp_path / device), device=device, **asked)))]
    for one, other in zip(read("cpu"), read(DEVICE), strict=True):
        assert off(other, one) < 1e-5


TOLD = {"model_type": "ToldUNet", "img_size": 16, "base_channels": 8, "depth": 1, "target": "absolute"}
JOBS = {
    "train": (train, "train", {"training": dict(ema=0.9, unroll=2)}), "bf16": (train, "train", {"training": dict(precision="bf16")}),
    "compiled": (train, "train", {"training": dict(precision="bf16", compile=True)}),
    "choosing": (train_sparsely, "sparse", {"training": dict(precision="bf16", unroll=2, compile=True), "sparse": dict(method="adaptive", score="fresh", target_activation=0.5)}),
    "importance": (train_sparsely, "sparse", {"training": dict(ema=0.9), "sparse": dict(method="importance", score="fresh", target_activation=0.5)}),
    "meanflow": (train_flow, "flow", {"model": TOLD, "flow": dict(method="meanflow", precision="bf16")}),
    "crps": (train_flow, "flow", {"model": TOLD, "flow": dict(method="crps", precision="bf16", unroll=2, unroll_start=0.5)}),
    "crps_compiled": (train_flow, "flow", {"model": TOLD, "flow": dict(method="crps", compile=True)}),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_goes_on_and_is_scored(home, job):
    teach, stage, sections = JOBS[job]
    run = open_run(config(home, job, **sections), stage)
    if stage in ("flow", "sparse"):
        with pytest.raises(Stopped):
            teach(run, [StopSoon()])
        run.close()
        run = open_run(run.path, stage)
    teach(run)
    run.close()
    infer(run := open_run(run.path, "inference"))
    run.close()
    scores = short_analysis(run := open_run(run.path, "short_analysis"))["best"]
    assert all(bool(value.notnull().any()) for value in scores.data_vars.values())
    emulators = [load_emulator(run.checkpoints / "best.tar", device) for device in ("cpu", DEVICE)]
    if not emulators[0].stochastic:
        x = torch.randn(2, 2, 1, 16, 16)
        one, other = (torch.stack(list(rollout(emulator, x.to(device), 3))) for emulator, device in zip(emulators, ("cpu", DEVICE)))
        assert off(other, one) < 1e-4


def test_a_coder_and_an_emulator_in_its_codes(home):
    train_latent(run := open_run(config(home, "coder", latent=dict(levels=[[2, 4], [4, 3]], width=8)), "latent"))
    assert keep_latents(run)
    run.close()
    model = dict(patch_size=4, embed_dim=16, depth=1, num_heads=2, fields=["omega"], coder=str(run.checkpoints / "best.tar"))
    train(run := open_run(config(home, "latent", model=model | {"model_type": "ViT", "img_size": 16}, training={}), "train"))
    run.close()
    infer(run := open_run(run.path, "inference"))
    run.close()
    assert short_analysis(open_run(run.path, "short_analysis"))["best"].sizes
    assert read_checkpoint(run.checkpoints / "best.tar")["coder"]
