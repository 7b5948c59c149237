"""Every kind of source into images and pairs: what is good comes through whole, what is bad is counted by its name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datatrove")

import fsspec
from PIL import Image, PngImagePlugin

from data.config import Ingest
from data.executor import LocalRun, start
from data.sources.dicom import read_dicom
from data.sources.images import store_encoded
from data.sources.ingest import ingest_pass, list_units, write_plan
from data.tables import Counts, Pair, RunFolder
from huatuo_vision.schema import BadSample, UserError
from tests.data.test_jats import article, fig, xref


def ingest(folder: Path, where: Path | str, limit: int | None = None, **settings: object) -> RunFolder:
    from rich.console import Console

    from data.config import Executor

    run, settings = RunFolder(folder), Ingest(**settings)
    tasks = write_plan(run, str(where), settings, limit)
    work = ingest_pass(run, str(where), settings, limit, tasks)
    start(run, work, "")
    with LocalRun(Executor(workers=1), Console(quiet=True)) as local:
        local.run(run, work)
    return run


def rows(run: RunFolder) -> dict[str, Pair]:
    return {pair.id: pair for rank in range(run.tasks("ingest")) for pair in run.pairs("ingest", rank)}


def reasons(run: RunFolder) -> dict[str, str]:
    return {dropped.id: dropped.reason for dropped in run.dropped("ingest")}


def picture(seed: int = 0, size: tuple[int, int] = (60, 40), format: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def record(**values: object) -> bytes:
    return json.dumps({"pmcid": "PMC1", "license_code": "CC BY", "is_pmc_openaccess": True} | values).encode()


# Articles ------------------------------------------------------------------------------------------------------------


def test_pmc_layout_folder_of_articles_and_archives_give_the_same_rows(tmp_path):
    xml = article(f"<p>See {xref('f1', '1')}.</p>{fig(1)}{fig(2)}")
    files = {"a.xml": xml, "f1.jpg": picture(1), "f2.png": picture(2, format="PNG")}
    put(tmp_path / "s", {f"PMC1.1/{n}".replace("a.xml", "PMC1.1.xml"): d for n, d in files.items()})
    put(tmp_path / "s", {"PMC1.1/PMC1.1.json": record()})
    put(tmp_path / "s", {f"b/{n}": d for n, d in files.items()})
    with zipfile.ZipFile(tmp_path / "s" / "c.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"inner/{name}", data)
    with tarfile.open(tmp_path / "s" / "d.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"d/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    run = ingest(tmp_path / "run", tmp_path / "s", shard_size=2)
    found = rows(run)
    assert sorted(found) == ["PMC1.1_f1", "PMC1.1_f2", "b--a_f1", "b--a_f2", "c_f1", "c_f2", "d_f1", "d_f2"]
    same = {(p.caption, p.image_ids, p.context, p.licence, p.label) for p in found.values()}
    assert len(same) == 2 and run.tasks("ingest") == 2
    counts = run.counts("ingest")
    assert (counts.rows_in, counts.rows_out, counts.notes["articles"], counts.notes["figures"]) == (8, 8, 4, 8)
    with run.images(0) as images:
        kept = images.get(found["PMC1.1_f1"].image_ids[0])
    assert np.array_equal(Image.open(io.BytesIO(kept)), Image.open(io.BytesIO(files["f1.jpg"])))
    assert pq.ParquetFile(run.images_file(0)).metadata.num_rows == 2  # shown by two articles, stored once a task


def test_the_preferred_of_several_files_is_taken_and_names_need_no_suffix(tmp_path):
    xml = article(fig(1) + fig(2, '<caption><p>T.</p></caption><graphic xlink:href="sub.dir/X-1.TIF"/>'))
    put(tmp_path, {"a/a.xml": xml, "a/f1.tif": picture(1, format="TIFF"), "a/f1.jpg": picture(2)})
    put(tmp_path, {"a/x-1.tif": picture(3, format="TIFF")})
    found = rows(ingest(tmp_path / "run", tmp_path / "a"))
    with RunFolder(tmp_path / "run").images(0) as images:
        assert images.get(found["a_f1"].image_ids[0])[:2] == b"\xff\xd8"
        assert images.get(found["a_f2"].image_ids[0])[1:4] == b"PNG"


def test_every_article_and_figure_that_cannot_be_used_is_counted(tmp_path):
    good = {"f1.jpg": picture()}
    nc = '<license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/>'
    stop = io.BytesIO()
    frames = [Image.new("L", (9, 9), shade) for shade in (0, 99)]
    frames[0].save(stop, "GIF", save_all=True, append_images=frames[1:])
    two = fig(1, '<caption><p>T.</p></caption><graphic xlink:href="f1"/><graphic xlink:href="gone"/>')
    articles = {
        "broken": ({"broken.xml": b"<article>", **good}, {"broken": "broken_xml"}),
        "nolicence": ({"nolicence.xml": article(fig(1), permissions=""), **good}, {"nolicence_f1": "no_licence"}),
        "nc": ({"nc.xml": article(fig(1), permissions=nc), **good}, {"nc_f1": "licence_not_allowed"}),
        "retracted": (
            {"retracted.xml": article(fig(1)), "retracted.json": record(is_retracted=True), **good},
            {"retracted_f1": "retracted"},
        ),
        "closed": (
            {"closed.xml": article(fig(1)), "closed.json": record(is_pmc_openaccess=False), **good},
            {"closed_f1": "not_open_access"},
        ),
        "conflict": (
            {"conflict.xml": article(fig(1)), "conflict.json": record(license_code="CC BY-NC"), **good},
            {"conflict_f1": "licence_conflict"},
        ),
        "badjson": ({"badjson.xml": article(fig(1)), "badjson.json": b"{", **good}, {"badjson": "broken_record"}),
        "zero": ({"zero.xml": article(fig(1)), "f1.jpg": b""}, {"zero_f1": "empty_image"}),
        "cut": ({"cut.xml": article(fig(1)), "f1.jpg": picture()[:500]}, {"cut_f1": "unreadable_image"}),
        "text": ({"text.xml": article(fig(1)), "f1.jpg": b"<html>404</html>"}, {"text_f1": "unreadable_image"}),
        "moving": ({"moving.xml": article(fig(1)), "f1.gif": stop.getvalue()}, {"moving_f1": "animated_image"}),
        "half": ({"half.xml": article(two), **good}, {"half_f1": "missing_image"}),
        "up": (
            {"up.xml": article(fig(1, '<caption><p>T.</p></caption><graphic xlink:href="../zero/f1.jpg"/>'))},
            {"up_f1": "unsafe_path"},
        ),
        "web": (
            {"web.xml": article(fig(1, '<caption><p>T.</p></caption><graphic xlink:href="http://x/f1.jpg"/>'))},
            {"web_f1": "unsafe_path"},
        ),
        "video": ({"video.xml": article(fig(1, "<caption><p>T.</p></caption>"))}, {"video_f1": "no_graphic"}),
        "mute": ({"mute.xml": article(fig(1, '<graphic xlink:href="f1"/>')), **good}, {"mute_f1": "no_text"}),
        "letter": (
            {"letter.xml": article("", back=f"<sub-article><body>{fig(1)}</body></sub-article>"), **good},
            {"letter_f1": "in_sub_article"},
        ),
        "md5": (
            {"md5.xml": article(fig(1)), "md5.json": record(media_urls=[f"s3://b/md5/f1.jpg?md5={'0' * 32}"]), **good},
            {"md5_f1": "checksum_mismatch"},
        ),
        "plain": ({"plain.xml": article("<p>No figure.</p>")}, {}),
    }
    for name, (files, _) in articles.items():
        put(tmp_path / "s" / name, files)
    run = ingest(tmp_path / "run", tmp_path / "s")
    expected = {id_: reason for _, dropped in articles.values() for id_, reason in dropped.items()}
    assert reasons(run) == expected and not rows(run)
    counts = run.counts("ingest")
    assert counts.rows_in == len(expected) == sum(counts.dropped.values())
    assert counts.dropped == dict(sorted(Counter(expected.values()).items()))
    assert counts.notes["articles_without_figures"] == 1


def test_noncommercial_figures_and_sub_articles_come_when_asked_for(tmp_path):
    nc = '<license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/>'
    xml = article("", permissions=nc, back=f"<sub-article><body>{fig(1)}</body></sub-article>")
    put(tmp_path / "s", {"a.xml": xml, "f1.jpg": picture()})
    found = rows(ingest(tmp_path / "run", tmp_path / "s", licences=["CC-BY-NC"], sub_articles=True))
    assert found["a_f1"].licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_lead_out_or_blow_up_are_not_read(tmp_path, kind):
    name = tmp_path / "s" / f"a.{kind}"
    name.parent.mkdir()
    bomb = bytes(64 * 2**20)
    files = {"a/a.xml": article(fig(1) + fig(2)), "a/f1.jpg": picture(), "../evil.xml": article(fig(1))}
    if kind == "zip":
        with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in (files | {"a/f2.png": bomb, "/etc/x.jpg": picture()}).items():
                archive.writestr(member, data)
    else:
        with tarfile.open(name, "w") as archive:
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("a/f2.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    run = ingest(tmp_path / "run", tmp_path / "s")
    assert list(rows(run)) == ["a_f1"]
    assert sorted(reasons(run).values()) == ["missing_image", "unsafe_path"]
    notes = run.counts("ingest").notes
    expected = "archive_bomb" if kind == "zip" else "special_file"
    assert notes[f"archive_member_{expected}"] == 1 and notes["archive_member_unsafe_path"] >= 1


def test_a_broken_archive_and_one_without_an_article_are_counted(tmp_path):
    put(tmp_path / "s", {"a.zip": b"PK\x03\x04 cut", "b.tar.gz": b"\x1f\x8b broken", "ok.xml": article(fig(1))})
    with zipfile.ZipFile(tmp_path / "s" / "c.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    run = ingest(tmp_path / "run", tmp_path / "s")
    assert sorted(reasons(run).values()) == ["broken_archive", "broken_archive", "missing_image", "no_article"]


def test_a_bucket_is_read_through_fsspec_by_list_or_inventory(tmp_path):
    fs = fsspec.filesystem("memory")
    for number in (1, 2, 3):
        media = [f"https://host/PMC{number}.1/f1.jpg?md5={hashlib.md5(picture(number)).hexdigest()}"]
        put_in = {f"PMC{number}.1.xml": article(fig(1)), "f1.jpg": picture(number)}
        put_in[f"PMC{number}.1.json"] = record(media_urls=media)
        for name, data in put_in.items():
            fs.pipe(f"/bucket/PMC{number}.1/{name}", data)
    (tmp_path / "list.txt").write_text("PMC2.1\nPMC3.1\nPMC9.1\n")
    keys = [f'"bucket","PMC1.1/{name}","2026-01-01"' for name in ("PMC1.1.xml", "PMC1.1.json", "f1.jpg")]
    (tmp_path / "inventory.csv").write_text("\n".join(keys))
    whole = ingest(tmp_path / "all", "memory://bucket")
    listed = ingest(tmp_path / "listed", "memory://bucket", articles=str(tmp_path / "list.txt"))
    inventory = ingest(tmp_path / "inventory", "memory://bucket", articles=str(tmp_path / "inventory.csv"))
    assert list(rows(whole)) == [f"PMC{n}.1_f1" for n in (1, 2, 3)]
    assert list(rows(listed)) == ["PMC2.1_f1", "PMC3.1_f1"] and reasons(listed) == {"PMC9.1": "missing_article"}
    assert list(rows(inventory)) == ["PMC1.1_f1"]
    assert list(rows(ingest(tmp_path / "two", "memory://bucket", limit=2))) == ["PMC1.1_f1", "PMC2.1_f1"]


@pytest.mark.parametrize("text", ["", "hello there\n", "PMC1.1\n../x.xml\n"])
def test_a_list_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=r"ingest\.articles: .*list\.txt"):
        list(list_units(str(tmp_path), Ingest(articles=str(tmp_path / "list.txt")), None))


@pytest.mark.parametrize(("kind", "expected"), [("articles", "JATS"), ("pairs", r"\*\.jsonl, \*\.csv or \*\.parquet")])
def test_a_source_without_anything_to_read_is_refused(tmp_path, kind, expected):
    with pytest.raises(UserError, match=expected):
        list(list_units(str(tmp_path), Ingest(kind=kind), None))
    with pytest.raises(UserError, match="does not exist"):
        list(list_units(str(tmp_path / "gone"), Ingest(kind=kind), None))


# Pairs ---------------------------------------------------------------------------------------------------------------


def lines(*rows_of: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows_of)


def test_json_lines_and_parquet_give_the_same_rows_in_any_cut(tmp_path):
    made = [
        {"id": f"r{n}", "image": f"i/{n}.jpg", "caption": f"Caption {n}", "context": [f"Text {n}"], "licence": "own"}
        for n in range(7)
    ]
    for n in range(7):
        put(tmp_path / "a" / "i", {f"{n}.jpg": picture(n)})
    put(tmp_path / "a", {"rows.jsonl": lines(*made)})
    embedded = [row | {"image": {"bytes": picture(n), "path": "x"}} for n, row in enumerate(made)]
    (tmp_path / "b").mkdir()
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "b" / "rows.parquet", row_group_size=3)
    found = [
        rows(ingest(tmp_path / f"run{n}", tmp_path / source, kind="pairs", shard_size=size))
        for n, (source, size) in enumerate([("a", 2), ("a", 100), ("b", 2), ("b", 100), ("a/rows.jsonl", 3)])
    ]
    assert len(found[0]) == 7 and all(other == found[0] for other in found)
    assert found[0]["r3"].context == ("Text 3",) and found[0]["r3"].article == "r3"
    assert len(rows(ingest(tmp_path / "limited", tmp_path / "a", limit=5, kind="pairs", shard_size=2))) == 5


def test_each_bad_row_is_counted_and_the_others_come_through(tmp_path):
    put(tmp_path / "s", {"ok.jpg": picture(), "zero.jpg": b"", "red.png": _plain(), "rows.jsonl": b""})
    good = {"image": "ok.jpg", "caption": "A caption", "licence": "own"}
    made = lines(
        {"id": "good", **good},
        {"id": "good", **good},
        {"id": "two", **good | {"image": ["ok.jpg", "ok.jpg"]}},
        {"id": "html", **good | {"caption": "<p>An <b>X-ray</b> &amp; more</p><script>x()</script>"}},
        {"id": "half \ud83d", **good | {"caption": "half a pair: \ud83d."}},
        b'{"id": "cut", "image": ',
        b"",
        b"[1, 2]",
        b'{"id": "latin", "caption": "\xe9"}',
        {**good},
        {"id": "list", **good | {"caption": ["x"]}},
        {"id": "mute", **good | {"caption": " "}},
        {"id": "free", **good | {"licence": None}},
        {"id": "gone", **good | {"image": "gone.jpg"}},
        {"id": "up", **good | {"image": "../ok.jpg"}},
        {"id": "root", **good | {"image": "/etc/passwd"}},
        {"id": "zero", **good | {"image": "zero.jpg"}},
        {"id": "none", **good | {"image": None}},
        {"id": "red", **good | {"image": "red.png"}},
    )
    put(tmp_path / "s", {"rows.jsonl": made})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", shard_size=100)
    found = rows(run)
    assert len(found) == 4 and len(found["two"].image_ids) == 2
    assert found["html"].caption == "An X-ray & more"
    assert next(p for id_, p in found.items() if id_.startswith("half")).caption == "half a pair: ?."
    assert reasons(run) == {
        "good": "duplicate_id",
        "rows.jsonl:6": "broken_json",
        "rows.jsonl:7": "broken_json",
        "rows.jsonl:8": "broken_json",
        "rows.jsonl:9": "broken_json",
        "rows.jsonl:10": "malformed_row",
        "list": "malformed_row",
        "mute": "no_text",
        "free": "no_licence",
        "gone": "missing_image",
        "up": "unsafe_path",
        "root": "unsafe_path",
        "zero": "empty_image",
        "none": "malformed_row",
        "red": "blank_image",
    }
    assert run.counts("ingest").rows_in == 19 and run.counts("ingest").notes["html_removed"] == 1


def _plain() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_columns_and_a_common_licence_are_settings(tmp_path):
    put(tmp_path / "s", {"a.jpg": picture(), "r.jsonl": lines({"study": 7, "file": "a.jpg", "report": "A report"})})
    columns = {"id": "study", "image": "file", "caption": "report"}
    found = rows(
        ingest(tmp_path / "run", tmp_path / "s", kind="pairs", columns=columns, licence="in-house", source="H")
    )
    assert (found["7"].licence, found["7"].source, found["7"].caption) == ("in-house", "H", "A report")


def test_a_parquet_file_of_other_columns_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="columns text; expected also id, image, caption"):
        list(list_units(str(tmp_path), Ingest(kind="pairs"), None))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="can't be read as Parquet"):
        list(list_units(str(tmp_path), Ingest(kind="pairs"), None))


# Pictures ------------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_picture_is_its_pixels_alone():
    exif = Image.Exif()
    exif[0x010E] = "PATIENT NAME"
    jpeg = picture(exif=exif, comment=b"PATIENT NAME", quality=90)
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", "PATIENT NAME")
    png = picture(format="PNG", pnginfo=text, exif=exif)
    for encoded in (jpeg, png):
        kept, notes = store_encoded(encoded, "x")
        assert b"PATIENT" in encoded and b"PATIENT" not in kept.data and notes == ()
        assert np.array_equal(Image.open(io.BytesIO(kept.data)), Image.open(io.BytesIO(encoded)))


def test_a_picture_s_id_is_that_of_its_pixels():
    kept = [store_encoded(picture(3, format=f), "x")[0] for f in ("PNG", "TIFF", "BMP")]
    assert len({image.id for image in kept}) == 1 and {image.path[-4:] for image in kept} == {".png"}
    assert store_encoded(picture(4, format="PNG"), "x")[0].id != kept[0].id


def test_a_rotated_photograph_and_cmyk_are_stored_upright_and_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6
    kept, notes = store_encoded(picture(size=(60, 40), exif=exif), "x")
    assert notes == ("exif_rotated",) and (kept.width, kept.height) == (40, 60) and kept.path.endswith(".png")


def dicom(values: np.ndarray, **tags: object) -> bytes:
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "4711"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def test_dicom_goes_through_the_window_of_the_file_or_the_configuration():
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    windowed = dicom(RAMP, **hounsfield, WindowCenter=[40, 300], WindowWidth=[400, 1500])
    picture, how = read_dicom(windowed, "x", None)
    grey = np.asarray(picture).reshape(-1)
    assert how == "dicom_window_of_file"
    # Hounsfield -160 and below are black, 240 and above white (DICOM PS3.3 C.11.2.1.2).
    assert (grey[1024 - 161], grey[1024 + 240], grey[1024 + 40]) == (0, 255, 128)
    given, how = read_dicom(windowed, "x", (300, 1500))
    assert how == "dicom_window_given" and np.asarray(given).reshape(-1)[1024 + 240] < 255
    full, how = read_dicom(dicom(RAMP), "x", None)
    assert how == "dicom_full_range" and np.asarray(full).reshape(-1)[[0, 4095]].tolist() == [0, 255]


def test_dicom_of_inverted_grey_comes_out_upright():
    inverted, _ = read_dicom(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"), "x", None)
    assert np.asarray(inverted).reshape(-1)[[0, 4095]].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2}, "animated_image"),
        ({"BurnedInAnnotation": "YES"}, "burned_in_text"),
        ({"PixelData": b"\0" * 64}, "unreadable_image"),
        ({"Rows": 65535, "Columns": 65535}, "image_too_large"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "unreadable_image"),
    ],
)
def test_dicom_that_cannot_be_used_says_why(tags, reason):
    with pytest.raises(BadSample) as refused:
        read_dicom(dicom(RAMP, **tags), "x", None)
    assert refused.value.reason == reason


def test_nothing_of_a_dicom_header_reaches_the_run_folder(tmp_path):
    put(tmp_path / "s", {"1.dcm": dicom(RAMP), "cut.dcm": dicom(RAMP)[:300]})
    put(tmp_path / "s", {"rows.jsonl": lines(*({"id": n, "image": f"{n}.dcm", "caption": "CT"} for n in ("1", "cut")))})
    run = ingest(tmp_path / "run", tmp_path / "s", kind="pairs", licence="own")
    assert list(rows(run)) == ["1"] and reasons(run) == {"cut": "unreadable_image"}
    assert run.counts("ingest").notes == {"image_dicom_full_range": 1}
    everything = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert b"Doe" not in everything and b"4711" not in everything


# Real data -----------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("HUATUO_SAMPLES" not in os.environ, reason="needs the real samples")


@real
def test_real_articles_in_all_layouts(tmp_path):
    run = ingest(tmp_path / "run", Path(os.environ["HUATUO_SAMPLES"]) / "jats_sample", sub_articles=True)
    counts = run.counts("ingest")
    assert counts == Counts(8, 4, {"missing_image": 4}, counts.notes, counts.seconds)
    assert counts.notes["articles"] == 3 and counts.notes["figure_references"] == 28
    assert {id_.rsplit("_", 1)[0] for id_ in reasons(run)} == {"1471-2180-11-174"}


@real
def test_real_figures_all_come_through(tmp_path):
    source = Path(os.environ["HUATUO_SAMPLES"]) / "real_sample"
    run = ingest(tmp_path / "run", source, kind="pairs", shard_size=50)
    assert len(rows(run)) == 104 and run.counts("ingest").dropped == {} and run.tasks("ingest") == 3
