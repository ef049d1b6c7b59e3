"""A Hub on loopback for the tests: as much of its API as `hf download`, `hf upload` and their functions speak.

The client is always the real one, with ``HF_ENDPOINT`` set to this server. It keeps everything in memory, knows users
by their tokens, and answers refusals with the status and the ``X-Error-Code`` that huggingface.co gives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.model")


@dataclass(frozen=True)
class File:
    """One file of a commit: its content, and whether it is stored by Git LFS."""

    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def listed(self, path: str) -> dict[str, Any]:
        """Its entry in a file listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass
class Repository:
    """A repository: who may read it, whether the server fails at it, its commits by id, its branches and tags."""

    owner: str
    private: bool = False
    gated: bool = False
    broken: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        names = "".join(f"{path}{file.blob_id}" for path, file in sorted(files.items()))
        commit = hashlib.sha1(f"{self.refs.get(branch)}{names}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def at(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server's state, for tests to set up and to look at.

    Attributes:
        endpoint: Its address.
        elsewhere: The same by another name, where LFS files come from: a client takes redirects within one host for
            renamed repositories.
        tokens: Token -> user.
        repositories: ``"user/name"`` -> repository.
        uploads: SHA-256 -> content of LFS objects.
        requests: Every request so far: method, path, and range if it had one.
        cut_after: Bytes after which the next download of an LFS file loses its connection; None for never.
        stall_after: The same, but the connection stays and nothing more comes until `go_on` is set.
    """

    endpoint: str = ""
    elsewhere: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_owner": "user", "hf_other": "other"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    cut_after: int | None = None
    stall_after: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def add(self, repo_id: str, folder: Path, **options: bool) -> str:
        """Put a folder there as one commit on ``main``, without an upload; returns the commit."""
        repository = self.repositories.setdefault(repo_id, Repository(repo_id.split("/")[0], **options))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return repository.commit({name: File(path.read_bytes(), is_lfs(name)) for name, path in files.items()})


def is_lfs(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in LFS_PATTERNS)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub, at ``hub.endpoint``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.elsewhere = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()


class _Refusal(Exception):
    """An answer other than the one asked for: status, error code and message as the Hub's headers have them."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    # (method, path) -> function of the same class; the groups are its arguments
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/cdn/([^/]+/[^/]+)/([0-9a-f]{64})", "lfs_download"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, name in self.ROUTES:
                if method == wanted and (match := re.fullmatch(pattern, path)):
                    return getattr(self, name)(*match.groups())
            raise _Refusal(404)
        except _Refusal as refusal:
            self.send(refusal.status, X_Error_Code=refusal.code, X_Error_Message=refusal.message)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def log_message(self, *_: object) -> None:
        pass

    # Who may do what

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def readable(self, repo_id: str) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.owner):
            raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if repository.gated and user != repository.owner:
            raise _Refusal(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if repository.broken:
            raise _Refusal(501)
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        if self.user() is None:
            raise _Refusal(401, message="Invalid username or password.")
        if self.user() != repository.owner:
            raise _Refusal(403, message=f"You don't have the rights to write to {repo_id}.")
        return repository

    def commit_at(self, repository: Repository, revision: str) -> str:
        commit = repository.at(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Reading

    def whoami(self) -> None:
        if self.user() is None:
            raise _Refusal(401, message="Invalid username or password.")
        self.send_json({"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.readable(repo_id)
        commit = self.commit_at(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        self.send_json({"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        """The listing, in pages of 10 to have more than one."""
        repository = self.readable(repo_id)
        files = sorted(repository.commits[self.commit_at(repository, revision)].items())
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        page = json.dumps([file.listed(path) for path, file in files[start : start + 10]]).encode()
        more = {}
        if start + 10 < len(files):
            url = f"{self.hub.endpoint}/api/models/{repo_id}/tree/{revision}?recursive=true&cursor={start + 10}"
            more = {"Link": f'<{url}>; rel="next"'}
        self.send(200, page, Content_Type="application/json", **more)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.readable(repo_id)
        commit = self.commit_at(repository, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{file.etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if not file.lfs:
            return self.send_content(file.content, headers)
        linked = {"X_Linked_ETag": f'"{file.sha256}"', "X_Linked_Size": len(file.content)}
        url = f"{self.hub.elsewhere}/cdn/{repo_id}/{file.sha256}"
        self.send(302, Location=url, **{**headers, "ETag": f'"{file.blob_id}"'}, **linked)

    def lfs_download(self, repo_id: str, sha256: str) -> None:
        commits = self.hub.repositories[repo_id].commits.values()
        content = next(file.content for files in commits for file in files.values() if file.sha256 == sha256)
        self.send_content(content, {"ETag": f'"{sha256}"', "Accept_Ranges": "bytes"})

    def send_content(self, content: bytes, headers: dict[str, object]) -> None:
        """The content or the range asked for, whole or up to where the test has the connection lost."""
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers |= {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        cut, stall = self.hub.cut_after, self.hub.stall_after
        place = cut or stall
        if self.command == "HEAD" or place is None or place >= len(content):
            return self.send(status, content, **headers)
        self.hub.cut_after = self.hub.stall_after = None
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content[:place])
        self.wfile.flush()
        if stall:
            self.hub.stalled.set()
            self.hub.go_on.wait()
        self.close_connection = True

    # Writing

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        if user is None:
            raise _Refusal(401, message="Invalid username or password.")
        owner = wanted.get("organization") or user
        if owner != user:
            raise _Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner!r}.")
        repo_id = f"{owner}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            body = json.dumps({"url": f"{self.hub.endpoint}/{repo_id}"}).encode()
            return self.send(
                409, body, Content_Type="application/json", X_Error_Message="You already created this repo"
            )
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(owner, private=bool(private))
        repository.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        self.send_json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        present = repository.commits[self.commit_at(repository, revision)]
        files = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            mode = "lfs" if is_lfs(path) else "regular"
            oid = present[path].etag if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploads:
                url = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Refusal(400, message="The content isn't what was announced.")
        self.hub.uploads[sha256] = self.body
        self.send(200)

    def lfs_verify(self, sha256: str) -> None:
        if json.loads(self.body)["size"] != len(self.hub.uploads.get(sha256, b"")):
            raise _Refusal(404)
        self.send(200)

    def commit(self, repo_id: str, branch: str) -> None:
        repository = self.writable(repo_id)
        files = dict(repository.commits[self.commit_at(repository, branch)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = File(self.hub.uploads[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[name] = self.commit_at(repository, start)
        self.send_json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        repository.refs[json.loads(self.body)["tag"]] = self.commit_at(repository, revision)
        self.send_json({})
