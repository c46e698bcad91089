"""Which pieces save most: byte-pair encoding, continued over ids, exact and reproducible.

At each turn the pair of neighbours that occurs most often becomes one piece, wherever it occurs, or the unknown
character that takes most tokens becomes one (R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare
Words with Subword Units", 2016). A pair's count only falls once both its parts exist, so a heap of former counts is
enough: what comes up is counted anew, and taken when nothing else can be as frequent. Ties go to the smaller ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from finetune.steps.tokens.learn.protect import Forbidden
from finetune.steps.tokens.learn.symbols import GAP, Ids, Symbols, pair_keys
from finetune.steps.tokens.learn.watch import Watch

LONGEST_NAME = 64
"""Characters of a piece's name (bytes of its text, in byte-level tokenizers). A text repeated throughout a corpus is
not a word of it. Below 256, which is what spans have room for."""

GONE = -2
"""In the place of an id that was joined to its left neighbour."""

BLOCK = 1 << 22
"""Ids that are sorted at a time, to bound the memory of sorting."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A new entry of the vocabulary: what stood in its place (old ids), and the tokens that it saved when taken."""

    name: str
    parts: tuple[int, ...]
    saving: int


@dataclass
class Found:
    """Pieces in the order of their ids, merges in the order of their rank, how many tokens all merges together saved,
    and how often each piece was left in the corpus in the end."""

    pieces: list[Piece] = field(default_factory=list)
    merges: list[tuple[str, str]] = field(default_factory=list)
    saved: int = 0
    counts: list[int] = field(default_factory=list)


def framed(blocks: list[Ids]) -> Ids:
    """One array with a gap at both ends. The list is emptied, so that its memory is free for what follows."""
    edge = np.full(1, GAP, np.int32)
    whole = np.concatenate([edge, *blocks, edge])
    blocks.clear()
    return whole


class JoinedText:
    """Ids in which neighbours are joined in place: `span` is how many places an id takes, `back` how many the id before
    it takes. Where an id may stand is remembered, and read anew with each use.

    Takes over the arrays, which are `framed`, and of which each id is below `kinds`. Needs 14 bytes for each id.
    """

    def __init__(self, ids: Ids, weights: Ids, kinds: int) -> None:
        self.ids, self.weights = ids, weights
        self._span = np.ones(self.ids.size, np.uint8)
        self._back = np.ones(self.ids.size, np.uint8)
        self._places = _places(self.ids, kinds)

    def places(self, id_: int) -> Ids:
        """Where this id stands."""
        known = self._places.get(id_, np.zeros(0, np.int32))
        self._places[id_] = known[self.ids[known] == id_]
        return self._places[id_]

    def count(self, places: Ids) -> int:
        """How often what stands there occurs in the corpus."""
        return int(self.weights[places].sum(dtype=np.int64))

    def pairs(self, left: int, right: int) -> Ids:
        """Where `left` stands before `right`, without overlaps, from the left."""
        if len(self._places.get(left, ())) <= len(self._places.get(right, ())):
            lefts = self.places(left)
            starts: Ids = lefts[self.ids[lefts + self._span[lefts]] == right]
        else:
            ends = self.places(right)
            before = ends - self._back[ends]
            starts = before[self.ids[before] == left]
        if left != right or starts.size < 2:
            return starts
        follows = np.concatenate([[False], starts[1:] == (starts + self._span[starts])[:-1]])
        order = np.arange(starts.size)
        first_of_run = np.maximum.accumulate(np.where(follows, 0, order))
        every_other: Ids = starts[(order - first_of_run) % 2 == 0]
        return every_other

    def join(self, starts: Ids, joined: int) -> None:
        """Make one new id of the pairs that start there."""
        ends = starts + self._span[starts]
        self.ids[starts], self.ids[ends] = joined, GONE
        self._span[starts] += self._span[ends]
        self._back[starts + self._span[starts]] = self._span[starts]
        self._places[joined] = starts

    def neighbours(self, id_: int) -> tuple[Counts, Counts]:
        """The pairs that this id is part of, as keys, and how often each occurs (overlaps included)."""
        places = self.places(id_)
        lefts, rights = self.ids[places - self._back[places]], self.ids[places + self._span[places]]
        keys = np.concatenate([pair_keys(lefts, id_), pair_keys(id_, rights)])
        real = np.concatenate([lefts >= 0, (rights >= 0) & (rights != id_)])
        return summed(keys[real], np.tile(self.weights[places], 2)[real])

    def all_pairs(self) -> tuple[Counts, Counts]:
        """All pairs of neighbours before anything is joined, and how often each occurs (overlaps included)."""
        keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for first in range(0, self.ids.size - 1, BLOCK):
            part = self.ids[first : first + BLOCK + 1]
            real = (part[:-1] >= 0) & (part[1:] >= 0)
            more = summed(pair_keys(part[:-1][real], part[1:][real]), self.weights[first : first + part.size - 1][real])
            keys, counts = summed(np.concatenate([keys, more[0]]), np.concatenate([counts, more[1]]))
        return keys, counts


def find_pieces(
    text: JoinedText,
    symbols: Symbols,
    forbidden: Forbidden,
    size: int,
    minimum: int,
    watch: Watch = lambda done, total: None,
) -> Found:
    """At most `size` pieces, each of which saves at least `minimum` tokens at its turn. `watch` is told of each.

    Every piece has one merge. A second way to an old token would bring old merges into play again, which rank before
    it; a second way to a new piece would do so with newer ones.
    """
    names = list(symbols.names)
    known = set(names)
    parts: dict[int, tuple[int, ...]] = {}
    found, taken = Found(), []
    usable = np.zeros(len(names) + size, bool)
    usable[: symbols.length] = True
    candidates = _Candidates(minimum)
    keys, counts = text.all_pairs()
    candidates.offer(*_among(keys, counts, usable))
    for id_ in range(symbols.length, len(names)):
        parts[id_] = symbols.parts_of(names[id_])
        if names[id_] not in forbidden.characters:
            candidates.offer_character(id_, text.count(text.places(id_)) * (len(parts[id_]) - 1 if parts[id_] else 1))

    def take(id_: int, saving: int) -> None:
        taken.append(id_)
        found.pieces.append(Piece(names[id_], parts[id_], saving))
        watch(len(taken), size)

    while len(taken) < size and (candidate := candidates.next()) is not None:
        promised, left, right = candidate
        if right < 0:
            usable[left] = True
            take(left, promised)
            candidates.offer(*_among(*text.neighbours(left), usable))
            continue
        name = names[left] + names[right]
        if name in known or len(name) > LONGEST_NAME or name in forbidden.words or forbidden.pair(left, right):
            continue
        starts = text.pairs(left, right)
        saving = text.count(starts)
        if saving < promised:
            candidates.offer_again(saving, left, right)
            continue
        joined = len(names)
        text.join(starts, joined)
        found.merges.append((names[left], names[right]))
        found.saved += saving
        names.append(name)
        known.add(name)
        usable[joined] = True
        parts[joined] = parts.get(left, (left,)) + parts.get(right, (right,))
        take(joined, saving)
        candidates.offer(*_among(*text.neighbours(joined), usable))
    found.counts = [text.count(text.places(id_)) for id_ in taken]
    return found


def _among(keys: Counts, counts: Counts, usable: npt.NDArray[np.bool_]) -> tuple[Counts, Counts]:
    both = usable[keys >> 32] & usable[keys & 0xFFFFFFFF]
    return keys[both], counts[both]


class _Candidates:
    """Pairs and characters by what they promise to save; the greatest promise first, then the smallest ids.

    Pairs come in batches, each in order. Only the head of each batch lies in the heap.
    """

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum
        self._heap: list[tuple[int, int, int, int]] = []
        self._batches: list[Iterator[tuple[int, int, int]]] = []

    def offer(self, keys: Counts, counts: Counts) -> None:
        enough = counts >= self._minimum
        keys, counts = keys[enough], counts[enough]
        if keys.size:
            order = np.lexsort((keys, -counts))
            self._batches.append(_in_turn(keys[order], counts[order]))
            self._advance(len(self._batches) - 1)

    def offer_character(self, id_: int, saving: int) -> None:
        if saving >= self._minimum:
            heapq.heappush(self._heap, (-saving, id_, -1, -1))

    def offer_again(self, saving: int, left: int, right: int) -> None:
        if saving >= self._minimum:
            heapq.heappush(self._heap, (-saving, left, right, -1))

    def next(self) -> tuple[int, int, int] | None:
        """The greatest promise with its left and right id; right is negative for a character."""
        if not self._heap:
            return None
        promised, left, right, batch = heapq.heappop(self._heap)
        if batch >= 0:
            self._advance(batch)
        return -promised, left, right

    def _advance(self, batch: int) -> None:
        if (head := next(self._batches[batch], None)) is not None:
            heapq.heappush(self._heap, (*head, batch))


def _in_turn(keys: Counts, counts: Counts) -> Iterator[tuple[int, int, int]]:
    for place in range(keys.size):
        key = int(keys[place])
        yield -int(counts[place]), key >> 32, key & 0xFFFFFFFF


def summed(keys: Counts, weights: npt.NDArray[np.integer]) -> tuple[Counts, Counts]:
    """Distinct keys in order, and the sum of the weights of each."""
    if not keys.size:
        return keys, np.zeros(0, np.int64)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(weights[order].astype(np.int64), starts)


def _places(ids: Ids, kinds: int) -> dict[int, Ids]:
    """Where each id stands, in order: a counting sort, block by block."""
    present = np.zeros(kinds, np.int64)
    for first in range(0, ids.size, BLOCK):
        part = ids[first : first + BLOCK]
        present += np.bincount(part[part >= 0], minlength=kinds)
    bounds = np.concatenate([[0], np.cumsum(present)])
    places, free = np.zeros(int(bounds[-1]), np.int32), bounds[:-1].copy()
    for first in range(0, ids.size, BLOCK):
        part = ids[first : first + BLOCK]
        real = np.flatnonzero(part >= 0)
        order = real[np.argsort(part[real], kind="stable")]
        counts = np.bincount(part[order], minlength=kinds)
        rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        places[np.repeat(free, counts) + rank] = first + order
        free += counts
    return {int(id_): places[bounds[id_] : bounds[id_ + 1]] for id_ in np.flatnonzero(present)}
