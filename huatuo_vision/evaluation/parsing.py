"""Our own reading of replies: which option one chooses, and what one says to an open question. No torch here.

A reply is read from its clearest statement down: the reply as a whole, what stands in a box or in an answer field,
what a final answer says, what any other answer says, a letter at its beginning or end, an option named in passing,
an option's text. The first kind of statement that is there decides; where it names two options, or one that does not
exist, the reply is unparsed. A letter or text counts where it is chosen, not where it is rejected.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from huatuo_vision.evaluation.words import ARTICLES, CJK, STOPS, Words, clean, normal, refuses

# What a statement names: a letter, or None for an option that does not exist.
Claims = set[str | None]

# --- Options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """The options of one question, ready to be looked for in replies."""

    options: tuple[str, ...]

    @cached_property
    def letters(self) -> str:
        return string.ascii_uppercase[: len(self.options)]

    @cached_property
    def texts(self) -> dict[str, Words]:
        """Letter -> the words of its option, the letter that some data sets write before it taken off."""
        texts = [clean(option) for option in self.options]
        prefixes = [re.match(rf"\(?{letter}[).:]\s+", text) for letter, text in zip(self.letters, texts, strict=True)]
        if all(prefixes):
            texts = [text[prefix.end() :] for text, prefix in zip(texts, prefixes, strict=True) if prefix]
        return {letter: Words.of(text) for letter, text in zip(self.letters, texts, strict=True)}

    @cached_property
    def without_article(self) -> dict[str, Words]:
        """Texts without the article they begin with, where what is left is part of no other option's text."""
        shortened = {}
        for letter, text in self.texts.items():
            short = Words(text.words[1:], text.gaps[1:])
            others = (other for key, other in self.texts.items() if key != letter)
            if text.words[:1] and text.words[0] in ARTICLES and short.words and not any(
                next(_spans(other, short), None) is not None for other in others
            ):
                shortened[letter] = short
        return shortened

    @cached_property
    def yes_no(self) -> dict[str, str]:
        """ "yes" and "no" -> their letters, where these are the options; else empty."""
        answers = {_YES_NO_WORDS.get("".join(text.words)): letter for letter, text in self.texts.items()}
        return answers if len(self.options) == 2 and set(answers) == {"yes", "no"} else {}

    @cached_property
    def echo(self) -> re.Pattern[str]:
        """All options with their letters, one after the other."""
        each = (
            rf"\(?{letter}[).:]\s*{re.escape(clean(option))}" for letter, option in zip(self.letters, self.options, strict=True)
        )
        return re.compile(r"[\s.,;]*(?:(?:and|or)\s+)?".join(each), re.IGNORECASE)

    def claim(self, letter: str) -> str | None:
        return letter.upper() if letter.upper() in self.letters else None


_YES_NO_WORDS = {"yes": "yes", "no": "no", "是": "yes", "是的": "yes", "否": "no", "不是": "no"}


@lru_cache(maxsize=512)
def _choices(options: tuple[str, ...]) -> Choices:
    return Choices(options)


def equal_options(options: Sequence[str]) -> set[str]:
    """The letters of the options whose text another option repeats, so that the text alone names neither."""
    texts = {letter: normal(option) for letter, option in zip(string.ascii_uppercase, options, strict=False)}
    return {letter for letter, text in texts.items() if list(texts.values()).count(text) > 1}


# Characters of a reply that are looked at for an option's text that must stand at one place.
_FAR = 600

# --- Letters ------------------------------------------------------------------------------------------------------

_WRAPPED = r"[(\[{<\"'「『【]+\s*(?P<wrapped>[A-Za-z])\s*[)\]}>\"'」』】]+"
_ALONE = r"(?<![A-Za-z0-9'-])(?P<bare>[A-Za-z])(?![A-Za-z0-9]|'\w|-\w)"
# A bare letter is a choice where its clause ends behind it: no article before a noun, no pronoun, no "B cell".
_ENDS = (
    rf"(?=[ \t]*\n|\s*(?:$|[.,;:!?)\]}}\"'。/&+、|]|-\s|[–—]|[{CJK}]"
    r"|\b(?:because|since|as|due|which|based|given|for|with|from|or|and|in|on|not|rather|instead|is|was|but)\b))"
)
_LETTER = rf"(?:{_WRAPPED}|{_ALONE}{_ENDS})"
_ONLY_LETTER = re.compile(
    r"(?:(?:option|choice|选项|選項)\s*)?[(\[{<\"'「『【\s]*(?P<letter>[A-Za-z])\s*(?:选项|選項|项|項)?[)\]}>\"'」』】\s.:,;!?。、]*",
    re.IGNORECASE,
)
_ONLY_LETTERS = re.compile(r"[\W_]*[A-Za-z](?:(?:[\s,;/&+.、|()\[\]]|\band\b|\bor\b)+[A-Za-z])+[\W_]*")
_OTHER_LETTER = re.compile(
    rf"\s*[)\]]?\s*(?:[,/&+、|]|\bor\b|\band\b|\bas well as\b|或者?|和|与|及|还是)\s*"
    rf"(?:(?:and|or|maybe|perhaps|possibly|also|both|either)\s+)*(?:(?i:option|choice)\s+)?(?:{_WRAPPED}|(?<![A-Za-z0-9'-])(?P<bare>[A-Z])(?![A-Za-z0-9]|'\w|-\w|\s+[a-z]))"
)
# "E. coli": a full stop and a small letter continue a name, unless a sentence's small word begins an explanation.
_SPECIES = re.compile(
    r"\.\s*(?!(?:because|since|as|the|an?|this|it|its|there|these|in|on|based|due|given|which|that|for|and|or|not|is|are|if|"
    r"while|with|from|no|yes|i|we|you|so|but)\b)[a-z]{2,}"
)


def _letter(match: re.Match[str]) -> str:
    return match["wrapped"] or match["bare"]


_LISTED = r"(?:[(\[\"']?[A-Z][)\]\"']?\s*(?:,|/|\bor\b|\band\b|\bnor\b|、|和|与)\s*(?:and\s+|or\s+)?)*"
_REJECTED_BEFORE = re.compile(
    r"(?:\bnot|n't|\brul(?:e[sd]?|ing)\s+out|\bexclud\w*|\beliminat\w*|\breject\w*|\b(?:rather|other|likely)\s+than"
    r"|\binstead\s+of|\bunlike|\bexcept(?:\s+for)?|\b(?:anything|everything|all)\s+but|\bneither|\bnor|\bwrong|\bincorrect|\bavoid|不是|并非|不能?选|不应选|排除|而非|除了?|不为)"
    r"\s*(?:\b(?:an?|the|be|to|option|options|choice|choices|answer|answers|either|both|likely)\b|选项|[:(\[\"'\s])*" + _LISTED + r"[(\[\"'\s]*$",
    re.IGNORECASE,
)
_NOT = (
    r"(?:wrong|incorrect|false|unlikely|less\s+likely|ruled\s+out|excluded|eliminated|rejected|implausible|inconsistent|irrelevant"
    r"|out\b)"
)
_AUXILIARY = r"(?:is|are|was|were|seems?|looks?|appears?|can|could|would|should|may|might|must|do|does|did|has|have|been|be|to)"
_REJECTED_AFTER = re.compile(
    r"[)\]\"'.]*\s*(?:(?:,|/|\band|\bor|、|和)\s*(?:and\s+)?[(\[]?[A-Z][)\]]?\s*)*(?:选项|项)?\s*"
    rf"(?:(?:{_AUXILIARY}\s+(?:(?:both|all|also|very|clearly|definitely|therefore|an?|the|most|likely|be|{_AUXILIARY})\s+)*(?:not\b|never\b|{_NOT}))"
    rf"|(?:isn't|aren't|wasn't|weren't|doesn't|don't|didn't|can't|cannot|couldn't|wouldn't|shouldn't)|[-:]\s*{_NOT}"
    r"|(?:是|都|均|也)*(?:不对|不正确|不是|不符|不选|不成立|错|可以?排除|被?排除|并不|并非))",
    re.IGNORECASE,
)
_NEGATED_CLAUSE = re.compile(
    r"\b(?:not|never|cannot|neither|nor|unlikely|doubt|whether|if|wrong|incorrect|false|worst|least)\b|n't\b|不|并非|无法|没|是否|错误"
)
_CLAUSE_START = re.compile(r".*(?:[.;!?\n,。，；]|\bbut\b|\bhowever\b|\bso\b|\btherefore\b|\bthus\b|\bhence\b|\binstead\b)", re.DOTALL)


def _clause_before(text: str, position: int) -> str:
    """What stands before a position in its own clause, in small letters."""
    before = text[max(0, position - 120) : position].lower()
    start = _CLAUSE_START.match(before)
    return before[start.end() :] if start else before


# --- Statements ---------------------------------------------------------------------------------------------------

_BOXED = re.compile(r"(?:(?:\\|\x08)?b?oxed|\\fbox)\s*\{([^{}]*)\}")
_TAGGED = re.compile(r"<(answer|final_answer|final|choice|option)>(.*?)(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_FIELD = re.compile(
    r"[\"'](?:(?:final|correct|my|the|selected|predicted)[_ ]?)?(?:answer|choice|option|letter|selection|prediction|label)[\"']\s*:\s*"
    r"(?:\"([^\"]*)\"|'([^']*)'|\[([^\]]*)\]|([^\s,}\]]+))",
    re.IGNORECASE,
)

_BE = r"(?:is|was|(?:would|will|should|must|has\s+to|could|may|might)\s+(?:also\s+)?be|(?:seems?|appears?)\s+to\s+be)"
_HEDGE = (
    r"(?:(?:most\s+|very\s+)?(?:likely|probably|possibly)|clearly|definitely|indeed|obviously|therefore|thus|simply|actually|still|either|both"
    r"|between|as\s+follows|choice|option|options|letter|answer|number|the|that|选项|應?应?该?|可能|選項|項)"
)
_FILLING = re.compile(rf"(?:[\s:=*>-]|(?:{_HEDGE})(?![A-Za-z]))*", re.IGNORECASE)
_ANSWER = re.compile(
    r"\b(?:answers?|ans|(?:correct|right|best|final|my|appropriate|accurate|suitable|likely|chosen|selected|preferred)\s+(?:option|choice|one|response|selection|letter|letter\s+choice)"
    r"|(?:option|choice|selection|decision|conclusion|verdict|response)(?=\s*:|\s+is\s+[(\"']?[A-Za-z][)\"']?\s*(?:$|[.,;])))\b"
    rf"(?:\s+(?:to|for|of|here|among|from|in|based|given|that|choice|option|letter)\b[^.:\n]{{0,100}}?)?[\s\"')]*(?:,[^.,:\n]{{1,60}},\s*)?(?:{_BE}\b\s*:?|:|=+>?|-+>?\s|→|\.(?=\s*[A-Z]\b))"
    r"|(?:答案|正确的?选项|正確的?選項|正确的?选择|最佳选项)(?:应该?|应当|應該?|可能|就)?(?:是|为|為|选择?|選擇?|:|[】\])]?(?=\s*[(\[「]?[A-Z](?![A-Za-z])))",
    re.IGNORECASE,
)
# Statements after which only a letter counts, not a text.
_CHOSEN = re.compile(
    r"\b(?:choos(?:e|es|ing)|chose|chosen|pick(?:s|ed|ing)?|select(?:s|ed|ing)?|go(?:es|ing)?\s+(?:with|for)|opt(?:s|ed|ing)?\s+for|vote\s+for|settle\s+on|favou?r|prefer"
    r"|lean(?:s|ing)?\s+towards?|leaves?|leaving|(?:corresponds?|points?|refers?|equals?|matches)(?:\s+to)?(?=\s+(?:option|choice|answer)\b)|answered?\s+(?:with|is)?"
    r"|it'?s|(?:it|that|this|which|diagnosis|finding|conclusion)\s+is|(?:must|should|would|could|may|might|has\s+to)\s+(?:also\s+)?be|(?<!everything )(?<!anything )(?<!all )but|rather|instead|believe|think|say|guess|definitely|probably|clearly|obviously|answer(?=\s+[(\"']?[A-Z][)\"']?\s*(?:$|[.\n])))\b(?!\s+(?:than|of)\b)[\s,:]*"
    r"|(?:=+>|-+>|→)\s*|(?:我|应该?|应当|應該?|故|所以|因此|本题|本題|只能|综上)*(?<![不可能])(?:选择?(?!项)|選擇?(?!項))|(?<![不并可否还])(?:是|为|為)(?=\s*[(\"'「【]?[A-Z])",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|consequently|accordingly|finally|in\s+(?:conclusion|summary|short)|overall)\b|因此|所以|故|综上(?:所述)?|最终)\s*[,:]?\s*(?:it(?:'s|\s+is)\s+|i(?:'d| would)?\s+(?:choose|pick|select|go\s+with)\s+)?",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(
    r"\b(?:final(?:ly)?|so|therefore|thus|hence|consequently|accordingly|conclusion|summary|overall)\b|最终|最后|因此|所以|故|综上", re.IGNORECASE
)
_IS_RIGHT = re.compile(
    rf"(?:{_WRAPPED}|{_ALONE})\s*(?:(?:{_BE}|remains|seems|appears|looks|fits|matches)\s+(?:(?:the|to|be|clearly|definitely|most|more|only|likely|probably|indeed|therefore|thus|single|one|our|my)\s+)*"
    r"(?:correct|right|best|accurate|appropriate|true|answer|choice|option|suitable)\b|is\s*(?:\.\s|\.?$)|[:-]\s*(?:correct|right|true)\b|(?:选?项)?(?:是|为|為)?(?:最)?(?:正确|正確|对的|合适|合適))",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r".*(?:\b(?:wait|actually|correction|scratch\s+that|on\s+second\s+thoughts?|i\s+was\s+wrong|let\s+me\s+(?:correct|reconsider|re-?check)(?:\s+\w+)?)\b|等等|更正)[\s,.:!-]*",
    re.IGNORECASE | re.DOTALL,
)
def parse_choice(reply: str, options: Sequence[str], question: str = "") -> str | None:
    """The letter of the one option a reply chooses, or None where it chooses none, or two.

    The question matters for yes/no options only: "There is no fracture" is a No where just that was asked.
    """
    choices = _choices(tuple(options))
    claims = _claims(choices.echo.sub(" ", clean(reply)).strip(), choices, question)
    return claims.pop() if len(claims) == 1 else None


def _claims(text: str, choices: Choices, question: str) -> Claims:
    if not re.search(r"\w", text):
        return _whole(text, choices)
    corrected = _TAKEN_BACK.match(text)
    if corrected and (claims := _stated(text[corrected.end() :], choices)):
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


_QUESTION = re.compile(r"[吗呢][?。\s]*$")


def _implied(text: str, choices: Choices, question: str) -> Claims:
    """What the reply shows of its answer by the words it uses."""
    if _QUESTION.search(text) or (refuses(text) and not any(refuses(option) for option in choices.options)):
        return set()
    words = Words.of(text)
    if all(_too_short(option) for option in choices.texts.values()):
        return _said_letters(text, choices)
    if choices.yes_no:
        return _said_yes_or_no(words, choices) or _affirmed_or_denied(words, question, choices)
    return _texts(words, choices)


def _whole(text: str, choices: Choices) -> Claims:
    """A reply that is a letter, some letters, or an option's text, and nothing else."""
    only = _ONLY_LETTER.fullmatch(text)
    if only and choices.claim(only["letter"]):
        return {choices.claim(only["letter"])}
    words = Words.of(text).words
    if words and (same := {letter for letter, option in choices.texts.items() if option.words == words}):
        return set(same)
    if short := {letter for letter, option in choices.without_article.items() if option.words == words}:
        return set(short)
    if only:
        return {None}
    lead = _LEAD.match(text)
    if lead and choices.claim(_letter(lead)):
        own = choices.texts[_letter(lead).upper()].words
        if own and Words.of(text[lead.end() :]).words == own:
            return {choices.claim(_letter(lead))}
    if _ONLY_LETTERS.fullmatch(text):
        return {choices.claim(letter) for letter in re.findall(r"\b[A-Za-z]\b", text)}
    return set()


def enclosed(text: str) -> list[str]:
    """What stands in boxes, answer tags, or the answer fields of JSON: of the first kind that is there."""
    contents = [match[1] for match in _BOXED.finditer(text)] or [match[2] for match in _TAGGED.finditer(text)]
    return contents or [next(filter(None, match.groups()), "") for match in _FIELD.finditer(text)]


def _enclosed(text: str, choices: Choices) -> Claims:
    claims: Claims = set()
    for content in enclosed(text):
        claims |= _claims(clean(content), choices, "") or {None}
    return claims


def _marked(text: str, choices: Choices) -> Claims:
    """What "the answer is ..." and its like say; the final answer, where one is called that, overrides the others."""
    final: Claims = set()
    other: Claims = set()
    for marker in _ANSWER.finditer(text):
        before = _clause_before(text, marker.start())
        if _NEGATED_CLAUSE.search(before):
            continue
        sentence_start = text[max(0, marker.start() - 40) : marker.start()]
        concluding = _CONCLUDING.search(marker[0]) or _CONCLUDING.search(re.split(r"[.!?。\n]", sentence_start)[-1])
        (final if concluding else other).update(_answer_after(text, marker.end(), choices))
    for marker in _CONCLUDED.finditer(text):
        final |= _letters_after(text, marker.end(), choices)
    for marker in _CHOSEN.finditer(text):
        if not _NEGATED_CLAUSE.search(_clause_before(text, marker.start())):
            other |= _letters_after(text, marker.end(), choices)
    for match in _IS_RIGHT.finditer(text):
        before = text[: match.start()]
        if _ends_with_text(text[: match.end("wrapped" if match["wrapped"] else "bare")], choices):
            continue  # "hepatitis C is the answer"
        if not _NEGATED_CLAUSE.search(_clause_before(text, match.start())):
            other.add(choices.claim(_letter(match)))
            other |= _letters_before(before, choices)
    return final or other


_ANY_LETTER = re.compile(_LETTER)
_NEGATION_AHEAD = re.compile(r"\s*(?:not|n't|neither|never)\b|\s*不|\s*并非", re.IGNORECASE)


_ASKED = re.compile(r"[)\]\"']*\s*(?:\?|吗|呢)")


def _letters_after(text: str, position: int, choices: Choices) -> Claims:
    """The letter chosen at a position, and the letters and text that follow it as if chosen too."""
    if _is_text_with_letters(text[position:], choices):
        return set()
    start = _FILLING.match(text, position).end()
    match = _ANY_LETTER.match(text, start)
    if not match:
        return _letter_and_own_text(text[start:], choices)
    rest = text[match.end() :]
    if _ASKED.match(rest):
        return set()
    if match["bare"] and not _has_own_text(rest, _letter(match), choices):
        if _SPECIES.match(rest) or (match["bare"].islower() and re.match(r"\s+(?!because\b|since\b)\w", rest)):
            return set()
    if _rejected_after(rest, _letter(match), choices) or _REJECTED_BEFORE.search(text[:start]):
        return set()
    if match["bare"] and _is_text_with_letters(text[start:], choices):
        return set()
    return {choices.claim(_letter(match))} | _further(rest, _letter(match), choices)


def _is_text_with_letters(text: str, choices: Choices) -> bool:
    """Whether letters at the beginning belong to an option's text: "C. difficile colitis", "both A and B"."""
    stated = _prefix(Words.of(text[:_FAR]), choices.texts)
    if stated is None:
        return False
    words = choices.texts[stated].words
    return len(words) > 1 or (len(words[0]) == 1 and words[0].isalpha() and choices.claim(words[0]) is None)


def _letter_and_own_text(text: str, choices: Choices) -> Claims:
    """ "B Hepatitis C", without a sign between."""
    match = re.match(_ALONE, text)
    if not match or not (letter := choices.claim(match["bare"])):
        return set()
    return {letter} if match["bare"].isupper() and _has_own_text(text[match.end() :], letter, choices) else set()


def _rejected_after(rest: str, letter: str, choices: Choices) -> bool:
    """Whether what follows a letter rejects it; an option's text may itself begin with "cannot"."""
    return _REJECTED_AFTER.match(rest) is not None and not _has_own_text(rest, letter, choices)


def _has_own_text(rest: str, letter: str, choices: Choices) -> bool:
    """Whether what follows a letter begins with its option's text, and with no longer one."""
    own = choices.texts.get(letter.upper())
    stated = _prefix(Words.of(rest[:_FAR]), choices.texts)
    return own is not None and stated is not None and choices.texts[stated].words == own.words


def _further(rest: str, letter: str, choices: Choices) -> Claims:
    """What follows a chosen letter as if it were chosen too: "or C", or another option's text."""
    claims: Claims = set()
    if other := _OTHER_LETTER.match(rest):
        if not _REJECTED_AFTER.match(rest[other.end() :]):
            claims.add(choices.claim(_letter(other)))
        return claims
    stated = _prefix(Words.of(rest[:_FAR]), choices.texts) or _prefix(Words.of(rest[:_FAR]), choices.without_article)
    own = choices.texts.get(letter.upper())
    if stated and _denied(Words.of(rest[:_FAR]), 0, len(choices.texts[stated].words)):
        return claims
    if stated and own and choices.texts[stated].words != own.words and re.match(r"[\s.:,;)(\"'\]–—-]", rest):
        claims.add(stated)
    return claims


def _letters_before(before: str, choices: Choices) -> Claims:
    """The letter joined to the one that follows: "A and" before "B are right"."""
    match = re.search(rf"(?:{_WRAPPED}|{_ALONE})\s*(?:,|/|\band\b|\bor\b|和|与|、)\s*(?:option\s+)?[(\[\"']?$", before)
    if not match or _REJECTED_BEFORE.search(before[: match.start()]):
        return set()
    return {choices.claim(_letter(match))}


def _answer_after(text: str, position: int, choices: Choices) -> Claims:
    """What stands at a position where an answer is due: a letter, or an option's text in the rest of the sentence."""
    if negation := _NEGATION_AHEAD.match(text, position):
        turn = re.compile(r"[^.\n。]*?(?:\bbut\b|\brather\b(?!\s+than)|\binstead\b(?!\s+of)|而是)(?:\s+(?:rather|instead|it\s+is))?").match(
            text, negation.end()
        )
        return _answer_after(text, turn.end(), choices) if turn else set()
    if claims := _letters_after(text, position, choices):
        return claims
    rest = text[position : position + _FAR]
    words = Words.of(rest)
    if stated := _prefix(words, choices.texts) or _prefix(words, choices.without_article):
        after = Words(words.words, (*words.gaps[:-1], "."))
        sentence = _first_sentence(after, choices, stated)
        said = _said_yes_or_no(sentence, choices) if choices.yes_no else _texts(sentence, choices)
        return _same_text(stated, choices) | said
    if choices.yes_no:
        return _said_yes_or_no(_first_sentence(words, choices, None), choices)
    if re.match(r"\s*[A-Za-z]\s*[.)]?\s*$", rest):
        return {choices.claim(rest.strip(" .)"))}
    if refuses(rest):
        return set()
    return _texts(_first_sentence(words, choices, None), choices)


def _first_sentence(words: Words, choices: Choices, beginning: str | None) -> Words:
    """The words up to the first end of a sentence that is not inside an option's text."""
    start = len(choices.texts[beginning].words) if beginning else 1
    inside = {
        position
        for option in choices.texts.values()
        for begin in _spans(words, option)
        for position in range(begin + 1, begin + len(option.words))
    }
    for position in range(start, len(words.words)):
        if words.gaps[position] in STOPS and position not in inside:
            return Words(words.words[:position], (*words.gaps[:position], "."))
    return words


def _same_text(letter: str, choices: Choices) -> Claims:
    words = choices.texts[letter].words
    return {other for other, text in choices.texts.items() if text.words == words}


# --- A letter at the beginning, at the end, or named in passing -----------------------------------------------------

_LEAD = re.compile(
    rf"(?:(?:option|choice|选项)\s*)?(?:{_WRAPPED}|(?P<bare>[A-Za-z])(?![A-Za-z0-9]|'\w|-\w))"
    r"(?P<sign>\s*(?:[.:)\],、。]|-\s|[–—]|\n|(?=because\b|since\b|$|\(|(?:rather|instead|not|due|given|based)\b)))?",
    re.IGNORECASE,
)
_ENUMERATED = re.compile(r"(?:^|[.;\n])\s*[(\[]?([A-Z])(?:[)\]:]|\.(?!\s*[a-z]))|(?:^|[.;\n])\s*([A-Z])\s*(?=\.(?!\s*[a-z])|\n|$)")


def _leading(text: str, choices: Choices) -> Claims:
    """The letter a reply begins with, if what follows does not name another one, or yes or no."""
    if choices.yes_no and (answer := _leading_yes_or_no(Words.of(text), choices)):
        return answer
    match = _LEAD.match(text)
    if not match:
        return set()
    letter, rest = _letter(match).upper(), text[match.end() :]
    if not match["wrapped"]:
        article = letter in "AI" and rest[:1] == "(" and not re.match(r"\(\s*not\b", rest)
        if match["sign"] is None or article or (letter == "I" and match["sign"].strip() == ","):
            return _letter_and_own_text(text, choices)
        if _is_text_with_letters(text, choices):
            return set()
    own = choices.texts.get(letter)
    begins = _prefix(Words.of(rest[:_FAR]), choices.texts)
    if match["sign"] and match["sign"].strip() == "." and begins is None and _SPECIES.match("." + rest):
        return set()
    after = text[match.end("wrapped" if match["wrapped"] else "bare") :]
    answerer = match["sign"] and match["sign"].strip() == ":" and refuses(rest.splitlines()[0] if rest else "")
    if _rejected_after(after, letter, choices) or answerer:  # "A: I do not know"
        return set()
    claims: Claims = {choices.claim(letter)}
    if not (begins and own and choices.texts[begins].words == own.words):
        claims |= _further(after, letter, choices)
        # The joining sign may have been taken for the letter's own: "A, B".
        claims |= _further(" , " + rest, letter, choices) if match["sign"] and match["sign"].strip() in (",", "、") else set()
    own_text = clean(choices.options[choices.letters.index(letter)]) if own else ""
    stated = re.match(rf"\s*{re.escape(own_text)}", rest, re.IGNORECASE)
    return claims | _enumerated(rest[stated.end() :] if stated else rest, choices)


def _enumerated(rest: str, choices: Choices) -> Claims:
    """Other letters that stand as the first one does: at the beginning of a line or sentence, with a sign."""
    claims: Claims = set()
    for match in _ENUMERATED.finditer(rest):
        if not _REJECTED_AFTER.match(rest[match.end() :]):
            letter = match[1] or match[2]
            if choices.claim(letter):
                claims.add(letter)
    for letter, option in choices.texts.items():
        for match in re.finditer(rf"(?<![A-Za-z0-9'-])\(?{letter}[).:]\s", rest, re.IGNORECASE):
            if option.words and _has_own_text(rest[match.end() :], letter, choices):
                claims.add(letter)
    return claims


_LAST_LETTER = re.compile(rf"(?:^|[.!?。\n]\s*|\b(?:is|are|be)\b\s*:?\s*|[:=]\s*)(?:(?:option|choice)\s+)?(?:{_WRAPPED}|{_ALONE})[\s.!。)]*$", re.IGNORECASE)


def _trailing(text: str, choices: Choices) -> Claims:
    """The letter a reply ends with: alone in its last line or sentence, after "is", or with its option's text."""
    line = text.splitlines()[-1].strip()
    lead = _LEAD.match(line)
    if lead and (lead["wrapped"] or lead["sign"]) and "\n" in text:
        letter = choices.claim(_letter(lead))
        if letter and _has_own_text(line[lead.end() :], letter, choices):
            return {letter}
    last = None
    for last in _LAST_LETTER.finditer(text):
        pass
    if not last or _REJECTED_BEFORE.search(text[: last.start("wrapped") if last["wrapped"] else last.start("bare")]):
        return set()
    if last["bare"] and (_NOUN_BEFORE.search(text[: last.start("bare")]) or _ends_with_text(text[: last.end("bare")], choices)):
        return set()
    if _NEGATED_CLAUSE.search(_clause_before(text, last.start())):
        return set()
    return {choices.claim(_letter(last))} if choices.claim(_letter(last)) else set()


_NAMED = re.compile(rf"(?:\b(?:option|choice|answer)|选项|選項)\s*(?:{_WRAPPED}|{_ALONE})|[(\[\"'「【](?P<own>[A-Za-z])[)\]\"'」】]|(?<![A-Za-z0-9])(?P<cjk>[A-Z])(?=选?项|選項)", re.IGNORECASE)
_NOUN_BEFORE = re.compile(
    r"\b(?:vitamin|hepatitis|type|group|grade|class|stage|lead|factor|segment|zone|panel|fig|figure|image|arrow|label(?:l?ed)?|point|structure|region|part|picture|view|marker|blood|letter|area)s?\.?\s*[(\[\"']?$",
    re.IGNORECASE,
)


def _named(text: str, choices: Choices) -> Claims:
    """Options named by letter anywhere, "(B)" or "option B", and not rejected."""
    chosen: Claims = set()
    rejected: Claims = set()
    for match in _NAMED.finditer(text):
        group, letter = next((group, match[group]) for group in ("wrapped", "bare", "own", "cjk") if match[group])
        claim = choices.claim(letter)
        before, after = text[: match.start(group)], text[match.end(group) :]
        if claim is None or _ASKED.match(after) or _NOUN_BEFORE.search(text[: match.start()]) or (letter.islower() and group == "bare"):
            continue
        if _REJECTED_BEFORE.search(before) or _rejected_after(after, letter, choices):
            rejected.add(claim)
        else:
            chosen |= {claim} | _further(after, letter, choices)
            stated = _ends_with_text(before, choices)  # "pneumonia (B)"
            chosen |= {stated} if stated and choices.texts[stated].words != choices.texts[claim].words else set()
    return chosen - rejected


_IS_CJK = re.compile(f"[{CJK}]")

# --- Texts --------------------------------------------------------------------------------------------------------


def _spans(words: Words, option: Words) -> Iterator[int]:
    """Where an option's words stand in a text. A match runs over the end of a sentence only where the option does."""
    length = len(option.words)
    for start in range(len(words.words) - length + 1):
        if words.words[start : start + length] == option.words and all(
            words.gaps[start + inner] not in STOPS or option.gaps[inner] in STOPS for inner in range(1, length)
        ):
            yield start


def _prefix(words: Words, texts: dict[str, Words]) -> str | None:
    """The letter of the longest option text (the first of equal ones) that a text begins with, "the" apart."""
    if not words.words:
        return None
    skip = 1 if words.words[:1] == ("the",) else 0
    found = [
        (len(option.words), letter)
        for letter, option in texts.items()
        if option.words
        and not (_IS_CJK.fullmatch("".join(option.words)) and not _stands_apart(words, 0))
        and (words.words[: len(option.words)] == option.words or words.words[skip : skip + len(option.words)] == option.words)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _ends_with_text(text: str, choices: Choices) -> str | None:
    """The letter of the longest option text of several words, or of one word of several letters, that a text ends with."""
    words = Words.of(text[-_FAR:]).words
    found = [
        (len(option.words), letter)
        for letter, option in choices.texts.items()
        if option.words and words[-len(option.words) :] == option.words and not _too_short(option)
    ]
    return max(found)[1] if found else None


_NEGATORS = frozenset(
    "no not nothing without never neither nor cannot cant isnt arent wasnt werent doesnt dont didnt hasnt havent wouldnt couldnt shouldnt exclude excludes "
    "excluded excluding absent absence lack lacks lacking unlikely except denies non eliminate eliminates eliminated reject rejects "
    "rejected against".split()
)
_PAIRS = frozenset(
    [("rather", "than"), ("likely", "than"), ("other", "than"), ("instead", "of"), ("less", "likely"), ("negative", "for"), ("free", "of")]
    + [(rule, "out") for rule in ("rule", "rules", "ruled", "ruling")]
)
_BREAKERS = frozenset(
    "but however although though instead rather leaving leaves is are was were shows show showing suggests suggest indicates indicate represents represent "
    "demonstrates reveals has have so therefore thus hence because since consistent it this".split()
)
_DENIED_AFTER = re.compile(
    r"(?:(?:is|are|was|were|can|could|would|may|might|seems?|appears?|be|been|has|have|does|do|did|also|very|highly|therefore|clearly|an?) )*"
    r"(?:not|isnt|arent|wasnt|werent|doesnt|dont|didnt|cannot|cant|couldnt|unlikely|less likely|absent|excluded|ruled out|wrong|incorrect|false|never)\b"
)
_DENIED_BEFORE_CJK = re.compile(r"(?:不是|不存在|不支持|没有|沒有|未见|未見|无|無|非|排除|并非|否认|不像|除外|不考虑)[的是为有]?$")
_DENIED_AFTER_CJK = re.compile(r"(?:的?可能性(?:较|很)?小|是?不对|不正确|是?错|不是|不符|被排除|可以?排除|不成立|不支持|除外)")


def _denied(words: Words, start: int, end: int, inside: Collection[int] = ()) -> bool:
    """Whether the words from start to end are said not to be: "no evidence of ...", "... is ruled out".

    Words `inside` option texts do not negate what follows: "no fracture or fracture".
    """
    sentence_end = next(gap for gap in words.gaps[end:] if gap in STOPS)
    if sentence_end == "?":
        return True
    before = "".join(words.words[max(0, start - 6) : start])
    if _DENIED_BEFORE_CJK.search(before) or _DENIED_AFTER_CJK.match("".join(words.words[end : end + 6])):
        return True
    stop = next((i for i in range(end, len(words.words)) if words.gaps[i] in (*STOPS, ",")), len(words.words))
    if _DENIED_AFTER.match(" ".join(words.words[end:stop])):
        return True
    for position in range(start - 1, -1, -1):
        if words.gaps[position + 1] in STOPS:
            return False
        if position in inside:
            continue
        word = words.words[position]
        following = words.words[position + 1]
        if word in _NEGATORS or (word, following) in _PAIRS:
            return True
        if word == "unlike":
            return "," not in words.gaps[position + 1 : start + 1]
        if word in _BREAKERS:
            return position > 0 and words.gaps[position] == "" and words.words[position - 1] in _NEGATORS
    return False


_CONCLUDING_WORDS = re.compile(r"\b(?:therefore|thus|so|hence|conclusion|overall|most (?:likely|consistent)|suggests?|diagnosis|best)\b|因此|所以|故|综上")


def _texts(words: Words, choices: Choices) -> Claims:
    """The options whose text is said and not denied; of texts within one another, the longest."""
    found = _said(words, choices.texts) or _said(words, choices.without_article)
    asserted = {letter for _, _, letter, denied in found if not denied}
    if asserted & {letter for _, _, letter, denied in found if denied}:
        return {None}
    if len(asserted) > 1:
        # Reasoning weighs several options; its last sentence counts where it concludes.
        begin = max((i for i in range(len(words.words)) if words.gaps[i] in STOPS), default=0)
        sentence = " ".join(words.words[begin:])
        last = {letter for start, _, letter, denied in found if start >= begin and not denied}
        if begin and len(last) == 1 and (_CONCLUDING_WORDS.search(sentence) or _CONCLUDING_WORDS.search(sentence.replace(" ", ""))):
            return set(last)
    return set(asserted)


def _said(words: Words, texts: dict[str, Words]) -> list[tuple[int, int, str, bool]]:
    """(start, end, letter, denied) of the option texts in a text, without those inside longer ones."""
    spans = [
        (start, start + len(option.words), letter)
        for letter, option in texts.items()
        if option.words and not _too_short(option)
        for start in _spans(words, option)
        if len(option.words) > 1 or not _IS_CJK.match(option.words[0]) or _stands_apart(words, start)
    ]
    longest = [
        (start, end, letter)
        for start, end, letter in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    ]
    inside = {position for start, end, _ in longest for position in range(start, end)}
    return [(start, end, letter, _denied(words, start, end, inside)) for start, end, letter in longest]


def _stands_apart(words: Words, position: int) -> bool:
    """Whether the Chinese character at a position is joined to no other."""
    joined_before = position > 0 and not words.gaps[position] and _IS_CJK.match(words.words[position - 1])
    following = words.words[position + 1] if position + 1 < len(words.words) else ""
    return not joined_before and not (not words.gaps[position + 1] and _IS_CJK.match(following))


def _too_short(option: Words) -> bool:
    """Whether an option's text is a single letter, which stands in any sentence without being meant."""
    return len(option.words) == 1 and re.fullmatch(r"[a-z]", option.words[0]) is not None


def _said_letters(text: str, choices: Choices) -> Claims:
    """Of options that are letters themselves, those in a sentence that are neither article nor pronoun."""
    texts = {option.words[0]: letter for letter, option in choices.texts.items()}
    claims: Claims = set()
    for match in re.finditer(rf"{_ALONE}(?:\s+(?P<next>[a-z]+))?", text):
        small_word = match["next"] and match["next"] not in _NO_NOUNS
        rest = text[match.end("bare") :]
        rejected = (
            _REJECTED_BEFORE.search(text[: match.start()])
            or _REJECTED_AFTER.match(rest)
            or re.match(r"[^.!\n]*\?", rest)
            or _NEGATED_CLAUSE.search(_clause_before(text, match.start()))
        )
        if match["bare"].isupper() and not (match["bare"] in "AI" and small_word) and not rejected:
            claims.add(texts.get(match["bare"].lower()))
    return claims


# --- Yes and no -----------------------------------------------------------------------------------------------------

# No noun begins with these: a "no" or "A" before them is no determiner.
_NO_NOUNS = frozenset("in on at for from here because since as with according based by to of and or nor but so if when is are was were than".split())
_CLAUSE_BEGINNERS = frozenset("it there this that these those the i we they he she because since its theres".split())


def _yes_or_no_at(words: Words, position: int) -> str | None:
    """ "yes" or "no" where the word at a position is an answer; the "no" of "no other finding" is none."""
    word, after = words.words[position], words.gaps[position + 1]
    following = words.words[position + 1] if position + 1 < len(words.words) else ""
    if word == "yes":
        return "yes"
    if word in ("是", "否"):
        return _YES_NO_WORDS[word] if _stands_apart(words, position) and (position == 0 or words.gaps[position]) else None
    starts = position == 0 or words.gaps[position] != ""
    if word == "no" and (after or following in ("", *_NO_NOUNS) or (starts and following in (*_CLAUSE_BEGINNERS, "yes"))):
        return "no"
    return None


def _leading_yes_or_no(words: Words, choices: Choices) -> Claims:
    joined = "".join(words.words[:4])
    for word in ("不是", "没有", "是的", "是", "否", "有"):
        alone = words.gaps[len(word)] if len(words.gaps) > len(word) else ""
        if joined.startswith(word) and alone:
            return {choices.yes_no["no" if word in ("不是", "没有", "否") else "yes"]}
    if words.words and _yes_or_no_at(words, 0):
        return _said_yes_or_no(words, choices)
    return set()


def said_yes_or_no(text: str) -> str | None:
    """ "yes" or "no", where a cleaned text says one of them and not the other."""
    claims = _claims(text, _choices(("yes", "no")), "")
    return {"A": "yes", "B": "no"}.get(next(iter(claims)) or "") if len(claims) == 1 else None


def _said_yes_or_no(words: Words, choices: Choices) -> Claims:
    if re.search(r"\b(?:yes(?: or| and|/) no|no(?: or| and|/) yes)\b", words.joined):
        return {None}
    answers = {_yes_or_no_at(words, position) for position in range(len(words.words))} - {None}
    return {choices.yes_no[answer] for answer in answers if answer}


_ASKS = re.compile(r"\s*(?:is|are|was|were|do|does|did|has|have|can|could)\b", re.IGNORECASE)
_EMPTY_WORDS = frozenset(
    "is are was were do does did has have can could be been there a an the any this that these those it in on of at to from for with by and "
    "evidence sign signs image images picture scan seen see show shows shown showing visible present identified detected noted observed here patient "
    "patients patient's no not without absent absence isnt arent doesnt dont cannot".split()
)
_DENYING = frozenset("no not without absent absence isnt arent doesnt dont".split())


def _affirmed_or_denied(words: Words, question: str, choices: Choices) -> Claims:
    """One sentence that says, or denies, all that was asked: "There is no fracture" to "Is there a fracture?"."""
    asked = Words.of(clean(question)).words
    subject = set(asked) - _EMPTY_WORDS
    if not _ASKS.match(question) or not subject or {"or", "not", "no"} & set(asked) or not STOPS.isdisjoint(words.gaps[1:-1]):
        return set()
    said = set(words.words)
    if not subject <= said or len(said - _EMPTY_WORDS - subject) > 2 or {"but", "unclear", "possible", "maybe"} & said:
        return set()
    denials = sum(word in _DENYING for word in words.words)
    return {choices.yes_no["no" if denials else "yes"]} if denials <= 1 else set()
