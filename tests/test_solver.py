"""The solver against real Py2D output, over long times, in several processes and on a GPU; speed belongs in benchmarks/bench_solver.py."""
import math
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from turbvit_nb.physics.py2d import Regime, find_runs, open_store, read_state
from turbvit_nb.physics.solver import BlowUp, Solver, random_vorticity, simulate
from turbvit_nb.physics.spectral import Grid

JETS = Regime(Re=1000, fkx=0, fky=4, alpha=0.1, beta=20, NX=64, dt=2e-4)


@pytest.fixture(scope="module")
def run(py2d_data):
    return open_store(find_runs(py2d_data / "results")[0])


def frame(store, *numbers: int) -> torch.Tensor:
    return torch.as_tensor(store.read(list(numbers), dtype=np.float64))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def mean_square_error(a: torch.Tensor, b: torch.Tensor) -> float:
    "Relative, over all flows."
    return (((a - b) ** 2).mean((-2, -1)) / (b**2).mean((-2, -1))).mean().item()


# Real Py2D output -----------------------------------------------------------------------------------------------------

def test_py2d_scheme_continues_the_real_run(run):
    state = read_state(run.path, 1999)
    solver = Solver.from_restart(run.regime, state.omega0_hat, state.omega1_hat, state.time)
    assert relative(solver.omega, frame(run, 1999)[0]) < 1e-14
    solver.advance(0.04)
    assert relative(solver.omega, frame(run, 2000)[0]) < 1e-12
    assert solver.time == pytest.approx(run.times[-1], abs=1e-9)


def test_py2d_scheme_writes_the_restart_state_that_py2d_wrote(run):
    state, after = read_state(run.path, 1999), read_state(run.path, 2000)
    solver = Solver.from_restart(run.regime, state.omega0_hat, state.omega1_hat, state.time)
    solver.advance(0.04)
    for ours, theirs in zip(solver.restart_hats, (after.omega0_hat, after.omega1_hat)):
        assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()


def test_both_history_slots_matter(run):
    "A cold start from the frame alone, or exchanged slots, miss the next frame by orders of magnitude."
    state, truth = read_state(run.path, 1999), frame(run, 2000)[0]
    for pair in ((state.omega1_hat, state.omega1_hat), (state.omega1_hat, state.omega0_hat)):
        solver = Solver.from_restart(run.regime, *pair, state.time)
        solver.advance(0.04)
        assert relative(solver.omega, truth) > 1e-7


def test_exact_scheme_follows_the_real_run(run):
    "Over one interval the two schemes differ by the error of the one that is less exact."
    truth = frame(run, 1500)[0]
    solver = Solver(run.regime, frame(run, 1499)[0])
    solver.advance(0.04)
    assert 1e-6 < relative(solver.omega, truth) < 5e-3


def test_exact_scheme_is_no_less_accurate_than_py2d(run):
    omega = frame(run, *range(1001, 2000, 125))
    after = lambda **how: next(simulate(run.regime, omega, 1.0, 1.0, **how))[1]
    truth = after(dt=1 / 300)
    assert mean_square_error(after(), truth) <= mean_square_error(after(scheme="py2d"), truth)


def test_the_climate_of_both_is_the_same(run):
    "Energy and enstrophy of frames our solver makes lie where those of the real run do."
    omega = torch.stack([w for _, w in simulate(run.regime, frame(run, 1001, 1250, 1500, 1750), 12.0, 1.0)][2:])
    real, grid = frame(run, *range(1001, 2001, 10)), Grid.of(omega)
    for quantity in (grid.energy, grid.enstrophy):
        assert quantity(omega).mean().item() == pytest.approx(quantity(real).mean().item(), rel=0.15)


def test_the_real_run_is_not_resolved_either(run):
    "Its dissipation of enstrophy rises towards the last wave, as ours does on the same grid."
    omega = frame(run, *range(1001, 2001, 20))
    grid = Grid.of(omega)
    dissipation = run.regime.nu * grid.spectrum(grid.gradient(omega)).sum(-2).mean(0)
    assert 1.2 * dissipation[18:22].mean() < dissipation[29:32].mean() < 1.8 * dissipation[18:22].mean()


# Long runs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("regime", [
    Regime(Re=1000, fkx=0, fky=4, alpha=0.01, beta=0, NX=32),  # strong vortices, every direction alike
    Regime(Re=5000, fkx=4, fky=0, alpha=0.05, beta=0, NX=32),  # under-resolved
    Regime(Re=200, fkx=0, fky=4, alpha=0.1, beta=20, NX=32),
    Regime(Re=1000, fkx=0, fky=4, alpha=0.1, beta=300, NX=32),  # waves faster than the flow
    Regime(Re=20, fkx=2, fky=2, alpha=0.1, beta=0, NX=32),  # viscous
], ids=str)
def test_the_step_that_exact_chooses_never_blows_up(regime):
    solver = Solver(regime, random_vorticity(32, 2, energy=4.0))
    for _ in range(40 if abs(regime.beta) < 100 else 8): solver.advance(1.0)
    assert solver.omega.abs().max() < 200


def test_a_flow_at_rest_starts_to_move():
    solver = Solver(Regime(Re=200, fky=4, alpha=0.1, beta=20, NX=32), torch.zeros(32, 32))
    solver.advance(1.0)
    growth = (1 - math.exp(-0.1 - 16 / 200)) / (0.1 + 16 / 200)
    assert solver.omega.abs().max().item() == pytest.approx(4 * growth, rel=1e-9)


def test_a_flow_that_blows_up_later_keeps_the_last_good_state():
    solver = Solver(JETS, random_vorticity(64)[0], dt=0.03)
    with pytest.raises(BlowUp, match=r"blew up before t = [\d.]+ \(trajectory 1 of 1\): the step dt = 0\.029\d is too long for it; pass dt = 0\.015 or less"):
        for _ in range(60): solver.advance(0.5)
    assert solver.time > 0 and solver.omega.isfinite().all()


# Convergence at full size ---------------------------------------------------------------------------------------------

def test_orders_at_64():
    "Order 4; and Py2D's mixture at its own steps."
    omega = next(simulate(JETS, random_vorticity(64)[0], 8.0, 8.0))[1]
    after = lambda **how: next(simulate(JETS, omega, 0.2, 0.2, **how))[1]
    truth = after(dt=0.2 / 400)
    exact = [relative(after(dt=0.2 / n), truth) for n in (25, 50)]
    assert math.log2(exact[0] / exact[1]) == pytest.approx(4, abs=0.4)
    py2d = [relative(after(scheme="py2d", dt=dt), truth) for dt in (2e-4, 1e-4, 5e-5)]
    orders = [math.log2(a / b) for a, b in zip(py2d, py2d[1:])]
    assert 2 > orders[0] > orders[1] > 1  # second order from the advection, until the first order of the rest takes over


def test_advection_alone_is_of_second_order_in_py2d():
    "Without drag, β and forcing nothing in the scheme is of first order but its first step."
    regime = Regime(Re=1000, fkx=0, fky=0, alpha=0, beta=0, NX=32)
    omega = random_vorticity(32)[0]
    truth = next(simulate(regime, omega, 1.0, 1.0, dt=1 / 400))[1]
    errors = [relative(next(simulate(regime, omega, 1.0, 1.0, "py2d", dt=1 / n))[1], truth) for n in (500, 1000)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


# Bits -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, dt", [("exact", None), ("exact", 0.01), ("py2d", 1e-3)])
def test_stopping_going_on_and_workers_change_no_bit(scheme, dt, tmp_path):
    omega = random_vorticity(64, 9)
    whole = [w for _, w in simulate(JETS, omega, 0.4, 0.1, scheme, dt, workers=1)]
    solver = Solver(JETS, omega, scheme, dt, workers=2)
    solver.advance(0.1)
    solver.advance(0.1)
    torch.save(solver.state, tmp_path / "state.tar")
    state = torch.load(tmp_path / "state.tar", weights_only=True)
    rest = list(simulate(JETS, omega, 0.2, 0.1, scheme, dt, state=state, workers=3))
    assert [t for t, _ in rest] == [0.3, 0.4]
    assert all(torch.equal(a, w) for (_, a), w in zip(rest, whole[2:]))


def test_workers_leave_with_their_solver():
    threads, children = torch.get_num_threads(), lambda: set(psutil.Process().children())
    before = children()
    solver = Solver(JETS, random_vorticity(64, 9), workers=2)
    solver.advance(0.02)
    assert len(children() - before) == 2
    del solver
    assert children() == before and torch.get_num_threads() == threads


def test_a_killed_worker_is_reported_and_replaced():
    omega, before = random_vorticity(64, 9), set(psutil.Process().children())
    solver, alone = Solver(JETS, omega, workers=2), Solver(JETS, omega, workers=1)
    solver.advance(0.02)
    (set(psutil.Process().children()) - before).pop().kill()
    with pytest.raises(RuntimeError, match="killed, perhaps for want of memory: pass workers=1"): solver.advance(0.02)
    assert solver.time == 0.02
    solver.advance(0.02)
    alone.advance(0.02)
    alone.advance(0.02)
    assert torch.equal(solver.omega, alone.omega)


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    code = ("import os, psutil, signal, torch; from turbvit_nb.physics.solver import *; from turbvit_nb.physics.py2d import Regime;"
            "s = Solver(Regime(Re=100, fkx=0, fky=4, alpha=0.1, beta=20, NX=64), random_vorticity(64, 9), workers=2); s.advance(0.02);"
            "print(*[p.pid for p in psutil.Process().children()], flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2, run.stderr
    for _ in range(100):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids): return
        time.sleep(0.05)
    assert False, f"processes {pids} still run"


@pytest.mark.parametrize("NX", [8, 20, 48, 128])
def test_any_even_grid(NX):
    regime = Regime(Re=100, fkx=0, fky=2, alpha=0.1, beta=5, NX=NX)
    omega = random_vorticity(NX, 2, peak=2.0)
    solver = Solver(regime, omega)
    solver.advance(0.5)
    assert solver.omega.shape == omega.shape and solver.omega.isfinite().all()


def test_resolution_does_not_matter_where_the_flow_is_resolved():
    coarse, fine = (Regime(Re=50, fkx=0, fky=2, alpha=0.1, beta=5, NX=n) for n in (64, 96))
    ends = [next(simulate(r, random_vorticity(r.NX, peak=2.0)[0], 1.0, 1.0, dt=0.01))[1] for r in (coarse, fine)]
    assert relative(Grid.of(ends[1]).resample(ends[1], 64), ends[0]) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("scheme, dt", [("exact", 0.01), ("py2d", 1e-3)])
def test_gpu_agrees_with_cpu(scheme, dt):
    omega = random_vorticity(64, 6)
    here = next(simulate(JETS, omega, 0.5, 0.5, scheme, dt))[1]
    there = next(simulate(JETS, omega.cuda(), 0.5, 0.5, scheme, dt))[1]
    assert there.is_cuda and relative(there.cpu(), here) < 1e-10
