"""The review kit: blinded and balanced draws, forms that give nothing away, right figures, and a real browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")
pytest.importorskip("krippendorff")


from data import review
from data.assemble import finish, write_part
from huatuo_vision.schema import UserError
from tests.data.rows import described, stored

METHODS = ("llm_reformatted", "mllm_distill", "mllm_reformatted", "native_caption")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>bold</b>"


def data_set(folder: Path, method: str, n: int = 6, **changed: object) -> Path:
    """`n` figures described by a method, one of them with two pictures."""
    rows = [
        described(k, n_images=2 if k == 2 else 1, method=method, description=f"Text {k} written so.", **changed)
        for k in range(1, n + 1)
    ]

    def pictures(pair) -> list[bytes]:
        number = int(pair.article.removeprefix("PMC").removesuffix(".1"))
        return [stored(10 * number + k).data for k in range(len(pair.image_ids))]

    write_part(iter(rows), pictures, folder, task=0, first_number=1, shard_bytes=10**9)
    finish(folder, pubmedvision_files=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    return [data_set(folder / method, method) for method in METHODS]


@pytest.fixture
def drawn(data: list[Path], tmp_path: Path) -> tuple[Path, review.Key]:
    out = tmp_path / "review"
    return out, review.draw(data, out, images=4, raters=["Ann", "Bo B."], seed=3)


def embedded(page: Path, name: str) -> object:
    text = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text[1])


def fill(out: Path, key: review.Key, rater: str, marks, leave_out: tuple[str, ...] = ()) -> Path:
    """A filled form as the page saves it; `marks(item, criterion)` gives 1 to 5."""
    ratings = {n: {c: marks(item, c) for c in review.CRITERIA} for n, item in key.items.items() if n not in leave_out}
    path = out / f"{rater}.json"
    filled = {
        "schema": 1,
        "draw": key.draw,
        "rater": rater,
        "ratings": ratings,
        "comments": {"01": " ", "02": "blurred"},
    }
    path.write_text(json.dumps(filled))
    return path


def test_a_draw_is_balanced_and_blinded(drawn: tuple[Path, review.Key]) -> None:
    out, key = drawn
    assert set(Counter(item.method for item in key.items.values()).values()) == {4}
    assert set(Counter(item.pair for item in key.items.values()).values()) == {4}
    forms = sorted(out.glob("*.html"))
    assert [form.name for form in forms] == ["form-Ann.html", "form-Bo_B_.html"]
    orders = [[item[0] for item in embedded(form, "items")] for form in forms]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(key.items) and orders[0] != orders[1]
    for form in forms:
        text = form.read_text()
        assert not any(method in text for method in METHODS) and "PMC" not in text and str(out) not in text
        # Nothing is fetched from anywhere.
        assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "http:" not in text and "https:" not in text
        pictures = embedded(form, "pictures")
        assert len(pictures) == 4 and all(url.startswith("data:image/jpeg") for urls in pictures for url in urls)
    # Items of one figure do not stand side by side by rule.
    figures = [key.items[n].pair for n in sorted(key.items)]
    assert sum(a == b for a, b in pairwise(figures)) < 8


def test_the_seed_decides(data: list[Path], tmp_path: Path) -> None:
    raters = ["a"]
    keys = [review.draw(data, tmp_path / str(n), images=3, raters=raters, seed=s) for n, s in enumerate((1, 1, 2))]
    assert keys[0] == keys[1] and keys[0].draw != keys[2].draw
    assert (tmp_path / "0/form-a.html").read_bytes() == (tmp_path / "1/form-a.html").read_bytes()


def test_means_intervals_and_agreement(drawn: tuple[Path, review.Key]) -> None:
    out, key = drawn
    better = {method: 2 + k for k, method in enumerate(METHODS)}  # 2, 3, 4, 5
    figures = sorted({item.pair for item in key.items.values()})
    forms = [
        fill(out, key, "Ann", lambda item, c: better[item.method]),
        fill(out, key, "Bo B.", lambda item, c: max(1, better[item.method] - figures.index(item.pair) % 2)),
    ]
    report = review.read(out / review.KEY_FILE, forms)
    for method, mean in better.items():
        score = report["methods"][method]["accuracy"]
        # One figure in two is a point lower for one rater of two.
        assert score["mean"] == pytest.approx(mean - 0.25)
        assert mean - 0.5 <= score["ci95"][0] <= score["mean"] <= score["ci95"][1] <= mean
        assert (score["figures"], score["ratings"]) == (4, 8)
    assert 0.6 < report["agreement"]["accuracy"] < 1
    assert report["comments"] == 2 and report["raters"]["Ann"] == {"rated": 16, "of": 16}
    assert review.read(out / review.KEY_FILE, forms) == report
    text = review.report_markdown(report)
    assert "| native_caption | 4.75 (4.50 to 5.00)" in text and "Krippendorff" in text


def test_agreement_is_krippendorffs_alpha() -> None:
    same = np.array([[1, 2, 3, 4, 5, 3], [1, 2, 3, 4, 5, 3]], float)
    assert review._alpha(same) == pytest.approx(1)
    assert review._alpha(np.array([[1, 5, 1, 5], [5, 1, 5, 1]], float)) < 0
    # Krippendorff's own worked example for ordinal data (2011, section C), with missing values.
    table = """. . . . . 3 4 1 2 1 1 3 3 . 3
               1 . 2 1 3 3 4 3 . . . . . . .
               . . 2 1 3 4 4 . 2 1 1 3 3 . 4"""
    marks = np.array([[np.nan if m == "." else float(m) for m in line.split()] for line in table.splitlines()])
    assert 0.7 < review._alpha(marks) < 0.9
    assert review._alpha(np.full((2, 5), 3.0)) is None
    assert review._alpha(np.array([[1, np.nan], [np.nan, 2]])) is None


def test_a_rater_who_left_things_out_is_counted(drawn: tuple[Path, review.Key]) -> None:
    out, key = drawn
    first = sorted(key.items)[0]
    report = review.read(out / review.KEY_FILE, [fill(out, key, "Ann", lambda *_: 4, leave_out=(first,))])
    assert report["raters"] == {"Ann": {"rated": 15, "of": 16}} and report["raters_missing"] == ["Bo B."]
    assert report["methods"][key.items[first].method]["accuracy"]["figures"] == 3
    assert set(report["agreement"].values()) == {None}
    assert "No form yet: Bo B." in review.report_markdown(report)


def test_wrong_forms_are_one_sentence_each(drawn: tuple[Path, review.Key]) -> None:
    out, key = drawn
    good = fill(out, key, "Ann", lambda *_: 3)
    values = json.loads(good.read_text())

    def refused(changed: object, text: str, *others: Path) -> None:
        path = out / "wrong.json"
        path.write_text(changed if isinstance(changed, str) else json.dumps(values | changed))
        with pytest.raises(UserError, match=text) as raised:
            review.read(out / review.KEY_FILE, [*others, path])
        assert "\n" not in str(raised.value)

    refused("{", "expected what a form's Save button, or draw, wrote")
    refused("[]", "expected what a form")
    refused({"draw": "other"}, "was filled for the draw other")
    refused({"rater": "Eve"}, "is by 'Eve'; the raters of this draw are Ann, Bo B.")
    refused({}, "second form by 'Ann'", good)
    refused({"ratings": {"99": {"accuracy": 3}}}, "rates the item '99'")
    refused({"ratings": {"01": {"beauty": 3}}}, "rates 'beauty'; the criteria are")
    for mark in (0, 6, 3.5, "3", True, None):
        refused({"ratings": {"01": {"accuracy": mark}}}, "ratings.01.accuracy")
    refused({"ratings": {}}, "hold no rating")
    with pytest.raises(UserError, match="can't be read"):
        review.read(out / review.KEY_FILE, [out / "nowhere.json"])


def test_draws_that_cannot_be_are_refused(data: list[Path], tmp_path: Path) -> None:
    def refused(text: str, folders: list[Path], out: Path = tmp_path / "new", **changed: object) -> None:
        with pytest.raises(UserError, match=text):
            review.draw(folders, out, **{"images": 3, "raters": ["a"], "seed": 0} | changed)

    refused("6 figures have a description by every method", data, images=7)
    refused("two descriptions by the method", [data[0], data[0]])
    refused("a name of its own", data, raters=["a", "a"])
    refused("holds no", [tmp_path])
    review.draw(data, tmp_path / "old", images=2, raters=["a"], seed=0)
    refused("holds a draw already", data, tmp_path / "old")


def test_the_commands(data: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    folders = [str(folder) for folder in data]
    arguments = ["review", "draw", "--data", *folders, "--out", str(tmp_path / "r"), "--images", "2", "--raters", "Ann"]
    monkeypatch.setattr(sys, "argv", arguments)
    review.main()
    assert "8 items for 1 raters" in capsys.readouterr().out
    key = review.Key.model_validate_json((tmp_path / "r/key.json").read_bytes())
    form = fill(tmp_path / "r", key, "Ann", lambda *_: 3)
    arguments = ["review", "read", "--key", str(tmp_path / "r/key.json"), "--forms", str(form), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    review.main()
    assert "3.00" in capsys.readouterr().out
    assert json.loads((tmp_path / "review.json").read_text())["figures"] == 2
    assert (tmp_path / "review.md").read_text().startswith("# Review ")


# In a browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium: pip install selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    for flag in (*flags, "--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_form_is_filled_saved_and_read_back(browser, data: list[Path], tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    bad = data_set(tmp_path / "bad", "zz_hostile", n=3)
    hostile = [described(k, n_images=2 if k == 2 else 1, method="zz", description=HOSTILE) for k in range(1, 4)]
    shutil.rmtree(bad)
    write_part(iter(hostile), lambda p: [stored(1).data] * len(p.image_ids), bad, task=0, first_number=1, shard_bytes=1)
    finish(bad, pubmedvision_files=False)
    key = review.draw([data[0], bad], tmp_path / "r", images=3, raters=[HOSTILE, "Ann"], seed=0)
    browser.set_window_size(1280, 900)
    browser.get((tmp_path / "r/form-Ann.html").as_uri())
    assert browser.title == "Review of 6 descriptions"

    def find(css: str):
        return browser.find_elements(By.CSS_SELECTOR, css)

    seen = set()
    for item in range(6):
        assert find("#item")[0].text == f"Item {item + 1} of 6"
        seen.add(find("#text")[0].text)
        assert all(
            browser.execute_script("return arguments[0].naturalWidth", image) == 48 for image in find("#figures img")
        )
        for place, criterion in enumerate(review.CRITERIA):
            mark = find(f"input[name={criterion}]")[(item + place) % 5]
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
            mark.click()
        find("#next")[0].click() if item < 5 else None
    assert HOSTILE in seen and len(seen) == 4  # as text; the page is still whole
    assert find("#where")[0].text == "6 of 6 rated" and not find("#open")[0].is_enabled()
    find("#comment")[0].send_keys("a <b>comment</b>")
    find("#save")[0].click()
    for _ in range(100):
        saved = list(browser.downloads.glob("*.json"))
        if saved:
            break
        time.sleep(0.05)
    assert saved[0].name == f"review-{key.draw}-Ann.json"
    report = review.read(tmp_path / "r/key.json", saved)
    assert report["raters"]["Ann"] == {"rated": 6, "of": 6} and report["comments"] == 1
    filled = json.loads(saved[0].read_text())
    first = embedded(tmp_path / "r/form-Ann.html", "items")[0][0]
    assert filled["ratings"][first] == dict(zip(review.CRITERIA, (1, 2, 3, 4), strict=True))
    # Opened again, it goes on where it was; a form of another rater is another.
    browser.get((tmp_path / "r/form-Ann.html").as_uri())
    assert find("#where")[0].text == "6 of 6 rated"
    other = next(path for path in (tmp_path / "r").glob("*.html") if "Ann" not in path.name)
    browser.get(other.as_uri())
    assert find("#where")[0].text == "0 of 6 rated" and HOSTILE in find(".top")[0].text
    # Not another's file, but one's own.
    upload = find("#file")[0]
    browser.execute_script("arguments[0].hidden = false", upload)
    upload.send_keys(str(saved[0]))
    time.sleep(0.3)
    assert "belongs to another form" in find("#note")[0].text
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(filled | {"rater": HOSTILE}))
    upload.send_keys(str(mine))
    time.sleep(0.3)
    assert "Loaded 6 rated items" in find("#note")[0].text and find("#where")[0].text == "6 of 6 rated"
    for width in (390, 1280):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
