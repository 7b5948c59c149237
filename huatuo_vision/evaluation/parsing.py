"""Our own reading of multiple-choice replies: which option one chooses. No torch here.

A reply is read from its clearest statement down: the reply as a whole, what stands in a box or in an answer field,
what a final answer says, what any other answer says, a letter at its beginning or end, an option named in passing,
an option's text. The first kind of statement that is there decides; where it names two options, or one that does not
exist, the reply is unparsed. A letter or text counts where it is chosen, not where it is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from huatuo_vision.evaluation.choices import Choices, choices_of, denied, stands_apart
from huatuo_vision.evaluation.words import BREAKS, CJK, KANA_HANGUL, STOPS, Words, any_of, clean, refuses

# What a statement names: letters, or None for an option that does not exist.
Claims = set[str | None]


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


def _implied(text: str, choices: Choices, question: str) -> Claims:
    """What the words of the reply say without calling it an answer."""
    if _ENDS_ASKING.search(text) or (refuses(text) and not any(map(refuses, choices.options))):
        return set()
    words = Words.of(text)
    if choices.are_letters:
        return _letters_said(text, choices)
    if choices.yes_no:
        return _yes_or_no(words, choices) or _affirmed_or_denied(words, question, choices)
    return _texts_said(words, choices)


# --- Letters ------------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = r"[(\[{<\"'「『【]", r"[)\]}>\"'」』】]"
_WRAPPED = rf"{_OPEN}{{1,3}}\s?(?P<wrapped>[A-Za-z])\s?{_CLOSE}{{1,3}}"
_BARE = r"(?<![A-Za-z0-9'-])(?P<bare>[A-Za-z])(?![A-Za-z0-9]|'\w|-\w)"
_ANY_LETTER = rf"(?:{_WRAPPED}|{_BARE})"
# A bare letter is a choice where its clause ends behind it: no article before a noun, no pronoun, no "B cell".
_CLAUSE_ENDS = (
    rf"(?=[ \t]*\n|\s*(?:$|[.,;:!?)\]}}\"'。/&+、|]|-\s|[–—]|[{CJK}{KANA_HANGUL}]"
    r"|\b(?:because|since|as|due|which|based|given|for|with|from|or|and|in|on|not|rather|instead|over|is|was|but)\b"
    r"|\bto\s+(?:option\s+)?[A-Z]\b))"
)
_CHOSEN_LETTER = re.compile(rf"(?:{_WRAPPED}|{_BARE}{_CLAUSE_ENDS})")
_JOINED = any_of("[,/&+、|]", r"\bor\b", r"\band\b", r"\bas well as\b", "或者?", "和", "与", "及", "还是")
_OTHER_LETTER = re.compile(
    rf"\s*{_CLOSE}*\s*{_JOINED}\s*(?:(?:and|or|maybe|perhaps|possibly|also|both|either)\s+)*(?:(?i:option|choice)\s+)?"
    rf"(?:{_WRAPPED}|(?<![A-Za-z0-9'-])(?P<bare>[A-Z])(?![A-Za-z0-9]|'\w|-\w|\s+[a-z]))"
)
_LETTER_BEFORE = re.compile(rf"{_ANY_LETTER}\s*(?:,|/|\band\b|\bor\b|和|与|、)\s*(?:option\s+)?[(\[\"']?$")
# "E. coli": a full stop and a small letter continue a name, unless a sentence's small word begins an explanation.
_NAME_GOES_ON = re.compile(
    r"\.\s*(?!(?:because|since|as|the|an?|this|it|its|there|these|in|on|based|due|given|which|that|for|and|or|not|is|are"
    r"|if|while|with|from|no|yes|i|we|you|so|but)\b)[a-z]{2,}"
    r"|\.\s*[A-Z]\.\s+[a-z]"  # initials
)
# "vitamin B", "figure (A)": these letters are names.
_NAMED_BY_LETTER = re.compile(
    r"\b(?:vitamin|hepatitis|type|group|grade|class|stage|lead|factor|segment|zone|panel|fig|figure|image|arrow"
    r"|label(?:l?ed)?|point|structure|region|part|picture|view|marker|blood|letter|area)s?\.?\s*[(\[\"']?$",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[)\]\"']*\s*(?:\?|吗|呢)")
_ENDS_ASKING = re.compile(r"[吗呢][?。\s]*$")


def _letter(match: re.Match[str]) -> str:
    return match["wrapped"] or match["bare"]


def _start(match: re.Match[str]) -> int:
    """Where the letter itself stands."""
    return match.start("wrapped" if match["wrapped"] else "bare")


# --- Rejection of letters -------------------------------------------------------------------------------------------

_LISTED = r"(?:[(\[\"']?[A-Z][)\]\"']?\s*(?:,|/|\bor\b|\band\b|\bnor\b|、|和|与)\s*(?:and\s+|or\s+)?)*"
_REJECTED_BEFORE = re.compile(
    any_of(
        *(r"\bnot", "n't", r"\bneither", r"\bnor", r"\bwrong", r"\bincorrect", r"\bavoid", r"\bunlike"),
        *(r"\brul(?:e[sd]?|ing)\s+out", r"\bexclud\w*", r"\beliminat\w*", r"\breject\w*", r"\bexcept(?:\s+for)?"),
        *(r"\b(?:rather|other|likely)\s+than", r"\binstead\s+of", r"\b(?:anything|everything|all)\s+but"),
        *("不是", "并非", "不能?选", "不应选", "排除", "而非", "除了?", "不为"),
    )
    + r"\s*(?:\b(?:an?|the|be|to|options?|choices?|answers?|either|both|likely)\b|选项|[:(\[\"'\s])*"
    + rf"{_LISTED}[(\[\"'\s]*$",
    re.IGNORECASE,
)
_FALSE = any_of(
    *(
        "wrong",
        "incorrect",
        "false",
        "unlikely",
        r"less\s+likely",
        r"ruled\s+out",
        "excluded",
        "eliminated",
        "rejected",
    ),
    *("implausible", "inconsistent", "irrelevant", r"out\b"),
)
_AUXILIARY = any_of(
    *("is", "are", "was", "were", "seems?", "looks?", "appears?", "can", "could", "would", "should", "may", "might"),
    *("must", "do", "does", "did", "has", "have", "been", "be", "to"),
)
# "A, C and D are wrong" rejects all of them, "B, A is wrong" only the last.
_ONE_ALONE = r",\s*[(\[]?[A-Z][)\]]?\s*(?:选项|项)?\s*(?:(?:is|was|does|seems|looks|appears|has)(?:n't)?\b|[是不错被可并])"
_REJECTED_AFTER = re.compile(
    rf"(?!{_ONE_ALONE})"
    r"[)\]\"'.]*\s*(?:(?:,|/|\band|\bor|、|和)\s*(?:and\s+)?[(\[]?[A-Z][)\]]?\s*)*(?:选项|项)?\s*"
    + any_of(
        rf"{_AUXILIARY}\s+(?:(?:both|all|also|very|clearly|definitely|therefore|an?|the|most|likely|{_AUXILIARY})\s+)*"
        rf"(?:not\b|never\b|{_FALSE})",
        "(?:is|are|was|were|does|do|did|ca|could|would|should)n't|cannot",
        rf"[-:]\s*{_FALSE}",
        "(?:是|都|均|也)*(?:不对|不正确|不是|不符|不选|不成立|错|可以?排除|被?排除|并不|并非)",
    ),
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|never|cannot|neither|nor|unlikely|doubt|whether|if|wrong|incorrect|false|worst|least)\b|n't\b"
    "|不|并非|无法|没|是否|错误"
)
_CLAUSE_BEGINS = re.compile(
    r".*(?:[.;!?\n,。，；]|\bbut\b|\bhowever\b|\bso\b|\btherefore\b|\bthus\b|\bhence\b|\binstead\b)", re.DOTALL
)


def _before(text: str, position: int) -> str:
    """What stands before a position, as far back as one looks for what bears on a letter."""
    return text[max(0, position - 120) : position]


def _rejected_before(text: str, position: int) -> bool:
    """Whether what stands before a letter rejects it: "not", "unlike A and"."""
    return _REJECTED_BEFORE.search(_before(text, position)) is not None


def _in_negated_clause(text: str, position: int) -> bool:
    """Whether what stands before a position in its own clause denies or doubts it: "I don't think the answer ..."."""
    before = _before(text, position).lower()
    clause = _CLAUSE_BEGINS.match(before)
    return _NEGATED.search(before, clause.end() if clause else 0) is not None


def _rejected_after(rest: str, letter: str, choices: Choices) -> bool:
    """Whether what follows a letter rejects it; an option's text may itself begin with "cannot"."""
    return _REJECTED_AFTER.match(rest) is not None and not choices.begins_with_text_of(letter, rest)


# --- The whole reply ------------------------------------------------------------------------------------------------

_ONLY_LETTER = re.compile(
    rf"(?:(?:option|choice|选项|選項)\s*)?(?:{_OPEN}|\s)*(?P<letter>[A-Za-z])\s*(?:选项|選項|项|項)?"
    rf"(?:{_CLOSE}|[\s.:,;!?。、])*",
    re.IGNORECASE,
)
_ONLY_LETTERS = re.compile(r"(?s:(?!.*[✓✔✅☑✗✘❌❎✖]))[\W_]*[A-Za-z](?:(?:[\W_]|\band\b|\bor\b)+[A-Za-z])+[\W_]*")


def _whole(text: str, choices: Choices) -> Claims:
    """A reply that is a letter, an option's text, both, or some letters, and nothing else."""
    only = _ONLY_LETTER.fullmatch(text)
    if only and choices.claim(only["letter"]):
        return {choices.claim(only["letter"])}
    words = Words.of(text).words
    if choices.yes_no and (answer := _ALONE.get(" ".join(words))):
        return {choices.yes_no[answer]}
    for texts in (choices.texts, choices.without_article):
        if same := {letter for letter, option in texts.items() if words and option.words == words}:
            return set(same)
    if only:
        return {None}
    lead = _LEAD.match(text)
    if lead and (letter := choices.claim(_letter(lead))):
        own = choices.texts[letter].words
        if own and Words.of(text[lead.end() :]).words == own:
            return {letter}
    if _ONLY_LETTERS.fullmatch(text):
        return {choices.claim(letter) for letter in re.findall(r"\b[A-Za-z]\b", text)}
    return set()


# --- Boxes and fields -----------------------------------------------------------------------------------------------

# A lost escape leaves a backspace of "\b".
_BOXED = re.compile(r"(?:(?:\\|\x08)?b?oxed|\\fbox)\s*\{([^{}]*)\}")
_TAGGED = re.compile(
    any_of(
        *(
            rf"[<\[]{tag}[>\]]((?:(?![<\[]/?{tag}[>\]]).)*)"
            for tag in ("answer", "final_answer", "final", "choice", "option")
        )
    ),
    re.DOTALL | re.IGNORECASE,
)
_FIELD = re.compile(
    r"[\"'](?:(?:final|correct|my|the|selected|predicted)[_ ]?)?"
    r"(?:answer|choice|option|letter|selection|prediction|label)[\"']\s*:\s*"
    r"(?:\"([^\"]*)\"|'([^']*)'|\[([^\]]*)\]|\{([^{}]*)\}|([^\s,}\]]+))",
    re.IGNORECASE,
)


def enclosed(text: str) -> list[str]:
    """What stands in boxes, answer tags, or the answer fields of JSON: of the first kind that is there."""
    found = next(filter(None, (list(kind.finditer(text)) for kind in (_BOXED, _TAGGED, _FIELD))), [])
    final = [match for match in found if _IS_FINAL.search(_sentence_before(text, match.start()))]
    return [next(filter(None, match.groups()), "") for match in (final or found)]


def _enclosed(text: str, choices: Choices) -> Claims:
    claims: Claims = set()
    for content in enclosed(text):
        claims |= _claims(clean(content), choices) or {None}
    return claims


# --- Answers that are called answers ----------------------------------------------------------------------------------

_BE = any_of(
    *("is", "was", r"(?:would|will|should|must|has\s+to|could|may|might)\s+(?:also\s+)?be"),
    r"(?:seems?|appears?)\s+to\s+be",
)
# Before a letter that is an answer: "is most likely option ...".
_FILLING = re.compile(
    r"(?:[\s:=*>-]|"
    + any_of(
        *(r"(?:most\s+|very\s+)?(?:likely|probably|possibly)", "clearly", "definitely", "indeed", "obviously"),
        *("therefore", "thus", "simply", "actually", "still", "either", "both", "between", r"as\s+follows"),
        *("choice", "options?", "letter", "answer", "number", "the", "that", "选项", "選項", "應?应?该?", "可能"),
    )
    + "(?![A-Za-z]))*",
    re.IGNORECASE,
)
_ONE_LETTER_AHEAD = r"[(\"']?[A-Za-z][)\"']?\s*(?:$|[.,;\n])"
_ANSWER = re.compile(
    r"\b"
    + any_of(
        "answers?|ans",
        r"(?:correct|right|best|final|my|appropriate|accurate|suitable|likely|chosen|selected|preferred)\s+"
        r"(?:option|choice|one|response|selection|letter|letter\s+choice)",
        rf"(?:option|choice|selection|decision|conclusion|verdict|response)(?=\s*:|\s+is\s+{_ONE_LETTER_AHEAD})",
    )
    + r"\b(?:\s+(?:to|for|of|here|among|from|in|based|given|that|choice|option|letter)\b[^.:\n]{0,100}?)?"
    + r"[\s\"')]*(?:,[^.,:\n]{1,60},\s*)?"
    + any_of(rf"{_BE}\b\s*:?", ":", "=+>?", r"-+>?\s", "→", r"\.(?=\s*[A-Z]\b)")
    + r"|(?:respuesta|réponse|antwort|resposta)\b[^.:\n]{0,30}?\s(?:es|est|ist|é)\s+|(?:答え|正解)は\s*|정답은\s*"
    + r"|(?:答案|正确的?选项|正確的?選項|正确的?选择|最佳选项)(?:应该?|应当|應該?|可能|就)?"
    + r"(?:是|为|為|选择?|選擇?|:|[】\])]?(?=\s*[(\[「]?[A-Z](?![A-Za-z])))",
    re.IGNORECASE,
)
# After these a letter counts, a text does not.
_CHOOSING = re.compile(
    r"\b"
    + any_of(
        *(
            "choos(?:e|es|ing)",
            "chose",
            "chosen",
            "pick(?:s|ed|ing)?",
            "select(?:s|ed|ing)?",
            r"go(?:es|ing)?\s+(?:with|for)",
        ),
        *(r"opt(?:s|ed|ing)?\s+for", r"vote\s+for", r"settle\s+on", "favou?r", "prefer", r"lean(?:s|ing)?\s+towards?"),
        *("leaves?", "leaving", r"answered?\s+(?:with|is)?", "believe", "think", "say", "guess"),
        r"(?:corresponds?|points?|refers?|equals?|matches)(?:\s+to)?(?=\s+(?:option|choice|answer)\b)",
        *("it'?s", r"(?:it|that|this|which|diagnosis|finding|conclusion)\s+is"),
        r"(?:must|should|would|could|may|might|has\s+to)\s+(?:also\s+)?be",
        *(
            "(?<!everything )(?<!anything )(?<!all )but",
            "rather",
            "instead",
            "definitely",
            "probably",
            "possibly",
            "perhaps",
            "maybe",
            "likely",
            "clearly",
            "obviously",
        ),
        *(r"(?:looks?|seems?)\s+like", r"in\s+favou?r\s+of"),
        rf"answer(?=\s+{_ONE_LETTER_AHEAD})",
    )
    + r"\b(?!\s+(?:than|of)\b)[\s,:]*"
    + r"|(?:=+>|-+>|→)\s*"
    + "|(?<![不可能])(?:选择?(?!项)|選擇?(?!項))"
    + r"|(?<![不并可否还])(?:是|为|為)(?=\s*[(\"'「【]?[A-Z])",
    re.IGNORECASE,
)
_CONTRASTS = re.compile(r"but\b|rather\b|instead\b", re.IGNORECASE)
_CONCLUSION = any_of(
    r"\b(?:so|therefore|thus|hence|consequently|accordingly|finally|in\s+(?:conclusion|summary|short)|overall)\b",
    *("因此", "所以", "故", "综上(?:所述)?", "最终"),
)
_CONCLUDING = re.compile(
    rf"{_CONCLUSION}\s*[,:]?\s*(?:it(?:'s|\s+is)\s+|i(?:'d| would)?\s+(?:choose|pick|select|go\s+with)\s+)?",
    re.IGNORECASE,
)
_IS_FINAL = re.compile(rf"{_CONCLUSION}|\b(?:final|conclusion|summary)\b|最后", re.IGNORECASE)
_IS_RIGHT = re.compile(
    _ANY_LETTER
    + r"\s*"
    + any_of(
        rf"(?:{_BE}|remains|seems|appears|looks|fits|matches)\s+"
        r"(?:(?:the|to|be|clearly|definitely|most|more|only|likely|probably|indeed|therefore|thus|single|one|our|my)\s+)*"
        r"(?:correct|right|best|better|accurate|appropriate|true|answer|choice|option|suitable|(?<=more )likely)\b",
        r"is\s*(?:\.\s|\.?$)",
        r"[:-]\s*(?:correct|right|true)\b",
        "(?:选?项)?(?:是|为|為)?(?:最)?(?:正确|正確|对(?![于比应称照])|符合|合适|合適)",
    ),
    re.IGNORECASE,
)
# "Only B fits", "everything except B is wrong".
_SINGLED_OUT = re.compile(
    any_of(
        r"\bonly\s+",
        r"\b(?:everything|anything|all|each)(?:\s+(?:of|the|other|options?|choices?|answers?))*\s+"
        r"(?:except(?:\s+for)?|but|besides|other\s+than)\s+",
    )
    + rf"(?:the\s+)?(?:(?:options?|choices?|answers?)\s+)?{_ANY_LETTER}\s+"
    + any_of(rf"(?:is|are|can\s+be|must\s+be)\s+(?:clearly\s+|definitely\s+)?{_FALSE}", "fits?", "match(?:es)?", "remains?"),
    re.IGNORECASE,
)
# A verdict on each option: "A: no. B: yes.", "A) Pneumonia ✗".
_ITEM = re.compile(rf"(?:^|[.;,\n])\s*(?:(?:option|choice)\s+)?{_ANY_LETTER}\s*[.:)\]-]?(?P<rest>[^.;\n]*)", re.IGNORECASE)
_ITEM_VERDICT = re.compile(
    r"[\s:–—|,(-]*(?:(?P<right>yes|correct|right|true|✓|✔|✅|☑)|no|not\b|wrong|incorrect|false|✗|✘|❌|❎|✖|×)",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r".*(?:\b(?:wait|actually|correction|scratch\s+that|on\s+second\s+thoughts?|i\s+was\s+wrong"
    r"|let\s+me\s+(?:correct|reconsider|re-?check)(?:\s+\w+)?)\b|等等|更正)[\s,.:!-]*",
    re.IGNORECASE | re.DOTALL,
)
_NEGATION_AHEAD = re.compile(r"\s*(?:(?:not|n't|neither|never)\b|不|并非)", re.IGNORECASE)
_BUT = re.compile(
    r"[^.\n。]*?(?:\bbut\b|\brather\b(?!\s+than)|\binstead\b(?!\s+of)|而是)(?:\s+(?:rather|instead|it\s+is))?",
    re.IGNORECASE,
)


def _marked(text: str, choices: Choices) -> Claims:
    """What "the answer is ..." and its like say; the final answer, where one is called that, overrides the others."""
    final: Claims = set()
    other: Claims = set()
    labelled: Claims = set()
    for marker in _ANSWER.finditer(text):
        if not _in_negated_clause(text, marker.start()):
            kind = final if _is_final(text, marker) else labelled if _is_label(text, marker) else other
            kind |= _answer_at(text, marker.end(), choices)
    # "It could be A or B at first sight. Answer: D": a label after considerations is final; one at the start is not.
    if not _ANSWER.match(text) or len(labelled) > 1:
        final |= labelled
    other |= labelled
    for marker in _CONCLUDING.finditer(text):
        final |= _letters_at(text, marker.end(), choices)
    said_until = 0
    for marker in _CHOOSING.finditer(text):
        if _CONTRASTS.match(marker[0]) or not _in_negated_clause(text, marker.start()):
            chosen = _letters_at(text, marker.end(), choices)
            # "It is either A or B. I choose B."
            decides = chosen and chosen < other and re.search(r"[.!?。\n]", text[said_until : marker.start()])
            other = chosen if decides else other | chosen
            said_until = marker.end() if chosen else said_until
    for match in _IS_RIGHT.finditer(text):
        belongs_to_text = choices.ends(text[: _start(match) + 1])  # "hepatitis C is correct"
        if not belongs_to_text and not _in_negated_clause(text, match.start()) and not _is_hypothetical(text, match):
            other |= {choices.claim(_letter(match))} | _letter_before(text, match.start(), choices)
    other |= {choices.claim(_letter(match)) for match in _SINGLED_OUT.finditer(text)}
    return final or other | _itemised(text, choices)


def _itemised(text: str, choices: Choices) -> Claims:
    """The options called right by a reply that calls each of them right or wrong."""
    verdicts: dict[str, bool] = {}
    for item in _ITEM.finditer(text):
        letter = choices.claim(_letter(item))
        if letter is None or choices.yes_no:
            continue
        own = re.match(rf"\s*{re.escape(choices.cleaned[letter])}", item["rest"], re.IGNORECASE)
        if verdict := _ITEM_VERDICT.match(item["rest"], own.end() if own else 0):
            verdicts[letter] = verdict["right"] is not None
    return {letter for letter, right in verdicts.items() if right} if len(verdicts) > 1 else set()


def _is_hypothetical(text: str, match: re.Match[str]) -> bool:
    """ "If it were sharp, A would be the answer"."""
    return "would" in match[0] and re.search(r"\bif\b", _sentence_before(text, match.start(), 120), re.IGNORECASE) is not None


def _sentence_before(text: str, position: int, reach: int = 40) -> str:
    return re.split(r"[.!?。\n]", text[max(0, position - reach) : position])[-1]


def _is_final(text: str, marker: re.Match[str]) -> bool:
    return _IS_FINAL.search(_sentence_before(text, marker.start()) + marker[0]) is not None


def _is_label(text: str, marker: re.Match[str]) -> bool:
    """Whether a marker with a colon begins a sentence: "Answer:"."""
    return marker[0].rstrip().endswith(":") and not re.search(r"\w", _sentence_before(text, marker.start()))


def _answer_at(text: str, position: int, choices: Choices) -> Claims:
    """What stands where an answer is due: a letter, or an option's text in the rest of the sentence."""
    if negation := _NEGATION_AHEAD.match(text, position):
        turn = _BUT.match(text, negation.end())
        return _answer_at(text, turn.end(), choices) if turn else set()
    if claims := _letters_at(text, position, choices):
        return claims
    rest = text[position:]
    sentence = choices.first_sentence(rest)
    said = _yes_or_no(sentence, choices) if choices.yes_no else _texts_said(sentence, choices)
    if stated := choices.begins_loosely(rest):
        return choices.same_text(stated) | said
    if beyond := re.fullmatch(r"\s*([A-Za-z])\s*[.)]?\s*", rest):
        return {choices.claim(beyond[1])}
    return set() if refuses(rest) else said


def _letters_at(text: str, position: int, choices: Choices) -> Claims:
    """The letter chosen at a position, and the letters and text that follow it as if chosen too."""
    if _begins_with_lettered_text(text[position:], choices):
        return set()
    filling = _FILLING.match(text, position)
    start = filling.end() if filling else position
    match = _CHOSEN_LETTER.match(text, start)
    if not match:
        return _letter_and_own_text(text[start:], choices)
    letter, rest = _letter(match), text[match.end() :]
    if match["bare"] and (
        _begins_with_lettered_text(text[start:], choices) or _is_part_of_a_name(match, rest, choices)
    ):
        return set()
    if _ASKED.match(rest) or _rejected_after(rest, letter, choices) or _rejected_before(text, start):
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
    return _NAME_GOES_ON.match(rest) is not None or bool(small)


def _letter_and_own_text(text: str, choices: Choices) -> Claims:
    """ "B Hepatitis C", without a sign between."""
    match = re.match(_BARE, text)
    if not match or not match["bare"].isupper() or not choices.begins_with_text_of(match["bare"], text[match.end() :]):
        return set()
    return {choices.claim(match["bare"])}


def _further(rest: str, letter: str, choices: Choices) -> Claims:
    """What follows a chosen letter as if it were chosen too: "or C", or another option's text."""
    if other := _OTHER_LETTER.match(rest):
        return set() if _REJECTED_AFTER.match(rest[other.end() :]) else {choices.claim(_letter(other))}
    stated = choices.begins_loosely(rest)
    if not stated or not choices.claim(letter) or letter.upper() in choices.same_text(stated):
        return set()
    words = choices.first_sentence(rest)
    apart = re.match(r"[\s.:,;)(\"'\]–—-]", rest)
    return {stated} if apart and not denied(words, 0, len(choices.texts[stated].words)) else set()


def _letter_before(text: str, position: int, choices: Choices) -> Claims:
    """The letter joined to one that follows: "A and" before "B are right"."""
    before = _before(text, position)
    match = _LETTER_BEFORE.search(before)
    return {choices.claim(_letter(match))} if match and not _rejected_before(before, match.start()) else set()


# --- A letter at the beginning, at the end, or named in passing -----------------------------------------------------

_LEAD = re.compile(
    rf"(?:(?:option|choice|选项)\s*)?{_ANY_LETTER}"
    r"(?P<sign>\s*(?:[.:)\],、。]|-\s|[–—]|\n|(?=because\b|since\b|$|\(|(?:rather|instead|not|due|given|based)\b)))?",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(
    r"(?:^|[.;\n])\s*(?:[(\[]?(?P<signed>[A-Z])(?:[)\]:]|\.(?!\s*[a-z]))|(?P<alone>[A-Z])\s*(?=\.(?!\s*[a-z])|\n|$))"
)
# A letter that is a paragraph of its own is an answer; what follows may explain the other options one by one.
_EXPLAINED = re.compile(r"[(\[]?[A-Za-z][.:)\]]*[ \t]*\n\s*\n(?!(?s:.*)(?m:^)[ \t]*\(?[A-Z][.)]?[ \t]*(?m:$))")
_LAST_LETTER = re.compile(
    rf"(?:^|[.!?。\n]\s*|\b(?:is|are|be)\b\s*:?\s*|[:=]\s*)(?:(?:option|choice)\s+)?{_ANY_LETTER}[\s.!。)]*$",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"(?:\b(?:option|choice|answer)|选项|選項)\s*{_ANY_LETTER}|{_OPEN}(?P<own>[A-Za-z]){_CLOSE}"
    "|(?<![A-Za-z0-9])(?P<cjk>[A-Z])(?=选?项|選項)",
    re.IGNORECASE,
)


def _leading(text: str, choices: Choices) -> Claims:
    """The letter a reply begins with, if what follows does not name another one, or yes or no."""
    if choices.yes_no and (answer := _leading_yes_or_no(Words.of(text), choices)):
        return answer
    match = _LEAD.match(text)
    if not match:
        return set()
    letter, sign, rest = _letter(match).upper(), (match["sign"] or "").strip(), text[match.end() :]
    if match["bare"]:
        article = letter in "AI" and (rest[:1] == "(" and not re.match(r"\(\s*not\b", rest))
        if match["sign"] is None or article or (letter == "I" and sign == ","):
            return _letter_and_own_text(text, choices)
        if _begins_with_lettered_text(text, choices):
            return set()
    if sign == "." and not choices.begins(rest) and _NAME_GOES_ON.match(f".{rest}"):
        return set()
    after = text[_start(match) + 1 :]
    speaker = sign == ":" and refuses(rest.partition("\n")[0])  # "A: I do not know"
    if speaker or _rejected_after(after, letter, choices):
        return set()
    claims: Claims = {choices.claim(letter)}
    if _EXPLAINED.match(text):
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
        for match in _LIST_ITEM.finditer(rest)
        if not _REJECTED_AFTER.match(rest[match.end() :])
    }
    for match in re.finditer(r"(?<![A-Za-z0-9'-])\(?([A-Za-z])[).:]\s", rest):
        if choices.begins_with_text_of(match[1], rest[match.end() :]):
            claims.add(choices.claim(match[1]))
    return claims - {None}


def _trailing(text: str, choices: Choices) -> Claims:
    """The letter a reply ends with: alone in its last line or sentence, after "is", or with its option's text."""
    line = text.rpartition("\n")[2].strip()
    lead = _LEAD.match(line)
    if lead and (lead["wrapped"] or lead["sign"]) and choices.begins_with_text_of(_letter(lead), line[lead.end() :]):
        return set() if line == text or _EXPLAINED.match(text) else {choices.claim(_letter(lead))}
    last = next(iter(_LAST_LETTER.finditer(text)), None)
    if not last or _rejected_before(text, _start(last)) or _in_negated_clause(text, _start(last)):
        return set()
    if last["bare"] and (
        _NAMED_BY_LETTER.search(_before(text, _start(last))) or choices.ends(text[: _start(last) + 1])
    ):
        return set()
    return {choices.claim(_letter(last))} - {None}


def _named(text: str, choices: Choices) -> Claims:
    """Options named by letter anywhere, "(B)" or "option B", and not rejected."""
    chosen: Claims = set()
    rejected: Claims = set()
    for match in _NAMED.finditer(text):
        group = next(group for group in ("wrapped", "bare", "own", "cjk") if match[group])
        letter, after = choices.claim(match[group]), text[match.end(group) :]
        is_name = _NAMED_BY_LETTER.search(_before(text, match.start())) or (group == "bare" and match[group].islower())
        if letter is None or is_name or _ASKED.match(after):
            continue
        if _rejected_before(text, match.start(group)) or _rejected_after(after, letter, choices):
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


# No noun begins with these: a "no" or "A" before them is no determiner.
_NO_NOUNS = frozenset(
    "in on at for from here because since as with according based by to of and or nor but so if when is are was were "
    "than".split()
)


def _letters_said(text: str, choices: Choices) -> Claims:
    """Of options that are letters themselves, those in a sentence that are neither article nor pronoun."""
    texts = {option.words[0]: letter for letter, option in choices.texts.items()}
    claims: Claims = set()
    for match in re.finditer(rf"{_BARE}(?:\s+(?P<next>[a-z]+))?", text):
        rest = text[match.end("bare") :]
        article = match["bare"] in "AI" and match["next"] and match["next"] not in _NO_NOUNS
        asked = re.match(r"[^.!\n]*\?", rest)
        rejected = (
            _rejected_before(text, match.start())
            or _REJECTED_AFTER.match(rest)
            or _in_negated_clause(text, match.start())
        )
        if match["bare"].isupper() and not (article or asked or rejected):
            claims.add(texts.get(match["bare"].lower()))
    return claims


# --- Yes and no -----------------------------------------------------------------------------------------------------

_CLAUSE_BEGINNERS = frozenset(
    "it there this that these those the i we they he she because since its theres yes".split()
)
_ANSWERS = {"yes": "yes", "yeah": "yes", "yep": "yes", "yup": "yes", "no": "no", "nope": "no"}
# These are answers where they are the whole reply.
_ALONE = {"true": "yes", "false": "no"} | _ANSWERS
_CJK_ANSWERS = {
    **dict.fromkeys(("不是", "没有", "不存在", "不对", "不正确", "否", "不", "无"), "no"),
    **dict.fromkeys(("是的", "是", "有", "存在", "对", "正确"), "yes"),
}
_YES_OR_NO = re.compile(r"\b(?:yes (?:or|and) no|no (?:or|and) yes|是 or 否|否 or 是)\b")


def said_yes_or_no(text: str) -> str | None:
    """ "yes" or "no", where a cleaned text says one of them and not the other."""
    choices = choices_of(("yes", "no"))
    words = Words.of(text)
    claims = _leading_yes_or_no(words, choices) or (set() if refuses(text) else _yes_or_no(words, choices))
    return next((word for word, letter in choices.yes_no.items() if claims == {letter}), None)


def _leading_yes_or_no(words: Words, choices: Choices) -> Claims:
    beginning = "".join(words.words[:4])
    for word, answer in _CJK_ANSWERS.items():
        if beginning.startswith(word) and words.gaps[len(word)] in BREAKS:
            return {choices.yes_no[answer]}
    return _yes_or_no(words, choices) if words.words and _yes_or_no_at(words, 0) else set()


def _yes_or_no(words: Words, choices: Choices) -> Claims:
    """Every yes and no that is an answer."""
    if _YES_OR_NO.search(" ".join(words.words)):
        return {None}
    answers = (_yes_or_no_at(words, position) for position in range(len(words.words)))
    return {choices.yes_no[answer] for answer in answers if answer}


def _yes_or_no_at(words: Words, position: int) -> str | None:
    """ "yes" or "no" where the word at a position is an answer; the "no" of "no other finding" is none."""
    word = words.words[position]
    if word in ("是", "否"):
        return _CJK_ANSWERS[word] if stands_apart(words, position) else None
    if word in _ANSWERS and word != "no":
        return _ANSWERS[word]
    following = words.words[position + 1] if position + 1 < len(words.words) else ""
    begins_clause = position == 0 or words.gaps[position] in BREAKS
    alone = words.gaps[position + 1] in BREAKS or following in _NO_NOUNS
    return "no" if word == "no" and (alone or (begins_clause and following in _CLAUSE_BEGINNERS)) else None


_ASKS = re.compile(r"\s*(?:is|are|was|were|do|does|did|has|have|can|could)\b", re.IGNORECASE)
_DENYING = frozenset("no not without absent absence isnt arent doesnt dont".split())
_EMPTY_WORDS = _DENYING | frozenset(
    "is are was were do does did has have can could be been there a an the any this that these those it in on of at to "
    "from for with by and evidence sign signs image images picture scan seen see show shows shown showing visible "
    "present identified detected noted observed here patient patients cannot".split()
)


def _affirmed_or_denied(words: Words, question: str, choices: Choices) -> Claims:
    """One sentence that says, or denies, all that was asked: "There is no fracture" to "Is there a fracture?"."""
    asked, said = set(Words.of(clean(question)).words), set(words.words)
    subject = asked - _EMPTY_WORDS
    one_sentence = STOPS.isdisjoint(words.gaps[1:-1])
    if not _ASKS.match(question) or not one_sentence or not subject or {"or", "not", "no"} & asked:
        return set()
    if not subject <= said or len(said - _EMPTY_WORDS - subject) > 2 or {"but", "unclear", "possible", "maybe"} & said:
        return set()
    denials = sum(word in _DENYING for word in words.words)
    return {choices.yes_no["no" if denials else "yes"]} if denials <= 1 else set()
