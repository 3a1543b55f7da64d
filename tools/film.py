r"""The moving picture at the top of the README: truth beside models, in continuous colours and under 400 kB.

    python tools/film.py nbs/media/truth_and_models.webp ViT=runs/reference_vit/best \
        "pruned to half=runs/reference_vit/prune3_remaining_50.0" UNet=runs/reference_unet/best

A GIF has 256 colours and no way to say "nearly the same as before"; an animated WebP has all colours in half the
bytes, and every browser plays it. Each model is a checkpoint of a run with rollouts; all are shown from the first
start. (The file in the repository was put together from the reference runs' own films.)
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from matplotlib.font_manager import findfont
from scipy.signal import resample

from turbvit_nb.climate.rollouts import open_rollouts
from turbvit_nb.lab.plots import DIVERGING, shared_limit

EDGE, GAP = 26, 10  # pixels above and below, and between the panels


def fields(models: dict[str, Path], steps: int) -> tuple[dict[str, np.ndarray], float]:
    "Vorticity (steps, N, N) of the truth and of each model, <run>/<checkpoint>, and the time step."
    chosen = {label: open_rollouts(path.parent)[path.name][0] for label, path in models.items()}
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


def picture(panels: dict[str, np.ndarray], time: float) -> Image.Image:
    "One picture of the film, from panels of colours (size, size, 3)."
    size = len(next(iter(panels.values())))
    sheet = Image.new("RGB", (len(panels) * (size + GAP) - GAP, size + 2 * EDGE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(findfont("DejaVu Sans"), 14)
    for p, (label, colours) in enumerate(panels.items()):
        left = p * (size + GAP)
        sheet.paste(Image.fromarray(colours), (left, EDGE))
        pen.text((left + size / 2, EDGE / 2), label, fill="black", font=font, anchor="mm")
    pen.text((0, size + 1.5 * EDGE), f"vorticity, t = {time:.1f}", fill="black", font=font, anchor="lm")
    return sheet


def write(target: Path, pictures: list[Image.Image], kilobytes: int = 400) -> Path:
    "Write the film in the best quality that stays under the limit."
    target.parent.mkdir(parents=True, exist_ok=True)
    for quality in (50, 30, 18, 10):
        pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=100, loop=0, quality=quality, method=3)
        if target.stat().st_size < 1000 * kilobytes:
            break
    return target


def film(target: Path, models: dict[str, Path], steps: int = 150, every: int = 3, size: int = 180) -> Path:
    "Truth beside the models, every so many steps."
    panels, step = fields(models, steps)
    limit = shared_limit([panels["truth"]])
    shown = range(0, len(panels["truth"]), every)
    return write(target, [picture({k: drawn(v[i], limit, size) for k, v in panels.items()}, step * (i + 1)) for i in shown])


if __name__ == "__main__":
    named = dict(word.split("=", 1) for word in sys.argv[2:])
    made = film(Path(sys.argv[1]), {label: Path(place) for label, place in named.items()})
    print(f"{made}, {made.stat().st_size // 1000} kB")
