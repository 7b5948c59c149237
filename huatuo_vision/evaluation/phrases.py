"""What replies say around the letters and texts of options: the phrases, as patterns. No torch here.

Only text is known here; what a letter means among a question's options is the affair of `parsing.py`.
"""

from __future__ import annotations

import re

from huatuo_vision.evaluation.words import CJK, KANA_HANGUL, any_of

# --- Letters -------------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = r"[(\[{<\"'「『【]", r"[)\]}>\"'」』】]"

_WRAPPED = rf"{_OPEN}{{1,3}}\s?(?P<wrapped>[A-Za-z])\s?{_CLOSE}{{1,3}}"

BARE = r"(?<![A-Za-z0-9'-])(?P<bare>[A-Za-z])(?![A-Za-z0-9]|'\w|-\w)"

_ANY_LETTER = rf"(?:{_WRAPPED}|{BARE})"

# A bare letter is a choice where its clause ends behind it: no article before a noun, no pronoun, no "B cell".
_CLAUSE_ENDS = (
    rf"(?=[ \t]*\n|\s*(?:$|[.,;:!?)\]}}\"'。/&+、|]|-\s|[–—]|[{CJK}{KANA_HANGUL}]"
    r"|\b(?:because|since|as|due|which|based|given|for|with|from|or|and|in|on|not|rather|instead|over|is|was|but)\b"
    r"|\bto\s+(?:option\s+)?[A-Z]\b|\((?:not\b|(?:option\s+)?[A-Z]\s+(?:is|was|would)\b)))"
)

CHOSEN_LETTER = re.compile(rf"(?:{_WRAPPED}|{BARE}{_CLAUSE_ENDS})")

_JOINED = any_of("[,;/&+、|]", r"\bor\b", r"\band\b", r"\bas well as\b", "或者?", "和", "与", "及", "还是")

OTHER_LETTER = re.compile(
    rf"\s*{_CLOSE}*\s*{_JOINED}\s*(?:(?:and|or|maybe|perhaps|possibly|also|both|either)\s+)*(?:(?i:option|choice)\s+)?"
    rf"(?:{_WRAPPED}|(?<![A-Za-z0-9'-])(?P<bare>[A-Z])(?![A-Za-z0-9]|'\w|-\w|\s+[a-z]))"
)

LETTER_BEFORE = re.compile(rf"{_ANY_LETTER}\s*(?:,|/|\band\b|\bor\b|和|与|、)\s*(?:option\s+)?[(\[\"']?$")

# "E. coli": a full stop and a small letter continue a name, unless a sentence's small word begins an explanation.
NAME_GOES_ON = re.compile(
    r"\.\s*(?!(?:because|since|as|the|an?|this|it|its|there|these|in|on|based|due|given|which|that|for|and|or|not|is|are"
    r"|if|while|with|from|no|yes|i|we|you|so|but)\b)[a-z]{2,}"
    r"|\.\s*[A-Z]\.\s+[a-z]"  # initials
)

# "vitamin B", "figure (A)": these letters are names.
NAMED_BY_LETTER = re.compile(
    r"\b(?:vitamin|hepatitis|type|group|grade|class|stage|lead|factor|segment|zone|panel|fig|figure|image|arrow"
    r"|label(?:l?ed)?|point|structure|region|part|picture|view|marker|blood|letter|area)s?\.?\s*[(\[\"']?$",
    re.IGNORECASE,
)

ASKED = re.compile(r"[)\]\"']*\s*(?:\?|吗|呢)")

ENDS_ASKING = re.compile(r"[吗呢][?。\s]*$")


def letter(match: re.Match[str]) -> str:
    return match["wrapped"] or match["bare"]


def start(match: re.Match[str]) -> int:
    """Where the letter itself stands."""
    return match.start("wrapped" if match["wrapped"] else "bare")


# --- Rejection of letters ------------------------------------------------------------------------------------------

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
    *("implausible", "inconsistent", "irrelevant", r"out\b", "least", "worst"),
)

_AUXILIARY = any_of(
    *("is", "are", "was", "were", "seems?", "looks?", "appears?", "can", "could", "would", "should", "may", "might"),
    *("must", "do", "does", "did", "has", "have", "been", "be", "to"),
)

_CROSS, _TICK = "[✗✘❌❎✖]", "[✓✔✅☑]"

SAYS_NO = re.compile(r"[.…:-]*\s*no\s*[.!]?\s*$", re.IGNORECASE)

# "A, C and D are wrong" rejects all of them, "B, A is wrong" only the last.
_ONE_ALONE = (
    r",\s*[(\[]?[A-Z][)\]]?\s*(?:选项|项)?\s*(?:(?:is|was|does|seems|looks|appears|has)(?:n't)?\b|[是不错被可并])"
)

REJECTED_AFTER = re.compile(
    rf"(?!{_ONE_ALONE})"
    r"[)\]\"'.]*\s*(?:(?:,|/|\band|\bor|、|和)\s*(?:and\s+)?[(\[]?[A-Z][)\]]?\s*)*(?:选项|项)?\s*"
    + any_of(
        rf"{_AUXILIARY}\s+(?:(?:both|all|also|very|clearly|definitely|therefore|an?|the|most|likely|{_AUXILIARY})\s+)*"
        rf"(?:not\b|never\b|{_FALSE})",
        "(?:is|are|was|were|does|do|did|ca|could|would|should)n't|cannot",
        rf"[-:]\s*{_FALSE}",
        _CROSS,
        r"(?:是|都|均|也)*(?:不对|不正确|不是|不符|不选(?!\s*[(A-Z])|不成立|错|可以?排除|被?排除|并不|并非)",
    ),
    re.IGNORECASE,
)

_NEGATED = re.compile(
    r"\b(?:not|never|cannot|neither|nor|unlikely|doubt|whether|if|wrong|incorrect|false|worst|least|nothing|avoid"
    r"|no\s+reason|was\s+(?:going|about|tempted)\s+to|would\s+have\s+said)\b|n't\b"
    "|不|并非|无法|没|是否|错误"
)

_CLAUSE_BEGINS = re.compile(
    r".*(?:[.;!?\n,。，；]|\bbut\b|\bhowever\b|\bso\b|\btherefore\b|\bthus\b|\bhence\b|\binstead\b)", re.DOTALL
)


def before(text: str, position: int) -> str:
    """What stands before a position, as far back as one looks for what bears on a letter."""
    return text[max(0, position - 120) : position]


def rejected_before(text: str, position: int) -> bool:
    """Whether what stands before a letter rejects it: "not", "unlike A and"."""
    return _REJECTED_BEFORE.search(before(text, position)) is not None


def in_negated_clause(text: str, position: int) -> bool:
    """Whether what stands before a position in its own clause denies or doubts it: "I don't think the answer ..."."""
    lowered = before(text, position).lower()
    clause = _CLAUSE_BEGINS.match(lowered)
    return _NEGATED.search(lowered, clause.end() if clause else 0) is not None


# --- The whole reply -----------------------------------------------------------------------------------------------

ONLY_LETTER = re.compile(
    rf"(?:(?:option|choice|选项|選項)\s*)?(?:{_OPEN}|\s)*(?P<letter>[A-Za-z])\s*(?:选项|選項|项|項)?"
    rf"(?:{_CLOSE}|[\s.:,;!?。、])*",
    re.IGNORECASE,
)

MARKED = re.compile(any_of(_CROSS, _TICK))

ONLY_LETTERS = re.compile(r"[\W_]*[A-Za-z](?:(?:[\W_]|\band\b|\bor\b)+[A-Za-z])+[\W_]*")

# --- Boxes and fields ----------------------------------------------------------------------------------------------

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


# --- Answers that are called answers -------------------------------------------------------------------------------

_BE = any_of(
    *("is", "was", r"(?:would|will|should|must|has\s+to|could|may|might)\s+(?:also\s+)?be"),
    r"(?:seems?|appears?)\s+to\s+be",
)

# Before a letter that is an answer: "is most likely option ...".
FILLING = re.compile(
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

ANSWER = re.compile(
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
CHOOSING = re.compile(
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
        *("leaves?", "leaving", r"answered?\s+(?:with|is)?", "believe", "think", "(?<!some )say", "guess"),
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
    + "|而(?:是|应?选择?)|(?<![不可能])(?:选择?(?!项)|選擇?(?!項))"
    + r"|(?<![不并可否还])(?:是|为|為)(?=\s*[(\"'「【]?[A-Z])",
    re.IGNORECASE,
)

CONTRASTS = re.compile(r"but\b|rather\b|instead\b|而", re.IGNORECASE)

_CONCLUSION = any_of(
    r"\b(?:so|therefore|thus|hence|consequently|accordingly|finally|in\s+(?:conclusion|summary|short)|overall)\b",
    *("因此", "所以", "故", "综上(?:所述)?", "最终"),
)

CONCLUDING = re.compile(
    rf"{_CONCLUSION}\s*[,:]?\s*(?:it(?:'s|\s+is)\s+|i(?:'d| would)?\s+(?:choose|pick|select|go\s+with)\s+)?",
    re.IGNORECASE,
)

_IS_FINAL = re.compile(rf"{_CONCLUSION}|\b(?:final|conclusion|summary)\b|最后", re.IGNORECASE)

IS_RIGHT = re.compile(
    _ANY_LETTER
    + r"\s*"
    + any_of(
        rf"(?:{_BE}|remains|seems|appears|looks|fits|matches)\s+"
        r"(?:(?:the|to|be|clearly|definitely|most|more|only|likely|probably|indeed|therefore|thus|single|one|our|my)\s+)*"
        r"(?:correct|right|best|better|accurate|appropriate|true|answer|choice|option|suitable|(?<=more )likely)\b",
        r"(?:best\s+)?(?:fits|matches)\b(?!\s+(?:neither|no)\b)",
        r"is\s*(?:\.\s|\.?$)",
        r"[:-]\s*(?:correct|right|true)\b",
        "(?:选?项)?(?:才?是|为|為|才)?(?:最)?(?:正确|正確|对(?![于比应称照])|符合|合适|合適)",
    ),
    re.IGNORECASE,
)

# "Only B fits", "everything except B is wrong".
SINGLED_OUT = re.compile(
    any_of(
        r"\bonly\s+",
        r"\b(?:everything|anything|all|each)(?:\s+(?:of|the|other|options?|choices?|answers?))*\s+"
        r"(?:except(?:\s+for)?|but|besides|other\s+than)\s+",
    )
    + rf"(?:the\s+)?(?:(?:options?|choices?|answers?)\s+)?{_ANY_LETTER}\s+"
    + any_of(
        rf"(?:is|are|can\s+be|must\s+be)\s+(?:clearly\s+|definitely\s+)?{_FALSE}", "fits?", "match(?:es)?", "remains?"
    ),
    re.IGNORECASE,
)

# A verdict on each option: "A: no. B: yes.", "A) Pneumonia ✗".
ITEM = re.compile(
    rf"(?:^|[.;,\n])\s*(?:(?:option|choice)\s+)?{_ANY_LETTER}\s*[.:)\]-]?(?P<rest>[^.;\n]*)", re.IGNORECASE
)

ITEM_VERDICT = re.compile(
    r"[\s:–—|,(-]*"
    + any_of(rf"(?P<right>(?:yes|correct|right|true)\b|{_TICK})", r"(?:no|not|wrong|incorrect|false)\b", _CROSS, "×"),
    re.IGNORECASE,
)

TAKEN_BACK = re.compile(
    r".*(?:\b(?:wait|actually|correction|scratch\s+that|on\s+second\s+thoughts?|i\s+was\s+wrong"
    r"|let\s+me\s+(?:correct|reconsider|re-?check)(?:\s+\w+)?)\b|等等|更正)[\s,.:!-]*",
    re.IGNORECASE | re.DOTALL,
)

RETRACTS = re.compile(r"no\b|that(?:'s|\s+is)\s+(?:wrong|incorrect|not)\b", re.IGNORECASE)

NEGATION_AHEAD = re.compile(r"\s*(?:(?:not|n't|neither|never)\b|不|并非)", re.IGNORECASE)

BUT = re.compile(
    r"[^.\n。]*?(?:\bbut\b|\brather\b(?!\s+than)|\binstead\b(?!\s+of)|而是)(?:\s+(?:rather|instead|it\s+is))?",
    re.IGNORECASE,
)


def is_hypothetical(text: str, match: re.Match[str]) -> bool:
    """ "If it were sharp, A would be the answer"."""
    after = re.split(r"[.!?\n]", text[match.end() :], maxsplit=1)[0]
    sentence = f"{_sentence_before(text, match.start(), 120)} {after}"
    return "would" in match[0] and re.search(r"\bif\b", sentence, re.IGNORECASE) is not None


def _sentence_before(text: str, position: int, reach: int = 40) -> str:
    return re.split(r"[.!?。\n]", text[max(0, position - reach) : position])[-1]


def is_final(text: str, marker: re.Match[str]) -> bool:
    return _IS_FINAL.search(_sentence_before(text, marker.start()) + marker[0]) is not None


def is_label(text: str, marker: re.Match[str]) -> bool:
    """Whether a marker with a colon begins a sentence: "Answer:"."""
    return marker[0].rstrip().endswith(":") and not re.search(r"\w", _sentence_before(text, marker.start()))


# --- A letter at the beginning, at the end, or named in passing ----------------------------------------------------

LEAD = re.compile(
    rf"(?:(?:option|choice|选项)\s*)?{_ANY_LETTER}"
    r"(?P<sign>\s*(?:[.:)\],、。]|-\s|[–—]|\n|(?=because\b|since\b|$|\(|(?:rather|instead|not|due|given|based)\b)))?",
    re.IGNORECASE,
)

LIST_ITEM = re.compile(
    r"(?:^|[.;\n])\s*(?:[(\[]?(?P<signed>[A-Z])(?:[)\]:]|\.(?!\s*[a-z]))|(?P<alone>[A-Z])\s*(?=\.(?!\s*[a-z])|\n|$))"
)

# A letter that is a paragraph of its own is an answer; what follows may explain the other options one by one.
EXPLAINED = re.compile(r"[(\[]?[A-Za-z][.:)\]]*[ \t]*\n\s*\n(?!(?s:.*)(?m:^)[ \t]*\(?[A-Z][.)]?[ \t]*(?m:$))")

LAST_LETTER = re.compile(
    rf"(?:^|[.!?;。\n]\s*|\b(?:is|are|be)\b\s*:?\s*|[:=]\s*)(?:(?:option|choice)\s+)?{_ANY_LETTER}[\s.!。)]*$",
    re.IGNORECASE,
)

NAMED = re.compile(
    rf"(?:\b(?:option|choice|answer)|选项|選項)\s*{_ANY_LETTER}|{_OPEN}(?P<own>[A-Za-z]){_CLOSE}"
    "|(?<![A-Za-z0-9])(?P<cjk>[A-Z])(?=选?项|選項)",
    re.IGNORECASE,
)
