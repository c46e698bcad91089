"""The picture of the rooms shows those that there are."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "operator" / "finetune"


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir() if item.is_dir() and item.name != "__pycache__"}


def test_each_room_of_the_code_is_in_the_picture_and_no_other(rooms):
    assert set(rooms.CONTROLLER) == found(CODE / "controller")
    drawn = {*rooms.STEPS, *rooms.SHARED}
    assert {name for name in drawn if "." not in name} == found(CODE / "steps")
    for name in (*rooms.CONTROLLER, *drawn):
        assert f'<tspan class="name">{name}</tspan>' in rooms.picture()
    assert all((CODE / "steps" / name).exists() for name in drawn)


def test_the_picture_is_the_one_that_the_script_draws(rooms):
    assert rooms.PICTURE.read_text() == rooms.picture(), "run `make rooms`"
