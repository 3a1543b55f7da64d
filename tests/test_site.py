"""The site: every notebook and every committed report becomes a page without a fault, and the table of runs works in a browser."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from turbvit_nb.lab.checkpoints import parse_name
from turbvit_nb.lab.index import Row, runs_table
from turbvit_nb.lab.site import build
from turbvit_nb.lab.site_check import check_site, render

ROOT = Path(__file__).resolve().parent.parent


def report(folder: Path, name: str, *outputs: str) -> None:
    "An executed chapter as papermill leaves it."
    cell = lambda source, *tags: nbformat.v4.new_code_cell(source, metadata={"tags": list(tags), "papermill": {"duration": 1.0}})
    run = nbformat.v4.new_code_cell("job()", outputs=[nbformat.v4.new_output("stream", text=text) for text in outputs])
    cells = [nbformat.v4.new_markdown_cell("# Short analysis\n\n> Is it any good?"), cell('config = "a.toml"', "parameters"),
             cell(f'# Parameters\nconfig = "{ROOT}/nbs/configs/smoke/train.toml"', "injected-parameters"), cell("#| export\ndef job(): pass"),
             nbformat.v4.new_markdown_cell("## Run\n\nThe job. See `LabError`."), run]
    papermill = {"input_path": f"{ROOT}/nbs/{name}.ipynb", "output_path": f"{folder}/.{name}.unfinished.ipynb"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"papermill": papermill}), folder / f"{name}.ipynb")


def made_run(folder: Path, *outputs: str) -> None:
    "A run folder with one report, of a stage that is done, and one of a stage that is not."
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('[generate]\nRe = 1000\nbeta = 20.0\nNX = 64\n[model]\nmodel_type = "ViT"\n')
    entry = {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T10:01:00+00:00"}
    summary = {"best": {"ACC u at 10": 0.97, "horizon": 41.0, "horizon_low": 38.0, "horizon_high": 45.0}}
    status = {"short_analysis": entry | {"state": "done", "summary": summary}, "train": entry | {"state": "failed"}}
    (folder / "status.json").write_text(json.dumps({"stages": status}))
    for name in ("05_short_analysis", "02_train"):
        report(folder, name, *outputs)


def committed_runs() -> list[str]:
    "The names of the runs that are in the repository."
    files = subprocess.run(["git", "ls-files", "-z", "runs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({Path(file).parts[1] for file in files if file.endswith("status.json")})


def test_every_page_is_sound(tmp_path):
    "`make docs-check` on the whole library, the committed runs, and two runs made here, in a process of its own, because nbdev executes what it documents."
    runs = tmp_path / "runs"
    made_run(runs / "vit", f"written to {ROOT}/data/x\n")
    made_run(runs / "group/small", "0.5\n")
    for name in committed_runs():
        os.symlink(ROOT / "runs" / name, runs / name)
    command = [sys.executable, ROOT / "tools/site.py", "check", "--target", tmp_path / "proc", "--runs", runs]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    pages = tmp_path / "proc/_html"
    assert (pages / "lab/runs.html").is_file() and "class=\"runs\"" in (pages / "results.html").read_text()
    shown = (pages / "runs/vit/short_analysis.html").read_text()
    assert "written to data/x" in shown and "<details><summary>Code</summary>" in shown and "<h2 id=\"run\">" in shown and not (pages / "runs/vit/train.html").exists()
    documented = (pages / "lab/runs.html").read_text()
    assert 'id="open_run"' in documented and "still tell the truth. Four rules" in documented  # nbdev alone drops the prose of the first cell


def small_site(folder: Path) -> Path:
    "The notebooks of a site of one page and the table of runs."
    folder.mkdir()
    for name, texts in {"index": ["# Home\n\n> Start."], "results": ["# Results\n\n> All.", "<!-- runs -->"]}.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in texts]), folder / f"{name}.ipynb")
    (folder / "styles.css").write_text("")
    (folder / "_quarto.yml").write_text(
        "format: {html: {css: styles.css}}\nwebsite:\n  navbar: {search: true}\n  sidebar:\n    contents: [index.ipynb, {section: Results, contents: [results.ipynb]}]\n")
    return folder


@pytest.mark.parametrize("output, fault", [
    ("/".join(["", "home", "someone", "data.nc\n"]), "a path of one machine"),
    ("Traceback (most recent call last)\n", "a traceback"),
    ("#| export\n", "a directive"),
])
def test_a_fault_in_a_report_is_found(tmp_path, output, fault):
    "What a report must not show is named with its page; the same report without it has no fault."
    for name, text in (("bad", output), ("good", "fine\n")):
        made_run(tmp_path / name / "runs/vit", text)
        nbs = small_site(tmp_path / name / "nbs")
        assert build(tmp_path / name / "proc", tmp_path / name / "runs", nbs) == []
        render(tmp_path / name / "proc", tmp_path / name / "html")
        page = "runs/vit/short_analysis.html"
        found = [line for line in check_site(tmp_path / name / "proc", tmp_path / name / "html") if line.startswith(page) and "links to" not in line]
        assert [fault in line for line in found] == ([True] if name == "bad" else []), found


def test_a_site_without_runs(tmp_path):
    "No run yet: the site is built all the same and says so."
    nbs = small_site(tmp_path / "nbs")
    assert build(tmp_path / "proc", tmp_path / "nothing", nbs) == []
    render(tmp_path / "proc", tmp_path / "html")
    assert check_site(tmp_path / "proc", tmp_path / "html") == []
    assert "No run has been finished yet" in (tmp_path / "html/results.html").read_text()


def test_the_table_sorts_and_filters_in_a_browser(tmp_path, browser):
    "With the network cut off: clicks sort, numbers as numbers with empty cells last; words and menus filter; nothing is complained of."
    facts = lambda model: {"model": model, "flow": "Re 1000, β 20", "grid": "64²", "seed": 0, "date": "2026-01-01", "state": "done"}
    skill = lambda value: {("short_analysis", "horizon"): value}
    scored = lambda run, name, model, value: Row(run, name, parse_name(name), facts(model), skill(value))
    lines = [scored("vit", "best", "ViT", 9.0), scored("vit", "prune1_remaining_50.0", "ViT", float("inf")),
             scored("unet", "best", "UNet", 41.0), Row("young", "", None, facts("UNet"))]
    (tmp_path / "page.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{runs_table(lines)}</body>', encoding="utf-8")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.context.set_offline(True)
    page.goto((tmp_path / "page.html").as_uri())
    rows = lambda: [row.inner_text().split("\t")[0] + "/" + row.inner_text().split("\t")[1] for row in page.locator("tbody tr:visible").all()]
    head = page.locator("th button", has_text="horizon")
    head.click()
    assert rows() == ["vit/best", "unet/best", "vit/prune1_remaining_50.0", "young/"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    head.press("Enter")  # the keyboard will do
    assert rows() == ["vit/prune1_remaining_50.0", "unet/best", "vit/best", "young/"]
    page.locator("input").fill("VIT 50")
    assert rows() == ["vit/prune1_remaining_50.0"] and page.locator(".runs-count").inner_text() == "1 of 4"
    page.locator("input").fill("")
    page.locator("select").select_option("UNet")
    assert rows() == ["unet/best", "young/"]
    assert page.locator("tbody a").first.get_attribute("href") == "runs/vit/index.html"
    assert said == []
    page.close()


def test_the_index_needs_no_nbdev():
    "Who lists runs has no use for the tools of the workshop."
    code = "import turbvit_nb.lab.index, sys; assert 'nbdev' not in sys.modules and 'execnb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def picture_cell(source: str, alt: str = "") -> nbformat.NotebookNode:
    "A cell that shows a picture, with what Jupyter has for who cannot see it."
    metadata = {"image/png": {"alt": alt}} if alt else {}
    shown = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="}, metadata=metadata)
    return nbformat.v4.new_code_cell(source, outputs=[shown])


def test_pictures_speak(tmp_path):
    "The text of a picture reaches the cell, where Quarto reads it, and the page; a picture without one is a fault."
    nbs = small_site(tmp_path / "nbs")
    cells = [nbformat.v4.new_markdown_cell("# Home\n\n> Start."), picture_cell("show(x)", "a wave")]
    for extra, wanted in (([], 0), ([picture_cell("bare(x)")], 2)):
        nbformat.write(nbformat.v4.new_notebook(cells=[*cells, *extra]), nbs / "index.ipynb")
        assert build(tmp_path / "proc", tmp_path / "nothing", nbs) == []
        render(tmp_path / "proc", tmp_path / "html")
        found = check_site(tmp_path / "proc", tmp_path / "html")
        assert len(found) == wanted and all("picture" in line or "bare(x)" in line for line in found), found
        sources = [cell.source for cell in nbformat.read(tmp_path / "proc/index.ipynb", 4).cells]
        assert '#| fig-alt: "a wave"\nshow(x)' in sources
        assert 'alt="a wave"' in (tmp_path / "html/index.html").read_text()


def test_a_section_shows_its_keys(tmp_path):
    "The page of a chapter has a table of the keys of its section: name, type, default and the comment beside it."
    from turbvit_nb.lab.pages import keys_table, write_page
    from turbvit_nb.compress.schedules import ScheduleConfig
    from turbvit_nb.prune import PruningConfig

    keys, above = ({row["key"]: row for row in keys_table(cls).rows} for cls in (PruningConfig, ScheduleConfig))
    assert keys.keys() | above.keys() == set(PruningConfig.model_fields) and not keys.keys() & above.keys()
    assert all(row["meaning"] for row in [*keys.values(), *above.values()])
    assert keys["score_batches"]["type"] == "int, > 0" and keys["score_batches"]["default"] == "16"
    assert keys["importance_metric"]["default"] == "required"
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("#| default_exp prune"), nbformat.v4.new_markdown_cell("# Pruning\n\n> Less."),
        nbformat.v4.new_code_cell("from turbvit_nb.prune import PruningConfig"), nbformat.v4.new_code_cell("show_doc(PruningConfig)")])
    source = ROOT / "nbs" / ".keys.ipynb"  # where nbdev finds its settings
    nbformat.write(nb, source)
    try:
        write_page(source, tmp_path / "keys.ipynb")
    finally:
        source.unlink()
    page = nbformat.read(tmp_path / "keys.ipynb", 4)
    text = "".join(str(output) for cell in page.cells for output in cell.get("outputs", []))
    assert "| `score_batches` | int, > 0 | `16` |" in text and "keys:Any" not in text
    assert any("turbvit_nb/prune.py" in cell.source for cell in page.cells)


def test_the_scorecard_is_shown_where_a_page_asks(tmp_path):
    "The landing page's scorecard has a row per model, and a sign and a word beside every colour."
    from turbvit_nb.lab.index import read_scorecard

    nbs, runs = small_site(tmp_path / "nbs"), tmp_path / "runs"
    os.makedirs(runs)
    os.symlink(ROOT / "runs/reference_vit", runs / "reference_vit")
    texts = ["# Home\n\n> Start.", "<!-- scorecard reference_vit -->"]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), nbs / "index.ipynb")
    build(tmp_path / "proc", runs, nbs)
    render(tmp_path / "proc", tmp_path / "html")
    page, card = (tmp_path / "html/index.html").read_text(), read_scorecard(ROOT / "runs/reference_vit")
    assert len(card) == 4 and page.count('<th scope="row"') == 4
    marks = [cell["mark"] for row in card for cell in row["cells"]]
    assert page.count('aria-label="chance explains it"') == marks.count("ok") > 0
    assert page.count('aria-label="far beyond chance"') == marks.count("far") > 0


@pytest.mark.parametrize("report", sorted((ROOT / "runs").glob("reference_*/[0-9]*.ipynb")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_reports_hold_the_run(report):
    "Title, parameters and the section Run: no exported code, no word of the smoke job, and the commit it was made at."
    nb = nbformat.read(report, 4)
    assert not any("#| export" in cell.source for cell in nb.cells)
    assert not any("smoke" in cell.source for cell in nb.cells if cell.cell_type == "markdown")
    commit = nb.metadata["made_at"]
    assert f"commit `{commit}`" in nb.cells[0].source
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert git("rev-parse", "--is-shallow-repository") == "true" or git("cat-file", "-t", commit) == "commit"


def test_films_and_explorers_are_not_in_git():
    "They are made by a command, and large."
    files = subprocess.run(["git", "ls-files", "runs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [file for file in files if file.endswith((".gif", ".mp4", ".html"))]
