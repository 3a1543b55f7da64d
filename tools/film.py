"""The moving picture at the top of the README: truth beside models, in continuous colours and under 400 kB.

    python tools/film.py nbs/media/truth_and_models.webp ViT=runs/demo UNet=runs/demo_unet

A GIF has 256 colours and no way to say "nearly the same as before"; an animated WebP has all colours in half the
bytes, and every browser plays it. Of each run the first checkpoint is shown, from the start that all of them share.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from matplotlib.font_manager import findfont
from scipy.signal import resample

from turbvit_nb.inference import open_rollouts
from turbvit_nb.lab.plots import DIVERGING, shared_limit

EDGE, GAP = 26, 10  # pixels above and below, and between the panels


def fields(runs: dict[str, Path], steps: int) -> tuple[dict[str, np.ndarray], float]:
    "Vorticity (steps, N, N) of the truth and of the first checkpoint of each run, and the time step."
    chosen = {label: next(iter(open_rollouts(folder).values()))[0] for label, folder in runs.items()}
    first = next(iter(chosen.values()))
    shown = first.followed[:steps]
    panels = {"truth": first.truth(shown)} | {label: one.vorticity(shown) for label, one in chosen.items()}
    return panels, first.step


def drawn(omega: np.ndarray, limit: float, size: int) -> np.ndarray:
    "A field (N, N) as colours (size, size, 3), as seen: y upwards. The flow is periodic, so Fourier may interpolate."
    fine = resample(resample(omega, size, axis=0), size, axis=1).T[::-1]
    smooth = np.interp(fine, np.linspace(-limit, limit, len(DIVERGING.colors)), np.arange(len(DIVERGING.colors)))
    low, part = np.floor(smooth).astype(int), (smooth % 1)[..., None]
    colours = np.asarray(DIVERGING.colors)
    mixed = colours[low] * (1 - part) + colours[np.minimum(low + 1, len(colours) - 1)] * part
    return (255 * mixed).round().astype(np.uint8)


def picture(panels: dict[str, np.ndarray], i: int, time: float, limit: float, size: int) -> Image.Image:
    "One picture of the film."
    sheet = Image.new("RGB", (len(panels) * (size + GAP) - GAP, size + 2 * EDGE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(findfont("DejaVu Sans"), 14)
    for p, (label, omega) in enumerate(panels.items()):
        left = p * (size + GAP)
        sheet.paste(Image.fromarray(drawn(omega[i], limit, size)), (left, EDGE))
        pen.text((left + size / 2, EDGE / 2), label, fill="black", font=font, anchor="mm")
    pen.text((0, size + 1.5 * EDGE), f"vorticity, t = {time:.1f}", fill="black", font=font, anchor="lm")
    return sheet


def film(target: Path, runs: dict[str, Path], steps: int = 80, size: int = 200, limit_kb: int = 400) -> Path:
    "Write the film in the best quality that stays under the limit."
    panels, step = fields(runs, steps)
    limit, every = shared_limit([panels["truth"]]), 2
    pictures = [picture(panels, i, step * (i + 1), limit, size) for i in range(0, len(panels["truth"]), every)]
    target.parent.mkdir(parents=True, exist_ok=True)
    for quality in (75, 60, 45, 30, 20, 10):
        pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=100, loop=0, quality=quality, method=2)
        if target.stat().st_size < 1000 * limit_kb:
            break
    return target


if __name__ == "__main__":
    named = dict(word.split("=", 1) for word in sys.argv[2:])
    made = film(Path(sys.argv[1]), {label: Path(folder) for label, folder in named.items()})
    print(f"{made}, {made.stat().st_size // 1000} kB")
