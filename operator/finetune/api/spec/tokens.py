"""New tokens: which, and how their rows start."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune.api.schema import (
    NO_PARENT,
    DatasetUri,
    FileUri,
    Matching,
    Model,
    Name,
    Revision,
    Split,
    keyed_by,
    rules,
)

MAX_TOKENS = 2_000
"""Tokens that one spec may list; longer lists go into a ConfigMap (`tokens.addFrom`)."""


PROBE_PROMPT = "Why is the sky blue?"


class MeanOf(StrEnum):
    PIECES = "Pieces"
    VOCABULARY = "Vocabulary"
    DESCRIPTION = "Description"


class Sample(StrEnum):
    NORMAL = "Normal"


class TokenInit(Model):
    """How the new rows of the embedding matrices start. Exactly one of the ways."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "(has(self.copyOf) ? 1 : 0) + (has(self.meanOf) ? 1 : 0) + (has(self.sample) ? 1 : 0) == 1",
                "init takes exactly one of copyOf, meanOf and sample",
            ),
            (
                "has(self.text) == (has(self.meanOf) && self.meanOf == 'Description')",
                "init.text goes with meanOf: Description, and that needs it",
            ),
            (
                "!has(self.noise) || !has(self.sample)",
                "init.noise goes with copyOf or meanOf; rows that are drawn differ already",
            ),
        )
    )

    copy_of: str | None = Field(
        None,
        description="Copy the row of this existing token. Choose one that is likely where the new token is wanted.",
        min_length=1,
        max_length=512,
    )
    mean_of: MeanOf | None = Field(
        None,
        description="The mean of the rows of: the token's own Pieces before it was added, the whole Vocabulary, "
        "or the pieces of a Description (`text`).",
    )
    text: str | None = Field(
        None, description="The description whose pieces are averaged.", min_length=1, max_length=4096
    )
    sample: Sample | None = Field(
        None,
        description="Draw each row from a Normal distribution around the mean of the old rows, with their covariance "
        "scaled by 1e-5, seeded by training.seed. Input and output embeddings each from their own.",
    )
    noise: float | None = Field(
        None,
        description="Add normal noise of this many standard deviations (of each column of the old rows), seeded by "
        "training.seed. For several tokens with one source, which would start equal: 0.01 tells them apart.",
        gt=0,
        le=1,
    )


class NewToken(Model):
    """One word or marker that becomes a single token."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.init) || !has(self.init.copyOf) || self.init.copyOf != self.content",
                "init.copyOf names the new token itself; name a token that the base model has",
            )
        )
    )

    content: str = Field(
        description="The text of the token.",
        min_length=1,
        max_length=512,
        json_schema_extra=rules((r"self.matches('[^\\s\\pZ]')", "a token must not consist of white space only")),
    )
    init: TokenInit | None = Field(None, description="How its rows start; tokens.init when absent.")
    reuse: bool = Field(
        False,
        description="The tokenizer has this token already (a reserved one, such as <|reserved_special_token_5|>, whose "
        "row was never trained): its rows start anew, as `init` says, and are trained like those of new tokens. "
        "Otherwise a token that is there keeps its rows.",
    )
    special: bool = Field(
        False,
        description="Register as a special token: decoding with skip_special_tokens hides it. "
        "Leave false for markers that the model shall emit visibly.",
    )
    lstrip: bool = Field(
        False, description="The token also swallows white space on its left, which decoding does not bring back."
    )
    rstrip: bool = Field(
        False, description="The token also swallows white space on its right, which decoding does not bring back."
    )
    single_word: bool = Field(False, description="Match only where no letter or digit adjoins.")
    normalized: bool = Field(
        False,
        description="Match after the tokenizer's normalizer instead of before it: a lower-casing tokenizer then finds "
        "the token in any case.",
    )


class ConfigMapKey(Model):
    """One key of a ConfigMap."""

    name: Name = Field(description="A ConfigMap of this namespace.")
    key: Annotated[
        str, Matching("[-._a-zA-Z0-9]+", "must be a key of a ConfigMap: letters, digits, '-', '_' and '.'")
    ] = Field(description="The key in it.", min_length=1, max_length=253)


class TokensFrom(Model):
    """Tokens kept outside the spec: plain lines, lines of {"piece": "..."}, or of a piece, a tab and its score."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("has(self.configMap) != has(self.uri)", "addFrom takes exactly one of configMap and uri")
        )
    )

    config_map: ConfigMapKey | None = Field(None, description="A list of up to 1 MiB.")
    uri: FileUri | None = Field(
        None, description="A longer list: pvc://CLAIM/PATH.", json_schema_extra=rules(NO_PARENT)
    )


class TokenSource(Model):
    """A corpus: all the text of a dataset's rows, in any format that dataset.sources takes."""

    uri: DatasetUri = Field(
        description="hf://datasets/ORGANISATION/NAME, pvc://CLAIM/PATH (a file or folder), s3://, gs:// or az://.",
        json_schema_extra=rules(NO_PARENT),
    )
    revision: Revision = Field("main", description="Branch, tag or commit of an hf:// dataset.")
    subset: str | None = Field(
        None, description="The configuration of an hf:// dataset that has several.", min_length=1, max_length=128
    )
    split: Split = Field(
        "train", description="Which rows, as in dataset.sources: train, train[:10000], train[10%:20%]."
    )


class LearnTokens(Model):
    """Vocabulary expansion: continue the tokenizer's own BPE (or Unigram) on a domain corpus.

    New merges follow the old ones, so text without new pieces is encoded exactly as before. A tenth of the corpus is
    held out to measure on.
    """

    source: TokenSource = Field(description="The domain corpus, of ten texts or more.")
    protect: TokenSource | None = Field(
        None, description="General text whose encoding must not change: no piece is learned that would."
    )
    size: int = Field(description="How many new ids to learn at most.", ge=1, le=200_000)
    minimum_saving: int = Field(
        2, description="Stop when a piece would save fewer tokens than this on the corpus.", ge=1, le=1_000_000
    )

    @property
    def uris(self) -> tuple[str, ...]:
        """Where text is read from."""
        return (self.source.uri, *([self.protect.uri] if self.protect else []))


class Tokens(Model):
    """New tokens for tokenizer and embedding matrices."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.add) || has(self.addFrom) || has(self.learn)",
                "tokens needs at least one of add, addFrom, learn",
            )
        )
    )

    add: list[NewToken] | None = Field(
        None,
        description="Words or markers, each of which becomes one token.",
        min_length=1,
        max_length=MAX_TOKENS,
        json_schema_extra=keyed_by("content"),
    )
    add_from: TokensFrom | None = Field(None, description="A longer list, in a ConfigMap or a file.")
    learn: LearnTokens | None = Field(None, description="Learn the tokens from a corpus.")
    init: TokenInit | None = Field(
        None, description="How new rows start where the token does not say; the mean of its pieces when absent."
    )
    pad_to_multiple_of: int = Field(
        64,
        description="Round the number of embedding rows up to a multiple of this (tensor cores like 64).",
        ge=1,
        le=1024,
    )
    probe_prompt: str = Field(
        PROBE_PROMPT,
        description="A user's message. How likely the new tokens are right after it, before and after, is measured "
        "and reported: it shows whether copyOf names a token that is likely where the new one is wanted.",
        min_length=1,
        max_length=4096,
    )
