"""A Hub on 127.0.0.1 for tests: the wire protocol of huggingface_hub for models and data sets, kept in memory.

    with FakeHub() as hub:
        env = hub.environment(tmp_path)  # HF_ENDPOINT and the like, for a process that has not imported the client yet
        hub.fail_next(503, method="PUT", path="/lfs/")
        ...
        assert hub.files("org/name", revision="main").keys() == {".gitattributes", "config.json"}

It is strict where the real one is: writes and private reads demand the token, bytes sent for large files must match
their SHA-256, a commit names only bytes that arrived, and fails when its parent is no longer the branch's head.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_FILES = (".safetensors", ".parquet", ".arrow", ".bin", ".model", ".zip", ".gguf")
DATE = "2025-01-01T00:00:00.000Z"
REPO_ROUTE = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>[a-z-]+)(?:/(?P<rest>.*))?)?"
)
RESOLVE_ROUTE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
BATCH_ROUTE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # decoded, without the query
    body: bytes = field(repr=False)
    authorized: bool


@dataclass(frozen=True)
class Blob:
    content: bytes = field(repr=False)
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares with a local file to see whether it changed."""
        return self.sha256 if self.large else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    id: str
    parent: Commit | None
    title: str
    files: Mapping[str, Blob]

    def history(self) -> Iterator[Commit]:
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add_commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        commit = Commit(secrets.token_hex(20), self.branches.get(branch), title, files)
        self.branches[branch] = self.commits[commit.id] = commit
        return commit


@dataclass
class Failure:
    status: int
    method: str
    path: str
    message: str
    times: int
    seconds: float = 0.0  # of silence before it is answered


class Refusal(Exception):
    """An answer other than success: HTTP status, the client's error code, and a message."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


class FakeHub:
    """A context manager around the running server; `requests` is everything it was sent, in order."""

    def __init__(self) -> None:
        self.token = "hf_" + secrets.token_hex(17)
        self.requests: list[Request] = []
        self.repos: dict[tuple[str, str], Repo] = {}  # (models or datasets, org/name)
        self._large: dict[str, bytes] = {}  # SHA-256 -> content of uploaded large files
        self.failures: list[Failure] = []
        self._upload_key = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # For tests

    def environment(self, home: Path, token: str | None = "") -> dict[str, str]:
        """Variables for a new process that shall take this server for the Hub; token None is logged out."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))
        }
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return inherited | settings | ({} if token is None else {"HF_TOKEN": token or self.token})

    def fail_next(
        self, status: int, *, method: str = "", path: str = "", times: int = 1, message: str = "made to"
    ) -> None:
        """Answer the next `times` requests of this method whose path contains `path` with an error status."""
        with self._lock:
            self.failures.append(Failure(status, method, path, message, times))

    def stall_next(self, seconds: float, *, method: str = "", path: str = "", times: int = 1) -> None:
        """Answer the next `times` such requests rightly, but after so long."""
        with self._lock:
            self.failures.append(Failure(0, method, path, "", times, seconds))

    def files(self, repo: str, *, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Path -> content at a revision."""
        with self._lock:
            commit = self._commit(self.repos[kind, repo], revision)
            return {path: blob.content for path, blob in commit.files.items()}

    def sent(self, method: str = "", path: str = "") -> list[Request]:
        """The recorded requests of this method whose path contains `path`."""
        return [request for request in self.requests if method in request.method and path in request.path]

    # The protocol

    def answer(self, method: str, raw_path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        url = urlsplit(raw_path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        credentials = headers.get("Authorization")
        authorized = credentials == f"Bearer {self.token}"
        self._stall_if_asked(method, unquote(url.path))
        with self._lock:
            self.requests.append(Request(method, unquote(url.path), body, authorized))
            try:
                self._fail_if_asked(method, unquote(url.path))
                if credentials and not authorized:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                return self._route("GET" if method == "HEAD" else method, url.path, query, headers, body, authorized)
            except Refusal as refusal:
                answer = _json({"error": refusal.message, **refusal.body}, refusal.status)
                code = {"X-Error-Code": refusal.code} if refusal.code else {}
                return Answer(
                    answer.body, answer.status, {**answer.headers, "X-Error-Message": refusal.message, **code}
                )

    def _stall_if_asked(self, method: str, path: str) -> None:
        for failure in self.failures:
            if failure.seconds and failure.times and failure.method in method and failure.path in path:
                failure.times -= 1
                time.sleep(failure.seconds)  # without the lock: others are answered meanwhile

    def _fail_if_asked(self, method: str, path: str) -> None:
        for failure in self.failures:
            if failure.status and failure.times and failure.method in method and failure.path in path:
                failure.times -= 1
                raise Refusal(failure.status, failure.message)

    def _route(
        self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes, authorized: bool
    ) -> Answer:
        if path.startswith("/lfs/"):  # a signed address, as of a storage service: no token is sent there
            return self._receive_large(path, query, body)
        if path == "/api/validate-yaml":
            return self._validate_card(json.loads(body)["content"])
        if method != "GET" and not authorized:
            raise Refusal(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create_repo(json.loads(body))
        if path == "/api/repos/delete":
            return self._delete_repo(json.loads(body))
        if path == "/api/whoami-v2" and authorized:
            return _json({"type": "user", "name": "tester", "orgs": [], "auth": {}})
        if match := BATCH_ROUTE.fullmatch(path):
            self._repo("datasets" if match["kind"] else "models", match["repo"], authorized)
            return self._large_batch(json.loads(body))
        if match := RESOLVE_ROUTE.fullmatch(path):
            repo = self._repo("datasets" if match["kind"] else "models", match["repo"], authorized)
            return self._download(repo, unquote(match["revision"]), unquote(match["path"]), headers.get("Range"))
        if match := REPO_ROUTE.fullmatch(path):
            repo = self._repo(match["kind"], match["repo"], authorized)
            return self._repo_call(method, repo, match["kind"], match["what"], match["rest"], query, body)
        raise Refusal(404, f"no route {method} {path}")

    def _repo(self, kind: str, name: str, authorized: bool) -> Repo:
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not authorized):
            raise Refusal(404 if authorized else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.branches.get(revision) or repo.commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _create_repo(self, wanted: dict[str, Any]) -> Answer:
        kind = wanted.get("type", "model") + "s"
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.repos:
            raise Refusal(409, "You already created this repo", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.repos[kind, name] = Repo(name, private)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_FILES)
        repo.add_commit("main", "initial commit", {".gitattributes": Blob(rules.encode(), large=False)})
        return _json({"url": url, "name": name, "private": private})

    def _delete_repo(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if self.repos.pop((wanted.get("type", "model") + "s", name), None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return _json({})

    def _validate_card(self, content: str) -> Answer:
        block = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            raise Refusal(400, "bad metadata", errors=[{"message": str(error)}], warnings=[]) from None
        if metadata is None:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        errors = []
        if not isinstance(metadata, dict):
            errors = ["metadata must be a mapping"]
        elif not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(metadata.get("license", "other"))):
            errors = ['"license" must be one of the known licenses']
        if errors:
            raise Refusal(400, "bad metadata", errors=[{"message": error} for error in errors], warnings=[])
        return _json({"errors": [], "warnings": []})

    def _repo_call(
        self, method: str, repo: Repo, kind: str, what: str | None, rest: str | None, query: dict[str, str], body: bytes
    ) -> Answer:
        if method == "GET" and what in (None, "revision"):
            return self._info(repo, self._commit(repo, unquote(rest or "main")))
        if method == "GET" and what == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.id}
                for name, commit in repo.branches.items()
            ]
            return _json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})
        if what == "branch":
            return self._change_branch(method, repo, unquote(rest), json.loads(body or b"{}"))
        revision, _, folder = (rest or "").partition("/")
        commit = self._commit(repo, unquote(revision))
        if method == "GET" and what == "commits":
            fields = {"authors": [{"user": "tester"}], "date": DATE, "message": ""}
            return _json([{"id": past.id, "title": past.title, **fields} for past in commit.history()])
        if method == "GET" and what == "tree":
            return _json(self._tree(commit, unquote(folder), recursive=query.get("recursive", "").lower() == "true"))
        if method == "POST" and what == "paths-info":
            wanted = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            paths = {path.strip("/") for path in wanted["paths"]}
            folders = [entry for entry in self._tree(commit, "", recursive=True) if entry["type"] == "directory"]
            files = [blob.entry(path) for path, blob in commit.files.items()]
            return _json([entry for entry in (*folders, *files) if entry["path"] in paths])
        if method == "POST" and what == "preupload":
            return _json({"files": [self._upload_mode(commit, file) for file in json.loads(body)["files"]]})
        if method == "POST" and what == "commit":
            return self._add_commit(repo, kind, unquote(revision), body)
        raise Refusal(404, f"no route {method} {what}")

    def _info(self, repo: Repo, commit: Commit) -> Answer:
        siblings = [{"rfilename": path} for path in commit.files]
        dates = {"lastModified": DATE, "createdAt": DATE}
        flags = {"private": repo.private, "disabled": False, "gated": False}
        counts = {"downloads": 0, "likes": 0, "tags": []}
        return _json({"id": repo.id, "sha": commit.id, "siblings": siblings, **dates, **flags, **counts})

    def _tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = folder + "/" if folder else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        folders = dict.fromkeys(
            str(parent) for path in inside for parent in Path(path).parents if str(parent).startswith(prefix or "")
        )
        folders.pop(".", None)
        shown = [path for path in (*folders, *inside) if recursive or "/" not in path.removeprefix(prefix)]
        return [
            commit.files[path].entry(path)
            if path in commit.files
            else {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in shown
            if path != folder
        ]

    def _upload_mode(self, commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
        present = commit.files.get(file["path"])
        mode = "lfs" if file["path"].endswith(LARGE_FILES) or file["size"] > 10 * 2**20 else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": present and present.etag}

    def _large_batch(self, wanted: dict[str, Any]) -> Answer:
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self._large:
                address = f"{self.url}/lfs/{item['oid']}"
                signed = f"?size={item['size']}&signature={self._upload_key}"
                answer["actions"] = {
                    "upload": {"href": address + signed, "header": {}},
                    "verify": {"href": f"{address}/verify{signed}"},
                }
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _receive_large(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        oid = path.split("/")[2]
        if query.get("signature") != self._upload_key:
            raise Refusal(403, "the address is not signed")
        if path.endswith("/verify"):
            wanted = json.loads(body)
            if len(self._large.get(wanted["oid"], b"")) != wanted["size"]:
                raise Refusal(404, "the object did not arrive")
            return _json({})
        if hashlib.sha256(body).hexdigest() != oid or len(body) != int(query["size"]):
            raise Refusal(400, "the bytes do not match their SHA-256")
        self._large[oid] = body
        return Answer()

    def _add_commit(self, repo: Repo, kind: str, branch: str, body: bytes) -> Answer:
        if branch not in repo.branches:
            raise Refusal(404, f"no branch {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = repo.branches[branch]
        if header.get("parentCommit") not in (None, head.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value, path = line["value"], line["value"].get("path", "")
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"], validate=True), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self._large:
                    raise Refusal(400, f"{path}: its bytes were never uploaded")
                files[path] = Blob(self._large[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif line["key"] == "deletedFolder":
                files = {kept: blob for kept, blob in files.items() if not kept.startswith(path.rstrip("/") + "/")}
        commit = repo.add_commit(branch, header["summary"], files)
        address = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo.id}/commit/{commit.id}"
        return _json({"success": True, "commitOid": commit.id, "commitUrl": address, "hookOutput": ""})

    def _change_branch(self, method: str, repo: Repo, branch: str, wanted: dict[str, Any]) -> Answer:
        if method == "DELETE":
            if repo.branches.pop(branch, None) is None:
                raise Refusal(404, f"no branch {branch}", "RevisionNotFound")
        elif branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        else:
            repo.branches[branch] = self._commit(repo, wanted.get("startingPoint", "main"))
        return _json({})

    def _download(self, repo: Repo, revision: str, path: str, span: str | None) -> Answer:
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            return Answer(b"Entry not found", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
        if match is None:
            return Answer(blob.content, 200, headers)
        start, end = int(match[1]), min(int(match[2] or len(blob.content) - 1), len(blob.content) - 1)
        if start > end:
            return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(blob.content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(blob.content)}"
        return Answer(blob.content[start : end + 1], 206, headers)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._chunked() if self.headers.get("Transfer-Encoding") else self._sized()
        answer = self.hub.answer(self.command, self.path, self.headers, body)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _sized(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunked(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *args: object) -> None:
        pass
