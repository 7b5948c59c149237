"""Clinical cases from the question to the page: controls, explanations, the judge, concepts, and what is refused."""

import importlib
import json
import re
import sys

import pytest

from huatuo_vision.evaluation import endpoint, reasoning, report, rules
from huatuo_vision.evaluation.protocols import PROTOCOLS
from huatuo_vision.evaluation.rows import Row
from huatuo_vision.evaluation.variants import OPTIONS_ONLY_QUESTION, with_controls, with_rotations
from huatuo_vision.schema import UserError
from tests.evaluation import layouts
from tests.evaluation.case_server import JUDGE, judge, kind_of, student_of, text_of
from tests.evaluation.helpers import read_lines
from tests.evaluation.server import Sent, completion
from tests.evaluation.server import endpoint as serve


@pytest.fixture
def command(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 1)

    def run(*arguments: object) -> int | None:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        return importlib.import_module("eval").main()

    return run


def asking(server, folder, out, *more, benchmark="case-challenge", protocol="explain"):
    return (
        "--model", "m", "--backend", "openai", "--base-url", server.url, "--benchmarks", f"{benchmark}={folder}",
        "--protocol", protocol, "--out", out, *more,
    )  # fmt: skip


def scores(out, name="case-challenge"):
    return json.loads((out / "scores.json").read_text())["benchmarks"][name]


def model_that_needs_the_case(body: dict) -> Sent:
    """Right with the case (A, B, C in turn, as the layout has it); A without it."""
    text = text_of(body)
    if kind_of(body) != "answer":
        return judge(lambda b: "1" if "consolidation" in student_of(b) else "0.5")(body)
    found = re.search(r"Patient (\d) coughs", text)
    if not found:
        return Sent(completion("Answer: A\nA guess."))
    return Sent(completion(f"Answer: {'ABC'[int(found[1]) % 3]}\nPatient {found[1]} has fever and consolidation."))


def test_from_the_question_to_the_page(command, tmp_path, capsys):
    folder, out = layouts.cases(tmp_path / "cases", [layouts.case_row(n) for n in range(6)]), tmp_path / "out"
    concepts = tmp_path / "terms.txt"
    concepts.write_text("fever\tpyrexia\nconsolidation\ncough\tcoughs\n")
    with serve(model_that_needs_the_case) as server:
        more = ("--judge", JUDGE, "--judge-url", server.url, "--concepts", concepts)
        assert command(*asking(server, folder, out, *more)) == 0
        asked = [kind_of(body) for body in server.requests]
        assert command(*asking(server, folder, out, *more)) == 0
        assert len(server.requests) == len(asked), "nothing is asked twice"

    assert asked.count("answer") == 3 * 6
    answers = {line["id"]: line for line in read_lines(out / "responses.jsonl")}
    assert list(answers)[:3] == ["case-0", "case-0#text-only", "case-0#options-only"]
    assert answers["case-0"]["reference"] == "Patient 0 has fever and consolidation."
    entry = scores(out)
    assert (entry["n"], entry["correct"], entry["comparable"]) == (6, 6, False)
    assert "compares with results on the same data only, sha256:" in entry["why_not_comparable"]
    assert {name: (c["n"], c["correct"]) for name, c in entry["controls"].items()} == {
        "text-only": (6, 6), "options-only": (6, 2),
    }  # fmt: skip
    guess = entry["controls"]["options-only"]
    assert guess["gain"] == pytest.approx(4 / 6) and guess["p"] == pytest.approx(2 / 2**4)
    marks = {name: one["mean"]["mean"] for name, one in entry["rubric"]["conditions"].items()}
    assert marks == {"whole": 1.0, "text-only": 1.0, "options-only": 0.5}
    assert {name: one["f1"]["mean"] for name, one in entry["concepts"]["conditions"].items()} == {
        "whole": 1.0, "text-only": 1.0, "options-only": 0.0,
    }  # fmt: skip
    assert entry["reasoning"]["inference"] == 0.5 and set(entry["groups"]["reasoning"]) == {"knowledge", "inference"}
    assert len(read_lines(out / "rubric.jsonl")) == 18
    assert "USMLE" in json.loads((out / "judge-prompts.json").read_text())["rubric_marks"]["text"]

    said = capsys.readouterr().out
    assert "case-challenge: choice" in said and "case-challenge: explanation" in said and "options-only" in said
    assert "knowledge and inference" in said
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for name in ("whole", "text-only", "options-only"):
        assert re.search(rf"^\| {name} \| 6 \|", text, re.MULTILINE), name
    assert "only begs" in text and "| evidence" not in text.split("pieces of evidence")[0]
    assert "Choice and explanation" in page and "Knowledge and inference" in page and "an answer that only begs" in page
    # Each whole question is shown once, with what became of its controls, and the discussion.
    shown = json.loads(re.search(r'id="data-samples"[^>]*>(.*?)</script>', page, re.DOTALL)[1])["rows"]
    assert [row["id"] for row in shown] == [f"case-{n}" for n in range(6)]
    assert shown[1]["controls"] == [
        {"name": "text-only", "verdict": "correct"}, {"name": "options-only", "verdict": "wrong"},
    ]  # fmt: skip
    assert shown[0]["metrics"]["key_points"] == 1.0 and shown[0]["metrics"]["concept_f1"] == 1.0
    assert shown[0]["reference"].startswith("Patient 0 has fever")


def test_what_the_controls_are_shown(command, tmp_path):
    folder = layouts.cases(tmp_path / "cases", [layouts.case_row(0)])
    with serve(judge()) as server:
        assert command(*asking(server, folder, tmp_path / "out")) == 0
    parts = [body["messages"][0]["content"] for body in server.requests]
    whole = next(p for p in parts if len(p) == 2)
    text_only, options_only = sorted((p for p in parts if len(p) == 1), key=lambda p: "withheld" in p[0]["text"])
    assert whole[0]["type"] == "image_url" and text_only[0]["text"] == whole[1]["text"]
    assert (
        "Patient 0" not in options_only[0]["text"] and "A. Pneumonia\nB. Cancer\nC. Asthma" in options_only[0]["text"]
    )
    assert all('"Answer: "' in p[-1]["text"] for p in parts)


@pytest.mark.parametrize(
    ("more", "kinds"),
    [(("--no-controls",), {""}), (("--blind",), {"", "options-only"}), ((), {"", "text-only", "options-only"})],
)
def test_which_controls_are_asked(more, kinds, command, tmp_path):
    folder = layouts.cases(tmp_path / "cases")
    with serve(judge()) as server:
        assert command(*asking(server, folder, tmp_path / "out", *more)) == 0
    lines = read_lines(tmp_path / "out" / "responses.jsonl")
    assert {line["id"].partition("#")[2] for line in lines} == kinds
    header = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert header["controls"] == ("--no-controls" not in more)
    with serve(judge()) as server, pytest.raises(UserError, match="holds answers with another"):
        command(*asking(server, folder, tmp_path / "out", *(() if more == ("--no-controls",) else ("--no-controls",))))


def test_controls_are_beside_rotations_and_never_of_them():
    row = Row("b", "1", "Q?", "multiple-choice", ("x", "y"), "A", (), {}, {"case": "c"})
    found = with_rotations(with_controls([row], ("text-only", "options-only")))
    assert [one.id for one in found] == ["1", "1#r1", "1#text-only", "1#options-only"]
    assert found[3].question == OPTIONS_ONLY_QUESTION and found[3].extra["case"] == "c" and found[2].question == "Q?"


def test_explanations_that_nobody_asked_for_are_not_marked(command, tmp_path, capfd):
    folder = layouts.cases(tmp_path / "cases")
    with serve(judge()) as server:
        more = ("--judge", JUDGE, "--judge-url", server.url)
        assert command(*asking(server, folder, tmp_path / "out", *more, protocol="default")) == 0
    assert scores(tmp_path / "out")["rubric"] is None
    assert "protocol default asks for no explanation" in capfd.readouterr().err


def test_jama_scores_stand_beside_what_is_unknown_of_the_printed_ones(command, tmp_path):
    folder = layouts.jama(tmp_path / "jama")
    with serve(judge(lambda body: "prose")) as server:
        more = ("--judge", JUDGE, "--judge-url", server.url)
        assert command(*asking(server, folder, tmp_path / "out", *more, benchmark="jama-clinical-challenge")) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| PMC-Cambrian-8B-AN | 1.29 |" in text and "Unknown: the judge's version" in text
    assert "3 no number" in text
    entry = scores(tmp_path / "out", "jama-clinical-challenge")
    assert entry["rubric"]["conditions"]["whole"]["mean"] == {"n": 0, "mean": None, "ci95": None}


def test_a_sheet_of_other_answers_is_refused(command, tmp_path):
    folder, out = layouts.cases(tmp_path / "cases"), tmp_path / "out"
    (tmp_path / "s.csv").write_text("benchmark,id,key_points,reasoning_steps,evidence\ncase-challenge,gone,1,1,1\n")
    with serve(judge()) as server:
        more = ("--no-controls", "--judge", JUDGE, "--judge-url", server.url, "--human-sheet", tmp_path / "s.csv")
        with pytest.raises(UserError, match="marks none of these answers"):
            command(*asking(server, folder, out, *more))
        (tmp_path / "s.csv").write_text(
            "benchmark,id,key_points,reasoning_steps,evidence\ncase-challenge,case-1,1,,2\n"
        )
        assert command(*asking(server, folder, out, *more)) == 0
    human = scores(out)["rubric"]["human"]
    assert human["marked"] == 1 and human["components"]["key_points"]["bias"] == 0.5
    assert "beside people (1 answers, 1 raters)" in (out / "report.md").read_text()


def test_the_page_of_cases_escapes_what_others_wrote(command, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>|`*"
    row = layouts.case_row(0, question=evil, discussion=evil, options=[evil, "b"], answer="A")
    folder = layouts.cases(tmp_path / "cases", [row])
    with serve(judge()) as server:
        more = ("--judge", JUDGE, "--judge-url", server.url)
        assert command(*asking(server, folder, tmp_path / "out", *more)) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in page


# How an explanation's choice is read


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("Answer: B\nUnlike A and C, it explains the fever.", "B"),
        ("**Answer:** (B)\n\nA is excluded by the biopsy.", "B"),
        ("Answer: B. Cancer\nPneumonia (A) would have fever.", "B"),
        ("The findings point to C.\n\nFinal answer: C", "C"),
        ("Answer: B\nA is wrong.\nAnswer: B", "B"),
        ("Answer: A\nOn reflection not.\nAnswer: B", None),
        ("Answer: Cancer\nBecause of the mass.", "B"),
        ("Answer:\nB", None),
        ("Answer: none of these", None),
        ("I would choose B.", "B"),
        ("", None),
        ("Pneumonia or cancer could both answer for this.", None),
    ],
)
def test_the_answer_line_is_what_counts(reply, read):
    response = {
        "benchmark": "b", "id": "1", "question_type": "multiple-choice", "question": "Which?", "answer": "B",
        "options": ["Pneumonia", "Cancer", "Asthma"], "response": reply,
    }  # fmt: skip
    graded = rules.answer_line(response)
    assert (graded.parsed, graded.right) == (read, read == "B")


# Questions asked openly


def test_open_withholds_the_options_and_accepts_the_right_ones_text():
    row = Row("b", "1", "Which organ?", "multiple-choice", ("Liver", "Heart"), "B", (), {"x": "y"})
    asked = PROTOCOLS["open"].asked(row)
    assert (asked.question_type, asked.options, asked.answer) == ("open", None, "Heart")
    assert asked.extra == {"withheld_options": ["Liver", "Heart"]}
    assert "Liver" not in PROTOCOLS["open"].render(asked) and PROTOCOLS["default"].asked(row) is row
    assert PROTOCOLS["open"].asked(Row("b", "1", "Q", "multiple-choice", ("x",), "?", (), {})).answer == "?"
    with pytest.raises(UserError, match="shows its options in the picture"):
        PROTOCOLS["open"].asked(Row("b", "1", "Q", "multiple-choice", ("x",), "A", (), {}, {"options_in_image": True}))


def test_the_four_sets_in_both_protocols_and_their_mean(command, tmp_path):
    def reply(body):
        assert "A. " in text_of(body) or "briefly" in text_of(body)
        return Sent(completion("yes" if "briefly" in text_of(body) else "A"))

    data = {
        "vqa-rad": layouts.short_answers(tmp_path / "rad"), "slake-en": layouts.slake(tmp_path / "slake"),
        "pathvqa": layouts.short_answers(tmp_path / "path"), "pmc-vqa": layouts.LAYOUTS["pmc-vqa"](tmp_path / "pmc"),
    }  # fmt: skip
    bundle = layouts.bundle(tmp_path / "bundle")
    with serve(reply) as server:
        base = ("--model", "m", "--backend", "openai", "--base-url", server.url)
        named = [f"{name}={path}" for name, path in data.items()]
        assert command(*base, "--benchmarks", *named, "--protocol", "open", "--out", tmp_path / "open") == 0
        assert command(*base, "--benchmarks", f"vqa-letters={bundle}", "--out", tmp_path / "letters") == 0
    opened = json.loads((tmp_path / "open" / "scores.json").read_text())
    assert all(set(entry["groups"]["question_type"]) == {"open"} for entry in opened["benchmarks"].values())
    assert opened["benchmarks"]["pmc-vqa"]["open"]["n"] == 2
    accuracies = [entry["accuracy"] for entry in opened["benchmarks"].values()]
    assert (
        opened["sets"]["vqa-open"]["mean"] == pytest.approx(sum(accuracies) / 4) and "vqa-letters" not in opened["sets"]
    )
    letters = json.loads((tmp_path / "letters" / "scores.json").read_text())["sets"]["vqa-letters"]
    assert letters["members"] == ["huatuo-vqa-rad", "huatuo-slake", "huatuo-pathvqa", "huatuo-pmc-vqa"]
    low, high = letters["ci95"]
    assert low <= letters["mean"] <= high
    page = (tmp_path / "letters" / "report.html").read_text()
    assert "79.0 %" in page and "almost certainly copied" in page


# Knowledge and inference


def sheet(path, *lines):
    path.write_text("\n".join(["benchmark,id,reasoning", *lines]) + "\n")
    return path


def answered(tmp_path, n=4):
    file = tmp_path / "answers.jsonl"
    row = {
        "benchmark": "b", "question_type": "multiple-choice", "question": "Which organ?", "options": ["x", "y"],
        "answer": "A", "response": "A", "groups": {}, "image_sha256": [],
    }  # fmt: skip
    file.write_text("".join(json.dumps(row | {"id": str(i), "response": "AB"[i % 2]}) + "\n" for i in range(n)))
    return file


def test_a_sheet_sorts_questions_and_scoring_again_remembers(command, tmp_path):
    file, out = answered(tmp_path), tmp_path / "out"
    labels = sheet(tmp_path / "s.csv", "b,0,knowledge", "b,1,Inference", "b,2,", "b,gone,knowledge", "c,1,inference")
    for more in (("--reasoning", labels), ()):
        assert command("--responses", file, "--out", out, *more) == 0
        entry = scores(out, "b")
        assert (entry["reasoning"]["n"], entry["reasoning"]["unlabelled"]) == (2, 2)
        assert entry["groups"]["reasoning"]["knowledge"]["accuracy"] == 1.0
        assert entry["groups"]["reasoning"]["inference"]["accuracy"] == 0.0
    assert "Sorted by sheet s.csv" in (out / "report.md").read_text()
    from huatuo_vision.evaluation import compare

    assert {row["groups"].get("reasoning") for row in compare.read(out).answers} == {"knowledge", "inference", None}


def test_a_judge_sorts_questions_without_seeing_answers(command, tmp_path):
    file, out = answered(tmp_path), tmp_path / "out"
    with serve(judge()) as server:
        assert command(
            "--responses", file, "--out", out, "--judge", JUDGE, "--judge-url", server.url, "--reasoning", "judge"
        ) == 0  # fmt: skip
        sorting = [text_of(body) for body in server.requests if kind_of(body) == "reasoning"]
    assert len(sorting) == 1, "equal questions are sorted once"
    assert "Which organ?\nA. x\nB. y" in sorting[0]
    assert scores(out, "b")["reasoning"] | {"ci95": 0} == {"n": 4, "unlabelled": 0, "inference": 0.0, "ci95": 0}
    assert f"judge {JUDGE}" in json.loads((out / "scores.json").read_text())["reasoning"]


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("knowledge", "knowledge"),
        ("**Inference.**", "inference"),
        ("It asks for inference", "inference"),
        ("knowledge or inference", None),
        ("neither", None),
        ("5", None),
        ("", None),
        ("<think>knowledge?</think>inference", "inference"),
    ],
)
def test_a_label_is_one_word_or_none(reply, read):
    assert reasoning.read_label(reply) == read


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["b,0,guess"], "line 2: reasoning is 'guess'; expected knowledge or inference"),
        (["b,0,knowledge", "b,0,inference"], "line 3: b 0 stands there twice"),
        (["x,0,knowledge"], "labels none of these questions"),
    ],
)
def test_a_wrong_sheet_names_its_line(lines, said, command, tmp_path):
    with pytest.raises(UserError) as caught:
        command(
            "--responses",
            answered(tmp_path),
            "--out",
            tmp_path / "out",
            "--reasoning",
            sheet(tmp_path / "s.csv", *lines),
        )
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--reasoning", "judge"), "--reasoning judge needs --judge"),
        (("--human-sheet", "eval.py"), "--human-sheet needs --judge"),
        (("--concepts", "gone.txt"), "--concepts gone.txt does not exist"),
        (("--concepts", "LICENSE-of-json"), "does not exist"),
    ],
)
def test_second_opinions_are_checked_first(more, said, command, tmp_path):
    with pytest.raises(UserError, match=said):
        command("--responses", answered(tmp_path), "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_list_of_terms_of_another_format(command, tmp_path):
    (tmp_path / "MRCONSO.RRF").write_text("C0000005|ENG|P|...|\n")
    with pytest.raises(UserError, match="--concepts: .*MRCONSO.RRF: line 1 is .*; expected an entry a line"):
        command("--responses", answered(tmp_path), "--out", tmp_path / "out", "--concepts", tmp_path / "MRCONSO.RRF")


def test_scores_of_before_have_a_report_still(tmp_path, command):
    assert command("--responses", answered(tmp_path), "--out", tmp_path / "out") == 0
    old = json.loads((tmp_path / "out" / "scores.json").read_text())
    for key in ("controls", "rubric", "concepts", "reasoning"):
        del old["benchmarks"]["b"][key]
    del old["sets"], old["reasoning"]
    (tmp_path / "again").mkdir()
    report.write_reports(tmp_path / "again", old, [], [])
    assert "Results" in (tmp_path / "again" / "report.md").read_text()
