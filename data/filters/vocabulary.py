"""Make a vocabulary for the text filter from files that the user downloads from the National Library of Medicine.

    python -m data.filters.vocabulary --specialist LEXICON --out vocabulary.txt     # what the paper used
    python -m data.filters.vocabulary --mesh desc2026.xml --out vocabulary.txt

General English is in the SPECIALIST Lexicon; the paper had GPT-4 remove it. Here --drop takes lists of words to leave
out, a short one of our own is always applied, and single words that are neither noun nor adjective are left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lxml import etree

from data.tables import whole_file
from huatuo_vision.cli import run_command
from huatuo_vision.schema import UserError

COMMON_WORDS = Path(__file__).with_name("common_words.txt")
# Anatomy, diseases, chemicals and drugs, techniques and equipment; what else MeSH has is hardly about pictures.
MESH_TREES = ("A", "C", "D", "E")
_SHORTEST = 3
_CATEGORIES = ("noun", "adj")
# Plurals of Greek and Latin words, longest ending first.
_CLASSICAL = {"men": "mina", "sis": "ses", "ex": "ices", "ix": "ices", "us": "i", "um": "a", "on": "a", "is": "es"}
_CLASSICAL |= {"ma": "mata", "x": "ces", "a": "ae"}


def specialist_entries(path: Path) -> Iterator[tuple[str, ...]]:
    """The nouns and adjectives of the Lexicon's unit records, each with its spellings and plurals.

    Raises UserError for a file of another format.
    """
    record: dict[str, list[str]] = {}
    records = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                line = line.strip()
                if line.startswith("{"):
                    record, line = {}, line[1:]
                if line == "}":
                    records += 1
                    if set(record.get("cat", ())) & set(_CATEGORIES):
                        yield tuple(dict.fromkeys(_inflected(record)))
                    record = {}
                    continue
                key, separator, value = line.partition("=")
                if separator:
                    record.setdefault(key, []).append(value)
                if not records and number > 10_000 or number == 1 and key != "base":
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--specialist {path} can't be read ({' '.join(str(error).split())})") from None
    if not records:
        raise UserError(
            f"--specialist {path} is not the SPECIALIST Lexicon: expected records like {{base=... cat=noun ... }}, as "
            "in the file LEXICON of its distribution (not the tables and not the XML)"
        )


def _inflected(record: dict[str, list[str]]) -> Iterator[str]:
    bases = [*record.get("base", ()), *record.get("spelling_variant", ())]
    yield from bases
    for variant in record.get("variants", ()):
        kind, *forms = variant.split("|")
        if kind in ("irreg", "group(irreg"):
            yield from (form for form in forms if form and form != ")")
        elif "noun" in record["cat"] and kind in ("reg", "metareg", "group(reg)"):
            yield from map(_plural, bases)
        elif "noun" in record["cat"] and kind in ("glreg", "group(glreg)"):
            yield from filter(None, map(_classical_plural, bases))


def _plural(word: str) -> str:
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def _classical_plural(word: str) -> str | None:
    return next((word[: -len(end)] + plural for end, plural in _CLASSICAL.items() if word.endswith(end)), None)


def mesh_entries(path: Path, trees: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The descriptors of these trees with all their entry terms, "Tomography, Computed" also the other way round.

    Raises UserError for a file of another format.
    """
    records = 0
    # Record by record: the file has hundreds of megabytes. No DTD is loaded and no entity expanded.
    options = {"events": ("end",), "tag": "DescriptorRecord", "load_dtd": False, "no_network": True}
    try:
        for _, record in etree.iterparse(str(path), resolve_entities=False, **options):
            records += 1
            numbers = [number.text or "" for number in record.iterfind("TreeNumberList/TreeNumber")]
            if any(number.startswith(tuple(trees)) for number in numbers):
                terms = [term.text or "" for term in record.iterfind("ConceptList/Concept/TermList/Term/String")]
                terms = [record.findtext("DescriptorName/String") or "", *terms]
                yield tuple(dict.fromkeys(form for term in terms if term for form in _both_orders(term)))
            record.clear()
            while record.getprevious() is not None:
                del record.getparent()[0]
    except (OSError, etree.XMLSyntaxError) as error:
        raise UserError(f"--mesh {path} can't be read as XML ({' '.join(str(error).split())})") from None
    if not records:
        raise UserError(f"--mesh {path} holds no DescriptorRecord; expected MeSH's descriptors, such as desc2026.xml")


def _both_orders(term: str) -> tuple[str, ...]:
    parts = term.split(", ")
    return (" ".join(reversed(parts)), term) if len(parts) == 2 else (term,)


def cleaned(entries: Iterable[tuple[str, ...]], drop: set[str]) -> list[tuple[str, ...]]:
    """Lower case, without what is dropped, too short or no word; entries that share their first spelling are one."""
    merged: dict[str, dict[str, None]] = {}
    for spellings in entries:
        kept = [" ".join(spelling.lower().split()) for spelling in spellings]
        if any(spelling in drop for spelling in kept):
            continue  # with "finding" goes "findings"
        kept = [s for s in kept if len(s) >= _SHORTEST and re.search(r"[a-z]", s) and "|" not in s and len(s) <= 200]
        if kept:
            merged.setdefault(kept[0], {}).update(dict.fromkeys(kept))
    return [tuple(spellings) for _, spellings in sorted(merged.items())]


def read_words(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--drop {path} can't be read ({' '.join(str(error).split())}); expected a word a line"
        ) from None
    return {" ".join(line.lower().split()) for line in lines if line.strip() and not line.startswith("#")}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.filters.vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("sources, one or both")
    source.add_argument("--specialist", type=Path, metavar="LEXICON", help="unit records of the SPECIALIST Lexicon")
    source.add_argument("--mesh", type=Path, metavar="XML", help="MeSH descriptors: desc<year>.xml")
    trees = ", ".join(MESH_TREES)
    parser.add_argument("--trees", nargs="+", default=list(MESH_TREES), help=f"MeSH trees (default: {trees})")
    parser.add_argument("--drop", type=Path, nargs="+", default=[], metavar="FILE", help="words to leave out")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.specialist is None and arguments.mesh is None:
        raise UserError("there is no source: give --specialist LEXICON, --mesh XML, or both")
    drop = read_words(COMMON_WORDS).union(*map(read_words, arguments.drop))
    entries: list[tuple[str, ...]] = []
    if arguments.specialist is not None:
        entries += specialist_entries(arguments.specialist)
    if arguments.mesh is not None:
        entries += mesh_entries(arguments.mesh, arguments.trees)
    vocabulary = cleaned(entries, drop)
    if not vocabulary:
        raise UserError("nothing is left of the source; check --trees and --drop")
    with whole_file(arguments.out) as unfinished:
        unfinished.write_text("".join("\t".join(spellings) + "\n" for spellings in vocabulary), encoding="utf-8")
    spellings = sum(map(len, vocabulary))
    print(f"{arguments.out}: {len(vocabulary):,} entries, {spellings:,} spellings")


if __name__ == "__main__":
    run_command(main)
