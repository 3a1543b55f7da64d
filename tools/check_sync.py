"""Fail where `nbdev_clean`, `nbdev_export` or the README's maker would change a file, and name the file.

The files are then as they should be: look at the diff and commit it.
"""
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def digests() -> dict[str, str]:
    "Every notebook, exported module and the README, by the digest of its bytes."
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("turbvit_nb/**/*.py"), ROOT / "README.md"]
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files if ".ipynb_checkpoints" not in f.parts}


def main() -> int:
    before = digests()
    for command in ([BIN / "nbdev_clean"], [BIN / "nbdev_export"], [sys.executable, ROOT / "tools" / "readme.py"]):
        subprocess.run(command, cwd=ROOT, check=True)
    after = digests()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    for name in changed:
        print(f"not clean, or not in step with its notebook: {name}")
    if changed:
        print("They have been written anew: look at `git diff`, and commit.")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
