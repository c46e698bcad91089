"""The patch from one document to another, and a server that merges it: the other document."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.controller.cluster.patch import merge_patch
from tests.merge_patch import merged

LEAVES = st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
FIELDS = st.sampled_from("abcd")
DOCUMENTS = st.dictionaries(
    FIELDS, st.recursive(LEAVES, lambda item: st.dictionaries(FIELDS, item, max_size=3)), max_size=4
)


@pytest.mark.parametrize(
    ("before", "after", "patch"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1, "b": {"c": 1, "d": 2}}, {"a": 2, "b": {"d": 2}}, {"a": 2, "b": {"c": None}}),
        ({"a": [1, 2]}, {"a": [1]}, {"a": [1]}),
        ({"a": True}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({}, {"a": {}}, {"a": {}}),
    ],
)
def test_only_what_changed_is_named(before, after, patch):
    assert merge_patch(before, after) == patch


@given(DOCUMENTS, DOCUMENTS)
def test_merged_it_gives_the_other_document(before, after):
    assert merged(before, merge_patch(before, after)) == after
