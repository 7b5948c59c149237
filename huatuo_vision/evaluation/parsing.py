"""Our own reading of multiple-choice replies: which option one chooses. No torch here.

A reply is read from its clearest statement down: the reply as a whole, what stands in a box or in an answer field,
what a final answer says, what any other answer says, a letter at its beginning or end, an option named in passing,
an option's text. The first kind of statement that is there decides; where it names two options, or one that does not
exist, the reply is unparsed. A letter or text counts where it is chosen, not where it is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from huatuo_vision.evaluation import phrases, yes_no
from huatuo_vision.evaluation.choices import Choices, Claims, choices_of, denied
from huatuo_vision.evaluation.words import STOPS, Words, clean, refuses


def parse_choice(reply: str, options: Sequence[str], question: str = "") -> str | None:
    """The letter of the one option a reply chooses, or None where it chooses none, or two.

    The question matters for yes/no options only: "There is no fracture" is a No where just that was asked.
    """
    choices = choices_of(tuple(options))
    claims = _claims(choices.without_echo(clean(reply)), choices, question)
    return claims.pop() if len(claims) == 1 else None


def _claims(text: str, choices: Choices, question: str = "") -> Claims:
    if not text:
        return set()
    corrected = phrases.TAKEN_BACK.match(text)
    if corrected:
        claims = _stated(text[corrected.end() :], choices)
        if claims or phrases.RETRACTS.match(text, corrected.end()):
            return claims
    return _stated(text, choices) or _implied(text, choices, question)


def _stated(text: str, choices: Choices) -> Claims:
    """What the reply says is its answer, in its clearest statements."""
    return (
        _whole(text, choices)
        or _enclosed(text, choices)
        or _marked(text, choices)
        or _leading(text, choices) | _trailing(text, choices)
        or _named(text, choices)
    )


def _implied(text: str, choices: Choices, question: str) -> Claims:
    """What the words of the reply say without calling it an answer."""
    if phrases.ENDS_ASKING.search(text) or (refuses(text) and not any(map(refuses, choices.options))):
        return set()
    words = Words.of(text)
    if choices.are_letters:
        return _letters_said(text, choices)
    if choices.yes_no:
        return yes_no.yes_or_no(words, choices) or yes_no.affirmed_or_denied(words, question, choices)
    return _texts_said(words, choices)


def _rejected_after(rest: str, letter: str, choices: Choices) -> bool:
    """Whether what follows a letter rejects it; an option's text may itself begin with "cannot"."""
    if phrases.SAYS_NO.match(rest):
        return not choices.yes_no
    return phrases.REJECTED_AFTER.match(rest) is not None and not choices.begins_with_text_of(letter, rest)


# --- The whole reply ------------------------------------------------------------------------------------------------


def _whole(text: str, choices: Choices) -> Claims:
    """A reply that is a letter, an option's text, both, or some letters, and nothing else."""
    if phrases.MARKED.search(text):
        return set()
    only = phrases.ONLY_LETTER.fullmatch(text)
    if only and choices.claim(only["letter"]):
        return {choices.claim(only["letter"])}
    words = Words.of(text).words
    if choices.yes_no and (answer := yes_no.ALONE.get(" ".join(words))):
        return {choices.yes_no[answer]}
    same_words = (words, {("one",): ("1",), ("1",): ("one",)}.get(words))
    for texts in (choices.texts, choices.without_article):
        if same := {letter for letter, option in texts.items() if words and option.words in same_words}:
            return set(same)
    if only:
        return {None}
    lead = phrases.LEAD.match(text)
    if lead and (letter := choices.claim(phrases.letter(lead))):
        own = choices.texts[letter].words
        if own and Words.of(text[lead.end() :]).words == own:
            return {letter}
    if phrases.ONLY_LETTERS.fullmatch(text):
        return {choices.claim(letter) for letter in re.findall(r"\b[A-Za-z]\b", text)}
    return set()


# --- Boxes and fields -----------------------------------------------------------------------------------------------


def _enclosed(text: str, choices: Choices) -> Claims:
    claims: Claims = set()
    for content in phrases.enclosed(text):
        claims |= _claims(clean(content), choices) or {None}
    return claims


# --- Answers that are called answers ----------------------------------------------------------------------------------


def _marked(text: str, choices: Choices) -> Claims:
    """What "the answer is ..." and its like say; the final answer, where one is called that, overrides the others."""
    final: Claims = set()
    other: Claims = set()
    labelled: Claims = set()
    for marker in phrases.ANSWER.finditer(text):
        if not phrases.in_negated_clause(text, marker.start()):
            kind = final if phrases.is_final(text, marker) else labelled if phrases.is_label(text, marker) else other
            kind |= _answer_at(text, marker.end(), choices)
    # "It could be A or B at first sight. Answer: D": a label after considerations is final; one at the start is not.
    if not phrases.ANSWER.match(text) or len(labelled) > 1:
        final |= labelled
    other |= labelled
    for marker in phrases.CONCLUDING.finditer(text):
        final |= _letters_at(text, marker.end(), choices)
    said_until = 0
    for marker in phrases.CHOOSING.finditer(text):
        if phrases.CONTRASTS.match(marker[0]) or not phrases.in_negated_clause(text, marker.start()):
            chosen = _letters_at(text, marker.end(), choices)
            # "It is either A or B. I choose B."
            decides = chosen and chosen < other and re.search(r"[.!?。\n]", text[said_until : marker.start()])
            other = chosen if decides else other | chosen
            said_until = marker.end() if chosen else said_until
    for match in phrases.IS_RIGHT.finditer(text):
        belongs_to_text = choices.ends(text[: phrases.start(match) + 1])  # "hepatitis C is correct"
        if (
            not belongs_to_text
            and not phrases.in_negated_clause(text, match.start())
            and not phrases.is_hypothetical(text, match)
        ):
            other |= {choices.claim(phrases.letter(match))} | _letter_before(text, match.start(), choices)
    other |= {choices.claim(phrases.letter(match)) for match in phrases.SINGLED_OUT.finditer(text)}
    return final or other | _itemised(text, choices)


def _itemised(text: str, choices: Choices) -> Claims:
    """The options called right by a reply that calls each of them right or wrong."""
    verdicts: dict[str, bool] = {}
    for item in phrases.ITEM.finditer(text):
        letter = choices.claim(phrases.letter(item))
        if letter is None or choices.yes_no:
            continue
        own = re.match(rf"\s*{re.escape(choices.cleaned[letter])}", item["rest"], re.IGNORECASE)
        if verdict := phrases.ITEM_VERDICT.match(item["rest"], own.end() if own else 0):
            verdicts[letter] = verdict["right"] is not None
    return {letter for letter, right in verdicts.items() if right} if len(verdicts) > 1 else set()


def _answer_at(text: str, position: int, choices: Choices) -> Claims:
    """What stands where an answer is due: a letter, or an option's text in the rest of the sentence."""
    if negation := phrases.NEGATION_AHEAD.match(text, position):
        turn = phrases.BUT.match(text, negation.end())
        return _answer_at(text, turn.end(), choices) if turn else set()
    if claims := _letters_at(text, position, choices):
        return claims
    rest = text[position:]
    if choices.are_letters and phrases.ASKED.match(rest.lstrip()[1:]):
        return set()
    sentence = choices.first_sentence(rest)
    said = yes_no.yes_or_no(sentence, choices) if choices.yes_no else _texts_said(sentence, choices)
    if stated := choices.begins_loosely(rest):
        return choices.same_text(stated) | said
    if beyond := re.fullmatch(r"\s*([A-Za-z])\s*[.)]?\s*", rest):
        return {choices.claim(beyond[1])}
    return set() if refuses(rest) else said


def _letters_at(text: str, position: int, choices: Choices) -> Claims:
    """The letter chosen at a position, and the letters and text that follow it as if chosen too."""
    if _begins_with_lettered_text(text[position:], choices):
        return set()
    filling = phrases.FILLING.match(text, position)
    start = filling.end() if filling else position
    match = phrases.CHOSEN_LETTER.match(text, start)
    if not match:
        return _letter_and_own_text(text[start:], choices)
    letter, rest = phrases.letter(match), text[match.end() :]
    if match["bare"] and (
        _begins_with_lettered_text(text[start:], choices) or _is_part_of_a_name(match, rest, choices)
    ):
        return set()
    if phrases.ASKED.match(rest) or _rejected_after(rest, letter, choices) or phrases.rejected_before(text, start):
        return set()
    return {choices.claim(letter)} | _further(rest, letter, choices)


def _begins_with_lettered_text(text: str, choices: Choices) -> bool:
    """Whether letters at the beginning belong to an option's text: "C. difficile colitis", "both A and B"."""
    stated = choices.begins(text)
    words = choices.texts[stated].words if stated else ()
    return len(words) > 1 or (
        bool(words) and re.fullmatch("[a-z]", words[0]) is not None and not choices.claim(words[0])
    )


def _is_part_of_a_name(match: re.Match[str], rest: str, choices: Choices) -> bool:
    """Whether a bare letter goes on as a name or, small, as an article: "E. coli", "a mass"."""
    if choices.begins_with_text_of(match["bare"], rest):
        return False
    small = match["bare"].islower() and re.match(r"\s+(?!because\b|since\b)\w", rest)
    return phrases.NAME_GOES_ON.match(rest) is not None or bool(small)


def _letter_and_own_text(text: str, choices: Choices) -> Claims:
    """ "B Hepatitis C", without a sign between."""
    match = re.match(phrases.BARE, text)
    if not match or not match["bare"].isupper() or not choices.begins_with_text_of(match["bare"], text[match.end() :]):
        return set()
    return {choices.claim(match["bare"])}


def _further(rest: str, letter: str, choices: Choices) -> Claims:
    """What follows a chosen letter as if it were chosen too: "or C", or another option's text."""
    if other := phrases.OTHER_LETTER.match(rest):
        return set() if phrases.REJECTED_AFTER.match(rest[other.end() :]) else {choices.claim(phrases.letter(other))}
    stated = choices.begins_loosely(rest)
    if not stated or not choices.claim(letter) or letter.upper() in choices.same_text(stated):
        return set()
    words = choices.first_sentence(rest)
    apart = re.match(r"[\s.:,;)(\"'\]–—-]", rest)
    return {stated} if apart and not denied(words, 0, len(choices.texts[stated].words)) else set()


def _letter_before(text: str, position: int, choices: Choices) -> Claims:
    """The letter joined to one that follows: "A and" before "B are right"."""
    before = phrases.before(text, position)
    match = phrases.LETTER_BEFORE.search(before)
    return (
        {choices.claim(phrases.letter(match))}
        if match and not phrases.rejected_before(before, match.start())
        else set()
    )


# --- A letter at the beginning, at the end, or named in passing -----------------------------------------------------


def _leading(text: str, choices: Choices) -> Claims:
    """The letter a reply begins with, if what follows does not name another one, or yes or no."""
    if choices.yes_no and (answer := yes_no.leading_yes_or_no(Words.of(text), choices)):
        return answer
    match = phrases.LEAD.match(text)
    if not match:
        return set()
    letter, sign, rest = phrases.letter(match).upper(), (match["sign"] or "").strip(), text[match.end() :]
    if match["bare"]:
        article = letter in "AI" and (rest[:1] == "(" and not re.match(r"\(\s*(?:not\b|不|非)", rest))
        if match["sign"] is None or article or (letter == "I" and sign == ","):
            return _letter_and_own_text(text, choices)
        if _begins_with_lettered_text(text, choices):
            return set()
    if sign == "." and not choices.begins(rest) and phrases.NAME_GOES_ON.match(f".{rest}"):
        return set()
    after = text[phrases.start(match) + 1 :]
    speaker = sign == ":" and refuses(rest.partition("\n")[0])  # "A: I do not know"
    if speaker or _rejected_after(after, letter, choices):
        return set()
    claims: Claims = {choices.claim(letter)}
    if phrases.EXPLAINED.match(text):
        return claims
    claims |= _list_items(rest, letter, choices)
    if not choices.begins_with_text_of(letter, rest):
        claims |= _further(after, letter, choices)
    return claims


def _list_items(rest: str, letter: str, choices: Choices) -> Claims:
    """Other letters that stand as the first one does: at the beginning of a line or sentence, or before their text."""
    own = re.match(rf"\s*{re.escape(choices.cleaned.get(letter, ''))}", rest, re.IGNORECASE)
    rest = rest[own.end() :] if own else rest
    claims: Claims = {
        choices.claim(match["signed"] or match["alone"])
        for match in phrases.LIST_ITEM.finditer(rest)
        if not phrases.REJECTED_AFTER.match(rest[match.end() :])
    }
    for match in re.finditer(r"(?<![A-Za-z0-9'-])\(?([A-Za-z])[).:]\s", rest):
        if choices.begins_with_text_of(match[1], rest[match.end() :]):
            claims.add(choices.claim(match[1]))
    return claims - {None}


def _trailing(text: str, choices: Choices) -> Claims:
    """The letter a reply ends with: alone in its last line or sentence, after "is", or with its option's text."""
    line = text.rpartition("\n")[2].strip()
    lead = phrases.LEAD.match(line)
    if (
        lead
        and (lead["wrapped"] or lead["sign"])
        and choices.begins_with_text_of(phrases.letter(lead), line[lead.end() :])
    ):
        return set() if line == text or phrases.EXPLAINED.match(text) else {choices.claim(phrases.letter(lead))}
    last = next(iter(phrases.LAST_LETTER.finditer(text)), None)
    if (
        not last
        or phrases.rejected_before(text, phrases.start(last))
        or phrases.in_negated_clause(text, phrases.start(last))
    ):
        return set()
    if last["bare"] and (
        phrases.NAMED_BY_LETTER.search(phrases.before(text, phrases.start(last)))
        or choices.ends(text[: phrases.start(last) + 1])
    ):
        return set()
    return {choices.claim(phrases.letter(last))} - {None}


def _named(text: str, choices: Choices) -> Claims:
    """Options named by letter anywhere, "(B)" or "option B", and not rejected."""
    chosen: Claims = set()
    rejected: Claims = set()
    for match in phrases.NAMED.finditer(text):
        group = next(group for group in ("wrapped", "bare", "own", "cjk") if match[group])
        letter, after = choices.claim(match[group]), text[match.end(group) :]
        is_name = phrases.NAMED_BY_LETTER.search(phrases.before(text, match.start())) or (
            group == "bare" and match[group].islower()
        )
        if letter is None or is_name or phrases.ASKED.match(after):
            continue
        if phrases.rejected_before(text, match.start(group)) or _rejected_after(after, letter, choices):
            rejected.add(letter)
            continue
        chosen |= {letter} | _further(after, letter, choices)
        text_before = choices.ends(text[: match.start(group)])  # "pneumonia (B)"
        if text_before and letter not in choices.same_text(text_before):
            chosen.add(text_before)
    return chosen - rejected


# --- Texts --------------------------------------------------------------------------------------------------------


_CONCLUDING_WORDS = re.compile(
    r"\b(?:therefore|thus|so|hence|conclusion|overall|most (?:likely|consistent)|suggests?|diagnosis|best)\b"
    "|因 ?此|所 ?以|故|综 ?上"
)


def _texts_said(words: Words, choices: Choices) -> Claims:
    """The options whose text is said and not denied; where reasoning weighs several, those of its conclusion."""
    mentions = choices.mentions(words)
    asserted: Claims = {mention.letter for mention in mentions if not mention.denied}
    if any(choices.may_mean_longer(mention, words, mentions) for mention in mentions if not mention.denied):
        return {None}
    if asserted & {mention.letter for mention in mentions if mention.denied}:
        return {None}
    if len(asserted) > 1:
        begin = max((i for i in range(1, len(words.words)) if words.gaps[i] in STOPS), default=0)
        last: Claims = {mention.letter for mention in mentions if mention.start >= begin and not mention.denied}
        if begin and len(last) == 1 and _CONCLUDING_WORDS.search(" ".join(words.words[begin:])):
            return last
    return asserted


def _letters_said(text: str, choices: Choices) -> Claims:
    """Of options that are letters themselves, those in a sentence that are neither article nor pronoun."""
    texts = {option.words[0]: letter for letter, option in choices.texts.items()}
    claims: Claims = set()
    for match in re.finditer(rf"{phrases.BARE}(?:\s+(?P<next>[a-z]+))?", text):
        rest = text[match.end("bare") :]
        article = match["bare"] in "AI" and match["next"] and match["next"] not in yes_no.NO_NOUNS
        asked = re.match(r"[^.!\n]*\?", rest)
        rejected = (
            phrases.rejected_before(text, match.start())
            or phrases.REJECTED_AFTER.match(rest)
            or phrases.SAYS_NO.match(rest)
            or phrases.in_negated_clause(text, match.start())
        )
        if match["bare"].isupper() and not (article or asked or rejected):
            claims.add(texts.get(match["bare"].lower()))
    return claims
