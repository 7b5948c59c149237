"""What the README tells people to type exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("accelerate launch", "python -m", "python eval.py", "make "))
]


def test_there_are_commands():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_files_and_flags_exist(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    for word in words:
        if word.startswith("recipes/") or word in ("train.py", "eval.py"):
            assert (ROOT / word).is_file(), word
    program = ["-m", words[2]] if words[1] == "-m" else [next(w for w in words if w in ("train.py", "eval.py"))]
    after = words[words.index(program[-1]) + 1 :]
    helped = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for flag in (word for word in after if word.startswith("--")):
        assert re.search(rf"{flag}\b", helped.stdout), flag


def test_the_map_names_what_is_there():
    tree = next(block for block in BLOCKS if "train.py, eval.py" in block)
    for line in tree.splitlines():
        entry = line.split()[0] if line.strip() else ""
        inside = "huatuo_vision" if line.startswith("  ") and not line.startswith("   ") else "."
        for name in (entry.rstrip(","),):
            if name and (name.endswith(("/", ".py"))):
                assert (ROOT / inside / name).exists(), name


def test_the_demo_table_is_filled_in():
    printed = next(block for block in BLOCKS if "with and without the picture" in block)
    assert all(subject in printed for subject in ("body_part", "count", "finding", "modality", "side", "size", "all"))
