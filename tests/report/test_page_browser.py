"""The pages in a real browser: quiet, offline, inert whatever stands in the records, and usable by keyboard, by search, in the dark.

Needs a Chromium; without one the tests fail and say which package to install.
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

from limbeck.report.page import write_report
from tests.report_folders import KINDS, PAYLOADS, make_comparison, make_run

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALLOWED = {
    "html", "head", "meta", "link", "title", "style", "body", "a", "header", "div", "p", "button", "h1", "h2", "h3", "h4", "aside", "details", "summary",
    "ul", "li", "strong", "q", "nav", "main", "section", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "i", "figure", "figcaption", "svg",
    "desc", "line", "text", "polyline", "circle", "rect", "code", "label", "input", "select", "option", "fieldset", "legend", "article", "dl", "dt", "dd",
    "pre", "footer", "script", "mark",
}  # fmt: skip
CONTRAST = """() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.e-]+/g).map(Number);
    const [r, g, b, a = 1] = text.startsWith("color(srgb") ? [...parts.slice(0, 3).map((x) => 255 * x), ...parts.slice(3)] : parts;
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, n) => x * a + below[n] * (1 - a));
  const backdrop = (element) => {
    if (!element) return [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, backdrop(element.parentElement));
  };
  const luminance = (rgb) => rgb.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, n) => sum + x * [0.2126, 0.7152, 0.0722][n], 0);
  const failures = [];
  for (const element of document.body.querySelectorAll("*")) {
    const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!says || !element.getClientRects().length || element.disabled || ["SCRIPT", "title", "desc"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const behind = backdrop(element);
    const ink = over(parse(element instanceof SVGElement ? style.fill : style.color), behind);
    const [low, high] = [luminance(ink), luminance(behind)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) failures.push(`${element.tagName}.${element.getAttribute("class")} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
  }
  return failures;
}"""


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.fail("no browser to test the pages in: install the Debian package `chromium`")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser, file, **settings):
    """A page that was quiet: no message, no dialog, no request but for its file, until it is closed."""
    context = browser.new_context(**settings)
    page = context.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request",
        lambda request: None if request.url in (file.as_uri(), "data:,") else heard.append(f"request: {request.url}"),
    )
    page.set_default_timeout(10_000)
    page.goto(file.as_uri())
    yield page
    assert heard == []
    context.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("page") / "run", prompts=60))


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory):
    return write_report(make_comparison(tmp_path_factory.mktemp("page") / "comparison"))


def counted(page):
    return page.locator("#count").inner_text()


def test_filters_pages_and_search_find_the_answers(browser, run_page):
    with opened(browser, run_page) as page:
        assert counted(page) == "Prompts 1 to 10 of 60" and page.locator("article").count() == 10
        page.click("#on")
        assert (
            counted(page) == "Prompts 11 to 20 of 60"
            and page.locator("article .id").first.inner_text() == "summarise-00010"
        )
        page.select_option("#kind", label=KINDS[1])
        assert counted(page) == "Prompts 1 to 10 of 15" and set(page.locator("article .kind").all_inner_texts()) == {
            KINDS[1]
        }
        page.select_option("#which", "fails")
        fails = page.locator("article").count()
        assert 0 < fails < 10 and page.locator("article .given:nth-child(4) .fails").count() == fails
        page.select_option("#which", "lost")
        assert page.locator("article .given:nth-child(1) .passes").count() == page.locator("article").count()
        page.select_option("#kind", "")
        page.select_option("#which", "differs")
        assert counted(page) == "Prompts 1 to 10 of 60"
        page.fill("#find", "question 7:")
        expect(page.locator("article")).to_have_count(1)
        assert counted(page) == "Prompts 1 to 1 of 1" and page.locator("mark").first.inner_text() == "Question 7:"
        page.fill("#find", "nowhere to be found")
        expect(page.locator("#count")).to_have_text("No prompt matches.")
        assert page.locator("#count").get_attribute("aria-live") == "polite"


def test_columns_can_be_chosen(browser, comparison_page):
    with opened(browser, comparison_page) as page:
        shown = page.locator("article").first.locator(".given h4")
        begin = ["Teacher", "seq-kd, seed 7", "forward-kl, seed 7", "reverse-kl, seed 7", "jsd, seed 7"]
        assert all(text.startswith(name) for text, name in zip(shown.all_inner_texts(), begin, strict=True))
        page.get_by_role("checkbox", name="jsd, seed 9").check()
        page.get_by_role("checkbox", name="Teacher").uncheck()
        assert [text.split(", seed ")[0] for text in shown.all_inner_texts()] == [
            "seq-kd",
            "forward-kl",
            "reverse-kl",
            "jsd",
            "jsd",
        ]
        assert page.locator("#system option:checked").inner_text() == "forward-kl, seed 7"


def test_the_lens_speaks_to_the_pointer_and_to_the_keyboard(browser, run_page):
    with opened(browser, run_page) as page:
        strip = page.locator(".strip").first
        strip.locator(".token").nth(0).hover()
        detail = strip.get_by_role("status").inner_text()
        assert (
            "“Bread”: 0.02 nats" in detail
            and "Teacher's choices: “Bread” 91.0 %, “The” 4.0 %" in detail
            and "Student's choices: “Bread” 88.0 %" in detail
        )
        assert strip.locator("[tabindex='0']").count() == 1
        strip.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        assert (
            "“↵”: 5.50 nats" in strip.get_by_role("status").inner_text()
            and strip.locator("[tabindex='0']").count() == 1
        )
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        assert page.evaluate("document.activeElement.className") == "token n8"
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement === document.querySelector('.strip .token:last-child')")
        page.locator(".lens").nth(1).locator("summary").click()
        expect(page.locator(".lens").nth(1).locator(".strip")).to_have_count(
            2
        )  # a disclosure tells of its opening later


def test_the_theme_follows_the_system_until_it_is_switched(browser, run_page):
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, run_page, color_scheme="dark") as page:
        dark = page.evaluate(paper)
        page.click("#theme")
        light = page.evaluate(paper)
        assert (
            dark == "rgb(20, 23, 28)"
            and light == "rgb(251, 250, 247)"
            and page.locator("#theme").inner_text() == "Dark theme"
        )
    with opened(browser, run_page, color_scheme="light") as page:
        assert page.evaluate(paper) == light
        page.emulate_media(media="print")
        assert (
            not page.locator("nav").is_visible()
            and not page.locator("#theme").is_visible()
            and page.locator("table").first.is_visible()
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_and_nothing_sticks_out(browser, run_page, comparison_page, scheme):
    for file in (run_page, comparison_page):
        with opened(browser, file, color_scheme=scheme, viewport={"width": 420, "height": 900}) as page:
            page.locator(".notice details, .lens").evaluate_all("all => all.forEach((one) => { one.open = true; })")
            assert page.evaluate(CONTRAST) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= 420


@pytest.mark.parametrize("width", [420, 1200])
@pytest.mark.parametrize("media", ["screen", "print"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_section_on_the_students_text_fits_and_shows(browser, run_page, width, media, scheme):
    with opened(browser, run_page, color_scheme=scheme, viewport={"width": width, "height": 900}) as page:
        page.emulate_media(media=media)
        section = page.locator("section:has(> #rollouts)")
        assert (
            section.locator("svg").count() == 5
            and section.locator("aside").is_visible()
            and section.locator("table").is_visible()
        )
        assert section.locator("svg").evaluate_all("all => all.every((one) => one.getBoundingClientRect().width > 250)")
        if media == "screen":
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.locator("nav a[href='#rollouts']").click()
            expect(section.locator("h2")).to_be_in_viewport()


def test_the_first_screen_says_what_a_user_asks_first(browser, run_page, comparison_page):
    """Verdict, figures of teacher, before and after, size, speed, and one example; a table scrolls, and nothing is cut."""
    with opened(browser, run_page, viewport={"width": 1280, "height": 900}) as page:
        for element in (page.locator(".verdict"), page.locator(".glance table"), page.locator(".example")):
            box = element.bounding_box()
            assert box["y"] + box["height"] <= 900 and box["x"] + box["width"] <= 1280
        table = page.locator(".glance table").inner_text()
        for words in (
            "Teacher",
            "Student before training",
            "Student",
            "Pass rate",
            "Parameters",
            "First token",
            "Speed",
        ):
            assert words in table
        assert page.locator(".cautions li").inner_text() == "One seed: another training may give another result."
    for file in (run_page, comparison_page):
        with opened(browser, file, viewport={"width": 1280, "height": 900}) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
            cut = """() => [...document.querySelectorAll('th, td, dd, figure, .example, .verdict')].filter((one) =>
              one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX === 'hidden').length"""
            assert page.evaluate(cut) == 0


def test_landmarks_headers_and_captions_are_there(browser, run_page, comparison_page):
    for file in (run_page, comparison_page):
        with opened(browser, file) as page:
            assert (
                page.get_by_role("main").count()
                == page.get_by_role("navigation").count()
                == page.get_by_role("search").count()
                == 1
            )
            assert page.locator("table:not(:has(caption))").count() == page.locator("th:not([scope])").count() == 0
            assert (
                page.evaluate("new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size")
                == page.locator("[id]").count()
            )
            names = "[...document.querySelectorAll('[aria-labelledby]')].flatMap((one) => one.getAttribute('aria-labelledby').split(' '))"
            assert page.evaluate(f"{names}.every((id) => document.getElementById(id))")
            assert page.locator("svg[role=img]").count() > 3
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.className") == "skip"
            links = page.locator("nav a").evaluate_all(
                "all => all.every((one) => document.querySelector(one.getAttribute('href')))"
            )
            assert links


def test_without_scripts_everything_but_the_tools_is_there(browser, run_page):
    with opened(browser, run_page, java_script_enabled=False) as page:
        text = page.locator("body").inner_text()
        for words in (
            "Pass rate on everyday rose from 0.00 to 0.35",
            "The student is 0.69 nats per token",
            "No price is stated, so no money is shown.",
            "Worst examples",
            "Fidelity on held-out text",
            "Question 0: why does bread rise?",
            "The first 24 prompts",
            "The student's own text",
            "Step 13: the student repeats itself",
            "Log-probability of the student's text",
            "What a judge says",
            "Trust the judge with care",
        ):
            assert words in text
        assert page.locator("article").count() == 24 and page.locator("svg").count() > 3
        assert not page.locator("#controls").is_visible() and not page.locator("#theme").is_visible()


@pytest.mark.parametrize("maker", [make_run, make_comparison])
@pytest.mark.promise("S6")
def test_hostile_records_stay_inert(browser, tmp_path, maker):
    """Every payload, one after the other and each in its own quotes, in every field of every record."""
    file = write_report(maker(tmp_path / "run", " ".join(PAYLOADS)))
    with opened(browser, file) as page:
        page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
        page.locator(".token").first.hover()
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        page.select_option("#kind", index=1)
        page.fill("#find", "<script>alert(1)")
        page.wait_for_selector("mark")
        page.locator("button:enabled, input[type=checkbox]").evaluate_all("all => all.forEach((one) => one.click())")
        tags = set(page.evaluate("[...document.querySelectorAll('*')].map((one) => one.localName)"))
        assert tags <= ALLOWED and page.locator("script").count() == 2 and page.locator("style").count() == 1
        attributes = set(
            page.evaluate(
                "[...document.querySelectorAll('*')].flatMap((one) => [...one.attributes].map((two) => two.name))"
            )
        )
        assert not {name for name in attributes if name.startswith("on")} | (
            attributes & {"src", "style", "srcdoc", "action"}
        )
        assert page.locator("meta[http-equiv]").count() == 1 and page.locator("a:not([href^='#'])").count() == 0
        assert "<script>alert(1)</script>" in page.locator("main").inner_text()


@pytest.mark.parametrize("payload", ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>"])
@pytest.mark.promise("S6")
def test_the_policy_stops_what_would_get_through(browser, run_page, tmp_path, payload):
    """Even if escaping failed, nothing would run: the payload is written into the page as it is."""
    broken = tmp_path / "broken.html"
    broken.write_text(run_page.read_text().replace("<main", f"{payload}<main", 1))
    context = browser.new_context()
    page = context.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(broken.as_uri())
    page.wait_for_timeout(200)
    assert dialogs == []
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return false; } catch (error) { return true; } }"
    )
    assert refused, "the policy asks for trusted types"
    context.close()


def test_ten_thousand_answers_make_a_page_that_is_light_and_quick(browser, tmp_path):
    file = write_report(make_run(tmp_path / "run", prompts=10_000, words=60))
    assert file.stat().st_size < 5_000_000
    began = time.perf_counter()
    with opened(browser, file) as page:
        loaded = time.perf_counter() - began
        assert " of 10,000 prompts are on this page" in page.locator("section:has(#answers) > p").inner_text()
        assert page.locator("article").count() == 10
        page.fill("#find", "question 4:")
        expect(page.locator("article")).to_have_count(1)
    print(
        f"{file.stat().st_size / 1e6:.1f} MB, shown after {loaded:.2f} s, searched after {time.perf_counter() - began:.2f} s"
    )
