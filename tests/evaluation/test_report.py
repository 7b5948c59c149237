"""What people read of a score: the page, the Markdown, the console."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from huatuo_vision.evaluation import report, report_samples
from huatuo_vision.evaluation.pictures import save_pictures
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.html import script_json
from huatuo_vision.schema import ImageRef
from tests.evaluation.helpers import REPOSITORY, environment
from tests.evaluation.results import NOTE, Result, choice, simple

HOSTILE = (
    "</script><img src=x onerror=alert(1)>|`*_[a](https://evil.example)\n# {{ 7 * 7 }} \u202e\u2028 \"'&amp; \ud800"
)


class Page(HTMLParser):
    """The elements, the visible text, and the data that the script is given."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.words, self.data, self._inside = text, [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        tag, name = self._inside or (None, None)
        if tag == "script" and name:
            self.data[name] = json.loads(data)
        elif tag not in ("script", "style"):
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def rows(self):
        return self.data["data-samples"]["rows"]


def written(result: Result, comparison=None, other=None, **changed) -> tuple[Page, str]:
    report.write_reports(result.out, result.scores, *result.rows, comparison, other.rows if other else None, **changed)
    return Page((result.out / "report.html").read_text()), (result.out / "report.md").read_text()


def console_of(result: Result) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    report.show(result.scores, result.out, console)
    return console.export_text()


def test_every_report_says_the_number_its_count_its_interval_and_its_protocol(tmp_path):
    result = simple(tmp_path / "out", 15, benchmark="phantom")
    page, markdown = written(result)
    for said in (page.said, markdown, console_of(result)):
        for number in ("75.0 %", "53.1 to 88.8 %", "unparsed", NOTE, "default"):
            assert number in said
        assert "Not comparable" not in said
    for said in (page.said, markdown):
        for fact in (PROTOCOLS["default"].hash, PROTOCOLS["default"].note.split(".")[0], "0123", "float32", "shown"):
            assert fact in said
    assert str(tmp_path / "out" / "report.html") in console_of(result)


def test_baselines_stand_beside_the_accuracy(tmp_path):
    answers = [choice("b", n, n < 5, options=("no", "a long option", "z") if n < 8 else ("a", "b")) for n in range(10)]
    result = Result(tmp_path / "out", answers)
    page, markdown = written(result)
    for said in (page.said, markdown, console_of(result)):
        assert "80.0 %" in said, "the longest option"
        assert "100.0 %" in said, "always B"
    assert "always B" in page.said and "B 100.0 %" in markdown


def test_a_number_over_other_rows_says_so_everywhere(tmp_path):
    result = simple(tmp_path / "out", 15, expected={"phantom": 600})
    page, markdown = written(result)
    for said in (page.said, markdown, console_of(result)):
        assert "Not comparable: 20 rows answered, the benchmark has 600." in said


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    page, _ = written(simple(tmp_path / "out", 15))
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert not [a for tag, a in page.elements if tag in ("link", "img", "iframe", "object") or "src" in a]
    assert all(a["href"].startswith("#") for tag, a in page.elements if "href" in a)
    assert not re.search(r"url\(|@import|https?://", page.text)
    assert "innerHTML" not in page.text and "insertAdjacentHTML" not in page.text


def test_the_same_result_gives_the_same_bytes(tmp_path):
    one, two = simple(tmp_path / "one", 15), simple(tmp_path / "two", 15)
    written(one)
    written(two)
    for name in ("report.md", "report.html"):
        assert (one.out / name).read_bytes() == (two.out / name).read_bytes()


def hostile_result(out):
    answers = [
        choice(
            HOSTILE, n, n < 3, options=(HOSTILE, "y", "z"), groups={HOSTILE: f"{HOSTILE}{n % 2}"}, question=HOSTILE,
            notes=[HOSTILE], image_sha256=["../../secret", "__proto__"],
        )
        for n in range(6)
    ]  # fmt: skip
    for answer in answers[3:]:
        answer["response"] = HOSTILE
    for n, answer in enumerate(answers):
        answer["id"] = f"{HOSTILE}{n}"
    names = dict.fromkeys(("model", "weights", "backend", "title", "note", "revision"), HOSTILE)
    return Result(out, answers, **names)


def test_other_peoples_text_is_never_markup_in_the_page(tmp_path):
    plain, _ = written(simple(tmp_path / "plain", 3, n=6))
    result = hostile_result(tmp_path / "hostile")
    (result.out / "images").mkdir()
    picture(tmp_path / "secret.jpg")
    page, _ = written(result)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    title = next(words for words in page.words if words.startswith("Evaluation of"))
    assert title == f"Evaluation of {HOSTILE}".replace("\ud800", "?")
    row = page.rows[3]
    shown = HOSTILE.replace("\ud800", "?")
    assert (row["reply"], row["question"], row["options"][0], row["notes"]) == (shown, shown, shown, [shown])
    assert page.data["data-pictures"] == {}, "a picture's name that is no checksum is never made a path"


def test_other_peoples_text_is_never_markup_in_a_comparison(tmp_path):
    one, other = simple(tmp_path / "one", 3, n=6), simple(tmp_path / "other", 5, n=6, weights="w", model="m")
    plain, _ = written(one, one.against(other), other)
    hostile = hostile_result(tmp_path / "hostile")
    second = hostile_result(tmp_path / "second")
    page, _ = written(hostile, hostile.against(second), second)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    assert sum(tag == "script" for tag, _ in page.elements) == sum(tag == "script" for tag, _ in plain.elements)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "onerror=alert(1)" in page.said, "it is shown, as text"


def test_other_peoples_text_stays_in_its_cell_of_the_markdown(tmp_path):
    _, markdown = written(hostile_result(tmp_path / "hostile"))
    assert "\ud800" not in markdown and "\u202e" not in markdown
    for line in markdown.splitlines():
        bare = re.sub(r"\\.", "", line)  # without what is escaped
        assert "<" not in bare.replace("<!-- -->", "") and "`" not in bare and "[" not in bare
        assert "https:" not in bare
    assert not [line for line in markdown.splitlines() if line.lstrip().startswith("# {{")]
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_the_console_takes_names_as_they_are(tmp_path):
    result = simple(tmp_path / "out", 3, model="[bold]x[/red]", note="[link=a]b[/link]")
    said = console_of(result)
    assert "[bold]x[/red]" in said and "[link=a]b[/link]" in said


def test_json_inside_a_script_cannot_end_it():
    text = script_json({"a": "</script><!--\u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--\u2028"}
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_sighted_against_blind(tmp_path):
    sighted, blind = simple(tmp_path / "s", 19), simple(tmp_path / "b", 8, blind=True)
    page, markdown = written(sighted, sighted.against(blind), blind)
    for said in (page.said, markdown):
        assert "Seeing against guessing" in said and "A against B" not in said
        for number in (
            "95.0 %",
            "40.0 %",
            "+55.0",
            "sighted",
            "blind",
            "< 0.001" if said == page.said else "&lt; 0.001",
        ):
            assert number in said
    assert page.data["data-samples"]["labels"] == ["sighted", "blind"]
    assert [row["flip"] for row in page.rows] == [None] * 8 + ["first"] * 11 + [None]
    assert page.rows[8]["other"] == {"reply": "A", "parsed": "A", "verdict": "wrong"}
    # Seen and unseen accuracy of each group, beside each other.
    assert re.search(r"\| side \| 10 \| 10 \| 0 \| 100.0 % \| 72.2 to 100.0 % \| 40.0 % \| \+60.0 \|", markdown)


def test_one_model_against_another(tmp_path):
    a = Result(tmp_path / "a", [choice(name, n, n < 15) for name in ("b1", "b2") for n in range(20)])
    b = Result(
        tmp_path / "b", [choice(name, n, n < 8 or n == 19) for name in ("b1", "b2") for n in range(20)],
        weights="other", model="runs/other",
    )  # fmt: skip
    comparison = a.against(b)
    page, markdown = written(a, comparison, b)
    for said in (page.said, markdown):
        for fact in (
            "A against B",
            "runs/other",
            "+30.0",
            "Holm",
            "McNemar",
            "All rows" if said == page.said else "all rows",
        ):
            assert fact in said
        assert "without the image" not in said
        p, holm = (comparison["benchmarks"]["b1"][key] for key in ("p", "p_holm"))
        assert p < holm and f"{p:.3f}" in said and f"{holm:.3f}" in said
    assert [row["flip"] for row in page.rows].count("second") == 2


def test_flips_are_known_without_the_other_answers(tmp_path):
    a, b = simple(tmp_path / "a", 15), simple(tmp_path / "b", 12, weights="other")
    page, _ = written(a, a.against(b))
    assert [row["flip"] for row in page.rows].count("first") == 3
    assert all(row["other"] is None for row in page.rows)


@pytest.mark.parametrize(
    ("benchmark", "protocol", "changed", "standing"),
    [
        ("huatuo-slake", "huatuo-2024", {}, "same rows and protocol"),
        ("huatuo-slake", "default", {}, "other protocol"),
        ("huatuo-slake", "huatuo-2024", {"expected": {"huatuo-slake": 416}}, "other rows"),
        ("slake-en", "huatuo-2024", {}, "other rows"),
    ],
)
def test_published_numbers_stand_beside_with_their_standing(tmp_path, benchmark, protocol, changed, standing):
    page, markdown = written(simple(tmp_path / "out", 15, benchmark=benchmark, protocol=protocol, **changed))
    for said in (page.said, markdown):
        for number in ("74.5 %", "76.9 %", "Med-Flamingo", "paper, table 2"):
            assert number in said
        assert standing in said
        assert [s for s in ("same rows and protocol", "other protocol", "other rows") if s in said] == [standing]


def test_printed_cells_and_flaws_stand_beside_the_groups(tmp_path):
    answers = [choice("huatuo-omnimedvqa", n, n < 9, groups={"modality": ("CT", "MR")[n % 2]}) for n in range(12)]
    page, markdown = written(Result(tmp_path / "out", answers))
    assert "61.6 %" in page.said, "8B, CT"
    assert re.search(r"\| CT \| 6 .*\| 61.6 % \| 60.8 % \|", markdown)
    for said in (page.said, markdown):
        assert "sets a macro against a micro mean" in said


def test_open_questions_rotations_likelihood_and_a_judge(tmp_path):
    answers = [
        choice("b", n, n < 9, likelihood={"letter": [0.2, 0.7, 0.1], "text": [0.5, 0.3, 0.2]}) for n in range(12)
    ]
    for n in range(12):
        turned = {"rotation": 1, "rotation_of": str(n), "answer": "A", "response": "A", "options": ["y", "z", "x"]}
        answers.append(choice("b", n, True) | turned | {"id": f"{n}#r1"})
    for n in range(4):
        answers.append(
            choice("b", 20 + n, True)
            | {"question_type": "open", "options": None, "answer": ["left", "L"], "response": "left"}
        )
    result = Result(tmp_path / "out", answers)
    result.scores["benchmarks"]["b"]["judge"] = {
        "model": "a-judge", "prompt_hash": "cafe", "n": 4, "accuracy": 0.25, "agreement": 0.5, "kappa": None,
        "tokens": 9,
    }  # fmt: skip
    page, markdown = written(result)
    rotation, calibration = (result.scores["benchmarks"]["b"][key] for key in ("rotation", "calibration"))
    for said in (page.said, markdown):
        for fact in (
            "token recall", "exact match", "BLEU", "50.0 %",
            "2 orders", report.percent(rotation["mean_accuracy"]), report.percent(rotation["consistency"]),
            f"{calibration['letter']['ece']:.3f}", f"{calibration['text']['brier']:.3f}", "a-judge", "25.0 %",
        ):  # fmt: skip
            assert fact in said
    assert len([a for tag, a in page.elements if a.get("class") == "plot"]) == 2
    console = console_of(result)
    assert "token F1" in console and "consistent" in console and "ECE" in console
    # A rotated row is told with the row it repeats, not as one of its own.
    assert len(page.rows) == 16 and page.rows[0]["rotated"] == [{"by": 1, "verdict": "correct"}]
    assert page.rows[0]["likelihood"] == {"letter": [0.2, 0.7, 0.1], "text": [0.5, 0.3, 0.2]}
    assert page.rows[12]["gold"] == ["left", "L"] and page.rows[12]["metrics"]["bleu"] == 0.5


def test_a_benchmark_that_hides_its_answers_still_has_a_report(tmp_path):
    result = Result(tmp_path / "out", [choice("mmmu-medical-test", n, True, answer="?") for n in range(3)])
    page, markdown = written(result)
    assert result.scores["benchmarks"]["mmmu-medical-test"]["accuracy"] is None
    assert "3 without a public answer" in page.said and "3 without a public answer" in markdown
    assert [row["gold"] for row in page.rows] == [[]] * 3
    assert "–" in console_of(result)


def test_a_probability_that_is_no_number_breaks_nothing(tmp_path):
    result = simple(tmp_path / "out", 2, n=4)
    result.answers[0]["likelihood"] = {"letter": [float("nan"), 1.0, 0.0]}
    page, _ = written(result)
    assert page.rows[0]["likelihood"] == {"letter": [None, 1.0, 0.0]}


def test_large_results_are_cut_with_what_matters_first(tmp_path, monkeypatch):
    monkeypatch.setattr(report_samples, "ROWS_PER_BENCHMARK", 10)
    monkeypatch.setattr(report, "ROWS_PER_BENCHMARK", 10)
    answers = [choice("b", n, n % 10 != 0) for n in range(60)]
    answers[7]["response"] = "who knows"
    result = Result(tmp_path / "out", answers)
    page, _ = written(result)
    shown = {row["id"]: row["verdict"] for row in page.rows}
    assert len(shown) == 10 and list(shown.values()).count("correct") == 3
    assert {"0", "10", "20", "30", "40", "50", "7"} <= shown.keys()
    assert "b 10 of 60" in page.said
    again = report_samples.choose(list(reversed(result.answers)), list(reversed(result.verdicts)))
    assert {row_id for _, row_id in again} == shown.keys(), "the choice does not depend on the order of the file"
    assert [int(row["id"]) for row in page.rows] == sorted(int(row["id"]) for row in page.rows)
    other = simple(tmp_path / "other", 0, n=60, benchmark="b", weights="other")
    flipped, _ = written(result, result.against(other), other)
    assert {row["flip"] for row in flipped.rows} == {"first"}, "flipped rows go before wrong ones"


def test_long_replies_are_cut_and_say_so(tmp_path):
    result = simple(tmp_path / "out", 2, n=2)
    result.answers[0]["response"] = "x" * 7000
    page, _ = written(result)
    assert page.rows[0]["reply"].endswith("x … (1,000 more characters in responses.jsonl)")


def picture(path, size=(640, 200)) -> ImageRef:
    Image.new("RGB", size, "teal").save(path)
    return ImageRef(path=str(path), sha256=f"{path.stem:0>64}")


def row_with(name: str, *images: ImageRef) -> Row:
    return Row("phantom", name, "Which one?", "multiple-choice", ("x", "y"), "B", images, {})


def test_pictures_are_small_and_only_those_wanted(tmp_path):
    first, second = picture(tmp_path / "a1.png"), picture(tmp_path / "b2.png", (40, 30))
    rows = [row_with("0", first), row_with("1", second), row_with("2", picture(tmp_path / "c3.png"))]
    save_pictures(tmp_path, rows, [("phantom", "0"), ("phantom", "1"), ("another", "2")])
    stored = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert stored == [f"{first.sha256}.jpg", f"{second.sha256}.jpg"]
    sizes = [Image.open(tmp_path / "images" / name).size for name in stored]
    assert sizes == [(320, 100), (40, 30)], "smaller ones are not blown up"
    kept = tmp_path / "images" / stored[0]
    kept.write_bytes(b"as it was")
    save_pictures(tmp_path, rows, [("phantom", "0")])
    assert kept.read_bytes() == b"as it was"


def test_pictures_at_hand_are_inside_the_page(tmp_path):
    reference = picture(tmp_path / "a1.png")
    save_pictures(tmp_path / "pictures", [row_with("0", reference)], [("phantom", "0")])
    result = simple(tmp_path / "out", 2, n=4)
    result.answers[0]["image_sha256"] = [reference.sha256, "0" * 64]
    page, _ = written(result, picture_folders=[tmp_path / "nowhere", tmp_path / "pictures" / "images"])
    assert page.rows[0]["images"] == [reference.sha256, "0" * 64]
    assert list(page.data["data-pictures"]) == [reference.sha256]
    assert page.data["data-pictures"][reference.sha256].startswith("data:image/jpeg;base64,/9j/")
    elsewhere, _ = written(result)
    assert elsewhere.data["data-pictures"] == {}


@pytest.mark.parametrize(
    ("difference", "said"), [(0.123, "+12.3"), (-0.05, "−5.0"), (0.0, "0.0"), (-0.0004, "0.0"), (None, "–")]
)
def test_points(difference, said):
    assert report.points(difference) == said


def test_reading_and_writing_results_needs_no_torch():
    modules = ("report", "published", "pictures", "hub_results")
    code = "import sys\n" + "".join(f"import huatuo_vision.evaluation.{name}\n" for name in modules)
    code += "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
