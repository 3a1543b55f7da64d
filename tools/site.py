"""Make the site, or check it without Quarto.

    python tools/site.py docs               the site, in _docs (needs Quarto)
    python tools/site.py check              plain HTML of every page in _proc/_html, and every fault in it, one line each
    python tools/site.py publish runs/vit   cut the reports of a run down to its own part, fit to be committed
"""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def explorers(runs: Path | None) -> None:
    "Make the explorer of every run that has what it shows; say which have not."
    from turbvit_nb.explore import explore
    from turbvit_nb.lab.config import LabError
    from turbvit_nb.lab.index import find_runs

    for folder in find_runs(runs):
        if not any((folder / "short_analyses").glob("*.nc")):
            print(f"{folder.name}: no short analyses here, so no explorer on its page")
            continue
        try:
            explore([folder])
        except LabError as error:
            print(f"{folder.name}: no explorer on its page: {error}")


def docs(target: Path, runs: Path | None) -> list[str]:
    "Build the site and have Quarto render it into `_docs`."
    from turbvit_nb.lab.site import build

    explorers(runs)
    if faults := build(target, runs):
        return faults
    subprocess.run(["quarto", "render", "--no-execute", "--no-cache"], cwd=target, check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(target / "_docs", ROOT / "_docs")
    return []


def check(target: Path, runs: Path | None) -> list[str]:
    "Build the site, render it as plain HTML and read every page."
    from turbvit_nb.lab.site import build
    from turbvit_nb.lab.site_check import check_site, figures_without, render

    faults = build(target, runs)
    pages = render(target, target / "_html")
    faults += check_site(target, target / "_html")
    print(f"{len(pages)} pages in {target / '_html'}, {len(faults)} faults")
    if uncaptioned := figures_without(target, "fig-cap"):
        print(f"{len(uncaptioned)} pictures have no caption (no fault): #| fig-cap in their cells would give them one")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["docs", "check", "publish"])
    parser.add_argument("run", nargs="*", type=Path, help="run folders to publish")
    parser.add_argument("--target", type=Path, default=ROOT / "_proc", help="where the pages are built; made anew")
    parser.add_argument("--runs", type=Path, help="the folder of runs; default: runs/, or $TURBVIT_RUNS")
    options = parser.parse_args()
    folders = [folder.absolute() for folder in options.run]
    target, runs = options.target.absolute(), options.runs and options.runs.absolute()
    os.chdir(ROOT)  # where nbdev looks for its settings
    if options.what == "publish":
        from turbvit_nb.lab.site import publish

        print("\n".join(str(report) for folder in folders for report in publish(folder)))
        return 0
    faults = docs(target, runs) if options.what == "docs" else check(target, runs)
    print("\n".join(faults), end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
