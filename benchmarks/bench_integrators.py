"""Why `exact` uses the method it uses: error against number of evaluations, for four ways to integrate the same flow.

    python benchmarks/bench_integrators.py [--flows 8]

64², Re 1000, β 20, α 0.1, fky 4, double precision. The first row is `py2d` at Δt = 2e-4; the others treat the linear part exactly. Errors are
relative and root-mean-square over all flows, after one unit of time. A dash is a run that blew up.
"""
import argparse

import torch

from turbvit_nb.physics.py2d import Regime
from turbvit_nb.physics.solver import BlowUp, Solver, _Advection, random_vorticity

REGIME = Regime(Re=1000, fkx=0, fky=4, alpha=0.1, beta=20, NX=64, dt=2e-4)


def if_rk4(w, L, f, dt, steps, rate):
    "Classical RK4 with an integrating factor (Lawson 1967)."
    half = torch.exp(L * dt / 2)
    for _ in range(steps):
        k1 = rate(w) - f
        k2 = rate(half * (w + dt / 2 * k1)) - f
        k3 = rate(half * w + dt / 2 * k2) - f
        k4 = rate(half * (half * w + dt * k3)) - f
        w = half * (half * w + dt / 6 * (half * k1 + 2 * (k2 + k3))) + dt / 6 * k4
    return w


def etd_rk4(w, L, f, dt, steps, rate):
    "Cox & Matthews (2002), with the contour integrals of Kassam & Trefethen (2005)."
    E, half = torch.exp(L * dt), torch.exp(L * dt / 2)
    z = (L * dt)[..., None] + torch.exp(2j * torch.pi * (torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    ez, mean = torch.exp(z), lambda q: dt * q.mean(-1)
    Q = mean((torch.exp(z / 2) - 1) / z)
    f1 = mean((-4 - z + ez * (4 - 3 * z + z**2)) / z**3)
    f2 = mean((2 + z + ez * (z - 2)) / z**3)
    f3 = mean((-4 - 3 * z - z**2 + ez * (4 - z)) / z**3)
    for _ in range(steps):
        k1 = rate(w) - f
        a = half * w + Q * k1
        k2 = rate(a) - f
        k3 = rate(half * w + Q * k2) - f
        k4 = rate(half * a + Q * (2 * k3 - k1)) - f
        w = E * w + f1 * k1 + 2 * f2 * (k2 + k3) + f3 * k4
    return w


def if_ab3(w, L, f, dt, steps, rate):
    "Adams-Bashforth 3 with an integrating factor, started by two steps of RK4: one evaluation a step."
    E, history = torch.exp(L * dt), []
    for _ in range(2):
        history = [E * (rate(w) - f)] + [E * h for h in history]
        w = if_rk4(w, L, f, dt, 1, rate)
    for _ in range(steps - 2):
        now = rate(w) - f
        w = E * (w + dt / 12 * (23 * now - 16 * history[0] + 5 * history[1]))
        history = [E * now, E * history[0]]
    return w


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flows", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = Solver(REGIME, random_vorticity(64, args.flows))
    for _ in range(30): start.advance(1.0)
    flow, w0, advect = start.flow, start.omega_hat, _Advection(start.modes, args.flows)

    def ours(**how):
        solver = Solver(REGIME, start.omega, **how)
        try: solver.advance(1.0)
        except BlowUp: return solver.omega_hat * torch.nan
        return solver.omega_hat

    truth = ours(dt=1 / 400)
    size = lambda q: (q.abs() ** 2).sum((1, 2))
    error = lambda q: (size(q - truth) / size(truth)).mean().sqrt().item()
    cell = lambda q: f"{error(q):9.4f}" if q.isfinite().all() else f"{'—':>9}"
    evaluations = (300, 360, 420, 480, 600)
    print(f"{'error at this many evaluations per unit of time':52}" + "".join(f"{n:9}" for n in evaluations))
    print(f"{'py2d, Δt = 2e-4 (5000 evaluations)':52}{cell(ours(scheme='py2d'))}")
    for name, method, stages in (("integrating factor, RK4", if_rk4, 4), ("ETDRK4", etd_rk4, 4), ("integrating factor, Adams-Bashforth 3", if_ab3, 1)):
        row = [method(w0, flow.linear, flow.forcing, stages / n, n // stages, lambda w: advect(w).clone()) for n in evaluations]
        print(f"{name:52}" + "".join(map(cell, row)))
    print(f"{'integrating factor, Berland-Bogey-Bailly: exact':52}" + "".join(cell(ours(dt=6 / n)) for n in evaluations))


if __name__ == "__main__":
    main()
