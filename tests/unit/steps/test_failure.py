"""What an exception amounts to: whether the operator tries again."""

import errno

import pytest

from finetune.api.contract import NEVER_RETRIED
from finetune.steps.runtime.failure import failure_of


@pytest.mark.parametrize(
    "error",
    [
        TypeError("forward() got an unexpected keyword argument 'seq_idx'"),
        AttributeError("'NoneType' object has no attribute 'weight'"),
        NotImplementedError("no kernel for this"),
        ImportError("cannot import name 'x'"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_would_end_the_same_way_again_is_not_tried_again(error: Exception) -> None:
    failure = failure_of(error)
    assert failure.code in NEVER_RETRIED
    assert str(error) in failure.error.message
    assert failure.error.hint


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), OSError(errno.EIO, "disk")])
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert failure_of(error).code not in NEVER_RETRIED
