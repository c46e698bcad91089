"""What a step came to, in one line: from its report here, or from the job's status in a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.api.contract import Step
from finetune.cli.picture import size

Result = Mapping[str, Any]


def summary(step: Step, result: Result) -> str:
    """The numbers that matter, in the wire names of api/status.py."""
    words = {
        Step.DOWNLOAD: _download,
        Step.ADD_TOKENS: _tokens,
        Step.RELOAD: _reload,
        Step.LOAD_DATASET: _dataset,
        Step.TRAIN: _training,
        Step.SAVE: _output,
    }[step](result)
    origin = "from the cache" if result.get("fromCache") else "reused" if result.get("reused") else None
    return ", ".join([*words, origin] if origin else words)


def _download(result: Result) -> list[str]:
    words = []
    if commit := result.get("commit"):
        words.append(f"commit {commit[:12]}")
    if bytes_ := result.get("sizeBytes"):
        words.append(size(bytes_))
    return words


def _tokens(result: Result) -> list[str]:
    words = [f"{result.get('added', 0)} added"]
    if present := result.get("alreadyPresent"):
        words.append(f"{present} already there")
    for name, label in (("vocabularySize", "vocabulary"), ("embeddingRows", "rows")):
        before, after = result.get(f"{name}Before"), result.get(name)
        if before is not None and after is not None:
            words.append(f"{label} {before:,} → {after:,}")
    if held_out := result.get("charactersPerToken"):
        words.append(f"characters per token {held_out['before']:.2f} → {held_out['after']:.2f}")
    return words


def _reload(result: Result) -> list[str]:
    words = []
    for item in (result.get("probabilities") or [])[:3]:
        place = "withPrompt" if item.get("withPrompt") is not None else "withoutPrompt"
        before, after = item.get(f"{place}Before"), item.get(place)
        if after is not None:
            words.append(f"P({item['token']}) {'' if before is None else f'{before:.2g} → '}{after:.2g}")
    return words


def _dataset(result: Result) -> list[str]:
    words = [f"{result.get('examples', 0):,} examples"]
    if held_out := result.get("validationExamples"):
        words.append(f"{held_out:,} held out")
    if result.get("tokens"):
        words.append(f"{result.get('trainedTokens', 0):,} of {result['tokens']:,} tokens carry loss")
    if packed := result.get("packedRows"):
        words.append(f"packed into {packed:,} rows")
    for name, label in (("truncated", "shortened"), ("dropped", "dropped")):
        if count := result.get(name):
            words.append(f"{count:,} {label}")
    if both := result.get("validationDuplicates"):
        words.append(f"{both:,} rows were in training and in validation")
    if empty := result.get("emptyAnswers"):
        words.append(f"{empty:,} empty answers")
    if result.get("endTokens") == []:
        words.append("nothing teaches where to stop")
    if turns := result.get("turnsBy"):
        words.append("turns: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(turns.items())))
    if fields := result.get("unusedFields"):
        words.append(f"not used: {'; '.join(fields[:4])}{' …' if len(fields) > 4 else ''}")
    if unused := result.get("unusedTokens"):
        words.append(f"never occur: {' '.join(unused[:4])}{' …' if len(unused) > 4 else ''}")
    return words


def _training(result: Result) -> list[str]:
    words = []
    if steps := result.get("steps"):
        words.append(f"{steps:,} steps")
    for name, label in (("loss", "loss"), ("validationLoss", "validation loss")):
        if result.get(name) is not None:
            words.append(f"{label} {result[name]:.4g}")
    if result.get("exact") is False:
        words.append("resumed, not bit-exact")
    return words


def _output(result: Result) -> list[str]:
    words = [str(result["uri"])] if result.get("uri") else []
    if result.get("sizeBytes"):
        words.append(size(result["sizeBytes"]))
    return words
