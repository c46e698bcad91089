"""docs/conditions.md has every condition and every reason, and the code gives no other."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from finetune.api.conditions import MEANINGS, ConditionType
from finetune.api.reasons import REASONS, Reason

ROOT = Path(__file__).parents[2]
DECISION = ROOT / "operator/finetune/controller/decision"
GIVING = {"set": 2, "_fail": 0, "fail": 0, "doom": 0, "_next_step": 1, "_always": 0}
"""Calls that give a reason, and which of their arguments it is."""


@pytest.fixture(scope="module")
def conditions():
    specification = importlib.util.spec_from_file_location("conditions_page", ROOT / "docs/conditions.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(conditions):
    assert conditions.PAGE.read_text() == conditions.page(), "stale: run `make conditions`"


def test_every_condition_and_every_reason_is_explained():
    assert set(MEANINGS) == set(ConditionType)
    assert set(REASONS) == set(Reason)


def literals():
    for path in DECISION.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                place = GIVING.get(name)
                if place is not None and len(node.args) > place and isinstance(node.args[place], ast.Constant):
                    yield str(node.args[place].value)


def test_the_decision_gives_no_reason_that_is_not_in_the_table():
    assert {word for word in literals() if word.isidentifier()} <= set(Reason)


def test_every_reason_of_a_step_is_on_the_page_with_what_to_do(conditions):
    found = conditions.failures()
    assert len({item.reason for item in found}) > 70
    bare = {item.reason for item in found if not item.remedy}
    assert bare <= set(Reason), "a step fails without a word on what to do"
