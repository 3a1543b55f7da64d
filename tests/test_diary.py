"""The diary of the folder of runs: what it says, that people's words in it stay, that several jobs lose nothing, that mistakes cost one line."""
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from turbvit_nb.cli import app
from turbvit_nb.lab.config import LabError, load_config
from turbvit_nb.lab.diary import DIARY, append, code, log_runs, plain
from turbvit_nb.lab.runs import open_run, stages

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def made(place: Path, name: str, stage: str = "train", keys: str = "", then: dict | None = None, began: str | None = None) -> Path:
    "A run that has been through a stage."
    (place / f"{name.replace('/', '_')}.toml").write_text(f'output_dir = "runs/{name}"\ndevice = "cpu"\n{keys}')
    run = open_run(place / f"{name.replace('/', '_')}.toml", stage)
    run.log(fit=stage, step=1, loss=0.5, seconds=5.0)
    if began:
        run.stage_status["started"] = f"2026-01-01T{began}:00+00:00"
    run.finish(**(then or {}))
    return run.path


def turbvit(*words: str):
    return CliRunner().invoke(app, list(words))


def diary(place: Path) -> str:
    return (place / "runs" / DIARY).read_text()


def shown(tokens) -> str:
    "The text that a reader sees."
    return "".join(shown(token.children) if token.children else token.content for token in tokens if token.type != "html_block")


@settings(max_examples=300, deadline=None)
@given(some.text(some.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp", "Cf")) | some.sampled_from(r"\`*_[]<>|#~$&@^!(){}+-.:/ "), max_size=60))
def test_people_may_write_anything(text):
    "What Markdown shows of an escaped text is the text, in a paragraph and in the cell of a table; of code, the code."
    text = " ".join(text.split())
    assert shown(MARKDOWN.parse(f"**Why.** {plain(text)}")) == f"Why. {text}".rstrip()
    table = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {plain(text)} | end |\n")
    assert [token.content for token in table if token.type == "inline"][-1] == "end"
    assert shown([token for token in table if token.type == "inline"][2:3]) == text
    if text:
        assert shown(MARKDOWN.parse(f"x {code(text)}")) == f"x {text}"


def test_keys_of_the_config(place):
    "`why` and `expect` are text at the top of every config, and another stage of the run may have its own."
    for text, line in [("why = 3", "why = 3"), ("wy = 'x'", r"wy is not a top-level key; did you mean why\?"), ("[why]\na = 1", r"\[why\] is not a section")]:
        (place / "wrong.toml").write_text(text)
        with pytest.raises(LabError, match=line):
            load_config(place / "wrong.toml")
    folder = made(place, "vit", keys='why = "first"\n')
    made(place, "vit", "prune", keys='why = "second"\nexpect = """nothing\nat all"""\n')
    said = {stage: (entry["why"], entry.get("expect")) for stage, entry in stages(folder).items()}
    assert said == {"train": ("first", None), "prune": ("second", "nothing\nat all")}
    output = turbvit("status", "vit").output
    assert "why: second" in output and "expect: nothing at all" in output


def test_an_entry(place):
    "Question, expectation, difference from the nearest run, figures, time, code and report, in a file that Markdown reads."
    made(place, "far", keys='seed = 9\ncheckpoint_file = "x.tar"\n', began="09:00")
    made(place, "near", keys="seed = 4\n", began="10:00")
    made(place, "other_kind", "inference", keys="seed = 5\n", began="10:30")
    folder = made(place, "new", keys='seed = 5\nwhy = "a | b\\n# c"\nexpect = "<i>no</i>"\n', began="11:00", then={"epochs": 3, "best": {"ACC u at 10": 0.9876, "horizon (steps)": "41 [38, 45]"}})
    (folder / "02_train.ipynb").write_text('{"metadata": {"papermill": {"parameters": {"config": "my.toml", "overrides": ["training.lr=0.1", "why=\'x\'"]}}}}')
    assert turbvit("log", "new").output.startswith("new: train")
    text = diary(place)
    html = MARKDOWN.render(text)
    for words in ("Why.</strong> a | b # c", "Expected.</strong> &lt;i&gt;no&lt;/i&gt;", "against <code>near</code>: <code>seed</code> <code>4</code> → <code>5</code>",
                  "<code>my.toml</code> with <code>training.lr=0.1</code>", "<strong>train</strong>: epochs 3", "<td style=\"text-align:right\">41 [38, 45]</td>",
                  "<td style=\"text-align:right\">0.988</td>", "Took</strong> train 5 s; turbvit_nb", '<a href="new/02_train.ipynb">02_train</a>'):
        assert words in html, words
    assert "<h1>c" not in html and len(re.findall("<h2>", html)) == 1
    made(place, "child", keys='checkpoint_file = "far/checkpoints/best.tar"\nseed = 5\n', began="12:00")
    turbvit("log", "child")
    assert "against `far`" in diary(place)  # the parent, though another is nearer


def test_nothing_is_doubled_and_nothing_of_a_persons_is_touched(place):
    made(place, "one")
    made(place, "two")
    assert turbvit("log").output.count(": train") == 2
    path = place / "runs" / DIARY
    path.write_text(before := diary(place).replace("**Came out.**", "**Came out, as I had said.**") + "\n- ask about | the mask")
    assert "train" not in turbvit("log").output and turbvit("log", "one").output.startswith("one: nothing new")
    assert diary(place) == before
    made(place, "one", "prune")
    assert turbvit("log").output.startswith("one: prune\n")
    assert diary(place).startswith(before) and diary(place).count("\n## ") == 3 and "\n\n## " in diary(place)[len(before):]
    for _ in range(2):
        turbvit("log", "two", "--note", "It was the *data*.")
    assert diary(place).count(r"It was the \*data\*.") == 1
    path.write_text("")  # somebody begins a new volume
    assert turbvit("log").output.count("train") == 2 and diary(place).count("\n## ") == 2


def test_what_failed_is_told_when_it_is_asked_for(place):
    (place / "a.toml").write_text('output_dir = "runs/a"\ndevice = "cpu"\n')
    run = open_run(place / "a.toml", "train")
    run.log(fit="train", step=7, loss=0.5)
    assert turbvit("log", "a").output.startswith("a: nothing new")  # it is running
    run.interrupted(ValueError("the loss | is not finite"))
    run.close()
    assert "a:" not in turbvit("log").output and not (place / "runs" / DIARY).exists()
    assert turbvit("log", "a").output.startswith("a: train")
    assert r"- **train** (failed: ValueError: the loss \| is not finite): step 7, loss 0.5" in diary(place)


def test_mistakes_cost_one_line(place):
    folder = made(place, "vit128")
    (place / "runs" / "empty").mkdir()
    for words, line in [(["vit182"], "the nearest is runs/vit128"), (["vit128.toml"], "is a file: give the name of a run"), (["empty"], "holds no run that has begun"),
                        (["--note", "x"], "a note is about one run"), (["vit128", "--note", " "], "a note is about one run")]:
        done = turbvit("log", *words)
        assert done.exit_code == 1 and line in done.output.replace("\n", " ") and len(done.output.strip().splitlines()) == 1, words
    assert not (place / "runs" / DIARY).exists()
    made(place, "unet128")
    (folder / "status.json").write_text("{")
    output = turbvit("log").output
    assert "vit128: left out" in output and "is damaged" in output and "unet128: train" in output
    assert turbvit("log", "vit128").exit_code == 1


def test_runs_of_a_study_by_its_name(place):
    made(place, "study/a")
    made(place, "study/b")
    made(place, "else")
    assert turbvit("log", "study").output.splitlines()[:2] == ["study/a: train", "study/b: train"]
    assert "(study/a" not in diary(place) and diary(place).count("\n## ") == 2


def test_several_processes_at_once_lose_nothing(place):
    "Four commands log ten runs at once, while somebody else appends lines of their own."
    for i in range(10):
        made(place, f"run{i}", keys=f"seed = {i}\n")
    words = [sys.executable, "-m", "turbvit_nb.cli", "log"]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    mine = 0
    while any(job.poll() is None for job in jobs):
        if (place / "runs" / DIARY).exists():
            with (place / "runs" / DIARY).open("a") as file:
                file.write(f"\n(my line {mine})\n")
            mine += 1
        time.sleep(0.05)
    said = [job.communicate()[0] for job in jobs]
    assert all(job.returncode == 0 for job in jobs), said
    text = diary(place)
    for i in range(10):
        assert len(re.findall(rf"^## \S+ · run{i} · train$", text, re.M)) == 1
        assert sum(f"run{i}: train" in words for words in said) == 1
    assert mine and all(text.count(f"(my line {i})\n") == 1 for i in range(mine))
    assert len(re.findall(r"<!-- turbvit log \w+: train \S+ -->\n", text)) == 10


def test_a_full_disk_leaves_what_was_there(place):
    path = place / "full.md"
    path.write_text("mine\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(LabError, match="no room to write"):
            append(path, "x" * 500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "mine\n"


def test_the_diary_goes_on_after_half_an_entry(place):
    "An entry that was cut off has no mark: it is written again, and its torn beginning stays for a person to see."
    made(place, "vit")
    assert list(log_runs()) == ["vit: train"]
    (place / "runs" / DIARY).write_text(torn := diary(place)[:-40])
    assert list(log_runs()) == ["vit: train"]
    assert diary(place).startswith(torn) and diary(place).count(" · vit · train") == 2
