"""Datasets in a bucket, over the real protocol, from a server of a few lines that signs nothing and checks the key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from finetune.api.contract import ExitCode
from finetune.steps.dataset.step import run
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens import step
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.poems import made as poems
from tests.unit.steps.adding import result
from tests.unit.steps.flow import Workshop
from tests.unit.steps.jobs import layout, report_of

KEY = "AKIATEST"
ROWS = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}."} for number in range(5)]


class S3(BaseHTTPRequestHandler):
    """HeadObject, GetObject and ListObjectsV2 over a dictionary of "bucket/key": bytes."""

    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        self._list(query) if "list-type" in query else self._object(with_body=True)

    def _object(self, *, with_body: bool) -> None:
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            return self._answer(403)
        content = self.objects.get(unquote(urlsplit(self.path).path).strip("/"))
        if content is None:
            return self._answer(404)
        asked = self.headers.get("Range")
        if asked is None:
            return self._answer(200, content, with_body=with_body)
        first, last = asked.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        return self._answer(206, part, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, with_body=with_body)

    def _list(self, query: dict[str, list[str]]) -> None:
        bucket, prefix = urlsplit(self.path).path.strip("/"), query.get("prefix", [""])[0]
        keys = [name.removeprefix(f"{bucket}/") for name in self.objects if name.startswith(f"{bucket}/{prefix}")]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2026-02-03T04:05:06.000Z</LastModified></Contents>"
            for key in sorted(keys)
        )
        body = f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount>{entries}</ListBucketResult>"
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _answer(
        self, code: int, content: bytes = b"", headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.send_response(code)
        for name, value in {"Last-Modified": formatdate(0, usegmt=True), **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    objects = {"corpus/sums/a.jsonl": b"".join(lines[:3]), "corpus/sums/b.jsonl": b"".join(lines[3:])}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (S3,), {"objects": objects}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    yield objects
    server.shutdown()
    thread.join()
    server.server_close()


def load(folder: Path, uri: str) -> dict[str, Any]:
    workshop = Workshop(folder) if (folder / "workspace").exists() else Workshop.at(folder)
    result = run(workshop.job({"uri": uri}), workshop.layout).result
    assert result is not None
    return result


def test_a_file_and_a_folder_of_a_bucket_are_read(objects: dict[str, bytes], tmp_path: Path) -> None:
    assert load(tmp_path / "file", "s3://corpus/sums/a.jsonl")["examples"] == 3
    assert load(tmp_path / "folder", "s3://corpus/sums")["examples"] == 5


def test_a_changed_object_is_read_again_and_an_unchanged_one_is_not(objects: dict[str, bytes], tmp_path: Path) -> None:
    load(tmp_path, "s3://corpus/sums")
    assert load(tmp_path, "s3://corpus/sums")["reused"] is True
    objects["corpus/sums/b.jsonl"] *= 2
    assert load(tmp_path, "s3://corpus/sums")["examples"] == 7


@pytest.mark.parametrize(
    ("uri", "environment", "code", "reason"),
    [
        ("s3://corpus/none", {}, ExitCode.NO_INPUT, "DatasetNotFound"),
        ("s3://corpus/sums", {"AWS_ACCESS_KEY_ID": "AKIAOTHER"}, ExitCode.NO_INPUT, "AccessDenied"),
        ("s3://corpus/sums", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ExitCode.UNAVAILABLE, "BucketUnavailable"),
    ],
)
def test_what_a_bucket_refuses_is_said_with_the_remedy(
    objects: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    environment: dict[str, str],
    code: ExitCode,
    reason: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StepFailure) as failure:
        load(tmp_path, uri)
    assert (failure.value.code, failure.value.error.reason) == (code, reason)
    assert failure.value.error.message.startswith(f"spec.dataset.sources[0].uri: {uri}")
    assert failure.value.error.hint


def test_a_vocabulary_is_learned_from_a_bucket(objects: dict[str, bytes], tmp_path: Path) -> None:
    objects["corpus/poems.jsonl"] = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in poems())
    publish(layout(tmp_path).model, "base", lambda partial: {"made": str(tiny(partial, dtype="float32"))})
    lesson = {"source": {"uri": "s3://corpus/poems.jsonl"}, "size": 40}
    assert result(tmp_path, {"tokens": {"learn": lesson}})["learned"] == 40
    absent = {"source": {"uri": "s3://corpus/none.jsonl"}, "size": 40}
    with pytest.raises(StepFailure, match=r"spec\.tokens\.learn\.source\.uri: s3://corpus/none"):
        report_of(step, tmp_path, {"tokens": {"learn": absent}})
