"""Several examples in one row, so that hardly a token of a batch is padding.

Best fit decreasing: the longest example first, each into the row that it fills best. It is done on windows of examples,
which bounds its memory and keeps a mixture's proportions and the order of buckets; inside a window the rows are
shuffled again, since by themselves they would come sorted by length.

Examples in a row stay isolated: positions begin anew with each, and transformers derives from them a mask that lets no
example see another. Models that carry a state from token to token, or know positions as distances only, cannot do that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure

WINDOW = 16_384
"""Examples that are packed together."""

STATE_SPACE = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
)  # fmt: skip
ALIBI = ("bloom", "mpt")
MIXERS = ("conv", "linear_attention", "mamba", "recurrent")
"""Types of layers, in a configuration's `layer_types`, that pass a state on from token to token."""

Numbers = npt.NDArray[np.int64]


def packed(order: Numbers, lengths: npt.NDArray[np.int32], size: int, seed: int) -> Iterator[list[Numbers]]:
    """The examples of `order`, window by window, put together into rows of at most `size` tokens."""
    for window, start in enumerate(range(0, len(order), WINDOW)):
        numbers = order[start : start + WINDOW]
        rows = best_fit(lengths[numbers], size)
        random = np.random.default_rng((seed, 2, window))
        yield [numbers[rows[place]] for place in random.permutation(len(rows))]


def best_fit(lengths: Sequence[int] | npt.NDArray[np.int32], size: int) -> list[Numbers]:
    """Rows of at most `size`, as places in `lengths` (each from 1 to `size`), by best fit decreasing.

    The room left in open rows is kept as a set of bits: the lowest bit at or above a length is its best fit.
    """
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    rooms = 0
    for place, length in zip(longest_first.tolist(), np.asarray(lengths)[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(place)
        if room > length:
            open_rows.setdefault(room - length, []).append(row)
            rooms |= 1 << room - length
    return [np.array(row, np.int64) for row in rows]


def require_isolation(model: Path) -> None:
    """Refuse a model whose architecture cannot keep packed examples apart, before a GPU is spent on it. What passes is
    proven on real rows at the start of training."""
    try:
        config = json.loads((model / "config.json").read_text())
    except FileNotFoundError:
        return
    why = _obstacle({**config, **config.get("text_config", {})})
    if why:
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "PackingNotPossible",
            f"spec.dataset.packing: Enabled, but the model ({config.get('model_type')}) {why}, so that examples in one "
            "row would not be isolated from one another",
            "Use packing: Disabled.",
        )


def _obstacle(config: dict[str, Any]) -> str | None:
    kind = config.get("model_type")
    if kind in ALIBI or config.get("alibi") or config.get("position_embedding_type") == "alibi":
        return "takes positions from distances (ALiBi)"
    mixers = sorted({str(layer) for layer in config.get("layer_types") or ()} & set(MIXERS))
    if kind in STATE_SPACE or mixers:
        return f"passes a state from token to token ({', '.join(mixers) or 'state space'})"
    return None
