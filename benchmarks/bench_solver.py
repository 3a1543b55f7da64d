"""Speed and accuracy of the solver at 64², Re 1000, β 20, α 0.1, fky 4, in double precision.

    python benchmarks/bench_solver.py [--workers 2] [--flows 8] [--repeat 5]

Prints one table. Each time is the best of `--repeat` runs, so that other work on the machine disturbs it least. Errors are relative and
root-mean-square over all flows, after one unit of time, against `exact` with a step so short that halving it changes nothing that is printed.
"""
import argparse
import time

import torch

from turbvit_nb.physics.py2d import Regime
from turbvit_nb.physics.solver import Solver, random_vorticity
from turbvit_nb.physics.spectral import grid

REGIME = Regime(Re=1000, fkx=0, fky=4, alpha=0.1, beta=20, NX=64, dt=2e-4)


def developed(flows: int, spin_up: float, workers: int) -> torch.Tensor:
    "Fields (flows, 64, 64) of the developed flow."
    solver = Solver(REGIME, random_vorticity(64, flows, seed=0), workers=workers)
    for _ in range(round(spin_up)): solver.advance(1.0)
    return solver.omega


def best(work, repeat: int) -> float:
    "Seconds that the fastest of `repeat` calls takes."
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (((a - b) ** 2).mean((-2, -1)) / (b**2).mean((-2, -1))).mean().sqrt().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--flows", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--spin-up", type=float, default=30.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    omega0 = developed(args.flows, args.spin_up, args.workers)

    def after_one(**kwargs):
        solver = Solver(REGIME, omega0, workers=args.workers, **kwargs)
        solver.advance(1.0)
        return solver.omega

    truth, finer = after_one(dt=1 / 400), after_one(dt=1 / 800)
    errors = {"py2d": error(after_one(scheme="py2d"), finer), "exact": error(after_one(), finer), "reference": error(truth, finer)}

    print(f"64² float64, {args.flows} flows, {args.workers} workers, torch {torch.__version__}\n")
    print(f"{'scheme':10} {'measured':46} {'value':>10} {'target':>8}")
    row = lambda scheme, what, value, target="": print(f"{scheme:10} {what:46} {value:>10} {target:>8}")
    steps, units = 500, 2
    solver = Solver(REGIME, omega0, scheme="py2d", workers=args.workers)
    wall = best(lambda: solver.advance(steps * REGIME.dt), args.repeat)
    row("py2d", "trajectory-steps/s", f"{args.flows * steps / wall:.0f}", "4000")
    row("py2d", "error after 1 at Δt = 2e-4", f"{errors['py2d']:.4f}")
    solver = Solver(REGIME, omega0, workers=args.workers)
    wall = best(lambda: solver.advance(units), args.repeat)
    row("exact", "time units/s, summed over trajectories", f"{args.flows * units / wall:.1f}", "40")
    row("exact", "  of each trajectory", f"{units / wall:.1f}")
    row("exact", "error after 1, step its own", f"{errors['exact']:.4f}", "≤ py2d")
    row("reference", "change when its step is halved", f"{errors['reference']:.1e}")
    row("exact", "steps per unit of time", f"{1 / solver.stepper.choose(solver.omega_hat):.0f}")
    for NX, frames in ((64, 512), (256, 32)):
        omega, g = torch.randn(frames, NX, NX), grid(NX, dtype=torch.float32)
        wall = best(lambda: g.velocity(omega), 4 * args.repeat)
        row("grid", f"vorticity to velocity, {NX}² float32, 1 thread", f"{frames / wall:.0f}")


if __name__ == "__main__":
    main()
