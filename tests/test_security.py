"""What comes from users, the Hub and data is never executed, never leaks a key, and carries no header along."""

import ast
import base64
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from huatuo_vision.evaluation.endpoint import data_uri
from huatuo_vision.inputs.images import load_image, without_headers
from huatuo_vision.redaction import redact
from huatuo_vision.schema import ImageRef

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "train.py", ROOT / "eval.py"]
SOURCES += sorted(path for folder in ("huatuo_vision", "data", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TEMPLATES = sorted(path for folder in ("huatuo_vision", "data") for path in (ROOT / folder).rglob("*.html.jinja"))
REQUIREMENTS = [*ROOT.glob("requirements*.txt"), *ROOT.glob("benchmarks/requirements*.txt")]
TOKEN = "hf_" + "notARealToken0" * 3

# Modules that run what they read, and calls that do.
PICKLING = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RUNNING = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load"}
RUNNING |= {"pd.read_pickle", "pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput"}
RUNNING |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
SWITCHES = {"shell", "trust_remote_code", "allow_pickle"}  # as a keyword, with anything but False


def dangers(source: str) -> list[str]:
    """Everything in a source text that could run text of others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in RUNNING or called.endswith((".extractall", ".read_pickle")) else []
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                found += [f"{keyword.arg}="] if keyword.arg in SWITCHES and not off else []
                if keyword.arg == "weights_only" and off:
                    found.append("weights_only=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_others_is_run(path):
    assert not dangers(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=recipe.trust)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
        "zipfile.ZipFile(path).extractall(folder)",
        "accelerator.load(path, weights_only=False)",
    ],
)
def test_the_scan_sees_what_it_is_there_for(line):
    assert dangers(f"def f():\n    return {line}" if "import" not in line.split()[0::2] else line)


# Keys


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (f"GET https://user:{TOKEN}@huggingface.co/x failed", "GET https://huggingface.co/x failed"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: Bearer ***"),
        ("my0own0key is in the text", "*** is in the text"),
        ("its token is a0trackers0token", "its token is ***"),
        ("mysql://me:pass@word@host/x or 'http://a:b@c'", "mysql://host/x or 'http://c'"),
        ("see https://host/a, mail me@host", "see https://host/a, mail me@host"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_redaction(text, after, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "my0own0key")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a0trackers0token")
    assert redact(text) == after


@pytest.mark.parametrize("kind", ["UserError", "ConnectionError", "OSError"])
def test_no_command_says_a_key(kind):
    """As a user's mistake, as an unforeseen error with its traceback and cause, and on a full disk."""
    said = f"https://me:{TOKEN}@host/ with {TOKEN} or my0own0key"
    raised = {"UserError": f"UserError({said!r})", "ConnectionError": f"ConnectionError({said!r})"}
    raised["OSError"] = f"OSError({errno.ENOSPC}, 'No space left on device', {said!r})"
    code = (
        "from huatuo_vision.cli import run_command\nfrom huatuo_vision.schema import UserError\n"
        f"def main():\n    try:\n        raise ValueError({said!r})\n    except ValueError as cause:\n"
        f"        raise {raised[kind]} from cause\nrun_command(main)\n"
    )
    environment = os.environ | {"HF_TOKEN": "my0own0key", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == (1 if kind == "ConnectionError" else 2)
    assert TOKEN not in done.stderr and "my0own0key" not in done.stderr and "***" in done.stderr
    assert ("Traceback" in done.stderr) == (kind == "ConnectionError")


# Headers of pictures


def with_headers(kind: str) -> bytes:
    exif, text, buffer = Image.Exif(), PngImagePlugin.PngInfo(), io.BytesIO()
    exif[0x010E] = exif[0x013B] = "PATIENT NAME"
    text.add_text("Comment", "PATIENT NAME")
    extra = {"JPEG": {"comment": b"PATIENT NAME"}, "PNG": {"pnginfo": text}, "WEBP": {"xmp": b"PATIENT NAME"}}[kind]
    Image.new("RGB", (40, 30), "teal").save(buffer, kind, exif=exif, icc_profile=b"PATIENT NAME", **extra)
    assert b"PATIENT NAME" in buffer.getvalue()
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_loaded_picture_carries_no_header_into_what_is_saved_of_it(kind):
    picture = load_image(ImageRef(data=with_headers(kind)), "x").image
    for saved_as in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        saved = io.BytesIO()
        picture.save(saved, saved_as)
        assert b"PATIENT" not in saved.getvalue(), saved_as


def jpeg_with_more(**options) -> bytes:
    """Coded in several scans or with restarts, a comment before its last scan or its end, and more behind its end."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, **options)
    encoded = buffer.getvalue()
    at = encoded.rindex(b"\xff\xda") if options.get("progressive") else encoded.rindex(b"\xff\xd9")
    return encoded[:at] + b"\xff\xfe\x00\x0ePATIENT NAME" + encoded[at:] + b"PATIENT NAME"


@pytest.mark.parametrize(
    "encoded",
    [
        with_headers("JPEG"),
        with_headers("PNG"),
        with_headers("PNG") + b"PATIENT NAME",
        jpeg_with_more(),
        jpeg_with_more(progressive=True),
        jpeg_with_more(restart_marker_blocks=2),
    ],
    ids=["jpeg", "png", "png and more", "jpeg and more", "progressive", "restarts"],
)
def test_a_file_is_kept_and_sent_without_its_headers(encoded):
    """As the data builder keeps it and an endpoint is sent it: the same pixels and nothing else."""
    ref = ImageRef(data=encoded)
    kept, _ = without_headers(encoded)
    for data in (kept, base64.b64decode(data_uri(ref, "x").partition(",")[2])):
        assert b"PATIENT" not in data and len(data) < len(encoded)
        assert load_image(ImageRef(data=data), "x").image.tobytes() == load_image(ref, "x").image.tobytes()


def test_a_file_of_an_odd_layout_is_not_kept_as_it_is():
    encoded = jpeg_with_more()
    at = encoded.index(b"\xff\xda")
    assert without_headers(encoded[:at] + b"\x00" + encoded[at:]) is None
    assert without_headers(encoded[: at + 40]) is None
    assert without_headers(b"GIF89a") is None


# Pages


def test_there_are_pages():
    assert len(TEMPLATES) >= 4


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_leave_escaping_on_and_quote_every_attribute(template):
    text = template.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", text)
    assert not re.search(r"=\{\{", text), "an attribute without quotes ends at the first space of its value"
    # In the script, text of others goes in as text: never as markup.
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert dangerous not in text, dangerous


def test_pages_are_rendered_in_one_place():
    """Whoever names a page's file renders it with `render_page`, which escapes."""
    naming = [path for path in SOURCES if re.search(r"""\.html["']""", path.read_text())]
    assert naming
    assert not [path.name for path in naming if "render_page" not in path.read_text()]


# Packages


def test_every_package_is_pinned_to_one_version():
    lines = [line.split("#")[0].strip() for path in REQUIREMENTS for line in path.open()]
    wanted = [line for line in lines if line]
    assert len(wanted) > 30
    assert not [line for line in wanted if not re.fullmatch(r"[A-Za-z0-9_.\[\]-]+==[A-Za-z0-9.+]+", line)]
