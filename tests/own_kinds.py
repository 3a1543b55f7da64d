"""Kinds of emulator that are not the package's own: a latent one that is stirred by noise, and a program without a network."""
import torch
from torch import nn

from turbvit_nb.model import Kind, noise, register
from turbvit_nb.physics.spectral import Grid


@register("swirling")
class Swirling(Kind):
    "Stream functions on a coarse grid, turned a little every step and stirred by noise that remembers."

    stochastic = True

    def __init__(self, *, size: int, points: int, **frames):
        super().__init__(**frames)
        self.size, self.points, self.arguments = size, points, dict(size=size, points=points)
        self.strength = nn.Parameter(torch.tensor(0.05))

    def begin(self, x, cond=None, generator=None):
        omega = Grid.of(x).vorticity(x[:, :, 0])
        latent = Grid.of(x).resample(omega, self.points)
        return {"latent": latent + 0.01 * noise(latent, generator), "stir": torch.zeros_like(latent)}

    def advance(self, state, cond=None, generator=None):
        stir = 0.9 * state["stir"] + self.strength * noise(state["latent"], generator)
        return {"latent": 0.99 * state["latent"].roll(1, -1) + stir, "stir": stir}

    def look(self, state):
        omega = Grid.of(state["latent"]).resample(state["latent"], self.size)
        return Grid.of(omega).velocity(omega)[:, :, None]


@register("program")
class Program(Kind):
    "A program as plain tensors: every wave of a vorticity field times a number. Nothing in its file is executed."

    def __init__(self, *, size: int, **frames):
        super().__init__(fields=("omega",), **{key: value for key, value in frames.items() if key != "fields"})
        self.size, self.arguments = size, dict(size=size)
        self.register_buffer("factors", torch.ones(size, size // 2 + 1))

    def advance(self, state, cond=None, generator=None):
        grid = Grid.of(state["x"])
        return {"x": grid.inverse(grid.transform(state["x"]) * self.factors)}

    def look(self, state):
        return state["x"]
