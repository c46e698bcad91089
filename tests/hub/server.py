"""A hub for tests: serves folders over the Hugging Face protocol, and misbehaves on request.

    python server.py --root DIR [--port 8080] [--host 0.0.0.0] [--rules FILE]

DIR holds models/ORGANISATION/NAME/... and datasets/ORGANISATION/NAME/.... Clients find it through HF_ENDPOINT. One
file, standard library only, so that it also runs in a pod with nothing but Python.

Rules make it fail. Each is a JSON object with `match` (a shell pattern over `models/ORGANISATION/NAME/FILE`), `action`
and the action's parameters; `times` limits how often it applies. They come from a file, or from PUT /control/rules.
    gate      {"token": "hf_..."}      files are refused (401, GatedRepo) unless the request carries this token
    refuse    {"status": 503}          every request is answered so
    delay     {"seconds": 1.5}         before the answer
    throttle  {"bytesPerSecond": 1e6}  the body comes slowly
    drop      {"after": 1000}          the connection breaks after so many bytes of the body
    corrupt   {"at": 5000}             one byte of the body differs from what was promised
    truncate  {"size": 3000}           the file is that short, and so is what is promised
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".gguf", ".arrow")
"""Files that a hub keeps outside git: their etag is their SHA-256."""

BLOCK = 1 << 16


@dataclass
class Rule:
    """One way to misbehave."""

    match: str
    action: str
    parameters: dict[str, Any] = field(default_factory=dict)
    times: int | None = None

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Rule:
        parameters = {key: value for key, value in entry.items() if key not in ("match", "action", "times")}
        return cls(entry["match"], entry["action"], parameters, entry.get("times"))


@dataclass(frozen=True)
class File:
    """A file of a repository as it is promised to clients."""

    path: Path
    name: str
    size: int
    sha256: str
    blob: str

    @property
    def large(self) -> bool:
        return self.name.endswith(LARGE)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob


class Hub:
    """The server. As a context manager it runs in a thread; `requests` remembers what was asked."""

    def __init__(self, root: Path, port: int = 0, host: str = "127.0.0.1") -> None:
        self.root = root
        self.requests: list[str] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._digests: dict[tuple[Path, int, int, int], tuple[str, str]] = {}
        self.server = ThreadingHTTPServer((host, port), _handler(self))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://{self.server.server_address[0]!s}:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def set_rules(self, entries: list[dict[str, Any]]) -> None:
        """Replace all rules."""
        with self._lock:
            self._rules = [Rule.of(entry) for entry in entries]

    def rule(self, action: str, target: str, *, use: bool = True) -> dict[str, Any] | None:
        """The parameters of the first rule of this action that applies, which counts as one use of it."""
        with self._lock:
            for rule in self._rules:
                if rule.action == action and rule.times != 0 and fnmatch.fnmatch(target, rule.match):
                    if rule.times is not None and use:
                        rule.times -= 1
                    return rule.parameters
        return None

    def files(self, kind: str, repository: str) -> list[File] | None:
        """A repository's files in name order, or None when there is no such repository."""
        folder = self.root / kind / repository
        if not folder.is_dir():
            return None
        return [self._file(path, kind, repository, folder) for path in sorted(folder.rglob("*")) if path.is_file()]

    def _file(self, path: Path, kind: str, repository: str, folder: Path) -> File:
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        if (cut := self.rule("truncate", f"{kind}/{repository}/{name}", use=False)) is not None:
            size = min(size, int(cut["size"]))
        sha256, blob = self._digest(path, size)
        return File(path, name, size, sha256, blob)

    def _digest(self, path: Path, size: int) -> tuple[str, str]:
        status = path.stat()
        key = (path, status.st_size, status.st_mtime_ns, size)
        if key not in self._digests:
            sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
            for data in _read(path, 0, size):
                sha256.update(data)
                blob.update(data)
            self._digests[key] = (sha256.hexdigest(), blob.hexdigest())
        return self._digests[key]


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (data := file.read(min(BLOCK, end - start))):
            start += len(data)
            yield data


def _commit(files: list[File]) -> str:
    return hashlib.sha1("".join(f"{file.name}\0{file.sha256}\0" for file in files).encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        if urlsplit(self.path).path != "/control/rules":
            self._error(HTTPStatus.NOT_FOUND)
            return
        self.hub.set_rules(json.loads(self._body()))
        self._json([])

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        wanted = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {unquote(path)} {wanted}".rstrip())
        if path in ("/", "/healthz"):
            self._json({"status": "ok"})
            return
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, repository, what, revision, inner = match.groups()
            self._api(kind, repository, what or "revision", unquote(revision or "main"), unquote(inner or ""), query)
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            dataset, repository, revision, name = match.groups()
            self._resolve("datasets" if dataset else "models", repository, unquote(revision), unquote(name))
        else:
            self._error(HTTPStatus.NOT_FOUND)

    def _repository(self, kind: str, repository: str, revision: str) -> tuple[list[File], str] | None:
        """Files and commit; None when an error was sent."""
        target = f"{kind}/{repository}/"
        if (delay := self.hub.rule("delay", target)) is not None:
            time.sleep(float(delay["seconds"]))
        if (refusal := self.hub.rule("refuse", target)) is not None:
            self._error(int(refusal["status"]))
            return None
        files = self.hub.files(kind, repository)
        if files is None:
            # as the real hub does: without credentials nobody learns whether a private repository exists
            known = "Authorization" in self.headers
            self._error(HTTPStatus.NOT_FOUND if known else HTTPStatus.UNAUTHORIZED, "RepoNotFound")
            return None
        commit = _commit(files)
        if revision not in ("main", commit):
            self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return None
        return files, commit

    def _api(
        self, kind: str, repository: str, what: str, revision: str, inner: str, query: dict[str, list[str]]
    ) -> None:
        found = self._repository(kind, repository, revision)
        if found is None:
            return
        files, commit = found
        if what == "revision":
            gated = self.hub.rule("gate", f"{kind}/{repository}/", use=False) is not None
            siblings = [_sibling(file) if "blobs" in query else {"rfilename": file.name} for file in files]
            self._json(
                {
                    "_id": "0" * 24,
                    "id": repository,
                    "modelId": repository,
                    "sha": commit,
                    "private": False,
                    "disabled": False,
                    "gated": "auto" if gated else False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "siblings": siblings,
                }
            )
        elif what == "tree":
            entries = _tree(files, inner, recursive=query.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if inner and not entries:
                self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")
            else:
                self._json(entries)
        elif what == "paths-info":
            wanted = _paths(self._body())
            everything = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            self._json([everything[path] for path in wanted if path in everything])
        else:
            self._error(HTTPStatus.NOT_FOUND)

    def _resolve(self, kind: str, repository: str, revision: str, name: str) -> None:
        target = f"{kind}/{repository}/{name}"
        found = self._repository(kind, repository, revision)
        if found is None:
            return
        files, commit = found
        gate = self.hub.rule("gate", target, use=False)
        if gate is not None and self.headers.get("Authorization") != f"Bearer {gate.get('token')}":
            self._error(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {repository} is restricted.")
            return
        file = next((file for file in files if file.name == name), None)
        if file is None:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound", commit=commit)
            return
        start, end = _range(self.headers.get("Range"), file.size)
        if start > file.size or (start == file.size and file.size > 0):
            self._error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        partial = (start, end) != (0, file.size)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(file.size))
        self.send_header("X-Linked-ETag", f'"{file.etag}"')
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size}")
        self.end_headers()
        if self.command == "GET":
            self._send(file, target, start, end)

    def _send(self, file: File, target: str, start: int, end: int) -> None:
        drop = self.hub.rule("drop", target)
        corrupt = self.hub.rule("corrupt", target)
        throttle = self.hub.rule("throttle", target)
        position, broken = start, end if drop is None else start + int(drop["after"])
        for data in _read(file.path, start, min(end, broken)):
            if corrupt is not None and position <= int(corrupt["at"]) < position + len(data):
                changed = bytearray(data)
                changed[int(corrupt["at"]) - position] ^= 0xFF
                data = bytes(changed)
            try:
                self.wfile.write(data)
            except OSError:
                self.close_connection = True
                return
            position += len(data)
            if throttle is not None:
                time.sleep(len(data) / float(throttle["bytesPerSecond"]))
        if position < end:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        if self.command in ("POST", "PUT"):
            self._body()
        body = json.dumps({"error": message or code or HTTPStatus(status).phrase}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message or code), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sibling(file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": file.name, "size": file.size, "blobId": file.blob}
    if file.large:
        entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def _tree(files: list[File], inner: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{inner.rstrip('/')}/" if inner else ""
    folders: set[str] = set()
    entries: list[dict[str, Any]] = []
    for file in files:
        if not file.name.startswith(prefix):
            continue
        parents = file.name[len(prefix) :].split("/")[:-1]
        folders.update(prefix + "/".join(parents[: depth + 1]) for depth in range(len(parents) if recursive else 1))
        if parents and not recursive:
            continue
        entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": file.size, "path": file.name}
        if file.large:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        entries.append(entry)
    folders.discard(prefix)
    directories = [
        {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        for path in sorted(folders)
    ]
    return directories + entries


def _paths(body: bytes) -> list[str]:
    text = body.decode()
    if text.startswith("{"):
        paths = json.loads(text).get("paths", [])
        return paths if isinstance(paths, list) else [paths]
    return parse_qs(text).get("paths", [])


def _range(header: str | None, size: int) -> tuple[int, int]:
    """First and last-plus-one byte of a single range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None:
        return 0, size
    first, last = match.groups()
    if not first:
        return max(0, size - int(last or 0)), size
    return int(first), min(size, int(last) + 1) if last else size


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve folders over the Hugging Face protocol.")
    parser.add_argument("--root", type=Path, required=True, help="holds models/ORG/NAME and datasets/ORG/NAME")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--rules", type=Path, help="a JSON list of rules")
    arguments = parser.parse_args()
    hub = Hub(arguments.root, arguments.port, arguments.host)
    if arguments.rules is not None:
        hub.set_rules(json.loads(arguments.rules.read_text()))
    print(f"serving {arguments.root} at {hub.url}", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
