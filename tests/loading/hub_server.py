"""A small Hub on the loopback interface: the endpoints that huggingface_hub's client needs, and faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"


def commit_hash(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """Commits by hash (file name -> bytes) and references by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # private: anything else gets 401
    gated: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)  # commits pushed

    def commit(self, files: dict[str, bytes], ref: str = MAIN) -> str:
        commit = commit_hash(f"{ref}{len(self.commits)}{sorted(files)}")
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits and len(revision) >= 7:  # the beginning of a hash, as the Hub takes it
            commit = next((full for full in self.commits if full.startswith(revision)), commit)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (f" {self.range}" if self.range else "")


class HubServer:
    """The server. ``fault(handler)`` may answer a request itself and return True."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.stored: dict[str, bytes] = {}  # LFS objects uploaded
        self.fault: Callable[[Handler], bool] | None = None
        self.ranges = True  # parts of files are given
        self.redirect_to: str | None = None  # files of 1 kB and more are redirected to this other host
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def repo(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        repo = self.repos.setdefault(repo_id, Repo(**options))
        if files is not None:
            repo.commit(files)
        return repo

    def take(self) -> list[str]:
        """The requests since the last call, as text."""
        taken, self.requests = [str(request) for request in self.requests], []
        return taken

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str = "", **headers: str) -> None:
        self.answer(status, **({"X_Error_Code": code} if code else {}), **headers)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        url = urlsplit(self.path)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = parse_qs(url.query)
        authorization, wish = self.headers.get("Authorization"), self.headers.get("Range")
        self.hub.requests.append(Request(self.command, unquote(url.path), authorization, wish))
        if self.hub.fault is not None and self.hub.fault(self):
            return
        if self.parts[0] == "api":
            self._api()
        elif self.parts[0] == "cdn":
            self._file(base64.urlsafe_b64decode(self.parts[1]))
        elif self.parts[0] == "lfs":
            self.hub.stored[self.parts[1]] = self.body
            self.answer(200)
        elif "resolve" in self.parts:
            self._resolve()
        elif self.parts[-3:] == ["info", "lfs", "objects"] or self.parts[-1] == "batch":
            self._lfs_batch()
        else:
            self.error(404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _allowed(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and sent != repo.token):
            self.error(404 if sent else 401, "RepoNotFound")
            return None
        if repo.gated:
            self.error(403, "GatedRepo")
            return None
        return repo

    def _resolve(self) -> None:
        at = self.parts.index("resolve")
        repo = self._allowed("/".join(self.parts[:at]))
        if repo is None:
            return
        found = repo.at(self.parts[at + 1])
        if found is None:
            self.error(404, "RevisionNotFound")
            return
        commit, files = found
        name = "/".join(self.parts[at + 2 :])
        if name not in files:
            self.error(404, "EntryNotFound", X_Repo_Commit=commit)
            return
        content = files[name]
        etag = hashlib.sha256(content).hexdigest()
        if self.hub.redirect_to and len(content) >= 1000:
            place = f"{self.hub.redirect_to}/cdn/{base64.urlsafe_b64encode(content).decode()}"
            self.answer(
                302,
                Location=place,
                X_Linked_Etag=f'"{etag}"',
                X_Linked_Size=str(len(content)),
                X_Repo_Commit=commit,
            )
            return
        self._file(content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def _file(self, content: bytes, **headers: str) -> None:
        wanted = (self.headers.get("Range") or "").removeprefix("bytes=").partition("-")
        if self.command == "HEAD":
            self.answer(200, Content_Length=str(len(content)), **headers)
        elif wanted[0] and self.hub.ranges:
            begin, end = int(wanted[0]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            place = f"bytes {begin}-{end}/{len(content)}"
            self.answer(206, content[begin : end + 1], Content_Range=place, **headers)
        else:
            self.answer(200, content, **headers)

    def _api(self) -> None:
        if self.parts[1] == "repos" and self.command == "POST":
            wish = json.loads(self.body)
            repo_id = "/".join(filter(None, (wish.get("organization") or "me", wish["name"])))
            status = 409 if repo_id in self.hub.repos else 200
            self.hub.repos.setdefault(repo_id, Repo()).commits or self.hub.repos[repo_id].commit({})
            self.json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, status)
        elif self.parts[1] == "whoami-v2":
            self.json({"name": "me", "type": "user", "orgs": []})
        elif self.parts[1] == "validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif self.parts[1] == "models":
            self._api_models()
        else:
            self.error(404)

    def _api_models(self) -> None:
        verbs = ("revision", "tree", "preupload", "commit", "branch")
        at = next((place for place, part in enumerate(self.parts) if part in verbs), len(self.parts))
        repo_id, verb = "/".join(self.parts[2:at]), "".join(self.parts[at : at + 1])
        revision = "/".join(self.parts[at + 1 :]) or MAIN
        repo = self._allowed(repo_id)
        if repo is None:
            return
        if verb == "branch":
            repo.refs.setdefault(revision, repo.refs[MAIN])
            self.answer(200)
            return
        found = repo.at(revision)
        if found is None:
            self.error(404, "RevisionNotFound")
            return
        commit, files = found
        if verb in ("", "revision"):
            self.json({"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        elif verb == "tree":
            self.json(
                [
                    {"type": "file", "oid": commit_hash(name), "size": len(data), "path": name}
                    for name, data in files.items()
                ]
            )
        elif verb == "preupload":
            wanted = json.loads(self.body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in wanted
            ]
            self.json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        else:
            self._commit(repo, repo_id, revision, files)

    def _commit(self, repo: Repo, repo_id: str, revision: str, files: dict[str, bytes]) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = dict(files)
        if any(line["key"] == "lfsFile" and line["value"]["oid"] not in self.hub.stored for line in lines):
            self.error(422)
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        header = next(line["value"] for line in lines if line["key"] == "header")
        pull = "create_pr" in self.query
        ref = "refs/pr/1" if pull else revision
        commit = repo.commit(files, ref)
        repo.log.append({**header, "ref": ref})
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True}
        self.json({**answer, **({"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"} if pull else {})})

    def _lfs_batch(self) -> None:
        wish = json.loads(self.body)
        objects = []
        for item in wish["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}
            objects.append({**item, "authenticated": True, "actions": {"upload": upload}})
        self.json({"transfer": "basic", "objects": objects})
