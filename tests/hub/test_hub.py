"""Pushing model folders through the real client to a Hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCardData

from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
PUBLIC = {"private": False, "license": "apache-2.0"}
PRIVATE = {"private": True, "license": "apache-2.0"}
TOKEN_LIKE = "hf_" + "Zq7" * 11
RUN = {
    "schema": 1,
    "recipe": "tiny",
    "fingerprint": "0123456789abcdef",
    "phase": "align",
    "overrides": ["seed=3", "data.local.path=/mnt/share/my pictures/set.json"],
    "started": "2025-01-01T00:00:00Z",
    "finished": "2025-01-01T01:02:03Z",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "a" * 40,
    "dirty": False,
    "host": "gpu-17.hospital.example",
    "hardware": {"device": "cpu", "world_size": 2, "distributed_type": "MULTI_CPU", "hostname": "gpu-17"},
    "image_backend": "pil",
    "base_models": {
        "vision_encoder": {"id": "openai/clip-vit-large-patch14-336", "revision": "c" * 40},
        "language_model": {"path": "/mnt/share/models/my-llm"},
    },
    "data": {
        "pubmedvision": {
            "adapter": "pubmedvision",
            "hub_id": "FreedomIntelligence/PubMedVision",
            "revision": "d" * 40,
            "rows": 12345,
            "kept": 12300,
            "dropped": {"overlong": 40, "wrong_role": 5},
            "synthetic": False,
        },
        "local": {
            "adapter": "messages",
            "path": "/mnt/share/my pictures/set.json",
            "sha256": {"/mnt/share/my pictures/set.json": "e" * 64},
            "rows": 7,
            "kept": 7,
            "dropped": {},
        },
    },
    "phases": {
        "align": {
            "fingerprint": "0123456789abcdef",
            "train": {"projector": {"lr": 1e-3}, "vision_encoder": False},
            "samples": 12288,
            "optimizer_steps": 48,
            "global_batch_size": 256,
            "supervised_tokens": 98765,
            "epochs": 1,
            "trainable_parameters": {"projector": 2112},
            "final_loss": 1.25,
            "train_seconds": 12.5,
        }
    },
}
RECIPE = "name: tiny\ndata:\n  local: {adapter: messages, path: /mnt/share/my pictures/set.json}\nhub: {license: mit}\n"


class Client:
    """`tests/hub/client.py` in its own process; `client.push(...)` calls its `push`."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, "-m", "tests.hub.client"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda **arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RemoteError(answer)
        return answer["result"]

    def stop(self) -> None:
        self.process.kill()  # leaving politely, it would take torch seconds
        self.process.communicate()

    def refused(self, folder: Path, repo: str, **options: Any) -> str:
        """The sentence with which a push is refused as a mistake of the user's."""
        with pytest.raises(RemoteError) as raised:
            self.push(folder=str(folder), repo_id=repo, **options)
        assert raised.value.type == "UserError", raised.value
        return one_sentence(str(raised.value))


class RemoteError(Exception):
    def __init__(self, answer: dict[str, Any]):
        super().__init__(answer["error"])
        self.type = answer["type"]


def one_sentence(text: str) -> str:
    assert text and "\n" not in text and len(text) < 500 and "Traceback" not in text, text
    return text


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub) -> Iterator[FakeHub]:
    yield server
    server.failures.clear()


@pytest.fixture(scope="module")
def client(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(server.environment(tmp_path_factory.mktemp("hub_home")))
    yield client
    client.stop()


@pytest.fixture(scope="module")
def model(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    assert client.make_model(folder=str(folder)) < 100_000
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return write_run(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A folder that pushes like a model, for tests that never load it."""
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "light" / "model.safetensors").write_bytes(b"weights")
    return write_run(tmp_path / "light")


def write_run(folder: Path, recipe_text: str = RECIPE, **changes: Any) -> Path:
    (folder / "run.json").write_text(json.dumps(RUN | changes))
    (folder / "recipe.yaml").write_text(recipe_text)
    return folder


def card_of(hub: FakeHub, repo: str, revision: str = "main") -> tuple[dict[str, Any], str]:
    """The card's metadata and its body."""
    _, metadata, body = hub.files(repo, revision=revision)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), body


# Pushing


def test_main_and_phase_revision_load_back_bit_equal(hub: FakeHub, client: Client, folder: Path) -> None:
    client.push(folder=str(folder), repo_id="org/loads", revision="align", **PRIVATE)
    url = client.push(folder=str(folder), repo_id="org/loads", **PRIVATE)
    assert url == f"{hub.url}/org/loads/commit/{hub.repos['models', 'org/loads'].branches['main'].id}"
    for revision in ("main", "align"):
        loaded = client.load_model(repo_id="org/loads", revision=revision, folder=str(folder))
        assert loaded == {
            "class": "LlavaForConditionalGeneration",
            "equal": True,
            "template": "{{ messages[0]['content'] }}",
            "image_tokens": 4,
            "logits": [1, 15, 64],
        }


def test_exactly_a_model_s_files_go_up(hub: FakeHub, client: Client, folder: Path) -> None:
    for name in ("notes.log", ".DS_Store", "modeling_llava.py", "README.md"):
        (folder / name).write_text("stays here")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"stays here")
    client.push(folder=str(folder), repo_id="org/files", **PRIVATE)
    pushed = hub.files("org/files")
    made = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "chat_template.jinja",
    }
    made |= {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tools.jinja"}
    assert pushed.keys() == made | {"run.json", "recipe.yaml", "README.md", ".gitattributes"}
    assert all(pushed[name] == (folder / name).read_bytes() for name in made)
    assert b"stays here" not in pushed["README.md"]
    for name in (b"notes.log", b".DS_Store", b"modeling_llava.py", b"checkpoint-5"):
        assert not any(name in request.body or name in request.path.encode() for request in hub.requests)


def test_scores_go_up_with_the_model_and_into_its_card(hub: FakeHub, client: Client, light: Path) -> None:
    (light / ".eval_results").mkdir()
    (light / ".eval_results" / "huatuo-slake.yaml").write_text("- value: 0.5\n")
    (light / ".eval_results" / "secret.txt").write_text("not pushed")
    scored = EvalResult(
        task_type="visual-question-answering", dataset_type="org/set", dataset_name="SLAKE", metric_type="accuracy",
        metric_name="accuracy (micro)", metric_value=0.5, metric_args={"protocol": "default", "protocol_hash": "ab12"},
    )  # fmt: skip
    card = ModelCardData(model_name="anything", eval_results=[scored])
    (light / "README.md").write_text(f"---\n{card.to_yaml()}\n---\nnot pushed either\n")
    client.push(folder=str(light), repo_id="org/scored", **PRIVATE)
    assert ".eval_results/huatuo-slake.yaml" in hub.files("org/scored")
    assert ".eval_results/secret.txt" not in hub.files("org/scored")
    data, text = card_of(hub, "org/scored")
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "| SLAKE | accuracy (micro) | 0.5 | default ab12 |" in text
    assert "not pushed either" not in text and "no evaluation scores" not in text


def test_local_paths_and_host_names_stay_here(hub: FakeHub, client: Client, folder: Path) -> None:
    client.push(folder=str(folder), repo_id="org/paths", **PRIVATE)
    pushed = hub.files("org/paths")
    for name, content in pushed.items():
        for private in (b"/mnt/share", b"my pictures", b"gpu-17", str(folder.parent).encode(), b"made0/model"):
            assert private not in content, (name, private)
    run, recipe = json.loads(pushed["run.json"]), yaml.safe_load(pushed["recipe.yaml"])
    assert run["data"]["local"]["path"] == recipe["data"]["local"]["path"] == "set.json"
    assert run["overrides"] == ["seed=3", "data.local.path=set.json"]
    assert run["data"]["local"]["sha256"] == {"set.json": "e" * 64}
    assert run["phases"] == RUN["phases"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/data/x", "x"),
        ("/data/my pictures/x/", "x"),
        ("data.a.path=/data/x", "data.a.path=x"),
        ("~/x/y", "y"),
        ("~someone/x/y", "y"),
        ("//nas/share/y", "y"),
        ("gpu-17:/data/x", "x"),
        ("file:///data/x", "x"),
        (r"C:\Users\me\x", "x"),
        ("read /data/x, then (/data/y) and [/data/z]", "read x, then (y) and [z]"),
        ("data.a.paths=[/data/x, '/data/y']", "data.a.paths=[x, 'y']"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("hf://datasets/org/name", "hf://datasets/org/name"),
        ("org/name and relative/path/x", "org/name and relative/path/x"),
        ("either/or, 1/2", "either/or, 1/2"),
        (r"a\nb", r"a\nb"),
    ],
)
def test_absolute_paths_are_cut(client: Client, before: str, after: str) -> None:
    assert client.call(function="_without_local_paths", arguments=[{"k": [before]}], options={}) == {"k": [after]}


def test_pushing_again_changes_nothing(hub: FakeHub, client: Client, light: Path) -> None:
    first = client.push(folder=str(light), repo_id="org/again", **PRIVATE)
    uploads = len(hub.sent("PUT", "/lfs/"))
    assert client.push(folder=str(light), repo_id="org/again", **PRIVATE) == first
    assert client.push(folder=str(light), repo_id="org/again", overwrite=True, **PRIVATE) == first
    assert len(hub.sent("POST", "org/again/commit/main")) == 1
    assert len(hub.sent("PUT", "/lfs/")) == uploads


def test_a_phase_revision_does_not_inherit_main_s_model(hub: FakeHub, client: Client, light: Path) -> None:
    (light / "vocab.json").write_text("{}")
    client.push(folder=str(light), repo_id="org/branch", **PRIVATE)
    (light / "vocab.json").unlink()
    write_run(light, phase="instruct", fingerprint="f" * 16)
    client.push(folder=str(light), repo_id="org/branch", revision="instruct", **PRIVATE)
    assert "vocab.json" not in hub.files("org/branch", revision="instruct")
    assert json.loads(hub.files("org/branch")["run.json"])["phase"] == "align"


def test_the_commit_replaces_only_what_was_looked_at(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/parent", **PRIVATE)
    [commit] = hub.sent("POST", "org/parent/commit/main")
    header = json.loads(commit.body.splitlines()[0])["value"]
    assert header["parentCommit"] == hub.repos["models", "org/parent"].branches["main"].parent.id


# Refusing to overwrite


@pytest.mark.parametrize("change", [{"fingerprint": "f" * 16}, {"phase": "instruct"}])
def test_another_model_is_not_overwritten_silently(
    hub: FakeHub, client: Client, light: Path, change: dict[str, str]
) -> None:
    repo = f"org/other-{next(iter(change))}"
    (light / "model.safetensors").rename(light / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (light / "model.safetensors.index.json").write_text(json.dumps(index))
    client.push(folder=str(light), repo_id=repo, **PRIVATE)
    before = hub.files(repo)

    (light / "model.safetensors.index.json").unlink()
    (light / "model-00001-of-00001.safetensors").rename(light / "model.safetensors")
    write_run(light, **change)
    sentence = client.refused(light, repo, **PRIVATE)
    for part in (repo, "revision main", "holds phase align of tiny (fingerprint 0123456789abcdef)", "--overwrite"):
        assert part in sentence
    assert hub.files(repo) == before

    client.push(folder=str(light), repo_id=repo, overwrite=True, **PRIVATE)
    after = hub.files(repo)
    assert json.loads(after["run.json"])["phase"] == change.get("phase", "align")
    # A shard left over would be loaded together with the new weights, or instead of them.
    assert [name for name in after if "safetensors" in name] == ["model.safetensors"]


def test_other_weights_of_the_same_recipe_are_not_overwritten(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/weights", **PRIVATE)
    (light / "model.safetensors").write_bytes(b"weights of another run")
    assert "other weights of phase align" in client.refused(light, "org/weights", **PRIVATE)
    assert hub.files("org/weights")["model.safetensors"] == b"weights"


def test_a_renamed_recipe_and_a_new_license_update_text_only(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/renamed", **PRIVATE)
    client.push(folder=str(write_run(light, recipe="new")), repo_id="org/renamed", private=True, license="mit")
    metadata, body = card_of(hub, "org/renamed")
    assert metadata["license"] == "mit" and "# new" in body.splitlines()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.safetensors", b"theirs", "without a run.json"),
        ("README.md", b"# a card", "without a run.json"),
        ("run.json", b"[]", "cannot be read"),
    ],
)
def test_a_model_of_unknown_origin_is_not_overwritten(
    hub: FakeHub, client: Client, light: Path, name: str, content: bytes, found: str
) -> None:
    repo = f"org/unknown-{name}"
    client.call(function="create_repo", arguments=[repo], options={"private": True})
    for path, data in {"model.safetensors": b"theirs", name: content}.items():
        file = light.parent / "theirs"
        file.write_bytes(data)
        upload = {"path_or_fileobj": str(file), "path_in_repo": path, "repo_id": repo}
        client.call(function="upload_file", arguments=[], options=upload)
    assert found in client.refused(light, repo, **PRIVATE)
    assert hub.files(repo)[name] == content
    client.push(folder=str(light), repo_id=repo, overwrite=True, **PRIVATE)
    assert hub.files(repo)["model.safetensors"] == b"weights"


def test_a_private_push_never_lands_in_a_public_repository(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/public", **PUBLIC)
    client.push(folder=str(light), repo_id="org/closed", **PRIVATE)
    (light / "config.json").write_text('{"model_type": "llava", "new": true}')
    assert "is public" in client.refused(light, "org/public", **PRIVATE)
    assert "is private" in client.refused(light, "org/closed", **PUBLIC)
    assert b"new" not in hub.files("org/public")["config.json"] + hub.files("org/closed")["config.json"]


# Failing without losing anything


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ({"status": 500, "method": "POST", "path": "/commit/"}, "answered 500 to POST"),
        ({"status": 503, "method": "PUT", "path": "/lfs/", "times": 100}, "answered 503 to PUT /lfs/"),
        ({"status": 412, "method": "POST", "path": "/commit/"}, "someone else pushed"),
        ({"status": 502, "method": "POST", "path": "/api/repos/create"}, "answered 502 to POST"),
    ],
)
def test_a_failing_hub_is_reported_and_the_redo_command_works(
    hub: FakeHub, client: Client, light: Path, failure: dict[str, Any], expected: str
) -> None:
    repo = f"org/fails-{failure['status']}"
    weights = f"weights for {repo}".encode()  # not yet on the server
    (light / "model.safetensors").write_bytes(weights)
    before = {path: path.read_bytes() for path in light.iterdir()}
    hub.fail_next(**failure, message=f"trouble with {hub.token} and {TOKEN_LIKE}")
    result = client.try_push(folder=str(light), repo_id=repo, revision="align", **PRIVATE)
    assert (result["ok"], result["url"]) == (False, None)
    assert expected in one_sentence(result["error"])
    assert hub.token not in str(result) and TOKEN_LIKE not in str(result) and "signature=" not in str(result)
    assert {path: path.read_bytes() for path in light.iterdir()} == before
    if ("models", repo) in hub.repos:
        assert "model.safetensors" not in hub.files(repo, revision="align")

    hub.failures.clear()
    python, _, module, *arguments = shlex.split(result["redo_command"])
    assert (python, module) == ("python", "huatuo_vision.hub")
    assert client.command(arguments=arguments).startswith(f"{hub.url}/{repo}/commit/")
    assert hub.files(repo, revision="align")["model.safetensors"] == weights


def test_transient_failures_are_retried_by_the_client(hub: FakeHub, client: Client, light: Path) -> None:
    (light / "model.safetensors").write_bytes(b"weights that are sent twice")
    hub.fail_next(503, method="PUT", path="/lfs/", times=2)
    assert client.try_push(folder=str(light), repo_id="org/retried", **PRIVATE)["ok"]


def test_a_slow_hub_is_waited_for_and_a_silent_one_is_not(hub: FakeHub, client: Client, light: Path) -> None:
    client.set_patience(seconds=1.0)
    try:
        hub.stall_next(0.5, method="POST", path="/commit/")
        assert client.try_push(folder=str(light), repo_id="org/slow", **PRIVATE)["ok"]
        hub.stall_next(2.0, method="POST", path="/commit/")
        result = client.try_push(folder=str(light), repo_id="org/silent", **PRIVATE)
    finally:
        client.set_patience(seconds=120.0)
    assert not result["ok"] and "Timeout" in one_sentence(result["error"])
    assert "--repo org/silent" in result["redo_command"]


@pytest.mark.parametrize("token", [None, "hf_" + "wrong0token" * 3])
def test_a_missing_or_wrong_token_is_one_sentence(hub: FakeHub, client: Client, light: Path, token: str | None) -> None:
    client.set_token(token=token)
    try:
        result = client.try_push(folder=str(light), repo_id="org/token", **PRIVATE)
    finally:
        client.set_token(token=hub.token)
    assert not result["ok"] and ("models", "org/token") not in hub.repos
    sentence = one_sentence(result["error"])
    assert "org/token" in sentence and "401" in sentence and "HF_TOKEN" in sentence
    assert token is None or token not in str(result)


def test_no_hub_at_all_is_reported(light: Path, tmp_path: Path) -> None:
    with FakeHub() as gone:
        environment = gone.environment(tmp_path)
    client = Client(environment)
    result = client.try_push(folder=str(light), repo_id="org/gone", **PRIVATE)
    client.stop()
    assert not result["ok"] and "ConnectError" in one_sentence(result["error"])


def test_a_license_that_the_hub_does_not_know_is_reported(client: Client, light: Path) -> None:
    result = client.try_push(folder=str(light), repo_id="org/license", private=True, license="My own!")
    assert "license" in one_sentence(result["error"])


def test_the_command_line(hub: FakeHub, client: Client, light: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        base = [sys.executable, "-m", "huatuo_vision.hub", "--folder", str(light)]
        environment = hub.environment(tmp_path)
        return subprocess.run([*base, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

    assert command("--repo", "org/cli").returncode == 0
    assert hub.repos["models", "org/cli"].private
    assert card_of(hub, "org/cli")[0]["license"] == "mit"  # the recipe's
    (light / "recipe.yaml").write_text("name: tiny\n")
    refused = command("--repo", "org/cli")
    assert refused.returncode == 2 and "license" in one_sentence(refused.stderr.strip())


# What never leaves the machine


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "optimizer.safetensors",
        "scheduler.json",
        "rng_state_0.pth",
        "training_args.bin",
        "pytorch_model.bin",
        "model.PT",
        "state.pkl",
        "global_step3/zero.pt",
        "optimizer_0/shard.json",
        "__0_0.distcp",
    ],
)
def test_optimizer_state_and_pickles_are_refused(hub: FakeHub, client: Client, light: Path, name: str) -> None:
    (light / name).parent.mkdir(exist_ok=True)
    (light / name).write_bytes(b"optimizer state of a run")
    before = len(hub.requests)
    assert name in client.refused(light, "org/forbidden", **PRIVATE)
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("config.json", TOKEN_LIKE),
        ("tokenizer_config.json", "wandb_api_key: " + "0123456789" * 4),
        ("notes.txt", "sk-" + "proj-" + "Ab1" * 10),
        ("notes.txt", "AKIA" + "ABCDEFGH12345678"),
        ("notes.txt", "aws_secret_access_key = " + "Ab1/" * 10),
        ("notes.txt", "ghp_" + "Ab1" * 12),
        ("chat_template.jinja", "-----BEGIN RSA PRIVATE KEY-----"),
        ("recipe.yaml", f"name: {TOKEN_LIKE}"),
        ("run.json", json.dumps(RUN | {"overrides": [f"x={TOKEN_LIKE}"]})),
    ],
)
def test_files_that_hold_keys_are_refused(hub: FakeHub, client: Client, light: Path, name: str, secret: str) -> None:
    (light / name).write_text(secret)
    before = len(hub.requests)
    sentence = client.refused(light, "org/secret", **PRIVATE)
    assert name in sentence and "looks like" in sentence
    assert TOKEN_LIKE not in sentence and secret not in sentence
    assert len(hub.requests) == before


def test_this_process_s_own_token_is_found_whatever_it_looks_like(hub: FakeHub, client: Client, light: Path) -> None:
    (light / "config.json").write_text('{"x": "no-known-pattern"}')
    client.set_token(token="no-known-pattern")
    try:
        assert "config.json" in client.refused(light, "org/own", **PRIVATE)
    finally:
        client.set_token(token=hub.token)


def test_hashes_and_vocabularies_are_no_keys(client: Client, light: Path) -> None:
    vocabulary = {"sk-": 1, "hf_": 2, "risk-adjusted-mortality-in-hospital": 3, "-" * 60: 4, "AKIA": 5, "key": "a" * 39}
    (light / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "sha": "b" * 40}))
    client.push(folder=str(light), repo_id="org/innocent", **PRIVATE)


def _unfinished(folder: Path) -> None:
    write_run(folder, finished=None)


def _half_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00002-of-00002.safetensors"}}')


def _local_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/x/base/model"}')


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_unfinished, "did not end"),
        (_half_an_index, "model-00002-of-00002.safetensors"),
        (_local_adapter, "python -m huatuo_vision.model.merge --adapter"),
        (lambda folder: (folder / "run.json").unlink(), "no run.json"),
        (lambda folder: (folder / "run.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "run.json").write_text("[]"), "damaged"),
        (lambda folder: write_run(folder, schema=2), "schema"),
        (lambda folder: write_run(folder, fingerprint=None), "fingerprint"),
        (lambda folder: (folder / "recipe.yaml").unlink(), "recipe.yaml"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_an_unfit_folder_is_refused(
    hub: FakeHub, client: Client, light: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(light)
    before = len(hub.requests)
    assert expected in client.refused(light, "org/unfit", **PRIVATE)
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("repo", "options", "expected"),
    [
        ("no-owner", PRIVATE, "ORG/NAME"),
        ("org/na me", PRIVATE, "ORG/NAME"),
        ("org/x", PRIVATE | {"revision": "a b"}, "branch name"),
        ("org/x", {"private": True, "license": ""}, "license"),
    ],
)
def test_a_wrong_address_or_no_license_is_refused(
    client: Client, light: Path, repo: str, options: dict[str, Any], expected: str
) -> None:
    assert expected in client.refused(light, repo, **options)


def test_an_adapter_on_a_model_of_the_hub_is_pushed(hub: FakeHub, client: Client, light: Path) -> None:
    (light / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}')
    client.push(folder=str(light), repo_id="org/adapter", **PRIVATE)
    metadata, body = card_of(hub, "org/adapter")
    assert metadata["library_name"] == "peft" and "LoRA adapter" in body


# The card


def test_the_card_says_what_the_run_record_says(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/card", revision="align", **PRIVATE)
    metadata, body = card_of(hub, "org/card", "align")
    assert metadata == {
        "base_model": ["openai/clip-vit-large-patch14-336"],
        "datasets": ["FreedomIntelligence/PubMedVision"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["medical", "llava", "huatuo-vision"],
    }
    row = "| align | projector (lr 0.001) | 12288 | 48 | 256 | 1 | 98765 | projector 2112 | 1.25 | 12.5 |"
    assert row in body.splitlines()
    assert "| 12345 | 12300 | overlong 40, wrong_role 5 | no |" in body
    assert "| local | messages | set.json | none | 7 | 7 | none | not recorded |" in body.splitlines()
    assert "| language_model | my-llm | none |" in body.splitlines()
    assert 'AutoProcessor.from_pretrained("org/card", revision="align")' in body
    assert "not a medical device" in body
    assert "synthetic data" not in body and "random weights" not in body
    recipe = re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1]
    assert yaml.safe_load(recipe)["data"]["local"]["path"] == "set.json"


def test_the_card_of_several_encoders_says_what_it_takes_to_load_it(hub: FakeHub, client: Client, light: Path) -> None:
    (light / "config.json").write_text('{"model_type": "multi_encoder_llava"}')
    client.push(folder=str(light), repo_id="org/several", **PRIVATE)
    card = hub.files("org/several")["README.md"].decode()
    assert "import huatuo_vision.model.multi_encoder" in card
    assert "library_name: huatuo-vision" in card
    assert "LLaVA-architecture" not in card and "library's own LLaVA" not in card


def test_no_number_in_the_card_that_is_not_in_the_run_record(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/numbers", **PRIVATE)
    body = re.sub(r"```yaml\n.*?```", "", card_of(hub, "org/numbers")[1], flags=re.DOTALL)
    numbers = set(re.findall(r"\d+(?:\.\d+)?", body))
    assert len(numbers) > 15 and numbers <= set(re.findall(r"\d+(?:\.\d+)?", json.dumps(RUN)))


def test_synthetic_data_and_random_weights_are_announced(hub: FakeHub, client: Client, light: Path) -> None:
    data = {"phantom": {"adapter": "phantom", "rows": 9, "kept": 9, "dropped": {}, "synthetic": True}}
    base = {part: {"config": "random weights"} for part in ("vision_encoder", "language_model")}
    client.push(folder=str(write_run(light, data=data, base_models=base)), repo_id="org/synthetic", **PRIVATE)
    metadata, body = card_of(hub, "org/synthetic")
    assert "Trained on synthetic data** (phantom)" in body
    assert "Started from random weights** (vision_encoder, language_model)" in body
    assert "base_model" not in metadata and "datasets" not in metadata


def test_what_is_missing_is_said_to_be_missing(hub: FakeHub, client: Client, light: Path) -> None:
    least = {key: RUN[key] for key in ("schema", "recipe", "fingerprint", "phase", "finished")}
    (light / "run.json").write_text(json.dumps(least | {"phases": {"align": {"samples": 0}}, "data": {"s": {}}}))
    client.push(folder=str(light), repo_id="org/least", **PRIVATE)
    _, body = card_of(hub, "org/least")
    assert "| align | not recorded | 0 |" in body
    assert "| s |" + " not recorded |" * 2 + " none |" + " not recorded |" * 4 in body
    for row in ("started", "code commit", "uncommitted changes", "overrides", "device", "image backend", "versions"):
        assert f"| {row} | not recorded |" in body.splitlines()


def test_hostile_strings_stay_text(hub: FakeHub, client: Client, light: Path) -> None:
    hostile = "a | b\n---\nlicense: mit\n# Head ![x](http://t.example/p) <script>`{{ 7 * 6 }}` \\| {% raw %}\u202e"
    source = RUN["data"]["pubmedvision"] | {"hub_id": hostile, "dropped": {hostile: 1}, "adapter": hostile}
    changes = {
        "recipe": "tiny" + hostile,
        "data": {hostile: source},
        "base_models": {"vision_encoder": {"id": hostile}},
        "versions": {"python": hostile},
    }
    fence = "name: tiny\nnote: |\n  ```\n  # not a heading\n  ```` \n"
    client.push(folder=str(write_run(light, fence, **changes)), repo_id="org/hostile", **PRIVATE)
    metadata, body = card_of(hub, "org/hostile")
    assert metadata["license"] == "apache-2.0" and "base_model" not in metadata and "datasets" not in metadata
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        r"# tinya \| b --- license: mit # Head !\[x\](http://t.example/p) &lt;script&gt;\`{{ 7 \* 6 }}\` \\\| {% raw %}"
    ]
    assert "<script>" not in body and "\u202e" not in body
    for line in body.splitlines():
        if line.startswith(r"| a \|"):
            cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1
            assert cells == 8, line
    assert re.search(r"^`````yaml\n(.*?)^`````$", body, re.DOTALL | re.MULTILINE)


# The fake Hub itself


def _fetch(
    hub: FakeHub, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_fake_hub_demands_the_token(hub: FakeHub, client: Client, light: Path) -> None:
    client.push(folder=str(light), repo_id="org/guarded", **PRIVATE)
    client.push(folder=str(light), repo_id="org/open", **PUBLIC)
    path, bearer = "/resolve/main/model.safetensors", {"Authorization": f"Bearer {hub.token}"}
    assert _fetch(hub, "/org/guarded" + path)[0] == 401
    assert _fetch(hub, "/org/guarded" + path, **bearer) == (200, b"weights")
    assert _fetch(hub, "/org/open" + path) == (200, b"weights")
    assert _fetch(hub, "/org/open" + path, Authorization="Bearer hf_wrong")[0] == 401
    assert _fetch(hub, "/org/open" + path, Range="bytes=2-4") == (206, b"igh")
    assert _fetch(hub, "/org/open" + path, Range="bytes=5-") == (206, b"ts")
    assert _fetch(hub, "/org/open" + path, Range="bytes=9-")[0] == 416
    assert _fetch(hub, "/api/models/org/open/commit/main", method="POST", body=b"{}")[0] == 401


def test_the_fake_hub_keeps_only_bytes_that_match_their_hash(hub: FakeHub, client: Client) -> None:
    client.call(function="create_repo", arguments=["org/hashes"], options={})
    bearer = {"Authorization": f"Bearer {hub.token}"}
    good = b"the right bytes"
    oid = hashlib.sha256(good).hexdigest()
    wanted = json.dumps({"objects": [{"oid": oid, "size": len(good)}]}).encode()
    _, answer = _fetch(hub, "/org/hashes.git/info/lfs/objects/batch", method="POST", body=wanted, **bearer)
    address = json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)
    lines = [
        {"key": "header", "value": {"summary": "add"}},
        {"key": "file", "value": {"path": "a.txt", "content": base64.b64encode(b"a").decode()}},
        {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": oid, "size": len(good)}},
    ]

    def commit() -> int:
        body = "\n".join(json.dumps(line) for line in lines).encode()
        return _fetch(hub, "/api/models/org/hashes/commit/main", method="POST", body=body, **bearer)[0]

    assert commit() == 400
    assert _fetch(hub, address, method="PUT", body=b"the wrong bytes")[0] == 400
    assert _fetch(hub, address.split("?")[0], method="PUT", body=good)[0] == 403
    assert commit() == 400
    assert _fetch(hub, address, method="PUT", body=good)[0] == 200
    assert commit() == 200
    assert hub.files("org/hashes").keys() == {".gitattributes", "a.txt", "m.safetensors"}
    lines[0]["value"]["parentCommit"] = "0" * 40
    assert commit() == 412


def test_data_sets_push_and_load(hub: FakeHub, client: Client) -> None:
    loaded = client.push_and_load_dataset(repo_id="org/rows")
    assert loaded == {"equal": True, "other": True, "streamed": ["a lung", "left"]}
    assert hub.repos["datasets", "org/rows"].private
