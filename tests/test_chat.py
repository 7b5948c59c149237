"""Chatting: the answers that the official command line gives, and what happens when something is amiss."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console

from huatuo_vision import chat
from huatuo_vision.conversation import Conversation, Decoding, described, start
from huatuo_vision.model.conversion import convert
from huatuo_vision.model.folder import load_model
from huatuo_vision.model.merge import save_adapter
from huatuo_vision.schema import UserError
from tests.model.official import Original, write_checkpoint
from tests.model.parts import picture

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GREEDY = Decoding(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "official")


@pytest.fixture(scope="module")
def folder(official: Path) -> Path:
    convert(str(official), official.parent / "converted")
    return official.parent / "converted"


@pytest.fixture(scope="module")
def images(official: Path) -> list[Path]:
    paths = [official.parent / f"scan {n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        picture(40 + 9 * n, 31 - 3 * n, seed=n).save(path)
    return paths


@pytest.fixture
def conversation(folder: Path) -> Conversation:
    return start(folder, CPU, GREEDY)


def silent(text: str) -> None:
    pass


def test_turns_and_images_are_the_official_command_lines(
    official: Path, conversation: Conversation, images: list[Path]
) -> None:
    """With images in a later turn too, and its repetition penalty, which a converted folder brings along."""
    assert conversation.repetition_penalty == 1.2
    original = Original(official)
    history: list[tuple[str, str | None]] = []
    shown: list[Image.Image] = []
    for question, added in (("Is it a cyst?", images[:1]), ("Sure?", []), ("And here?", images[1:]), ("Hm", [])):
        for path in added:
            conversation.add_image(path)
            shown.append(Image.open(path))
        ids = original.huatuo_ids([*history, ("<image>\n" * len(added) + question, None)])
        tokens = original.answer(ids, shown, 12, penalty=1.2)
        pieces: list[str] = []
        answer = conversation.ask(question, pieces.append)
        assert answer == original.tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) == answer
        assert len(pieces) > 1
        history.append(("<image>\n" * len(added) + question, answer))


def test_the_checkpoints_decoding_is_the_default(folder: Path) -> None:
    words = described(start(folder, CPU, Decoding()))
    assert words == (
        "sampling at temperature 0.2, top-k 50, top-p 0.8, repetition penalty 1.2 over the answer, "
        "at most 512 new tokens"
    )
    assert described(start(folder, CPU, Decoding(0.0, 5, 1.0))) == (
        "the likeliest token each time, at most 5 new tokens"
    )


def test_samples_hang_on_the_seed(folder: Path) -> None:
    conversation = start(folder, CPU, Decoding(temperature=5.0, max_new_tokens=8))
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(conversation.ask("Which organ?", silent))
        conversation.clear()
    assert answers[0] == answers[1] != answers[2]


def test_clearing_forgets_turns_and_images(conversation: Conversation, images: list[Path]) -> None:
    first = conversation.ask("Which organ?", silent)
    conversation.add_image(images[0])
    seen = conversation.ask("Which organ?", silent)
    conversation.add_image(images[1])
    conversation.clear()
    assert conversation.ask("Which organ?", silent) == first != seen


def test_a_literal_placeholder_is_text(conversation: Conversation) -> None:
    conversation.ask("What does <image> mean?", silent)
    assert conversation.messages[0]["content"] == [{"type": "text", "text": "What does < image > mean?"}]


def test_a_stopped_answer_counts_as_far_as_it_came(conversation: Conversation) -> None:
    shown: list[str] = []

    def stop_at_the_third(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = conversation.ask("Which organ?", stop_at_the_third)
    assert answer and answer == conversation.messages[-1]["content"]
    whole = start_over(conversation).ask("Which organ?", silent)
    assert whole.startswith(answer) and whole != answer


def start_over(conversation: Conversation) -> Conversation:
    conversation.clear()
    return conversation


def test_a_conversation_too_long_is_said_and_the_question_withdrawn(conversation: Conversation) -> None:
    conversation.ask("Which organ?", silent)
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"has [\d,]+ tokens with its images, and the model reads at most 512"):
        conversation.ask("Which organ is it? " * 200, silent)
    assert conversation.messages == before


def test_an_answer_takes_the_room_that_is_left(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, asked = conversation.model.generate, []

    def record(**arguments: object) -> torch.Tensor:
        asked.append((arguments["input_ids"].shape[1], arguments["generation_config"].max_new_tokens))
        return generate(**arguments)

    monkeypatch.setattr(conversation.model, "generate", record)
    conversation.ask("Which organ? " * 40, silent)
    conversation.decoding.max_new_tokens = 10_000
    conversation.ask("Sure?", silent)
    (_, usual), (length, shortened) = asked
    assert (usual, shortened) == (12, 512 - length)


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_an_image_that_cannot_be_read_is_said(
    conversation: Conversation, images: list[Path], tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "bad.png"
    if damage != "missing":
        path.write_bytes(images[0].read_bytes()[:300] if damage == "cut" else b"no picture")
    with pytest.raises(UserError, match="bad.png"):
        conversation.add_image(path)
    assert not conversation.pending


def chatted(folder: Path, lines: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "huatuo_vision.chat", "--model", str(folder), *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT)


def test_a_pipe_gets_the_answers_alone(folder: Path, images: list[Path]) -> None:
    conversation = start(folder, CPU, GREEDY)
    conversation.add_image(images[0])
    conversation.add_image(images[1])
    first = conversation.ask("Compare", silent)
    second = conversation.ask("Sure?", silent)
    lines = f"/image '{images[1]}'\nCompare\n\nSure?\n/quit\nnever asked\n"
    run = chatted(folder, lines, "--image", str(images[0]), "--temperature", "0", "--max-new-tokens", "12")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{first}\n\n{second}\n\n"
    assert "Warning" not in run.stderr


def test_a_question_is_never_asked_without_its_image(
    conversation: Conversation, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hello = conversation.ask("Hello", silent)
    conversation.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n/image '{images[0]}' nowhere.png\nWhich organ?\n"))
    with pytest.raises(UserError, match="there is no image nowhere.png; check the path"):
        chat.talk(conversation, Console(stderr=True), interactive=False)
    assert capsys.readouterr().out == f"{hello}\n\n"


class TestInteractive:
    """In the process, with lines that a person would type."""

    @pytest.fixture
    def typed(self, monkeypatch: pytest.MonkeyPatch, conversation: Conversation, capsys: pytest.CaptureFixture):
        def run(*lines: str | type[BaseException]) -> tuple[list[str], str, str]:
            prompts, left = [], list(lines)

            def read(prompt: str) -> str:
                prompts.append(prompt.strip())
                if not left:
                    raise EOFError
                line = left.pop(0)
                if isinstance(line, type):
                    raise line
                return line

            monkeypatch.setattr(builtins, "input", read)
            said = io.StringIO()
            chat.talk(conversation, Console(file=said, width=200), interactive=True)
            return prompts, capsys.readouterr().out, said.getvalue()

        return run

    def test_mistakes_are_said_and_the_conversation_goes_on(self, typed, images: list[Path]) -> None:
        prompts, out, said = typed(
            "/image nowhere.png",
            f"/image '{images[0]}' nowhere.png",
            "/image 'x",
            "/nonsense",
            "/image",
            KeyboardInterrupt,
            f"/image '{images[0]}' '{images[1]}'",
            "Which organ?",
            "/clear now",
            "/quit",
            "never asked",
        )
        assert said.count("there is no image nowhere.png; check the path") == 2
        assert "No closing quotation" in said
        assert said.count("is no command; /image FILE ... shows images") == 3
        assert out.count("model: ") == 1
        assert prompts == ["you:"] * 7 + ["you [2 images]:"] + ["you:"] * 2

    def test_an_end_of_input_ends_it(self, typed) -> None:
        assert typed("/help")[2].startswith("/image FILE")

    def test_conversions_are_said(self, typed, tmp_path: Path) -> None:
        Image.new("I;16", (40, 30), 900).save(tmp_path / "deep.png")
        assert "deep.png: 16bit_rescaled" in typed(f"/image {tmp_path}/deep.png")[2]

    def test_an_empty_answer_is_said(self, typed, conversation: Conversation, monkeypatch) -> None:
        monkeypatch.setattr(Conversation, "ask", lambda self, question, show: "")
        assert "the model ended its answer at once" in typed("Hello")[2]


def test_an_adapters_folder_answers_with_the_adapter(folder: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.mlp\.\w+_proj", init_lora_weights=False)
    torch.manual_seed(0)
    save_adapter(get_peft_model(load_model(folder, dtype=torch.float32), lora), tmp_path / "adapter", folder)
    plain = start(folder, CPU, GREEDY).ask("Which organ?", silent)
    adapted = start(tmp_path / "adapter", CPU, GREEDY).ask("Which organ?", silent)
    assert adapted and adapted != plain


def test_flags_that_make_no_sense(folder: Path) -> None:
    run = chatted(folder, "", "--max-new-tokens", "0")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: --max-new-tokens 0 is too small; expected 1 or more\n"
