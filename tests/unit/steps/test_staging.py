"""Publishing a folder: complete or absent, whenever the process dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.steps.runtime.memory import available_memory
from finetune.steps.workspace import staging
from finetune.steps.workspace.base_model import base_model
from tests.unit.steps.jobs import layout


def write(partial: Path) -> dict[str, Any]:
    (partial / "data").write_text("whole")
    return {"size": 5}


def test_a_folder_is_made_once_and_then_reused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert staging.publish(folder, {"a": 1}, write) == {"size": 5}
    assert staging.publish(folder, {"a": 1}, lambda _: pytest.fail("written again")) == {"size": 5, "reused": True}
    assert staging.inputs_of(folder) == staging.digest({"a": 1})
    assert staging.published(folder, {"a": 2}) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_other_inputs_replace_the_folder_and_drop_what_was_begun(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def fail(partial: Path) -> dict[str, Any]:
        (partial / "begun").touch()
        raise RuntimeError

    staging.publish(folder, 1, write)
    with pytest.raises(RuntimeError):
        staging.publish(folder, 2, fail)
    assert staging.published(folder, 1) == {"size": 5}

    def goes_on(partial: Path) -> dict[str, Any]:
        assert (partial / "begun").exists()
        return write(partial)

    staging.publish(folder, 2, goes_on)
    with pytest.raises(RuntimeError):
        staging.publish(folder, 3, fail)
    staging.publish(folder, 4, lambda partial: {"begun": (partial / "begun").exists()})
    assert staging.published(folder, 4) == {"begun": False}


KILLED_AT = """
import os, sys
from pathlib import Path
from finetune.steps.workspace import staging
folder, moment = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def watch(event, arguments):
    global calls
    changes = ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "os.chmod")
    if event in changes and "model" in str(arguments):
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), 9)
def write(partial):
    (partial / "data").write_text("new")
    return {"size": 3}
sys.addaudithook(watch)
staging.publish(folder, "new", write)
"""


def test_killed_before_any_call_the_folder_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    outcomes = set()
    for moment in range(1, 60):
        folder = tmp_path / str(moment) / "model"
        folder.parent.mkdir()
        staging.publish(folder, "old", write)
        command = [sys.executable, "-c", KILLED_AT, str(folder), str(moment)]
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).returncode
        found = staging.published(folder)
        if found is None:
            assert not folder.exists()
            assert (folder.parent / "model.former/data").read_text() == "whole"
        else:
            outcomes.add((folder / "data").read_text())
            assert (folder / "data").read_text() == {5: "whole", 3: "new"}[found["size"]]
        staging.publish(folder, "new", lambda partial: (write(partial), {"size": 3})[1])
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if code == 0:
            break
    else:
        pytest.fail("never ran to its end")
    assert outcomes == {"whole", "new"}


def test_later_steps_start_from_the_extended_model_only_when_it_is_complete(tmp_path: Path) -> None:
    place = layout(tmp_path)
    staging.publish(place.model, 1, write)
    place.prepared.mkdir()
    assert base_model(place) == place.model
    staging.publish(place.prepared, 1, write)
    assert base_model(place) == place.prepared


@pytest.mark.parametrize("version", ["memory.max memory.current memory.stat", "memory/limit memory/usage memory/stat"])
def test_memory_is_what_machine_and_container_leave(tmp_path: Path, version: str) -> None:
    names = {"memory/limit": "memory/memory.limit_in_bytes", "memory/usage": "memory/memory.usage_in_bytes"}
    limit, usage, stat = (tmp_path / names.get(name, name) for name in version.split())
    (tmp_path / "memory").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    stat = limit.parent / "memory.stat"
    stat.write_text("anon 5\ninactive_file 300\nactive_file 200\n")
    limit.write_text("2000000\n")
    usage.write_text("1000500\n")
    assert available_memory(tmp_path, tmp_path / "meminfo") == 1_000_000
    limit.write_text("max\n" if version.startswith("memory.max") else f"{1 << 63}\n")
    assert available_memory(tmp_path, tmp_path / "meminfo") == 4_096_000
