"""The shared cache: the second job finds the first one's work, and no crash, race or damage gets into a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode, Layout
from finetune.steps import cache
from finetune.steps.download import step as download
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.tokens import step
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.staging import MANIFEST, publish, published
from tests.hub import Hub
from tests.models import tiny
from tests.unit.steps.jobs import job, job_file, layout, outcome_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
THINK = {"tokens": {"add": [{"content": "<think>"}]}}


class Place:
    """Workspaces of several jobs around one cache."""

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.folder = folder
        self.cache = shared or folder / "cache"

    def layout(self, name: str) -> Layout:
        return replace(layout(self.folder / name), claims=self.folder / "claims", cache=self.cache)

    def with_model(self, name: str, commit: str = COMMIT, **model: Any) -> Layout:
        """A workspace whose base model came from a commit, by way of the cache."""
        place = self.layout(name)
        place.workspace.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> dict[str, Any]:
            tiny(partial, **({"sharded": True, "layers": 4} | model))
            return {"commit": commit}

        publish(place.model, commit, cache.cached(place, cache.MODELS, lambda: {"commit": commit}, write))
        return place

    def add_tokens(self, name: str, spec: dict[str, Any] = THINK, commit: str = COMMIT, **model: Any) -> dict[str, Any]:
        report = step.run(job(spec), self.with_model(name, commit, **model))
        assert report.result is not None
        return report.result

    def environment(self, name: str, spec: dict[str, Any] = THINK) -> dict[str, str]:
        """What a step's process for one of the workspaces sees."""
        return job_file(self.with_model(name).workspace, spec) | {"FINETUNE_CACHE": str(self.cache)}

    @property
    def extended(self) -> Path:
        return self.cache / cache.FOLDER / cache.EXTENDED

    def entries(self) -> list[Path]:
        return sorted(path for path in self.extended.iterdir() if len(path.name) == 64)

    def files(self) -> dict[str, str]:
        """The digest of every file in the cache."""
        return {
            str(path.relative_to(self.cache)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.cache.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Place]:
    """With the cache on a file system of its own."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Place(tmp_path, Path(folder))


def test_a_second_job_with_the_same_tokens_reuses_the_first_ones_model(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place.add_tokens("first")
    monkeypatch.setattr(step, "add_tokens", lambda *_: pytest.fail("made again"))
    second = place.add_tokens("second")
    assert (first.pop("fromCache"), second.pop("fromCache")) == (False, True)
    assert first == second
    one, other = place.layout("first").prepared, place.layout("second").prepared
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        assert path.name == MANIFEST or path.read_bytes() == (other / path.name).read_bytes()
    assert len(place.entries()) == 1


def test_a_restarted_pod_says_again_where_its_model_came_from(place: Place) -> None:
    assert place.add_tokens("first")["fromCache"] is False
    assert place.add_tokens("first")["fromCache"] is False


def test_without_a_cache_status_does_not_mention_one(place: Place) -> None:
    report = step.run(job(THINK), replace(place.with_model("job"), cache=None))
    assert "fromCache" not in (report.result or {})
    assert not place.extended.exists()


def test_shards_without_token_matrices_are_one_file_in_base_model_extended_models_and_workspaces(place: Place) -> None:
    place.add_tokens("first")
    place.add_tokens("second", {"tokens": {"add": [{"content": "<other>"}]}})
    names = [path.name for path in place.layout("first").prepared.glob("*.safetensors")]
    copies = {name: {path.stat().st_ino for path in place.folder.rglob(name)} for name in names}
    assert sorted(map(len, copies.values())) == [1, 1, 3]  # the embedding lies in one shard of three
    assert len(place.entries()) == 2


TOKEN = {"content": "<think>"}


@pytest.mark.parametrize(
    "tokens",
    [
        {"add": [{"content": "<thinks>"}]},
        {"add": [TOKEN, {"content": "<b>"}]},
        {"add": [{"content": "<b>"}, TOKEN]},
        {"add": [TOKEN | {"init": {"copyOf": "<|im_start|>"}}]},
        {"add": [TOKEN], "init": {"meanOf": "Vocabulary"}},
        {"add": [TOKEN | {"special": True}]},
        {"add": [TOKEN | {"lstrip": True}]},
        {"add": [TOKEN], "padToMultipleOf": 1},
    ],
)
def test_whatever_changes_the_result_changes_the_key(place: Place, tokens: dict[str, Any]) -> None:
    place.add_tokens("first")
    place.add_tokens("both", {"tokens": {"add": [TOKEN, {"content": "<c>"}]}})
    assert place.add_tokens("other", {"tokens": tokens})["fromCache"] is False
    assert len(place.entries()) == 3


def test_another_commit_or_another_release_of_the_editor_changes_the_key(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.add_tokens("first")
    assert place.add_tokens("second", commit="f" * 40, seed=1)["fromCache"] is False
    monkeypatch.setattr(step, "FORMAT", step.FORMAT + 1)
    assert place.add_tokens("third")["fromCache"] is False
    assert len(place.entries()) == 3


def test_the_seed_changes_the_key_only_where_rows_are_drawn(place: Place) -> None:
    drawn = {"tokens": {"add": [TOKEN], "init": {"sample": "Normal"}}}
    seeds = [{"training": {"epochs": 1, "seed": seed}} for seed in (1, 2)]
    assert [place.add_tokens(f"drawn-{n}", drawn | seed)["fromCache"] for n, seed in enumerate(seeds)] == [False, False]
    assert [place.add_tokens(f"mean-{n}", THINK | seed)["fromCache"] for n, seed in enumerate(seeds)] == [False, True]


def from_claim(place: Place, name: str, claim: str) -> bool:
    spec = THINK | {"model": {"uri": f"pvc://{claim}/base"}}
    there = place.layout(name)
    there.workspace.mkdir(exist_ok=True)
    download.run(job(spec), there)
    return bool((step.run(job(spec), there).result or {})["fromCache"])


def test_models_in_claims_are_known_by_their_content_and_stay_their_owners(place: Place) -> None:
    base = tiny(place.folder / "claims/mine/base", sharded=True, layers=4)
    shutil.copytree(base, place.folder / "claims/copy/base")
    tiny(place.folder / "claims/other/base", sharded=True, layers=4, seed=1)
    before = {path: path.stat().st_mode for path in base.iterdir()}
    assert not from_claim(place, "first", "mine")
    assert from_claim(place, "second", "copy")
    assert not from_claim(place, "third", "other")
    assert {path: path.stat().st_mode for path in base.iterdir()} == before
    kept = place.files()
    for path in base.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"the owner writes into the file as it lies there")
    assert place.files() == kept


def test_published_files_are_read_only_and_nobody_writes_to_them(place: Place) -> None:
    place.add_tokens("first")
    before = place.files()
    for path in (place.cache / name for name in before):
        assert path.stat().st_mode & 0o777 == 0o444, path
    place.add_tokens("first", {"tokens": {"add": [{"content": "<other>"}]}})
    place.add_tokens("first", {"tokens": {"add": [{"content": "<|im_end|>"}]}})
    assert not set(before.items()) - set(place.files().items())
    shutil.rmtree(place.folder / "first")
    assert not set(before.items()) - set(place.files().items())


RACE = """
import sys, time
from pathlib import Path
from finetune.steps import __main__
from finetune.steps.tokens import step
add_tokens, entries = step.add_tokens, Path(sys.argv[1])
def at_the_same_time(*arguments):
    while len(list(entries.glob("*.partial-*"))) < 2 and not list(entries.glob("*/finetune-manifest.json")):
        time.sleep(0.001)
    return add_tokens(*arguments)
step.add_tokens = at_the_same_time
sys.exit(__main__.main(["add-tokens"]))
"""


def test_of_two_jobs_at_once_one_takes_the_others_model(place: Place) -> None:
    place.with_model("base")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(place.extended)], env=place.environment(name), stdout=subprocess.DEVNULL
        )
        for name in ("one", "other")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [published(place.layout(name).prepared) for name in ("one", "other")]
    assert sorted(result["fromCache"] for result in results if result) == [False, True]
    assert [path.name for path in place.extended.iterdir()] == [place.entries()[0].name]
    assert place.add_tokens("third")["fromCache"] is True


KILLED_AT = """
import os, sys
moment, calls = int(sys.argv[1]), 0
def watch(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.link", "os.chmod", "os.utime"):
        if "cache" in str(arguments[0]) and "pycache" not in str(arguments[0]):
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), 9)
sys.addaudithook(watch)
from finetune.steps import __main__
sys.exit(__main__.main(["add-tokens"]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_nothing_half_and_the_next_run_works(place: Place) -> None:
    place.add_tokens("whole")
    whole = {path.name: path.read_bytes() for path in place.entries()[0].iterdir()}
    moments = iter(range(1, 400, 7))
    killed = 0
    for moment in moments:
        shutil.rmtree(place.extended)
        shutil.rmtree(place.folder / "job", ignore_errors=True)
        command = [sys.executable, "-c", KILLED_AT, str(moment)]
        code = subprocess.run(command, env=place.environment("job"), stdout=subprocess.DEVNULL).returncode
        for entry in place.entries() if place.extended.exists() else ():
            assert {path.name: path.read_bytes() for path in entry.iterdir()} == whole
        place.add_tokens("job")
        assert [{path.name: path.read_bytes() for path in entry.iterdir()} for entry in place.extended.iterdir()] == [
            whole
        ]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    else:
        pytest.fail("never ran to its end")
    assert killed > 5


def test_what_a_killed_job_began_is_removed_when_it_is_old_and_not_while_its_writer_may_live(place: Place) -> None:
    place.add_tokens("first")
    begun = place.extended / f"{'a' * 64}.partial-somebody"
    begun.mkdir()
    (begun / "model.safetensors").write_bytes(b"half")
    place.add_tokens("second")
    assert begun.exists()
    old = time.time() - cache.ABANDONED_SECONDS - 1
    os.utime(begun, (old, old))
    place.add_tokens("third")
    assert [path.name for path in place.extended.iterdir()] == [place.entries()[0].name]


def test_a_writer_that_takes_long_shows_that_it_lives(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HEARTBEAT_SECONDS", 0.01)

    def write(partial: Path) -> dict[str, Any]:
        os.utime(partial, (1, 1))
        while partial.stat().st_mtime == 1:
            time.sleep(0.001)
        return {}

    cache.Cache(place.cache, "writer").entry("slow", write)


def test_a_download_goes_on_from_what_the_same_job_left_in_the_cache(place: Place) -> None:
    entries = cache.Cache(place.cache, "writer")

    def interrupted(partial: Path) -> dict[str, Any]:
        (partial / "weights.part").write_bytes(b"half")
        raise StepFailure(ExitCode.UNAVAILABLE, "HubUnavailable", "gone")

    def goes_on(partial: Path) -> dict[str, Any]:
        return {"found": (partial / "weights.part").read_bytes().decode()}

    with pytest.raises(StepFailure):
        entries.entry("model", interrupted)
    assert entries.entry("model", goes_on)[0].result == {"found": "half"}


def test_what_can_never_become_an_entry_is_not_left_lying_there(place: Place) -> None:
    with pytest.raises(StepFailure):
        place.add_tokens("first", {"tokens": {"add": [TOKEN, {"content": "Ġthe"}]}})
    assert list(place.extended.iterdir()) == []


def truncate_weights(entry: Path) -> None:
    path = next(entry.glob("*-00001-*.safetensors"))
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 8)


def change_configuration(entry: Path) -> None:
    path = entry / "config.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"2048", b"4096"))


def lose_tokenizer(entry: Path) -> None:
    (entry / "tokenizer.json").unlink()


def spoil_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()
    (entry / MANIFEST).write_text('{"result": {}, "files": ["x"]}')


@pytest.mark.parametrize("damage", [truncate_weights, change_configuration, lose_tokenizer, spoil_manifest])
def test_a_damaged_entry_is_noticed_and_made_anew(place: Place, damage: Any) -> None:
    place.add_tokens("first")
    before = place.files()
    damage(place.entries()[0])
    assert place.add_tokens("second")["fromCache"] is False
    assert place.files() == before
    assert place.add_tokens("third")["fromCache"] is True


def test_on_another_file_system_weights_are_read_in_place(elsewhere: Place) -> None:
    elsewhere.add_tokens("first")
    assert elsewhere.add_tokens("second")["fromCache"] is True
    prepared = elsewhere.layout("second").prepared
    for path in prepared.iterdir():
        assert path.is_symlink() == path.name.endswith(".safetensors"), path
        first = elsewhere.layout("first").prepared / path.name
        assert path.name == MANIFEST or path.read_bytes() == first.read_bytes()
    assert base_model(elsewhere.layout("second")) == prepared


def test_a_removed_entry_is_made_anew_and_never_mistaken_for_a_model_without_tokens(elsewhere: Place) -> None:
    elsewhere.add_tokens("first")
    shutil.rmtree(elsewhere.extended)
    with pytest.raises(StepFailure, match=r"spec\.cache: .* was removed from the cache"):
        base_model(elsewhere.layout("first"))
    assert elsewhere.add_tokens("first")["fromCache"] is False
    assert base_model(elsewhere.layout("first")) == elsewhere.layout("first").prepared


MOUNTED = """
mount -t tmpfs -o "$OPTIONS" tmpfs "$FINETUNE_CACHE" && "$PYTHON" -m finetune.steps add-tokens
code=$?; find "$FINETUNE_CACHE" -type f; exit $code
"""


def with_mounted_cache(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    """add-tokens with a cache on a tmpfs that is mounted so."""
    publish(layout(folder).model, "base", lambda partial: {"made": str(tiny(partial, hidden=512))})
    (folder / "cache").mkdir()
    environment = {"FINETUNE_CACHE": str(folder / "cache"), "PYTHON": sys.executable, "OPTIONS": options}
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    command = [*namespace, "sh", "-c", MOUNTED]
    return subprocess.run(command, env=job_file(folder, THINK) | environment, capture_output=True, text=True)


def test_a_cache_without_room_fails_no_job(tmp_path: Path) -> None:
    process = with_mounted_cache(tmp_path, "size=1m")
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "report.json").read_text())["result"]["fromCache"] is False
    assert published(tmp_path / "prepared") is not None
    assert str(tmp_path / "cache") not in process.stdout
    assert "the cache has no room" in process.stderr


def test_a_cache_that_must_not_be_written_is_named(tmp_path: Path) -> None:
    process = with_mounted_cache(tmp_path, "ro")
    error = json.loads((tmp_path / "report.json").read_text())["error"]
    assert (process.returncode, error["reason"]) == (78, "CacheNotWritable")
    assert error["message"] == f"spec.cache: {tmp_path}/cache/finetune-cache: Read-only file system"


def test_a_second_job_downloads_nothing_and_one_of_a_commit_does_not_even_ask(tmp_path: Path) -> None:
    tiny(tmp_path / "hub/models/org/model")

    def fetch(name: str, revision: str = "main") -> Any:
        (tmp_path / name).mkdir()
        spec = {"model": {"uri": "hf://org/model", "revision": revision}}
        return outcome_of(
            "download", tmp_path / name, spec, HF_ENDPOINT=hub.url, FINETUNE_CACHE=str(tmp_path / "cache")
        )

    with Hub(tmp_path / "hub") as hub:
        first = fetch("first")
        assert (first.result["fromCache"], first.result["reused"]) == (False, False)
        hub.requests.clear()
        second = fetch("second")
        assert second.result == first.result | {"fromCache": True, "reused": True}
        assert not any("safetensors" in request or "tokenizer" in request for request in hub.requests)
        hub.requests.clear()
        assert fetch("third", first.result["commit"]).result == second.result
        assert hub.requests == []
    weights = [tmp_path / name / "model/model.safetensors" for name in ("first", "third")]
    assert weights[0].samefile(weights[1])
