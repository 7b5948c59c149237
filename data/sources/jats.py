"""A JATS article (as PMC, eLife, PLOS and others write it) -> its figures, with captions and in-text mentions.

Neither the network nor a DTD is read, and no entity that a file declares is expanded.
"""

from __future__ import annotations

import html.entities
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lxml import etree

from data.sources.licences import licence_name
from data.sources.text import plain_text

MAX_XML_BYTES = 64 * 2**20
_HREF = "{http://www.w3.org/1999/xlink}href"
_LICENCE_REF = "{http://www.niso.org/schemas/ali/1.0/}license_ref"
# What stands inside a paragraph without being part of its text.
_NOT_TEXT = frozenset(
    "fig fig-group table-wrap table-wrap-group supplementary-material media graphic inline-graphic fn object-id"
    " inline-supplementary-material".split()
)
_BLOCKS = frozenset("p title list list-item def-item disp-formula disp-quote break sec label".split())
_OTHER_ARTICLES = ("sub-article", "response")
_RANGE = re.compile(r"\s*(?:[-‐‑‒–—]|to|through)\s*", re.IGNORECASE)
_PLAIN_LABEL = re.compile(r"[^\d]*?(\d+)\W*")
_TEX = re.compile(r"\\begin\{document\}(.*?)\\end\{document\}", re.DOTALL)


class BadArticle(ValueError):
    """An article that can't be read. `reason` is a short fixed word for counting."""

    def __init__(self, reason: str, explanation: str):
        super().__init__(explanation)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Mention:
    """A paragraph that refers to a figure."""

    text: str
    section: str


@dataclass(frozen=True, slots=True)
class JatsFigure:
    id: str
    label: str
    caption: str
    graphics: tuple[tuple[str, ...], ...]  # one entry a picture: the names under which it may be had, best first
    mentions: tuple[Mention, ...]
    licence: str | None  # its own, else the article's
    in_sub_article: bool


@dataclass(frozen=True, slots=True)
class JatsArticle:
    title: str
    source: str  # authors, year, journal and DOI, for the attribution
    licence: str | None
    figures: tuple[JatsFigure, ...]
    references: int  # `xref`s to figures, wherever they stand
    mentions: int  # of them, those in paragraphs of text, captions excepted
    unresolved: int  # of them, those to something that is no figure here
    html_removed: int  # captions and paragraphs that held HTML as text


def parse_article(data: bytes) -> JatsArticle:
    """Raises BadArticle: empty_xml, xml_too_large, broken_xml, unknown_entity, not_jats."""
    if not data.strip():
        raise BadArticle("empty_xml", "the file is empty; copy or download it again")
    if len(data) > MAX_XML_BYTES:
        raise BadArticle("xml_too_large", f"{len(data):,} bytes; more than {MAX_XML_BYTES:,} are never parsed")
    parser = etree.XMLParser(
        resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise BadArticle("broken_xml", " ".join(str(error).split())) from None
    if etree.QName(root).localname != "article":
        # An OAI or PMC answer wraps the article.
        root = next(root.iter("{*}article"), None)
        if root is None:
            raise BadArticle("not_jats", "there is no <article> in it; expected JATS XML")
    for element in root.iter("{*}*"):
        # Some mirrors put JATS into a namespace of its own; the tags are the same.
        name = etree.QName(element)
        if name.namespace and "jats" in name.namespace:
            element.tag = name.localname
    return _Reader(root).article()


class _Reader:
    def __init__(self, root: etree._Element):
        self.root = root
        self.html_removed = 0

    def article(self) -> JatsArticle:
        figures = [figure for figure in self.root.iter("fig") if not _inside(figure, ("caption",))]
        ids = {figure: figure.get("id") or f"fig{number}" for number, figure in enumerate(figures, start=1)}
        licence = self._licence(self.root.find("front/article-meta/permissions"))
        mentions, references, in_text, unresolved = self._mentions(figures, ids)
        return JatsArticle(
            title=self._text_at("front/article-meta/title-group/article-title"),
            source=self._source(),
            licence=licence,
            figures=tuple(self._figure(figure, ids[figure], mentions.get(figure, []), licence) for figure in figures),
            references=references,
            mentions=in_text,
            unresolved=unresolved,
            html_removed=self.html_removed,
        )

    # Figures -------------------------------------------------------------------------------------------------

    def _figure(
        self, figure: etree._Element, id_: str, mentions: list[etree._Element], licence: str | None
    ) -> JatsFigure:
        group = figure.getparent() if figure.getparent().tag == "fig-group" else None
        permissions = figure.find("permissions")
        return JatsFigure(
            id=id_,
            label=self._label(figure) or (self._label(group) if group is not None else ""),
            caption=self._caption(figure) or (self._caption(group) if group is not None else ""),
            graphics=tuple(_graphics(figure)),
            mentions=tuple(Mention(self._clean(paragraph), _section(paragraph)) for paragraph in mentions),
            # A figure with permissions of its own was taken from elsewhere: the article's licence says nothing of it.
            licence=self._licence(permissions) if permissions is not None else licence,
            in_sub_article=_inside(figure, _OTHER_ARTICLES),
        )

    def _label(self, element: etree._Element) -> str:
        label = element.find("label")
        return self._clean(label).rstrip(".:") if label is not None else ""

    def _caption(self, element: etree._Element) -> str:
        parts = [self._clean(caption) for caption in element.findall("caption")]
        return " ".join(part for part in parts if part)

    def _clean(self, element: etree._Element) -> str:
        text, was_html = plain_text("".join(_text(element)))
        self.html_removed += was_html
        return text

    # Mentions ------------------------------------------------------------------------------------------------

    def _mentions(
        self, figures: list[etree._Element], ids: dict[etree._Element, str]
    ) -> tuple[dict[etree._Element, list[etree._Element]], int, int, int]:
        """Paragraphs by figure, in order; all references to figures, those in paragraphs, and those to nothing."""
        targets: dict[str, list[etree._Element]] = {ids[figure]: [figure] for figure in figures}
        for group in self.root.iter("fig-group"):
            if group.get("id"):
                targets.setdefault(group.get("id"), list(group.iterchildren("fig")))
        order = _Order(figures, {figure: self._label(figure) for figure in figures})
        by_paragraph: dict[etree._Element, list[etree._Element]] = {}
        references = in_text = unresolved = 0
        for xref in self.root.iter("xref"):
            if xref.get("ref-type") != "fig":
                continue
            references += 1
            paragraph = _paragraph(xref)
            if paragraph is not None:
                in_text += 1
                by_paragraph.setdefault(paragraph, []).append(xref)
            if not any(rid in targets for rid in (xref.get("rid") or "").split()):
                unresolved += 1
        mentions: dict[etree._Element, list[etree._Element]] = {}
        for paragraph, xrefs in by_paragraph.items():
            named = [[f for rid in (xref.get("rid") or "").split() for f in targets.get(rid, ())] for xref in xrefs]
            found = [figure for figures_of in named for figure in figures_of]
            for (first, left), (second, right) in pairwise(zip(xrefs, named, strict=True)):
                if left and right and first.getnext() is second and _RANGE.fullmatch(first.tail or ""):
                    found += order.between(left[-1], right[0])
            for figure in dict.fromkeys(found):
                mentions.setdefault(figure, []).append(paragraph)
        return mentions, references, in_text, unresolved

    # The article ---------------------------------------------------------------------------------------------

    def _licence(self, permissions: etree._Element | None) -> str | None:
        if permissions is None:
            return None
        for licence in permissions.iter("license"):
            said = [licence.get(_HREF) or ""]
            said += [reference.text or "" for reference in licence.iter(_LICENCE_REF)]
            said += [link.get(_HREF) or "" for link in licence.iter("ext-link")]
            said += [licence.get("license-type") or "", "".join(_text(licence))]
            if name := next(filter(None, map(licence_name, said)), None):
                return name
        references = (reference.text or "" for reference in permissions.iter(_LICENCE_REF))
        return next(filter(None, map(licence_name, references)), None)

    def _text_at(self, path: str) -> str:
        element = self.root.find(path)
        return plain_text("".join(_text(element)))[0] if element is not None else ""

    def _source(self) -> str:
        meta = "front/article-meta/"
        surnames = [s.text for s in self.root.iterfind(f"{meta}contrib-group/contrib/name/surname") if s.text]
        authors = surnames[0] + (" et al." if len(surnames) > 1 else "") if surnames else ""
        years = [year.text or "" for year in self.root.iterfind(f"{meta}pub-date/year")]
        journal = self._text_at("front/journal-meta/journal-title-group/journal-title")
        journal = journal or self._text_at("front/journal-meta/journal-title")
        numbers = {
            number.get("pub-id-type"): "".join(number.itertext()).strip()
            for number in self.root.iterfind(f"{meta}article-id")
        }
        doi = f"doi:{numbers['doi']}" if numbers.get("doi") else ""
        pmc = numbers.get("pmc") or numbers.get("pmcid") or ""
        pmc = f"PMC{pmc.removeprefix('PMC')}" if pmc else ""
        return ", ".join(part for part in (authors, min(filter(None, years), default=""), journal, doi, pmc) if part)


@dataclass(frozen=True)
class _Order:
    """The figures in their order, to say which lie between two of them."""

    figures: list[etree._Element]
    labels: dict[etree._Element, str]

    @cached_property
    def _numbers(self) -> dict[etree._Element, int]:
        # "Figure 3", not "Figure 3—figure supplement 1".
        plain = {figure: _PLAIN_LABEL.fullmatch(label) for figure, label in self.labels.items()}
        return {figure: int(match[1]) for figure, match in plain.items() if match}

    def between(self, first: etree._Element, last: etree._Element) -> list[etree._Element]:
        if first in self._numbers and last in self._numbers:
            low, high = self._numbers[first], self._numbers[last]
            return [figure for figure, number in self._numbers.items() if low < number < high]
        places = [self.figures.index(figure) for figure in (first, last)]
        return self.figures[places[0] + 1 : places[1]]


def _text(element: etree._Element) -> Iterator[str]:
    """The pieces of an element's text: formulas as their text, what is no text left out."""
    if isinstance(element, etree._Entity):
        yield _entity(element.name)
        return
    if not isinstance(element.tag, str):
        return
    tag = etree.QName(element).localname
    if tag == "alternatives":
        # The same thing several times over.
        children = list(element)
        best = next((c for c in children if isinstance(c.tag, str) and etree.QName(c).localname == "math"), None)
        best = best if best is not None else next((c for c in children if c.tag == "tex-math"), None)
        best = best if best is not None else next((c for c in children if c.tag not in _NOT_TEXT), None)
        if best is not None:
            yield from _text(best)
        return
    if tag == "tex-math":
        tex = "".join(element.itertext())
        document = _TEX.search(tex)
        yield (document[1] if document else tex).strip().strip("$")
        return
    if tag in _BLOCKS:
        yield " "
    yield element.text or ""
    for child in element:
        if child.tag not in _NOT_TEXT:
            yield from _text(child)
        yield child.tail or ""
    if tag in _BLOCKS:
        yield " "


def _entity(name: str) -> str:
    known = html.entities.html5.get(f"{name};")
    if known is None:
        raise BadArticle("unknown_entity", f"it uses &{name}; entities that a file declares are not expanded")
    return known


def _graphics(figure: etree._Element) -> Iterator[tuple[str, ...]]:
    seen = set()
    for graphic in figure.iter("graphic"):
        if _inside(graphic, ("caption",), up_to=figure):
            continue
        parent = graphic.getparent()
        if parent.tag == "alternatives":
            if parent in seen:
                continue
            seen.add(parent)
            names = tuple(g.get(_HREF) for g in parent.iter("graphic") if g.get(_HREF))
        else:
            names = (graphic.get(_HREF),) if graphic.get(_HREF) else ()
        if names:
            yield names


def _inside(element: etree._Element, tags: tuple[str, ...], up_to: etree._Element | None = None) -> bool:
    for ancestor in element.iterancestors():
        if ancestor is up_to:
            return False
        if ancestor.tag in tags:
            return True
    return False


def _paragraph(xref: etree._Element) -> etree._Element | None:
    """The paragraph of text around a reference; None in a caption, a heading or a table."""
    paragraph = None
    for ancestor in xref.iterancestors():
        if ancestor.tag == "p" and paragraph is None:
            paragraph = ancestor
        if ancestor.tag in ("caption", "table-wrap"):
            return None
    return paragraph


def _section(paragraph: etree._Element) -> str:
    section = next(paragraph.iterancestors("sec"), None)
    title = section.find("title") if section is not None else None
    return plain_text("".join(_text(title)))[0] if title is not None else ""
