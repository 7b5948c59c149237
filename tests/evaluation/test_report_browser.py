"""The report in a real browser, headless: it opens without a word of complaint, filters, pages and shows pictures."""

import json
import shutil

import pytest
from PIL import Image

from huatuo_vision.evaluation import report
from huatuo_vision.evaluation.pictures import save_pictures
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.schema import ImageRef
from tests.evaluation.results import Result, choice

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>bold</b>"
PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium: pip install selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def picture(folder, name: str) -> ImageRef:
    path = folder / f"{name}.png"
    Image.new("RGB", (400, 300), "teal").save(path)
    return ImageRef(path=str(path), sha256=f"{name:0>64}")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """45 rows of two benchmarks, sighted and blind: 30 and 10 right; one of the pictures is missing."""
    folder = tmp_path_factory.mktemp("page")
    at_hand = picture(folder, "a1")

    def answers(right: int):
        rows = []
        for n in range(45):
            name = "first" if n < 25 else "second"
            pictures = [at_hand.sha256] if n else [at_hand.sha256, "__proto__"]
            row = choice(name, n, n < right, image_sha256=pictures, question=f"Question number {n}?")
            rows.append(row | ({"response": "who knows"} if n == 44 else {}))
        rows[3] |= {"question": HOSTILE, "options": [HOSTILE, "y", "z"], "groups": {"subject": HOSTILE}}
        rows[3]["notes"] = [HOSTILE]
        return rows

    sighted = Result(folder / "sighted", answers(30), model=HOSTILE)
    blind = Result(folder / "blind", answers(10), model=HOSTILE, blind=True)
    row = Row("first", "0", "?", "multiple-choice", ("x",), "A", (at_hand,), {})
    save_pictures(sighted.out, [row], [("first", "0")])
    report.write_reports(sighted.out, sighted.scores, *sighted.rows, sighted.against(blind), blind.rows)
    return sighted.out / "report.html"


@pytest.fixture
def opened(browser, page):
    browser.get_log("browser"), browser.get_log("performance")  # what came before is not of this page
    width(browser, DESK)
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == [], "the console has something to complain about"
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    urls = [event["request"]["url"] for event in sent if event["documentURL"] == page.as_uri()]
    assert page.as_uri() in urls, "requests are seen at all"
    assert not [url for url in urls if url != page.as_uri() and not url.startswith("data:")]


def width(browser, pixels: int) -> None:
    metrics = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def by_id(browser, name):
    return browser.find_element("id", name)


def select(browser, name: str, starts: str) -> str:
    """Choose an option by how its text starts; returns the whole text, count included."""
    options = by_id(browser, name).find_elements("tag name", "option")
    option = next(option for option in options if option.text.strip().startswith(starts))
    text = option.text.strip()
    option.click()
    return text


def ids(browser) -> list[str]:
    return [heading.text.rsplit(" · ", 1)[1] for heading in browser.find_elements("css selector", ".card h3")]


def said(browser) -> str:
    return by_id(browser, "count").text


def test_the_page_opens_with_its_tables_and_first_answers(opened):
    assert opened.title == f"Evaluation of {HOSTILE}"
    assert len(opened.find_elements("css selector", ".overview tbody tr:not(.note)")) == 2
    assert "Seeing against guessing" in opened.find_element("tag name", "main").text
    assert ids(opened) == [str(n) for n in range(20)]
    assert said(opened) == "1–20 of 45"


def test_filters_reduce_the_list_and_their_counts_are_true(opened):
    assert select(opened, "verdict", "wrong") == "wrong (14)"
    assert ids(opened) == [str(n) for n in range(30, 44)]
    assert said(opened) == "1–14 of 14 (45 in all)"
    assert select(opened, "group", "size") == "size (7)"
    assert ids(opened) == [str(n) for n in range(31, 44, 2)]
    assert by_id(opened, "verdict").find_element("css selector", "option:checked").text == "wrong (7)"
    by_id(opened, "reset").click()
    assert said(opened) == "1–20 of 45"
    assert select(opened, "benchmark", "Title of second") == "Title of second (20)"
    assert select(opened, "verdict", "unparsed") == "unparsed (1)"
    assert ids(opened) == ["44"]
    assert "nothing could be read" in opened.find_element("css selector", ".card").text
    by_id(opened, "reset").click()
    assert select(opened, "flip", "only sighted right") == "only sighted right (20)"
    assert ids(opened) == [str(n) for n in range(10, 30)]


def test_text_is_found_and_nothing_is_said_to_be_nothing(opened):
    by_id(opened, "text").send_keys("NUMBER 41")
    assert ids(opened) == ["41"]
    by_id(opened, "text").send_keys(" nowhere")
    assert (ids(opened), said(opened)) == ([], "No row matches.")


def test_pages_turn_forth_and_back(opened):
    previous, following = by_id(opened, "previous"), by_id(opened, "next")
    assert not previous.is_enabled()
    following.click()
    following.click()
    assert (ids(opened), said(opened)) == ([str(n) for n in range(40, 45)], "41–45 of 45")
    assert not following.is_enabled()
    previous.click()
    assert said(opened) == "21–40 of 45"
    select(opened, "verdict", "correct")
    assert said(opened) == "1–20 of 30 (45 in all)", "a filter starts at its first page"


def test_pictures_are_shown_and_a_missing_one_is_said(opened):
    first = opened.find_element("css selector", ".card")
    (image,) = first.find_elements("tag name", "img")
    assert opened.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image) == [320, 240]
    assert image.is_displayed() and image.get_attribute("alt") == "Picture 1 of 2"
    assert first.find_element("css selector", ".absent").text == "picture not at hand"


def test_gold_and_choices_are_marked(opened):
    select(opened, "flip", "only sighted right")
    marks = [item.text.split("\n") for item in opened.find_elements("css selector", ".card:first-child .options li")]
    assert marks == [["A", "x", "blind"], ["B", "y", "sighted", "gold"], ["C", "z"]]
    replies = [reply.text.split("\n") for reply in opened.find_elements("css selector", ".card:first-child .reply")]
    assert replies == [["Reply, sighted · correct · read as B", "B"], ["Reply, blind · wrong · read as A", "A"]]


def test_hostile_text_is_shown_as_text(opened):
    by_id(opened, "text").send_keys("onerror")
    assert ids(opened) == ["3"]
    card = opened.find_element("css selector", ".card")
    assert card.find_element("css selector", ".question").text == HOSTILE
    assert card.find_element("css selector", ".options li").text == f"A\n{HOSTILE}"
    assert HOSTILE in card.find_element("css selector", ".about").text
    assert HOSTILE in opened.find_element("tag name", "h1").text
    # Chromium folds a line break or a run of blanks in an option's text; this has neither.
    assert select(opened, "group", HOSTILE[:20]) == f"{HOSTILE} (1)"
    assert opened.find_elements("css selector", "main b b, img[src='x']") == []
    assert opened.execute_script("return document.scripts.length") == 3


@pytest.mark.parametrize("pixels", [320, PHONE, 800, DESK])
def test_no_width_needs_sideways_scrolling(opened, pixels):
    width(opened, pixels)
    opened.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= pixels


def test_on_a_phone_the_filters_fold_and_open_by_keyboard(opened):
    width(opened, PHONE)
    toggle, facets = by_id(opened, "toggle"), by_id(opened, "facets")
    assert not facets.is_displayed() and toggle.get_attribute("aria-expanded") == "false"
    toggle.send_keys("\ue007")  # Enter
    assert facets.is_displayed() and toggle.get_attribute("aria-expanded") == "true"
    select(opened, "verdict", "wrong")
    assert said(opened) == "1–14 of 14"


def test_the_filter_bar_stays_in_sight(opened):
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight - 1500)")
    assert opened.execute_script("return document.querySelector('.filters').getBoundingClientRect().top") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(opened, scheme):
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    style = "const s = getComputedStyle(document.documentElement); return arguments[0].map(n => s.getPropertyValue(n))"
    names = ["--card", "--ink", "--soft", "--first", "--second", "--good", "--bad", "--open"]
    card, *inks = opened.execute_script(style, names)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert (luminance(card) > 0.5) == (scheme == "light")
    for name, ink in zip(names[1:], inks, strict=True):
        low, high = sorted((luminance(ink), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} is too faint (WCAG AA)"


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG defines it."""
    digits = colour.strip().lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
