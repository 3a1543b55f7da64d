"""The explorer in a real browser, opened from a file with the network cut off: it opens, draws, reacts, and complains of nothing."""
import io

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from typer.testing import CliRunner

from turbvit_nb.cli import app
from turbvit_nb.explore import explore
from turbvit_nb.physics.spectral import Grid
from turbvit_nb.study.entries import entries_of
from turbvit_nb.study.page import html_of, page
from turbvit_nb.study.shown import shown

SHOWN, LEADS, STARTS = [1, 5, 10, 20], 20, 3


def analysis(N: int, damping: float, slope: float, step: float = 0.1, extra: str | None = None) -> xr.Dataset:
    "A short analysis whose every number is known: a wave that travels, a forecast of `damping` its amplitude, an ACC that falls by `slope` a step."
    leads, x = np.arange(1, LEADS + 1), np.arange(N) * 2 * np.pi / N
    names = ["emulator", "persistence", "climatology"] + ([extra] if extra else [])
    falls = [slope, 0.1, 1.0, 0.04][: len(names)]
    acc = np.stack([1 - fall * leads for fall in falls])[:, None, :, None] + np.zeros((1, STARTS, 1, 3))
    truth = np.stack([10 * np.cos(2 * x[:, None] - 0.7 * lead) + 5 * np.sin(x)[None] for lead in SHOWN]).astype(np.float32)
    shells = np.arange(N // 2)
    power = np.where(shells > 0, np.maximum(shells, 1.0) ** -3, 0)[None, None] * np.ones((len(names), LEADS, 1)) * (1 + leads[:, None])
    scores, spectra, maps = ("forecast", "start", "lead", "field"), ("forecast", "lead", "shell"), ("shown_lead", "x", "y")
    variables = {"acc": (scores, acc), "rmse": (scores, 2 * (1 - acc)), "energy_spectrum": (spectra, damping**2 * power), "error_spectrum": (spectra, (1 - damping) ** 2 * power),
                 "truth_spectrum": (spectra[1:], power[0]), "omega_truth": (maps, truth), "omega_emulator": (maps, np.float32(damping) * truth)}
    coords = {"forecast": names, "field": ["u", "v", "omega"], "lead": leads, "shown_lead": SHOWN, "lead_time": ("lead", step * leads)}
    return xr.Dataset(variables, coords, {"step": step, "threshold": 0.6, "forcing_wavenumber": 4.0, "patch_wavenumber": 8.0})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Two runs: one with two checkpoints at 32², one at 16² with another step and a further baseline."
    home = tmp_path_factory.mktemp("study")
    made = {("vit", "best"): analysis(32, 0.9, 0.01), ("vit", "prune1_remaining_50.0"): analysis(32, 0.6, 0.03), ("unet", "best"): analysis(16, 0.5, 0.05, 0.2, "linear")}
    blown = made["vit", "prune1_remaining_50.0"]
    blown.omega_emulator[-1] = np.nan
    blown.acc[0, :, -1] = blown.rmse[0, :, -1] = np.nan
    for (run, checkpoint), data in made.items():
        (home / run / "short_analyses").mkdir(parents=True, exist_ok=True)
        data.to_netcdf(home / run / "short_analyses" / f"{checkpoint}.nc", engine="h5netcdf")
    return home


class Explorer:
    "The page as a reader has it: knobs to turn, and what is drawn."

    def __init__(self, browser, path, state: str = ""):
        self.complaints, self.asked = [], []
        context = browser.new_context(viewport={"width": 1150, "height": 1000}, offline=True)
        self.page = context.new_page()
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri() + f"#{state}" * bool(state))
        self.page.wait_for_function("window.Bokeh && Bokeh.documents.length === 1 && Bokeh.documents[0].is_idle", timeout=90_000)

    def choose(self, knob: str, label: str) -> None:
        self.page.get_by_label(knob, exact=True).select_option(label=label)

    def options(self, knob: str) -> list[str]:
        return self.page.get_by_label(knob, exact=True).evaluate("select => [...select.options].map(option => option.text)")

    def lead(self, number: int) -> None:
        "Move the slider with the keyboard."
        handle = self.page.locator(".noUi-handle")
        handle.press("Home")
        for _ in range(number):
            handle.press("ArrowRight")

    def images(self) -> list[np.ndarray]:
        "The maps that are drawn: truth, forecast, error, and where one is beside: the difference, it, and its error; rows from the bottom."
        read = """() => [...Bokeh.documents[0].all_models].filter(m => m.type === 'Figure' && m.visible)
                  .flatMap(f => f.renderers.filter(m => m.glyph.type === 'Image' && !m.data_source.data.dw))
                  .map(m => ({shape: m.data_source.data.image[0].shape, values: [...m.data_source.data.image[0]]}))"""
        return [np.array([np.nan if v is None else v for v in part["values"]], float).reshape(part["shape"]) for part in self.page.evaluate(read)]

    def lines(self, panel: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        "The lines of the figure with that title."
        read = """title => Object.fromEntries([...Bokeh.documents[0].all_models].filter(m => m.type === 'Figure' && m.title.text === title)[0].renderers
                  .filter(r => r.glyph.type === 'Line').map(r => [r.name, [[...r.data_source.data.x], [...r.data_source.data.y]]]))"""
        found = self.page.evaluate(read, panel)
        return {name: (np.array(x, float), np.array([np.nan if v is None else v for v in y], float)) for name, (x, y) in found.items()}

    def cursor(self) -> float:
        "Where the line of the lead stands."
        return self.page.evaluate("[...Bokeh.documents[0].all_models].find(m => m.type === 'Label' && m.text === 'this lead').x")

    @property
    def words(self) -> str:
        "All text of the page: every widget has a document of its own, which `innerText` does not enter."
        read = """() => { const text = node => node.nodeType === 3 ? node.textContent : ['STYLE', 'SCRIPT'].includes(node.nodeName) ? ''
                  : [...(node.shadowRoot || node).childNodes].map(text).join(''); return text(document.body) }"""
        return self.page.evaluate(read)

    def picture(self) -> np.ndarray:
        self.page.wait_for_function("Bokeh.documents[0].is_idle")
        self.page.wait_for_timeout(300)
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB"))


@pytest.fixture(scope="module")
def written(study):
    return explore([study / "vit", study / "unet"], study / "explorer.html")


@pytest.fixture
def explorer(browser, written):
    page = Explorer(browser, written)
    yield page
    assert page.complaints == []
    assert all(url.startswith("file:") and url.partition("#")[0].endswith("explorer.html") for url in page.asked), page.asked
    page.page.context.close()


def blue_and_brown(picture: np.ndarray) -> float:
    "The share of the picture in the colours of the fields."
    red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
    return float((abs(red - blue) > 60).mean())


def test_it_opens_and_draws_the_first_entry_at_the_middle_lead(explorer, study):
    truth = xr.load_dataset(study / "vit" / "short_analyses" / "best.nc", engine="h5netcdf")
    picture = explorer.picture()
    assert explorer.page.locator("canvas").count() >= 5
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500 and blue_and_brown(picture) > 0.05
    drawn = explorer.images()
    for field, true in zip(drawn, (truth.omega_truth[2], truth.omega_emulator[2], truth.omega_emulator[2] - truth.omega_truth[2])):
        np.testing.assert_allclose(field, true.values.T, atol=0.51 * np.abs(true.values).max() / 127)
    x, y = explorer.lines("score against lead")["forecast"]
    np.testing.assert_allclose(x, 0.1 * np.arange(1, 21), rtol=1e-6)
    np.testing.assert_allclose(y, 1 - 0.01 * np.arange(1, 21), rtol=1e-6)
    assert "ACC of ω 0.900, against persistence 0.000" in explorer.words
    assert explorer.cursor() == pytest.approx(1.0)


def test_lead_moves_fields_spectrum_and_cursor(explorer):
    before, spectrum, picture = explorer.images(), explorer.lines("energy per shell at this lead")["truth"][1], explorer.picture()
    explorer.lead(3)
    after = explorer.images()
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(after, before))
    np.testing.assert_allclose(explorer.lines("energy per shell at this lead")["truth"][1], spectrum * 21 / 11, rtol=1e-5)
    assert explorer.cursor() == pytest.approx(2.0)
    assert "at step 20: ACC of ω 0.800" in explorer.words and "lead: 20 steps, 2.00 time units" in explorer.words
    assert (explorer.picture() != picture).any(-1).mean() > 0.02


def test_checkpoint_and_run_change_what_is_shown(explorer):
    assert explorer.options("checkpoint") == ["best", "prune1_remaining_50.0"]
    dense = explorer.images()
    explorer.choose("checkpoint", "prune1_remaining_50.0")
    pruned = explorer.images()
    np.testing.assert_array_equal(pruned[0], dense[0])
    np.testing.assert_allclose(pruned[1], 0.6 * dense[0], atol=0.15)
    assert "vit · 50 % at step 10: ACC of ω 0.700" in explorer.words
    explorer.choose("run", "unet")
    assert explorer.options("checkpoint") == ["best"]
    assert explorer.images()[0].shape == (16, 16)
    assert explorer.lines("score against lead")["linear model"][1][0] == pytest.approx(0.96)
    assert "unet · dense at step 5: ACC of ω 0.750" in explorer.words  # the same time, which is another step
    assert "its ACC of ω falls below 0.6 at step 9 (1.80 time units, interval 9 to 9)" in explorer.words
    assert explorer.cursor() == pytest.approx(1.0)
    explorer.choose("run", "vit")
    assert len(explorer.lines("score against lead")["linear model"][0]) == 0  # this run has no such baseline


def test_score_field_and_the_line_beside(explorer):
    assert explorer.options("score") == ["ACC", "RMSE"]
    assert len(explorer.lines("score against lead")["beside"][0]) == 0
    explorer.choose("score", "RMSE")
    explorer.choose("of", "u")
    explorer.choose("of", "ω")
    explorer.choose("beside it", "vit · 50 %")
    lines = explorer.lines("score against lead")
    np.testing.assert_allclose(lines["forecast"][1], 0.02 * np.arange(1, 21), rtol=1e-5)
    np.testing.assert_allclose(lines["beside"][1][:-1], 0.06 * np.arange(1, 20), rtol=1e-5)
    assert np.isnan(lines["beside"][1][-1])  # the blow-up is a gap
    assert "RMSE of ω 0.200" in explorer.words
    spectra = explorer.lines("energy per shell at this lead")
    np.testing.assert_allclose(spectra["beside"][1], 0.36 * spectra["truth"][1], rtol=1e-5)


def test_a_blow_up_is_grey_and_said(explorer):
    explorer.choose("checkpoint", "prune1_remaining_50.0")
    explorer.lead(3)
    truth, forecast, error = explorer.images()
    assert np.isfinite(truth).all() and np.isnan(forecast).all() and np.isnan(error).all()
    assert "ACC of ω not finite" in explorer.words
    assert (np.abs(explorer.picture().astype(int) - 0xBB).max(-1) < 3).mean() > 0.08  # two grey panels


def test_error_on_its_own_scale_and_play(explorer):
    read = "[...Bokeh.documents[0].all_models].filter(m => m.type === 'LinearColorMapper' && !m.tags.length).map(m => m.high)"
    assert len(set(explorer.page.evaluate(read))) == 1
    explorer.page.get_by_role("checkbox").check()
    error = explorer.images()[2]
    assert sorted(set(explorer.page.evaluate(read)))[0] == pytest.approx(np.abs(error).max(), rel=1e-5)
    explorer.lead(0)
    play = explorer.page.get_by_role("button", name="play")
    play.click()
    explorer.page.wait_for_function("[...Bokeh.documents[0].all_models].find(m => m.type === 'Slider').value === 3")
    explorer.page.wait_for_function("[...Bokeh.documents[0].all_models].find(m => m.type === 'Slider').value === 0")
    play.click()
    explorer.page.wait_for_function("!window.playing || ![...Bokeh.documents[0].all_models].find(m => m.type === 'Toggle').active")
    explorer.lead(0)
    assert explorer.cursor() == pytest.approx(0.1)


def test_the_field_that_is_chosen_is_drawn(explorer, study):
    "u and v follow from the vorticity in the browser, as they do from `Grid`."
    truth = xr.load_dataset(study / "vit" / "short_analyses" / "best.nc", engine="h5netcdf")
    omega = torch.from_numpy(truth.omega_truth[2].values.astype(float))
    exact = dict(zip("uv", Grid.of(omega).velocity(omega).numpy()))
    for name in "uv":
        explorer.choose("of", name)
        true, forecast, error = explorer.images()
        size = np.abs(exact[name]).max()
        np.testing.assert_allclose(true, exact[name].T, atol=0.01 * size)
        np.testing.assert_allclose(forecast, 0.9 * exact[name].T, atol=0.01 * size)
        np.testing.assert_allclose(error, -0.1 * exact[name].T, atol=0.001 * size)
        assert f"ACC of {name} 0.900" in explorer.words


def test_the_forecast_beside_has_fields_and_a_difference(explorer):
    explorer.choose("beside it", "vit · 50 %")
    truth, forecast, error, difference, beside, its_error = explorer.images()
    np.testing.assert_allclose(beside, 0.6 * truth, atol=0.15)
    np.testing.assert_allclose(its_error, -0.4 * truth, atol=0.15)
    np.testing.assert_allclose(difference, error - its_error, atol=1e-5)
    explorer.choose("beside it", "unet · dense")  # another grid: no difference can be taken
    assert np.isnan(explorer.images()[3]).all() and explorer.images()[4].shape == (16, 16)
    explorer.choose("beside it", "nothing")
    assert len(explorer.images()) == 3


def test_maps_are_square(explorer):
    read = "[...Bokeh.documents[0].all_models].filter(m => m.type === 'Figure' && m.title.text.includes('truth')).map(m => [m.inner_width, m.inner_height])"
    width, height = explorer.page.evaluate(read)[0]
    assert width == height == 250


def test_the_address_keeps_the_state(explorer, browser, written):
    explorer.choose("checkpoint", "prune1_remaining_50.0")
    explorer.choose("beside it", "vit · dense")
    explorer.choose("of", "v")
    explorer.choose("score", "RMSE")
    explorer.lead(1)
    address = explorer.page.url
    assert "checkpoint=prune1_remaining_50.0" in address and "of=v" in address and "lead=0.5" in address
    again = Explorer(browser, written, address.partition("#")[2])
    assert again.page.url == address and again.complaints == []
    assert "RMSE of v 0.300" in again.words and "lead: 5 steps" in again.words
    for mine, theirs in zip(again.images(), explorer.images(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    again.page.context.close()
    wrong = Explorer(browser, written, "run=nobody&lead=x&of=w")  # what is not there is left as it opens
    assert "vit · dense at step 10" in wrong.words and wrong.complaints == []
    wrong.page.context.close()


def test_command(study, tmp_path, monkeypatch):
    "turbvit explore writes the page where it is told to; a run without analyses is one line, and the run that has some is still shown."
    monkeypatch.delenv("TURBVIT_PROGRESS")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.toml").write_text("")
    for run in ("vit", "unet"):
        (study / run / "config.toml").write_text("")
    target = tmp_path / "page.html"
    ran = CliRunner().invoke(app, ["explore", str(study / "vit"), str(tmp_path / "bare"), "-o", str(target)])
    assert ran.exit_code == 0, ran.output
    assert "bare has no short analysis and is left out" in ran.output
    text = target.read_text()
    assert "vit · 50 %" in text and target.stat().st_size < 3_000_000
    ran = CliRunner().invoke(app, ["explore", str(tmp_path / "bare")])
    assert ran.exit_code == 1 and "nothing to explore: no short analysis in bare" in ran.output
    ran = CliRunner().invoke(app, ["explore", str(study / "vti")])
    assert ran.exit_code == 1 and "no config or run folder" in ran.output


class Rolled:
    "A rollout of a known wave, in memory."

    def __init__(self, shift: float, truth: np.ndarray):
        self.shift, self.there, self.followed, self.header = shift, truth, np.array(SHOWN), {"start": {"frame": 7}}

    def vorticity(self, steps):
        return self.truth(steps) + self.shift

    def truth(self, steps):
        return self.there[np.isin(self.followed, steps)]


def test_an_ensemble_has_a_mean_a_spread_and_members(browser, study, tmp_path):
    entry = entries_of("unet", study / "unet")[0][0]
    truth = entry.scores.omega_truth.values
    crps = xr.DataArray(np.stack([np.ones((STARTS, LEADS, 3)), 4 * np.ones((STARTS, LEADS, 3))]), dims=("ensemble", "start", "lead", "field"))
    entry.scores = entry.scores.assign(crps=crps).assign_coords(ensemble=["emulator", "climatology"])
    parts = [shown(entry, [[Rolled(shift, truth) for shift in (-2.0, 0.0, 5.0)]])]
    path = tmp_path / "ensemble.html"
    path.write_text(html_of(page(parts), [part["label"] for part in parts]), encoding="utf-8")
    explorer = Explorer(browser, path)
    assert explorer.options("start")[1:] == ["frame 7, mean of 3 members", "frame 7, spread of 3 members", *(f"frame 7, member {m}" for m in (1, 2, 3))]
    explorer.choose("start", "frame 7, mean of 3 members")
    there, mean, error = explorer.images()
    np.testing.assert_allclose(mean - there, 1.0, atol=0.15)
    explorer.choose("start", "frame 7, spread of 3 members")
    _, spread, wrong = explorer.images()
    np.testing.assert_allclose(spread, np.std([-2, 0, 5], ddof=1), atol=0.1)
    np.testing.assert_allclose(wrong, error, atol=1e-6)
    explorer.choose("of", "u")
    assert np.isnan(explorer.images()[1]).all() and np.isfinite(explorer.images()[2]).all()
    explorer.choose("of", "ω")
    explorer.choose("score", "CRPS")
    assert "CRPS of ω 1.000, against climatology 4.000" in explorer.words and explorer.complaints == []
    explorer.page.context.close()
