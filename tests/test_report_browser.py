"""The report's page in a real browser: it draws itself without errors, obeys the keyboard, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from launch.report.page import build
from tests.report_runs import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to draw the page"),
]
HOSTILE = '</script><img src=x onerror="window.hit=1"><b>bold</b>'
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def every_fourth(folder):
    """Give the rows of ``folder`` steps 4, 8, ..., the third of them no KL, and its configuration an unknown key."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [
        row | {"step": 4 * row["step"]} | ({"kl": None} if row["step"] == 3 and "kl" in row else {}) for row in rows
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "config.toml").open("a") as file:
        file.write("\n[unheard_of]\nkey = 1\n")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of one run, of two, of a killed one without samples, and of one that recorded nothing yet; and odd ones.

    The completions of the first two, and a name, are hostile.
    """
    folder = tmp_path_factory.mktemp("runs")
    texts = [HOSTILE, "The answer is four: ", "The answer is five: ", "I do not know: "]
    row = {"completions/clipped_ratio": 0.6, "rewards/answer/mean": 0.5}
    one = write_run(folder / "one", 30, 10, 60, texts, row=row)
    two = write_run(folder / "<i>two", 30, 10, 20, texts, settings={"learner.lr": 3e-6}, row={"staleness/max": 2.0})
    killed = write_run(folder / "killed", 6, 0, ended=False)
    bare = folder / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text("[run]\nsteps = 9\n")
    (bare / "metrics.jsonl").touch()
    short = write_run(folder / "short", 1, 0)
    spaced = every_fourth(write_run(folder / "spaced", 8, 4, 5, texts, groups=20, row={"time/step": 22.45}))
    found = {"single": [one], "double": [one, two], "killed": [killed], "bare": [bare]}
    found |= {"uneven": [one, killed], "short": [short], "spaced": [spaced]}
    for name, runs in found.items():
        (folder / f"{name}.html").write_text(build(runs), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in found}


@pytest.fixture
def shown(chromium, pages):
    """``shown(name, **options)`` opens a page; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def open_page(name="single", size=DESK, **options):
        contexts.append(chromium.new_context(viewport=size, reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(pages[name])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


# --- what is there ---


def test_every_section_draws_itself(shown):
    page = shown()
    assert page.title() == "one — Millrace report"
    assert texts(page, "h1, main > section > h2") == ["one", "Curves", "Where the time went", "Completions", "Settings"]
    assert page.locator(".pill").first.inner_text() == "finished"
    assert "The learner bounds this run." in page.locator(".verdict").inner_text()
    assert "Many completions are truncated" in " ".join(texts(page, ".finding.problem h4"))
    assert "rollout.max_new_tokens" in texts(page, ".finding .change code")
    assert page.locator(".chart").count() >= 8
    assert page.locator(".chart path.line").count() >= 12
    assert texts(page, ".barrow .lane") == ["controller", "engine-0", "learner-0", "reward-0"]
    assert page.locator("canvas").count() == 2
    assert page.locator(".completion").count() == 4
    assert page.locator("#settings-table tbody tr").count() > 3
    assert "asks no network" in page.locator("footer").inner_text()


@pytest.mark.slow
def test_a_run_with_little_to_show_still_makes_a_page(shown):
    page = shown("killed")
    assert page.locator(".pill").inner_text() == "ended early"
    assert "No completions are stored" in page.locator("#completions").inner_text()
    page = shown("bare")
    assert "No step is recorded yet." in page.locator("#curves").inner_text()
    for key in "tsxjkcmr/?":
        page.keyboard.press(key)


@pytest.mark.slow
def test_without_a_configuration_that_fits_no_finding_is_made(shown):
    said = shown("spaced").locator("#overview").inner_text()
    assert "No findings were made" in said
    assert "Nothing stands out" not in said


@pytest.mark.slow
def test_landmarks_and_names_are_there_for_those_who_do_not_see(shown):
    page = shown()
    assert [page.locator(tag).count() for tag in ("main", "body > header", "footer", "nav[aria-label]")] == [1, 1, 1, 1]
    nameless = """[...document.querySelectorAll('button, input, select, canvas, [tabindex="0"]')].filter((node) =>
      !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length)).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("[...document.querySelectorAll('[id]')].length") == page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map((node) => node.id)).size"
    )


def test_what_a_run_says_stays_text(shown):
    page = shown("double")
    assert page.evaluate("window.hit") is None
    assert page.locator("img, main b:not(.part b), main i").count() == 0
    assert HOSTILE in page.locator(".completion .text").first.inner_text()
    assert "<i>two" in page.title()
    page.fill("#text-search", "onerror")
    assert page.locator(".entry mark").first.inner_text() == "onerror"
    assert page.evaluate("window.hit") is None


# --- curves ---


@pytest.mark.slow
def test_arrow_keys_read_a_curve_and_all_charts_follow(shown):
    page = shown()
    first, second = page.locator(".chart").nth(0), page.locator(".chart").nth(1)
    first.locator(".frame").focus()
    page.keyboard.press("Home")
    assert first.locator(".at").inner_text() == "step 1"
    page.keyboard.press("ArrowRight")
    assert [chart.locator(".at").inner_text() for chart in (first, second)] == ["step 2", "step 2"]
    assert "step 2" in page.locator("#live").inner_text()
    assert first.locator(".cursor line").count() == 1
    page.keyboard.press("Escape")
    assert first.locator(".at").inner_text() == ""
    page.keyboard.press("Enter")
    assert "wide" in first.get_attribute("class")


@pytest.mark.slow
def test_arrow_keys_pass_a_step_without_a_value(shown):
    chart = shown("spaced").locator(".chart", has_text="KL to the reference")
    chart.locator(".frame").focus()
    seen = []
    for key in ("Home", *("ArrowRight",) * 3, *("ArrowLeft",) * 2):
        chart.page.keyboard.press(key)
        seen.append(chart.locator(".at").inner_text())
    assert seen == [f"step {step}" for step in (4, 8, 12, 16, 12, 8)]


@pytest.mark.slow
def test_the_time_axis_has_the_seconds_of_the_rows(shown):
    page = shown("spaced")
    page.get_by_role("group", name="Horizontal axis").get_by_text("time").click()
    chart = page.locator(".chart", has_text="KL to the reference")
    chart.locator(".frame").focus()
    page.keyboard.press("End")
    assert chart.locator(".at").inner_text() == "3 min 0 s"  # 8 rows of 22.45 s.


@pytest.mark.slow
def test_what_never_changed_is_the_same_in_all_runs_and_several_steps(shown):
    told = " ".join(texts(shown("double"), ".constant"))
    assert "frac_reward_zero_std 0.2" in told
    assert "staleness/max" not in told
    page = shown("short")
    assert page.locator(".constant").count() == 0
    assert page.locator(".chart circle.dot").count() >= 8


@pytest.mark.slow
def test_the_pointer_reads_a_curve(shown):
    page = shown()
    frame = page.locator(".chart .frame").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    assert re.fullmatch(r"step 1[3-8]", page.locator(".chart .at").first.inner_text())


@pytest.mark.slow
def test_smoothing_axis_and_scale_change_the_curves(shown):
    page = shown()
    path = page.locator(".chart path.line:not(.raw)").first
    before = path.get_attribute("d")
    page.get_by_role("group", name="Smoothing").get_by_text("off").click()
    assert page.locator(".chart path.raw").count() == 0
    assert path.get_attribute("d") != before
    page.get_by_role("group", name="Horizontal axis").get_by_text("time").click()
    assert any(tick.endswith(" s") for tick in page.locator(".chart .tick").all_text_contents())
    page.get_by_label("log scale").check()
    assert page.locator(".chart path.line").count() > 8


@pytest.mark.slow
def test_every_metric_is_found_and_drawn(shown):
    page = shown()
    page.keyboard.press("m")
    page.keyboard.type("other metric_7")
    assert texts(page, "#picks .name") == ["other/metric_7"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chart = page.locator(".chart", has_text="other/metric_7")
    assert chart.locator("path.line").count() == 2
    page.get_by_label("Remove other/metric_7").click()
    assert chart.count() == 0


# --- time ---


@pytest.mark.slow
def test_bars_tell_their_seconds_and_the_table_repeats_them(shown):
    page = shown()
    bar = page.locator(".barrow", has_text="engine-0").locator("[role=img]")
    assert re.search(r"engine-0: generate \d+ %, .* s; ", bar.get_attribute("aria-label"))
    page.get_by_role("group", name="Seconds of").get_by_text("the whole process").click()
    assert "ledger/time.json" in page.locator("#time .tools").first.inner_text()
    page.locator("#time summary").click()
    assert page.locator("#time table tbody tr").count() == 4


@pytest.mark.slow
def test_a_press_keeps_focus_and_the_open_table(shown):
    page = shown()
    focused, opened = "document.activeElement.textContent", "document.querySelector('#time details').open"
    page.locator("#time summary").click()
    page.locator("#time .states button", has_text="generate").focus()
    page.keyboard.press("Enter")
    assert page.locator("#time .states button[aria-pressed=true]").inner_text() == "generate"
    assert (page.evaluate(focused), page.evaluate(opened)) == ("generate", True)
    page.get_by_role("group", name="Seconds of").get_by_text("the whole process").focus()
    page.keyboard.press("Enter")
    assert "ledger/time.json" in page.locator("#time .tools").first.inner_text()
    assert (page.evaluate(focused), page.evaluate(opened)) == ("the whole process", True)


@pytest.mark.slow
def test_the_keyboard_walks_the_timeline(shown):
    page = shown()
    canvas, status = page.locator("canvas").nth(1), page.locator("#time .readout").nth(1)
    canvas.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    first = status.inner_text()
    assert re.match(r"engine-0 · (wait for prompts|generate|pause|receive) · .*s · from \d", first)
    page.keyboard.press("ArrowRight")
    assert status.inner_text() != first
    page.keyboard.press("+")
    page.keyboard.press("Shift+ArrowLeft")
    page.locator("canvas").first.focus()
    page.keyboard.press("End")
    assert "mostly" in page.locator("#time .readout").first.inner_text()


# --- completions ---


@pytest.mark.slow
def test_search_sort_and_filter_choose_completions(shown):
    page = shown()
    found = page.locator("#found")
    assert found.inner_text() == "24 of 24 completions"
    page.keyboard.press("/")
    page.keyboard.type("is FIVE")
    assert found.inner_text() == "6 of 24 completions"
    page.keyboard.press("Escape")
    assert found.inner_text() == "24 of 24 completions"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.tagName") == "BODY"
    page.fill("#text-search", "no such words")
    assert page.locator(".groupview").inner_text() == "No completion matches."
    page.fill("#text-search", "")
    page.select_option("#step-filter", "20")
    assert found.inner_text() == "8 of 24 completions"
    assert set(re.findall(r"step \d+", " ".join(texts(page, ".entry-facts")))) == {"step 20"}
    page.select_option("#step-filter", "")
    for key, pattern in (("reward", r"r ([\d.]+)"), ("advantage", r"A ([+−\d.]+)"), ("length", r"(\d+) tokens")):
        page.select_option("#sort", key)
        for direction in (1, -1):
            listed = re.findall(pattern, " ".join(texts(page, ".entry-facts")))
            values = [direction * float(value.replace("−", "-")) for value in listed]
            assert values == sorted(values)
            page.click("#direction")


@pytest.mark.slow
def test_the_keyboard_walks_completions_and_their_tokens(shown):
    page = shown()
    page.locator("#entries").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".completion.current .no").inner_text() == "2"
    assert page.locator("#entries").get_attribute("aria-activedescendant") == "entry-1"
    page.keyboard.press("k")
    assert page.locator(".completion.current .no").inner_text() == "1"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip").inner_text()
    assert "“<” · token 1 of " in tip
    assert "log-prob" in tip
    assert "sampled by policy version 8" in tip
    assert "advantage of the completion" in tip
    page.keyboard.press("End")
    assert "sampled by policy version 9" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


@pytest.mark.slow
def test_enter_on_show_more_shows_more(shown):
    page = shown("spaced")
    assert page.locator(".entry").count() == 150
    page.locator(".more button").focus()
    page.keyboard.press("Enter")
    assert page.locator(".entry").count() == 160
    assert page.evaluate("document.activeElement.id") == "entries"


@pytest.mark.slow
def test_tokens_are_coloured_three_ways(shown):
    page = shown()
    coloured = (
        "[...document.querySelectorAll('.completion:nth-child(2) .tok')].map((node) => node.style.backgroundColor)"
    )
    seen = {}
    for mode in ("log-prob", "advantage", "version", "plain"):
        page.get_by_role("group", name="Colour tokens by").get_by_text(mode).click()
        seen[mode] = set(page.evaluate(coloured))
        if mode == "version":
            assert texts(page, ".groupview > .legend .name") == ["policy version 8", "policy version 9"]
    assert len(seen["log-prob"]) > 5
    assert len(seen["advantage"]) == 1
    assert len(seen["version"]) == 2
    assert seen["plain"] == {""}


@pytest.mark.slow
def test_a_group_shows_every_completion_with_its_rewards_by_part(shown):
    page = shown()
    assert page.locator(".completion").count() == 4
    assert texts(page, ".completion:first-child .part span") == ["answer", "format"]
    assert "prompt 100" in page.locator(".prompt .text").inner_text()


# --- several runs ---


@pytest.mark.slow
def test_two_runs_are_compared(shown):
    page = shown("double")
    assert page.locator("h1").inner_text() == "2 runs"
    assert texts(page, "#figures thead .runname") == ["one", "<i>two"]
    assert "Held-out reward, last" in texts(page, "#figures tbody th")
    assert page.locator("#figures .delta").count() >= 1
    assert ["learner.lr", "0.000001", "0.000003"] in [
        row.split("\t") for row in texts(page, "#differences tbody tr")
    ] or ("learner.lr" in texts(page, "#differences tbody th"))
    legend = texts(page, ".chart:first-child .legend .name")[:4]
    assert legend == ["one · training", "one · held-out", "<i>two · training", "<i>two · held-out"]
    assert "60 tokens" in " ".join(texts(page, ".entry-facts"))
    page.keyboard.press("r")
    assert page.locator(".runhead .runname").inner_text() == "<i>two"
    assert "60 tokens" not in " ".join(texts(page, ".entry-facts"))


@pytest.mark.slow
def test_runs_of_different_length_tell_how_many_steps_their_means_are_of(shown):
    assert "Means of the last 10 steps;" in shown("double").locator("#overview").inner_text()
    assert "Means of the last 3 to 10 steps;" in shown("uneven").locator("#overview").inner_text()


# --- keyboard, colours, sizes ---


@pytest.mark.slow
def test_help_and_sections_by_key(shown):
    page = shown()
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    assert "search completions" in page.locator("#keys").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#keys").is_hidden()
    page.keyboard.press("4")
    assert page.evaluate("document.activeElement.id") == "h-completions"
    assert page.evaluate("Math.abs(document.getElementById('completions').getBoundingClientRect().top) < 100")


@pytest.mark.slow
def test_the_tab_key_reaches_everything_and_focus_is_seen(shown):
    page = shown()
    seen, unseen = set(), []
    for _ in range(400):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            """[document.activeElement.closest('section, header.bar, .skip')?.id ?? '',
                getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth]"""
        )
        seen.add(place)
        unseen += [place] if outline in ("none0px", "none2px") or outline.endswith("0px") else []
        if place == "settings":
            break
    assert seen >= {"bar", "curves", "time", "completions", "settings"}
    assert unseen == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_the_switch(shown, scheme):
    page = shown(color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    light = sum(int(value) for value in re.findall(r"\d+", page.evaluate(background))) > 380
    assert light == (scheme == "light")
    page.keyboard.press("t")
    assert (sum(int(value) for value in re.findall(r"\d+", page.evaluate(background))) > 380) != light
    page.reload()
    assert (sum(int(value) for value in re.findall(r"\d+", page.evaluate(background))) > 380) != light


CONTRAST = """() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const paint = (layers) => {
    context.clearRect(0, 0, 1, 1);
    for (const fill of layers) { context.fillStyle = fill; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const low = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('script, .vh')) continue;
    const layers = [];
    for (let up = node; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
    const style = getComputedStyle(node), back = paint(['#fff', ...layers]);
    const ink = paint([...['#fff', ...layers], node instanceof SVGElement ? style.fill : style.color]);
    const [a, b] = [light(back), light(ink)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.set(`${node.tagName}.${node.className.baseVal ?? node.className} ${ratio.toFixed(2)}`, 1);
  }
  return [...low.keys()];
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(shown, scheme):
    page = shown("double", color_scheme=scheme)
    page.evaluate("document.querySelector('.sub').style.color = '#777'")
    assert len(page.evaluate(CONTRAST)) == 1  # The measure itself works.
    page.evaluate("document.querySelector('.sub').style.color = ''")
    page.locator("#time summary").click()
    for mode in ("log-prob", "advantage", "version"):
        page.get_by_role("group", name="Colour tokens by").get_by_text(mode).click()
        assert page.evaluate(CONTRAST) == []
    page.keyboard.press("?")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "double"])
def test_nothing_is_wider_than_a_phone(shown, name):
    page = shown(name, PHONE, has_touch=True)
    page.locator("#time summary").click()
    wide = """[...document.querySelectorAll('body *')].filter((node) => {
      if (node.closest('.scroll, nav, .vh, .skip, svg, [hidden], .stack, dialog')) return false;
      return node.getBoundingClientRect().right > innerWidth + 0.5; }).map((node) => node.className || node.tagName)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".entries").evaluate("(node) => node.scrollTop") == 0
    assert page.evaluate("document.querySelector('#help').getBoundingClientRect().right") <= 360
