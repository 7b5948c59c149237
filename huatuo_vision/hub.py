"""Push a trained model folder to the Hub: its files, and a card rendered only from its run record.

What leaves the machine is an allow-list of a model's files; optimizer state, pickles and anything that looks like a
key are refused. A revision that holds another model is never overwritten without being asked to. `python -m
huatuo_vision.hub --folder DIR --repo ORG/NAME` redoes a push that failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jinja2
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    errors,
    get_session,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from pydantic import BaseModel, Field, ValidationError

from huatuo_vision.redaction import SECRETS, own_secrets, redact, without_queries
from huatuo_vision.schema import UserError

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

# What a model folder may send, at its top and in its one folder of further chat templates.
ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.yaml", "*.txt", "*.model", "README.md")
RESULTS_FOLDER = ".eval_results"  # where the Hub looks for a model's scores; written by eval.py
TEMPLATES_FOLDER = "additional_chat_templates"
# What must not even lie there: optimizer state and pickles (anyone who loads a pickle runs its author's code).
FORBIDDEN = ("optimizer*", "scheduler*", "rng*", "trainer_state.json", "*.distcp")
FORBIDDEN += ("*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle", "*.ckpt")  # training_args.bin among them
# What a loader would mix with the new model if it stayed beside it.
LOADED = (".safetensors", ".json", ".jinja", ".model")

# Of a Hub that has a request and does not answer: a finished run must not wait for it with its GPUs.
SILENCE_SECONDS = 120.0

Present = Mapping[str, RepoFile]  # path -> entry of a revision

# What a push may raise: the client's errors (among them, by import, the base class of its HTTP library's errors, which
# differs between releases), files that cannot be read, and the two bare types that the client uses: ValueError for
# metadata and malformed answers (UserError is one), RuntimeError around the failed upload of a large file.
HUB_ERRORS = (
    *(error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)),
    OSError,
    ValueError,
    RuntimeError,
)

# An absolute path, also behind `file://`, `host:` or `~`, or a Windows one; a URL's slashes start none.
_PATH_START = r"(?:(?:file://|[\w.-]+:(?=/)|~[\w.-]*(?=/))?/(?!/)|[A-Za-z]:\\|\\\\)"
_WHOLE_PATH = re.compile(rf"(?P<key>[\w.-]+=)?(?:{_PATH_START}|//).*", re.DOTALL)
_PATH_INSIDE = re.compile(rf"(?<![\w./\\~-]){_PATH_START}[^\s'\",;()\[\]{{}}|<>=]+")


class Part(BaseModel):
    """Where a part's first weights came from."""

    id: str | None = None
    revision: str | None = None
    path: str | None = None
    config: str | None = None  # says "random weights"


class SourceRecord(BaseModel):
    adapter: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None
    language: str | None = None
    rows: int | None = None
    kept: int | None = None
    dropped: dict[str, int] | None = None
    synthetic: bool | None = None
    sha256: dict[str, str] | None = None  # file -> hash


class PhaseRecord(BaseModel):
    fingerprint: str | None = None
    train: dict[str, dict[str, Any] | Literal[False] | None] = {}
    samples: int | None = None
    dropped_last_step: int | None = None
    optimizer_steps: int | None = None
    global_batch_size: int | None = None
    accumulation: int | None = None
    supervised_tokens: int | None = None
    epochs: int | float | None = None
    trainable_parameters: dict[str, int] | None = None
    attention: str | None = None
    final_loss: float | None = None
    mean_loss_since_start: float | None = None
    train_seconds: float | None = None


class Hardware(BaseModel):
    device: str | None = None
    world_size: int | None = None
    distributed_type: str | None = None


class RunRecord(BaseModel):
    """The parts of `run.json` that may be published; every other key (a host name, say) stays behind."""

    model_config = {"populate_by_name": True}

    schema_version: Literal[1] = Field(alias="schema")
    recipe: str
    fingerprint: str
    phase: str
    overrides: list[str] | None = None
    started: str | None = None
    finished: str
    versions: dict[str, str | None] = {}
    commit: str | None = None
    dirty: bool | None = None
    hardware: Hardware = Hardware()
    image_backend: str | None = None
    base_models: dict[str, Part] = {}
    data: dict[str, SourceRecord] = {}
    phases: dict[str, PhaseRecord] = {}


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of a push; `error` is one sentence without secrets, `redo_command` tries again."""

    ok: bool
    url: str | None
    error: str | None
    redo_command: str


def push_folder(
    folder: Path, repo_id: str, *, revision: str = "main", private: bool, license: str, overwrite: bool = False
) -> str:
    """Push a finished phase's (or the final) model folder as one commit; returns the commit's URL.

    Creates the repository, and the branch for a revision other than main (empty, not as a copy of main). `run.json` and
    `recipe.yaml` go up as copies: absolute local paths cut to their last component, and of the run record only the
    published keys. Pushing again what is there already changes nothing, so a push that broke off is simply repeated.

    Raises UserError for a folder that must not be pushed, a repository of the other visibility, or a revision that
    holds another model; else what the client raises (`HUB_ERRORS`).
    """
    folder = Path(folder)
    _check_address(repo_id, revision)
    payload = _collect(folder, repo_id, revision, license)
    run = json.loads(payload["run.json"])

    def other_model(api: HfApi, present: Present, head: str, additions: list[CommitOperationAdd]) -> str | None:
        return _other_model(api, repo_id, head, present, run, additions)

    return _push(
        payload,
        repo_id,
        "model",
        revision=revision,
        private=private,
        overwrite=overwrite,
        label=_label(run),
        title=f"{run['recipe']}: {run['phase']} ({run['fingerprint']})",
        other=other_model,
        stale=lambda path: _allowed(path) and path.endswith(LOADED),
    )


def push_dataset(folder: Path, repo_id: str, *, revision: str = "main", private: bool, overwrite: bool = False) -> str:
    """Push a data set that `data.build` finished as one commit; returns the commit's URL.

    What goes up is the card with its pictures, `build.json` and the Parquet files; PubMedVision's files hold the same
    rows once more and stay. Repository, branch and repeated pushes are as `push_folder` has them.

    Raises UserError for a folder that must not be pushed, rows that their licence keeps from a public repository, a
    repository of the other visibility, or a revision that holds another data set; else what the client raises.
    """
    folder = Path(folder)
    _check_address(repo_id, revision)
    payload = _collect_dataset(folder, private=private)
    build = json.loads(payload["build.json"])
    label = f"{build['name']} (fingerprint {build['fingerprint']})"

    def other_dataset(api: HfApi, present: Present, head: str, additions: list[CommitOperationAdd]) -> str | None:
        if not any(path.endswith(".parquet") for path in present):
            return None
        if "build.json" not in present:
            return "a data set without a build.json"
        path = api.hf_hub_download(repo_id, "build.json", revision=head, repo_type="dataset")
        try:
            theirs = json.loads(Path(path).read_text(encoding="utf-8"))
            same = theirs["fingerprint"] == build["fingerprint"]
            return None if same else f"{theirs['name']} (fingerprint {theirs['fingerprint']})"
        except (ValueError, KeyError, TypeError):
            return "a data set whose build.json cannot be read"

    return _push(
        payload,
        repo_id,
        "dataset",
        revision=revision,
        private=private,
        overwrite=overwrite,
        label=label,
        title=label,
        other=other_dataset,
        stale=lambda path: path.endswith(".parquet"),
    )


def _push(
    payload: Mapping[str, bytes | Path],
    repo_id: str,
    repo_type: Literal["model", "dataset"],
    *,
    revision: str,
    private: bool,
    overwrite: bool,
    label: str,
    title: str,
    other: Callable[[HfApi, Present, str, list[CommitOperationAdd]], str | None],
    stale: Callable[[str], bool],
) -> str:
    """One commit with `payload`. `other` names what else a revision holds; `stale` is what must not stay beside it."""
    get_session().timeout = SILENCE_SECONDS  # the client itself would wait for ever
    api = HfApi(library_name="huatuo-vision")
    api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type)
    if bool(api.repo_info(repo_id, repo_type=repo_type).private) != private:
        is_now, asked, flag = ("public", "private", "--public") if private else ("private", "public", "--private")
        raise UserError(
            f"{repo_id} exists and is {is_now}, but the push asks for a {asked} repository; change it in the "
            f"repository's settings or push with {flag}"
        )
    if revision not in {branch.name for branch in api.list_repo_refs(repo_id, repo_type=repo_type).branches}:
        first_commit = api.list_repo_commits(repo_id, repo_type=repo_type)[-1].commit_id
        api.create_branch(repo_id, branch=revision, revision=first_commit, exist_ok=True, repo_type=repo_type)
    head = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    present = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, revision=head, recursive=True, repo_type=repo_type)
        if isinstance(entry, RepoFile)
    }
    additions = [CommitOperationAdd(path, content) for path, content in payload.items()]
    deletions = []
    if found := other(api, present, head, additions):
        if not overwrite:
            raise UserError(
                f"{repo_id} at revision {revision} already holds {found}, and this push is {label}; "
                "push to another --revision, or replace it with --overwrite"
            )
        deletions = [CommitOperationDelete(path) for path in present if stale(path) and path not in payload]
    commit = api.create_commit(
        repo_id,
        operations=[*deletions, *additions],
        commit_message=title,
        revision=revision,
        parent_commit=head,  # what was checked above is still what gets replaced
        repo_type=repo_type,
    )
    return commit.commit_url


def try_push(
    folder: Path, repo_id: str, *, revision: str = "main", private: bool, license: str, overwrite: bool = False
) -> PushResult:
    """`push_folder` for the end of a run: reports what goes wrong instead of raising it."""
    command = ["python", "-m", "huatuo_vision.hub", "--folder", str(folder), "--repo", repo_id]
    command += ["--revision", revision, "--private" if private else "--public", "--license", license]
    redo_command = shlex.join([*command, "--overwrite"] if overwrite else command)
    try:
        url = push_folder(folder, repo_id, revision=revision, private=private, license=license, overwrite=overwrite)
    except HUB_ERRORS as error:
        return PushResult(ok=False, url=None, error=explain(error, repo_id), redo_command=redo_command)
    return PushResult(ok=True, url=url, error=None, redo_command=redo_command)


def explain(error: BaseException, repo_id: str) -> str:
    """One sentence about a failed push, without tokens or signed addresses."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, errors.HfHubHTTPError):
        request, status = cause.response.request, cause.response.status_code
        said = f": {cause.server_message}" if cause.server_message else ""
        if status in (401, 403):
            text = (
                f"the Hub refused access to {repo_id} ({status}{said}); set HF_TOKEN to a token that may write there, "
                "or run `hf auth login`"
            )
        elif status == 412:
            text = f"someone else pushed to {repo_id} meanwhile ({status}{said}); push again"
        else:
            text = f"the Hub answered {status} to {request.method} {request.url.path}{said}"
    elif isinstance(cause, UserError):
        text = str(cause)
    else:
        text = f"{type(cause).__name__}: {cause}"
    return without_queries(redact(" ".join(text.split())))


def render_card(
    run: Mapping[str, Any],
    *,
    recipe: str,
    license: str,
    repo_id: str,
    revision: str,
    adapter: bool,
    own_architecture: bool = False,
    results: Sequence[EvalResult] = (),
) -> str:
    """The model card: every fact in it stands in the run record, the recipe's text, or the results of `eval.py`."""
    record = RunRecord.model_validate(run)
    from_hub = {part.id for part in record.base_models.values()}
    data_from_hub = {source.hub_id for source in record.data.values()}
    front_matter = ModelCardData(
        license=license,
        base_model=sorted(filter(_is_repo_id, from_hub)) or None,
        datasets=sorted(filter(_is_repo_id, data_from_hub)) or None,
        language=sorted({source.language for source in record.data.values() if source.language}) or None,
        pipeline_tag="image-text-to-text",
        library_name="peft" if adapter else "huatuo-vision" if own_architecture else "transformers",
        tags=["medical", "llava", "huatuo-vision"],
        **({"model_name": record.recipe, "eval_results": list(results)} if results else {}),
    )
    longest = max((len(ticks) for ticks in re.findall(r"`+", recipe)), default=0)
    content = render_markdown(
        CARD_TEMPLATE,
        front_matter=Markup(front_matter.to_yaml()),
        run=record,
        random=[name for name, part in record.base_models.items() if part.config],
        synthetic=[name for name, source in record.data.items() if source.synthetic],
        recipe=Markup(recipe.strip()),
        fence=Markup("`" * max(3, longest + 1)),
        adapter=adapter,
        own_architecture=own_architecture,
        results=results,
        location=Markup(json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision != "main" else "")),
        yes_or_no={True: "yes", False: "no"},
        settings=_settings,
        counts=_counts,
    )
    return str(ModelCard(content + "\n"))


def render_markdown(template: Path, **values: Any) -> str:
    """A card's template filled in: values are printed as inline Markdown, and cannot become markup (Markup can)."""
    environment = jinja2.Environment(
        finalize=_published, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def _published(value: Any) -> str:
    """A value as inline Markdown that cannot leave its table cell or start markup."""
    if isinstance(value, Markup):
        return value
    if value is None or value == "":
        return "not recorded"
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _settings(trained: Mapping[str, Any]) -> str | None:
    """`{projector: {lr: 0.001}}` as "projector (lr 0.001)"; frozen parts are left out."""

    def flat(values: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{key} {flat(value)}" if isinstance(value, Mapping) else f"{key} {value}"
            for key, value in values.items()
            if value is not None
        )

    return "; ".join(f"{part} ({flat(how)})" for part, how in trained.items() if how) or None


def _counts(counts: Mapping[str, int] | None) -> str | None:
    if counts is None:
        return None
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _check_address(repo_id: str, revision: str) -> None:
    if not _is_repo_id(repo_id) or "/" not in repo_id:
        raise UserError(f"{repo_id!r} is no repository on the Hub; expected ORG/NAME")
    if not re.fullmatch(r"\w[\w./-]*", revision):
        raise UserError(f"revision {revision!r} is no branch name; expected letters, digits, '.', '-', '_' and '/'")


def _collect(folder: Path, repo_id: str, revision: str, license: str) -> dict[str, bytes | Path]:
    """Path in the repository -> content; raises UserError for all that must not be pushed. No request is made here."""
    if not license.strip():
        raise UserError("the model card needs a license; name the weights' licence with --license, e.g. apache-2.0")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a model folder such as runs/<name>/final")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    _refuse_forbidden(folder, files)
    run = _read_run(folder)
    _refuse_incomplete(folder, files)
    _refuse_local_adapter(folder)
    if left_out := [path for path in files if not _allowed(path)]:
        logger.warning("not pushed, as it is no part of a model: %s", ", ".join(left_out))

    payload: dict[str, bytes | Path] = {
        path: file if path.endswith(".safetensors") else file.read_bytes()
        for path, file in files.items()
        if _allowed(path) and path != "README.md"
    }
    record = RunRecord.model_validate(_without_local_paths(run.model_dump(mode="json", by_alias=True)))
    recipe = yaml.safe_dump(_without_local_paths(_read_recipe(folder)), sort_keys=False, allow_unicode=True)
    card = render_card(
        record.model_dump(by_alias=True),
        recipe=recipe,
        license=license,
        repo_id=repo_id,
        revision=revision,
        adapter="adapter_config.json" in files,
        own_architecture=_has_own_architecture(folder),
        results=_results(folder),
    )
    payload["run.json"] = record.model_dump_json(by_alias=True, indent=2, exclude_none=True).encode() + b"\n"
    payload["recipe.yaml"] = recipe.encode()
    payload["README.md"] = card.encode()
    _refuse_secrets(folder, payload)
    return payload


def _has_own_architecture(folder: Path) -> bool:
    """Whether the model is one of several encoders, which transformers' own classes do not load."""
    config = folder / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "multi_encoder_llava"
    except (OSError, ValueError, AttributeError):
        return False  # an adapter's folder has none; one that is broken says nothing, and is searched for keys below


def _collect_dataset(folder: Path, *, private: bool) -> dict[str, bytes | Path]:
    """Path in the repository -> content; raises UserError for all that must not be pushed. No request is made here."""
    if not (folder / "build.json").is_file() or not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no build.json and README.md; push the out/ folder of a finished data.build")
    files = sorted(folder.glob("*/*/*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no */*/*.parquet, so there is no data set to push")
    if not private and (kept := [file for file in files if file.relative_to(folder).parts[0] == "restricted"]):
        raise UserError(
            f"{kept[0]} holds rows whose licence does not let them be passed on (class restricted); push to a private "
            "repository, or move that folder away"
        )
    payload: dict[str, bytes | Path] = {file.relative_to(folder).as_posix(): file for file in files}
    for name in ("README.md", "build.json", *(path.name for path in sorted(folder.glob("*.png")))):
        payload[name] = (folder / name).read_bytes()
    _refuse_secrets(folder, payload)
    return payload


def _results(folder: Path) -> Sequence[EvalResult]:
    """What `eval.py` wrote into the front matter of the folder's README.md; nothing else of that file is pushed."""
    path = folder / "README.md"
    if not path.is_file():
        return ()
    try:
        return ModelCard.load(path).data.eval_results or ()
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(
            f"the front matter of {path} can't be read ({' '.join(str(error).split())}); delete the file and run "
            "eval.py again"
        ) from None


def _refuse_forbidden(folder: Path, files: Mapping[str, Path]) -> None:
    for path in files:
        names = PurePosixPath(path).parts
        if any(fnmatch(name.lower(), pattern) for name in names for pattern in FORBIDDEN):
            raise UserError(
                f"{folder} holds {path}: optimizer state and pickles are never pushed; push a model folder "
                "(<phase>/model or final), not a checkpoint, or remove that file"
            )


def _read_run(folder: Path) -> RunRecord:
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no run.json, so nothing true can be said about its model; push a run's model folder"
        )
    run = _read_json(path)
    if run.get("finished") is None:
        raise UserError(f"{path} has no finished time: the run did not end; resume it, then push")
    try:
        return RunRecord.model_validate(run)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}; expected the run record that train.py writes") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; the file is damaged, so the model is not pushed")
    return values


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist; a model is pushed together with the recipe that made it")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a YAML mapping; a model is pushed together with the recipe that made it")
    return values


def _refuse_incomplete(folder: Path, files: Mapping[str, Path]) -> None:
    if not any(path.endswith(".safetensors") for path in files):
        raise UserError(f"{folder} holds no *.safetensors, so there is no model to push")
    if "model.safetensors.index.json" in files:
        index = _read_json(files["model.safetensors.index.json"])
        if missing := sorted(set(index.get("weight_map", {}).values()) - files.keys()):
            raise UserError(
                f"{folder} lacks {missing[0]}, which model.safetensors.index.json names; the model is not whole"
            )


def _refuse_local_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = str(_read_json(path).get("base_model_name_or_path") or "")
    if not _is_repo_id(base) or Path(base).exists():
        out = folder.with_name(folder.name + "-merged")
        raise UserError(
            f"{folder} is an adapter on a local model ({PurePosixPath(base).name or 'unnamed'}), which nobody else "
            "could load; merge first by "
            + shlex.join(["python", "-m", "huatuo_vision.model.merge", "--adapter", str(folder), "--out", str(out)])
        )


def _refuse_secrets(folder: Path, payload: Mapping[str, bytes | Path]) -> None:
    own = [secret.encode() for secret in own_secrets()]
    for path, content in payload.items():
        if not isinstance(content, bytes):
            continue
        kinds = (kind for kind, pattern in SECRETS.items() if re.search(pattern, content))
        found = next(kinds, "one of this process's keys" if any(secret in content for secret in own) else None)
        if found:
            raise UserError(
                f"{folder / path} holds what looks like {found}; remove it (and revoke it), then push again"
            )


def _allowed(path: str) -> bool:
    where = PurePosixPath(path)
    if where.parent.as_posix() == RESULTS_FOLDER:
        return where.suffix == ".yaml"
    return where.parent.as_posix() in (".", TEMPLATES_FOLDER) and any(fnmatch(where.name, p) for p in ALLOWED)


def _is_repo_id(text: str | None) -> bool:
    """Whether this can be a Hub address of the form ORG/NAME (or an old NAME)."""
    if not text:
        return False
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return True


def _without_local_paths(value: Any) -> Any:
    """Absolute paths in any string cut to their last component (a leading `key=` stays)."""
    if isinstance(value, Mapping):
        return {_without_local_paths(key): _without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _WHOLE_PATH.fullmatch(value):
        return (whole["key"] or "") + _last_component(value)
    return _PATH_INSIDE.sub(lambda match: _last_component(match[0]), value)


def _last_component(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\ "))[-1]


def _other_model(
    api: HfApi,
    repo_id: str,
    head: str,
    present: Mapping[str, RepoFile],
    run: Mapping[str, Any],
    additions: list[CommitOperationAdd],
) -> str | None:
    """What a sentence calls the model a revision holds, if it is not the one being pushed."""
    if "README.md" not in present and not any(path.endswith(".safetensors") for path in present):
        return None
    if "run.json" not in present:
        return "a model or card without a run.json"
    try:
        theirs = json.loads(Path(api.hf_hub_download(repo_id, "run.json", revision=head)).read_text(encoding="utf-8"))
        label, same = _label(theirs), _identity(theirs) == _identity(run)
    except (ValueError, KeyError, TypeError):
        return "a model whose run.json cannot be read"
    if not same:
        return label
    weights = {path: entry for path, entry in present.items() if path.endswith(".safetensors")}
    ours = {
        operation.path_in_repo: operation.upload_info.sha256.hex()
        for operation in additions
        if operation.path_in_repo.endswith(".safetensors")
    }
    theirs_by_path = {path: entry.lfs.sha256 if entry.lfs else None for path, entry in weights.items()}
    return None if not weights or theirs_by_path == ours else f"other weights of {label}"


def _identity(run: Mapping[str, Any]) -> tuple[str, str]:
    return run["fingerprint"], run["phase"]


def _label(run: Mapping[str, Any]) -> str:
    return f"phase {run['phase']} of {run['recipe']} (fingerprint {run['fingerprint']})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m huatuo_vision.hub", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="runs/<name>/<phase>/model or runs/<name>/final")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME")
    parser.add_argument("--revision", default="main", help="branch to push to; made if it does not exist")
    parser.add_argument("--license", help="the weights' licence; without it, hub.license of the folder's recipe.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace another model that the revision holds")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=True, help="the default")
    visibility.add_argument("--public", action="store_false", dest="private")
    arguments = parser.parse_args()
    try:
        license = arguments.license
        if license is None:
            hub = _read_recipe(arguments.folder).get("hub") or {}
            license = hub.get("license") or ""
        url = push_folder(
            arguments.folder,
            arguments.repo,
            revision=arguments.revision,
            private=arguments.private,
            license=license,
            overwrite=arguments.overwrite,
        )
    except HUB_ERRORS as error:
        sys.stderr.write(f"error: {explain(error, arguments.repo)}\n")
        sys.exit(2 if isinstance(error, UserError) else 1)
    sys.stdout.write(f"{url}\n")


if __name__ == "__main__":
    main()
