"""The picture of the rooms shows those that there are."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "operator" / "finetune"


@pytest.fixture(scope="module")
def rooms() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "rooms.py"), run_name="rooms"))


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
