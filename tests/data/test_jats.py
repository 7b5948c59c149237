"""The parser's cases, each as real articles have it, and the real articles' known counts."""

import os
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from data.sources.articles import article_name
from data.sources.jats import BadArticle, parse_article
from data.sources.licences import family, licence_name

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
CC_BY = '<license xlink:href="http://creativecommons.org/licenses/by/4.0/"><license-p>Open.</license-p></license>'


def article(body: str, *, permissions: str = CC_BY, back: str = "", doctype: str = "") -> bytes:
    meta = f"""<front><journal-meta><journal-title-group><journal-title>J. Test</journal-title></journal-title-group>
    </journal-meta><article-meta><article-id pub-id-type="doi">10.1/x</article-id><title-group><article-title>A
    <italic>title</italic></article-title></title-group><contrib-group><contrib><name><surname>Doe</surname></name>
    </contrib><contrib><name><surname>Roe</surname></name></contrib></contrib-group><pub-date><year>2020</year>
    </pub-date><permissions>{permissions}</permissions></article-meta></front>"""
    return f'<?xml version="1.0"?>{doctype}<article {XLINK}>{meta}<body>{body}</body>{back}</article>'.encode()


def fig(number: int, inner: str = "", **attributes: str) -> str:
    caption = f"<caption><title>Title {number}.</title><p>Text {number}.</p></caption>"
    graphic = f'<graphic xlink:href="f{number}"/>'
    return f'<fig id="f{number}"><label>Figure {number}.</label>{inner or caption + graphic}</fig>'


def xref(rid: str, text: str) -> str:
    return f'<xref ref-type="fig" rid="{rid}">{text}</xref>'


def figures(body: str, **keywords: str):
    return {figure.id: figure for figure in parse_article(article(body, **keywords)).figures}


def test_caption_is_title_and_paragraphs_without_losing_what_stands_in_them():
    caption = """<caption><title>Lungs.</title><p>See [<xref ref-type="bibr" rid="b1">3</xref>,<xref ref-type="bibr"
    rid="b2">4</xref>], CO<sub>2</sub> and <inline-formula><alternatives><tex-math>\\documentclass{x}
    \\begin{document}$p$\\end{document}</tex-math><mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:mi>p</mml:mi><mml:mo>=</mml:mo>
    <mml:mn>2</mml:mn></mml:math></alternatives></inline-formula>.</p><p>Second.</p></caption>"""
    found = figures(fig(1, caption + '<graphic xlink:href="a"/>'))["f1"]
    assert found.caption == "Lungs. See [3,4], CO2 and p= 2. Second."
    assert found.label == "Figure 1"


def test_a_formula_in_tex_alone_is_its_tex():
    tex = (
        "<inline-formula><tex-math>\\usepackage{x}\\begin{document}$\\alpha$\\end{document}</tex-math></inline-formula>"
    )
    assert figures(fig(1, f"<caption><p>An {tex}.</p></caption>"))["f1"].caption == "An \\alpha."


def test_figures_stand_in_body_groups_and_floats_and_share_a_group_s_caption():
    group = f"""<fig-group id="g"><label>Figure 9</label><caption><p>Of the group.</p></caption>
    {fig(1, '<graphic xlink:href="a"/>')}{fig(2)}</fig-group><p>As in {xref("g", "Fig. 9")}.</p>"""
    found = figures(group, back=f"<floats-group>{fig(3)}</floats-group>")
    assert list(found) == ["f1", "f2", "f3"]
    assert found["f1"].caption == "Of the group." and found["f2"].caption == "Title 2. Text 2."
    assert [len(f.mentions) for f in found.values()] == [1, 1, 0]


def test_graphics_alternatives_are_one_picture_and_inline_graphics_none():
    inner = """<caption><p>With <inline-graphic xlink:href="i"/> a sign.</p></caption><graphic xlink:href="a"/>
    <alternatives><graphic xlink:href="b.tif"/><graphic xlink:href="b.jpg"/></alternatives>"""
    assert figures(f'<p><inline-graphic xlink:href="z"/></p>{fig(1, inner)}')["f1"].graphics == (
        ("a",),
        ("b.tif", "b.jpg"),
    )


def test_mentions_keep_order_and_section_and_leave_out_captions_and_nested_figures():
    body = f"""<sec><title>Results</title><p>First {xref("f1", "1")}.{fig(1)}</p><p>None.</p>
    <p>Again {xref("f1", "1A")} and {xref("f2", "2")}, {xref("f1", "1B")}.</p>
    {fig(2, f'<caption><p>Like {xref("f1", "Figure 1")}.</p></caption><graphic xlink:href="f2"/>')}</sec>"""
    parsed = parse_article(article(body))
    first, second = parsed.figures
    assert [(m.text, m.section) for m in first.mentions] == [
        ("First 1.", "Results"),
        ("Again 1A and 2, 1B.", "Results"),
    ]
    assert len(second.mentions) == 1
    assert (parsed.references, parsed.mentions, parsed.unresolved) == (5, 4, 0)


@pytest.mark.parametrize("dash", ["-", "–", " to ", " through "])
def test_a_range_mentions_the_figures_between(dash):
    body = f"<p>Figs {xref('f2', '2')}{dash}{xref('f5', '5')}.</p>" + "".join(map(fig, range(1, 7)))
    assert [f.id for f in figures(body).values() if f.mentions] == ["f2", "f3", "f4", "f5"]


def test_a_list_is_no_range_and_one_reference_may_name_several():
    body = f"<p>{xref('f1', '1')}, {xref('f3', '3')}; {xref('f4 f6', '4, 6')}.</p>" + "".join(map(fig, range(1, 7)))
    assert [f.id for f in figures(body).values() if f.mentions] == ["f1", "f3", "f4", "f6"]


def test_supplements_are_not_between_two_figures():
    supplement = '<fig id="f1s1"><label>Figure 1—figure supplement 1.</label><graphic xlink:href="s"/></fig>'
    body = f"<p>{xref('f1', '1')}–{xref('f3', '3')}.</p>" + fig(1) + supplement + fig(2) + fig(3)
    assert [f.id for f in figures(body).values() if f.mentions] == ["f1", "f2", "f3"]


def test_a_reference_to_nothing_is_counted():
    parsed = parse_article(article(f"<p>{xref('f1', '1')} {xref('video1', 'Video 1')}</p>{fig(1)}"))
    assert (parsed.references, parsed.unresolved) == (2, 1)


def test_a_figure_s_own_permissions_stand_before_the_article_s():
    borrowed = "<permissions><copyright-statement>Elsevier, with permission</copyright-statement></permissions>"
    found = figures(fig(1) + fig(2, borrowed + '<graphic xlink:href="b"/>'))
    assert found["f1"].licence == "CC-BY-4.0" and found["f2"].licence is None


def test_figures_of_sub_articles_are_told_apart():
    back = f"<sub-article><body>{fig(2)}</body></sub-article><response><body>{fig(3)}</body></response>"
    assert [f.in_sub_article for f in figures(fig(1), back=back).values()] == [False, True, True]


def test_html_in_a_caption_becomes_text_and_is_counted():
    caption = "<caption><p>A &lt;b&gt;bold&lt;/b&gt; claim,&lt;br/&gt;p &lt; 0.05 and n &gt; 3.</p></caption>"
    parsed = parse_article(article(fig(1, caption)))
    assert parsed.figures[0].caption == "A bold claim, p < 0.05 and n > 3."
    assert parsed.html_removed == 1


def test_a_namespaced_or_wrapped_article_reads_the_same():
    plain = article(fig(1))
    wrapped = b"<OAI>" + plain.split(b"?>", 1)[1] + b"</OAI>"
    namespaced = plain.replace(b"<article ", b'<article xmlns="http://jats.nlm.nih.gov" ', 1)
    assert parse_article(plain) == parse_article(wrapped) == parse_article(namespaced)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"  ", "empty_xml"),
        (b"<article><body>", "broken_xml"),
        (b"\x89PNG\r\n", "broken_xml"),
        (b"<html><body/></html>", "not_jats"),
        (article(fig(1)).replace(b"Text 1", b"\xff\xfe"), "broken_xml"),
        (b"<article>" + b"<sec>" * 5000 + b"</sec>" * 5000 + b"</article>", "broken_xml"),
    ],
)
def test_what_is_no_article_says_so(data, reason):
    with pytest.raises(BadArticle) as refused:
        parse_article(data)
    assert refused.value.reason == reason


def test_an_entity_bomb_is_not_expanded():
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    doctype = f'<!DOCTYPE article [<!ENTITY e0 "lol">{bomb}]>'
    with pytest.raises(BadArticle) as refused:
        parse_article(article(fig(1).replace("Text 1", "&e11;"), doctype=doctype))
    assert refused.value.reason in ("unknown_entity", "broken_xml")


def test_neither_files_nor_the_network_are_read(tmp_path, monkeypatch):
    import socket

    def refuse(*arguments):
        raise AssertionError("the parser opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "secret.txt").write_text("the secret")
    secret = (tmp_path / "secret.txt").as_uri()
    doctype = f"""<!DOCTYPE article PUBLIC "-//NLM//DTD JATS" "http://127.0.0.1:9/jats.dtd" [
    <!ENTITY x SYSTEM "{secret}"> <!ENTITY % remote SYSTEM "http://127.0.0.1:9/evil.dtd"> %remote;]>"""
    with pytest.raises(BadArticle, match="&x;"):
        parse_article(article(fig(1).replace("Text 1", "&x;"), doctype=doctype))
    assert "Text 1" in figures(fig(1), doctype=doctype)["f1"].caption


def test_a_character_s_well_known_name_is_the_character():
    doctype = '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS" "jats.dtd">'
    assert "α–β" in figures(fig(1).replace("Text 1", "&alpha;&ndash;&beta;"), doctype=doctype)["f1"].caption


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("https://creativecommons.org/licenses/by-nc-nd/3.0/igo/", "CC-BY-NC-ND-3.0"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("CC BY-SA", "CC-BY-SA"),
        ("CC0", "CC0-1.0"),
        (
            "under the Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International License",
            "CC-BY-NC-SA-4.0",
        ),
        ("Creative Commons Attribution Non Commercial License", "CC-BY-NC"),
        ("Creative Commons Attribution License 2.0", "CC-BY-2.0"),
        ("TDM", None),
        ("All rights reserved", None),
    ],
)
def test_licences_have_one_name(text, name):
    assert licence_name(text) == name


def test_a_licence_s_family_has_no_version():
    assert [family(n) for n in ("CC-BY-4.0", "CC0-1.0", "CC-BY-NC")] == ["CC-BY", "CC0", "CC-BY-NC"]


def test_article_names_are_unique_and_fit_for_files():
    names = ["PMC1.1/PMC1.1.xml", "a/main.xml", "b/main.xml", "a--main.xml", "x y.xml", "x_y.xml"]
    assert article_name(names[0]) == "PMC1.1" and article_name(names[1]) == "a--main"
    made = [article_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzPMC0123456789._-") for name in made)


@pytest.mark.skipif("HUATUO_SAMPLES" not in os.environ, reason="needs the real samples")
@pytest.mark.parametrize(
    ("path", "n_figures", "references"),
    [
        ("elife-43154-v2/elife-43154-v2.xml", 3, 8),
        ("elife-19405/elife-19405.xml", 1, 2),
        ("1471-2180-11-174/1471-2180-11-174.nxml", 4, 18),
    ],
)
def test_real_articles_parse_to_known_counts(path, n_figures, references):
    parsed = parse_article((Path(os.environ["HUATUO_SAMPLES"]) / "jats_sample" / path).read_bytes())
    assert (len(parsed.figures), parsed.references, parsed.unresolved) == (n_figures, references, 0)
    assert all(f.caption and f.mentions and f.label and f.licence.startswith("CC-BY") for f in parsed.figures)
    assert "doi:10." in parsed.source
