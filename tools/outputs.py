"""Run notebooks top to bottom and keep their outputs, cleaned: what a commit of a changed notebook needs.

    python tools/outputs.py                      every notebook
    python tools/outputs.py nbs/02_train.ipynb   these
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main(names: list[str]) -> None:
    notebooks = [Path(n) for n in names] or sorted(
        p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    quiet = {**os.environ, "TURBVIT_PROGRESS": "0"}  # progress lines carry timings: they would churn
    for number, notebook in enumerate(notebooks, 1):
        print(f"[{number}/{len(notebooks)}] {notebook}", flush=True)
        subprocess.run([BIN / "jupyter", "nbconvert", "--log-level=WARN", "--to=notebook", "--execute", "--inplace",
                        notebook], check=True, env=quiet)
        subprocess.run([BIN / "nbdev_clean", "--fname", notebook], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
