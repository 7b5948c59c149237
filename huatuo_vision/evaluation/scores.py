"""From verdicts to scores.json: rates with intervals, groups, baselines, robustness, calibration. No torch here."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np

from huatuo_vision.evaluation import statistics
from huatuo_vision.evaluation.protocols import Protocol
from huatuo_vision.evaluation.rows import INFERENCE, REASONING, Benchmark
from huatuo_vision.evaluation.variants import CONTROLS, is_original
from huatuo_vision.schema import UserError

if TYPE_CHECKING:
    from huatuo_vision.evaluation.scorers import Verdict

HEADER_KEYS = ("model", "weights", "precision", "backend", "blind", "limit", "scoring")
LIKELIHOODS = ("letter", "text")
OPEN_METRICS = ("exact_match", "token_recall", "token_f1", "bleu")

Answer = Mapping[str, Any]  # one object of a responses file


@dataclass(frozen=True, slots=True)
class BenchmarkFacts:
    """What the scores of a benchmark say besides the numbers."""

    name: str
    title: str
    revision: str | None  # of the data; None where nobody knows
    expected_n: int | None  # rows, hidden and open ones included; None where nobody knows
    macro_over: str | None  # None: the group that the rows themselves suggest
    note: str
    protocol_hash: str

    @classmethod
    def of(cls, benchmark: Benchmark, revision: str, protocol: Protocol) -> BenchmarkFacts:
        return cls(
            name=benchmark.name,
            title=benchmark.title,
            revision=revision,
            expected_n=benchmark.expected_n,
            macro_over=benchmark.macro_over,
            note=benchmark.note,
            protocol_hash=protocol.hash_on(benchmark, revision),
        )

    @classmethod
    def unknown(cls, name: str, protocol: Protocol) -> BenchmarkFacts:
        return cls(
            name=name,
            title=name,
            revision=None,
            expected_n=None,
            macro_over=None,
            note="Scored by the protocol alone: this package does not know the benchmark.",
            protocol_hash=protocol.hash,
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Answers with their verdicts and clusters, in the order of their ids."""

    answers: Sequence[Answer]
    verdicts: Sequence[Verdict]
    clusters: statistics.Integers  # [rows]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Answer, Verdict]]) -> _Rows:
        # Sorted, so that sums of fractions and resamples do not depend on the order of the file.
        ordered = sorted(pairs, key=lambda pair: pair[1].id)
        answers = [answer for answer, _ in ordered]
        return cls(answers, [verdict for _, verdict in ordered], statistics.clusters(answers))

    def __len__(self) -> int:
        return len(self.answers)

    def pairs(self) -> Iterable[tuple[Answer, Verdict]]:
        return zip(self.answers, self.verdicts, strict=True)

    def take(self, indices: Sequence[int]) -> _Rows:
        return _Rows([self.answers[i] for i in indices], [self.verdicts[i] for i in indices], self.clusters[indices])

    @property
    def correct(self) -> list[bool]:
        return [verdict.verdict == "correct" for verdict in self.verdicts]


def summarise(
    header: Mapping[str, Any],
    protocol: Protocol,
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    facts: Mapping[str, BenchmarkFacts],
    sets: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The content of scores.json.

    Args:
        header: whose answers they are: HEADER_KEYS. A `backend` of None: a file that does not say how it was made.
        answers: the objects of the responses file, in any order.
        verdicts: one for each answer, in the same order.
        facts: by benchmark, in the order of the result; a benchmark of the answers that it lacks counts as unknown.
        sets: name -> benchmarks, to be averaged where all of them were answered.
    Raises:
        UserError for a row that stands there twice, a rotated row without its original, and a likelihood that is not
        one probability for each option.
    """
    _refuse_duplicates(answers)
    by_name: dict[str, list[tuple[Answer, Verdict]]] = {name: [] for name in facts}
    by_name |= {name: [] for name in sorted({answer["benchmark"] for answer in answers} - facts.keys())}
    for pair in zip(answers, verdicts, strict=True):
        check_extras(pair[0])
        by_name[pair[0]["benchmark"]].append(pair)
    return {
        "schema": 1,
        **{key: header[key] for key in HEADER_KEYS},
        "protocol": {"name": protocol.name, "hash": protocol.hash, "note": protocol.note},
        "benchmarks": {
            name: _score(facts.get(name) or BenchmarkFacts.unknown(name, protocol), pairs, header)
            for name, pairs in by_name.items()
        },
        "sets": _set_means(by_name, sets or {}),
    }


def _set_means(
    by_name: Mapping[str, Sequence[tuple[Answer, Verdict]]], sets: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The unweighted mean of the members' accuracies, resampled within each member."""
    means = {}
    for name, members in sets.items():
        rows = {
            member: [p for p in by_name.get(member, ()) if is_original(p[0]) and p[1].verdict != "ungraded"]
            for member in members
        }
        if not all(rows.values()):
            continue
        own = _Rows.of(pair for pairs in rows.values() for pair in pairs)
        values = {member: [i for i, v in enumerate(own.verdicts) if v.benchmark == member] for member in members}
        mean, ci95 = _macro(own, values)
        means[name] = {"members": list(members), "n": len(own), "mean": mean, "ci95": ci95}
    return means


def _refuse_duplicates(answers: Sequence[Answer]) -> None:
    keys = Counter((answer["benchmark"], answer["id"]) for answer in answers)
    for (benchmark, row_id), times in keys.items():
        if times > 1:
            raise UserError(f"{benchmark} row {row_id!r} is answered {times} times; keep one of its answers")


def check_extras(answer: Answer) -> None:
    """Raises UserError where an extra key that has a meaning does not keep to it."""
    where = f"{answer['benchmark']} row {answer['id']!r}"
    options = answer["options"]
    if answer.get("rotation") and (not isinstance(answer.get("rotation_of"), str) or is_open(answer) or not options):
        raise UserError(f"{where} has a rotation but no options or no rotation_of; give the id of its original there")
    control = answer.get("control")
    if control and (control not in CONTROLS or not isinstance(answer.get("control_of"), str)):
        raise UserError(
            f"{where} is the control {str(control)[:40]!r} of {str(answer.get('control_of'))[:40]!r}; expected one of "
            f"{', '.join(CONTROLS)} in control, and the id of its original in control_of"
        )
    likelihood = answer.get("likelihood")
    if likelihood is not None and not all(_is_likelihood(likelihood, kind, options) for kind in LIKELIHOODS):
        raise UserError(
            f"{where}: likelihood is {str(likelihood)[:80]}; expected letter and text, each a list with one "
            f"probability for each of its {len(options or ())} options"
        )


def _is_likelihood(likelihood: Any, kind: str, options: Sequence[str] | None) -> bool:
    values = likelihood.get(kind) if isinstance(likelihood, Mapping) else None
    if not isinstance(values, list) or not options or len(values) != len(options):
        return False
    # Compared this way round, NaN is none.
    return all(isinstance(value, int | float) and 0 <= value <= 1 + 1e-3 for value in values)


def is_open(answer: Answer) -> bool:
    """Whether the row has no options to choose from, whatever stands in its `options`."""
    return answer["question_type"] == "open"


def _score(facts: BenchmarkFacts, pairs: Sequence[tuple[Answer, Verdict]], header: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark's entry."""
    originals = [pair for pair in pairs if is_original(pair[0])]
    graded = _Rows.of(pair for pair in originals if pair[1].verdict != "ungraded")
    ungraded = len(originals) - len(graded)
    overall = _tally(graded)
    groups = group_indices(graded.answers)
    macro_over = facts.macro_over or _natural_group(graded.answers)
    macro, macro_ci95 = _macro(graded, groups.get(macro_over, {}))
    reason = _why_not_comparable(facts, len(originals), header)
    return {
        "title": facts.title,
        "note": facts.note,
        "revision": facts.revision,
        "protocol_hash": facts.protocol_hash,
        "n": overall["n"],
        "expected_n": facts.expected_n,
        "correct": overall["correct"],
        "unparsed": overall["unparsed"],
        "ungraded": ungraded,
        "accuracy": overall["accuracy"],
        "ci95": overall["ci95"],
        "ci_method": _ci_method(graded),
        "clusters": len(set(graded.clusters.tolist())),
        "micro": overall["accuracy"],
        "macro": macro,
        "macro_over": macro_over,
        "macro_ci95": macro_ci95,
        "comparable": reason is None,
        "why_not_comparable": reason,
        "expectation": _expectation(graded),
        "smallest_detectable_difference": statistics.smallest_detectable_difference(len(graded)),
        "groups": {
            group: {value: _tally(graded.take(indices)) for value, indices in values.items()}
            for group, values in groups.items()
        },
        "open": _open_metrics(graded),
        "baselines": _baselines(graded.answers),
        "rotation": _rotation(facts.name, pairs, graded),
        "controls": _controls(facts.name, pairs, graded),
        "calibration": _calibration(graded.answers),
        "judge": None,
        "rubric": None,
        "concepts": None,
        "reasoning": _reasoning(graded),
    }


def _why_not_comparable(facts: BenchmarkFacts, answered: int, header: Mapping[str, Any]) -> str | None:
    if facts.revision is None:
        return f"Not comparable: this package does not know {facts.name}; it is scored by the protocol alone."
    if facts.expected_n is None:
        return (
            f"Not comparable: nobody says which rows make {facts.name}; it compares with results on the same data "
            f"only, {facts.revision}."
        )
    if header["limit"] is not None:
        return (
            f"Not comparable: {answered} rows answered under --limit {header['limit']}, "
            f"the benchmark has {facts.expected_n}."
        )
    if answered != facts.expected_n:
        return f"Not comparable: {answered} rows answered, the benchmark has {facts.expected_n}."
    if header["backend"] is None:
        return "Not comparable: the answers come from a file that does not say how the model was asked."
    return None


def _tally(rows: _Rows) -> dict[str, Any]:
    n = len(rows)
    correct = rows.correct
    return {
        "n": n,
        "correct": sum(correct),
        "unparsed": sum(verdict.verdict == "unparsed" for verdict in rows.verdicts),
        "accuracy": sum(correct) / n if n else None,
        "ci95": list(statistics.rate_interval(correct, rows.clusters)[0]) if n else None,
    }


def _ci_method(rows: _Rows) -> str | None:
    if not len(rows):
        return None
    if len(set(rows.clusters.tolist())) == len(rows):
        return "wilson"
    return f"bootstrap clustered by {statistics.cluster_kind(rows.answers)}"


def group_indices(answers: Sequence[Answer]) -> dict[str, dict[str, list[int]]]:
    """Which rows belong to each value of each group, question_type first; groups and values in alphabetical order."""
    members: dict[str, dict[str, list[int]]] = {}
    for index, answer in enumerate(answers):
        for group, value in {**answer["groups"], "question_type": answer["question_type"]}.items():
            members.setdefault(group, {}).setdefault(value, []).append(index)
    names = sorted(members, key=lambda group: (group != "question_type", group))
    return {group: dict(sorted(members[group].items())) for group in names}


def _natural_group(answers: Sequence[Answer]) -> str | None:
    """The group to average over where no benchmark says so: subject, modality, or the first that every row has."""
    shared = set.intersection(*(set(answer["groups"]) for answer in answers)) if answers else set()
    return min(shared, key=lambda group: (group != "subject", group != "modality", group), default=None)


def _macro(rows: _Rows, values: Mapping[str, Sequence[int]]) -> tuple[float | None, list[float] | None]:
    """The unweighted mean of the values' rates with its interval; rows that lack the group are not in it."""
    if not values:
        return None, None
    rates = [sum(rows.take(indices).correct) / len(indices) for indices in values.values()]
    own = rows.take([index for indices in values.values() for index in indices])
    value = np.repeat(np.arange(len(values)), [len(indices) for indices in values.values()])
    return fsum(rates) / len(rates), list(statistics.macro_interval(own.correct, value, own.clusters))


def _expectation(rows: _Rows) -> float | None:
    """The accuracy to be expected of official code that draws a letter at random where we say unparsed."""
    chances = [verdict.chance for verdict in rows.verdicts if verdict.chance is not None]
    return (sum(rows.correct) + fsum(chances)) / len(rows) if chances else None


def _open_metrics(rows: _Rows) -> dict[str, Any] | None:
    measured = [i for i, (answer, verdict) in enumerate(rows.pairs()) if is_open(answer) and verdict.metrics]
    if not measured:
        return None
    own = rows.take(measured)
    values = [[verdict.metrics[name] for name in OPEN_METRICS] for verdict in own.verdicts]
    intervals = statistics.mean_intervals(values, own.clusters)
    metrics = {
        name: {"mean": fsum(column) / len(column), "ci95": list(interval)}
        for name, column, interval in zip(OPEN_METRICS, zip(*values, strict=True), intervals, strict=True)
    }
    return {"n": len(own), **metrics}


def _baselines(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """What is reached without reading the question, over the multiple-choice rows."""
    choices = [answer for answer in answers if not is_open(answer)]
    if not choices:
        return None
    n = len(choices)
    letters = Counter(answer["answer"] for answer in choices)
    longest = sum(
        _gold_index(answer) == max(range(len(answer["options"])), key=lambda i: len(answer["options"][i]))
        for answer in choices
    )
    texts = Counter(answer["options"][_gold_index(answer)].strip() for answer in choices)
    majority = min(texts, key=lambda text: (-texts[text], text))
    return {
        "majority": {"answer": majority, "accuracy": texts[majority] / n},
        "constant_letter": {
            letter: letters[letter] / n
            for letter in string.ascii_uppercase[: max(len(answer["options"]) for answer in choices)]
        },
        "longest_option": longest / n,
    }


def _gold_index(answer: Answer) -> int:
    return string.ascii_uppercase.index(answer["answer"])


def _rotation(name: str, pairs: Sequence[tuple[Answer, Verdict]], graded: _Rows) -> dict[str, Any] | None:
    """How much the order of the options matters, over the rows that were asked in several orders.

    A row is consistent when its replies choose the same option text in every order. Letter bias is over the replies
    that could be read: the share of each letter among the choices less its share among the gold answers.
    """
    repeats: dict[str, list[tuple[Answer, Verdict]]] = {}
    for answer, verdict in pairs:
        if answer.get("rotation") and verdict.verdict != "ungraded":
            repeats.setdefault(answer["rotation_of"], []).append((answer, verdict))
    if not repeats:
        return None
    if strays := repeats.keys() - {verdict.id for verdict in graded.verdicts}:
        raise UserError(
            f"{name} row {min(strays)!r} is answered with rotated options only; add the answer with its own options"
        )
    asked = [i for i, verdict in enumerate(graded.verdicts) if verdict.id in repeats]
    own = graded.take(asked)
    orders = [[pair, *repeats[pair[1].id]] for pair in own.pairs()]
    means = [sum(verdict.verdict == "correct" for _, verdict in row) / len(row) for row in orders]
    return {
        "rotations": max(map(len, orders)),
        "rows": len(own),
        "mean_accuracy": fsum(means) / len(means),
        "ci95": list(statistics.mean_intervals([[mean] for mean in means], own.clusters)[0]),
        "consistency": sum(_is_consistent(row) for row in orders) / len(orders),
        "letter_bias": _letter_bias([pair for row in orders for pair in row]),
    }


def _controls(name: str, pairs: Sequence[tuple[Answer, Verdict]], graded: _Rows) -> dict[str, Any] | None:
    """What is reached with less to see, over the rows asked that way, and how much the whole question adds to it."""
    found: dict[str, dict[str, Verdict]] = {}
    for answer, verdict in pairs:
        if answer.get("control") and verdict.verdict != "ungraded":
            found.setdefault(answer["control"], {})[answer["control_of"]] = verdict
    if not found:
        return None
    originals = {verdict.id for verdict in graded.verdicts}
    if strays := {row_id for verdicts in found.values() for row_id in verdicts} - originals:
        raise UserError(
            f"{name} row {min(strays)!r} is answered as a control only; add its answer to the whole question"
        )
    return {control: _control(found[control], graded) for control in CONTROLS if control in found}


def _control(verdicts: Mapping[str, Verdict], graded: _Rows) -> dict[str, Any]:
    own = graded.take([i for i, verdict in enumerate(graded.verdicts) if verdict.id in verdicts])
    controlled = _Rows(own.answers, [verdicts[verdict.id] for verdict in own.verdicts], own.clusters)
    whole, less = own.correct, controlled.correct
    difference = np.subtract(whole, less, dtype=np.float64).mean()
    return {
        **_tally(controlled),
        "gain": float(difference),
        "gain_ci95": list(statistics.difference_interval(whole, less, own.clusters)),
        "p": statistics.sign_flip_p(whole, less, own.clusters),
    }


def _reasoning(graded: _Rows) -> dict[str, Any] | None:
    """How many questions ask for inference rather than knowledge, of those that say (the group `reasoning`)."""
    labelled = [i for i, answer in enumerate(graded.answers) if answer["groups"].get(REASONING)]
    if not labelled:
        return None
    own = graded.take(labelled)
    infers = [answer["groups"][REASONING] == INFERENCE for answer in own.answers]
    return {
        "n": len(own),
        "unlabelled": len(graded) - len(own),
        INFERENCE: sum(infers) / len(own),
        "ci95": list(statistics.rate_interval(infers, own.clusters)[0]),
    }


def _is_consistent(row: Sequence[tuple[Answer, Verdict]]) -> bool:
    texts = {_chosen_text(answer, verdict) for answer, verdict in row}
    return len(texts) == 1 and None not in texts


def _chosen_text(answer: Answer, verdict: Verdict) -> str | None:
    letters = string.ascii_uppercase[: len(answer["options"])]
    # Not `in`: of a string, that also finds "AB".
    return answer["options"][letters.index(verdict.parsed)] if verdict.parsed in tuple(letters) else verdict.parsed


def _letter_bias(pairs: Sequence[tuple[Answer, Verdict]]) -> dict[str, float]:
    read = [(answer, verdict) for answer, verdict in pairs if verdict.parsed is not None]
    chosen = Counter(verdict.parsed for _, verdict in read)
    gold = Counter(answer["answer"] for answer, _ in read)
    letters = string.ascii_uppercase[: max(len(answer["options"]) for answer, _ in pairs)]
    return {letter: (chosen[letter] - gold[letter]) / len(read) for letter in letters} if read else {}


def _calibration(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Of the probabilities of the options' letters, and of their texts."""
    scored = [answer for answer in answers if answer.get("likelihood")]
    if not scored:
        return None
    gold = [_gold_index(answer) for answer in scored]
    found = {}
    for kind in LIKELIHOODS:
        chosen = [int(np.argmax(answer["likelihood"][kind])) for answer in scored]
        confidence = [max(answer["likelihood"][kind]) for answer in scored]
        found[kind] = statistics.calibration(confidence, np.equal(chosen, gold))
    return found
