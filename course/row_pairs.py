"""Which questions of a data file are similar: all pairs compared, in bounded memory. Notebook 03 shows what for."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from rapidfuzz import fuzz, process

import utils
from course.language import say

#: How many texts are compared with how many at once: some MiB of intermediate results.
BLOCK, ACROSS = 64, 8192
#: 64-bit words of a signature.
WORDS = 4


def shared_ends(texts: Sequence[str], share: float = 0.9) -> tuple[str, str]:
    """The longest text with which at least `share` of the texts begin, and the one with which as many of the rests end.

    Both are empty for fewer than three texts, of which every likeness may be meant.
    """
    if len(texts) < 3:
        return "", ""
    prefix = _shared_prefix(texts, share)
    rests = [text.removeprefix(prefix)[::-1] for text in texts]
    return prefix, _shared_prefix(rests, share)[::-1]


def _shared_prefix(texts: Sequence[str], share: float) -> str:
    """The longest text with which at least `share` of the texts begin."""
    prefix, having = "", texts
    while True:
        place = len(prefix)
        following = Counter(text[place] for text in having if len(text) > place)
        letter, count = max(following.items(), key=lambda item: item[1], default=("", 0))
        if not count or count < share * len(texts):
            return prefix
        prefix += letter
        having = [text for text in having if len(text) > place and text[place] == letter]


def similar_pairs(texts: Sequence[str], least: int, most: int = 100_000) -> tuple[int, dict[tuple[int, int], int]]:
    """All pairs of texts whose `fuzz.ratio`, rounded, is `least` or more.

    Args:
        texts: what is compared, in any order.
        least: from 1 to 100.
        most: so many pairs are kept. Of further ones only those that tie two groups together: whatever threshold from
            `least` up is taken later, the kept pairs give the same connected components as all would.

    Returns:
        How many pairs there are, and the kept ones: (i, j) with i < j to their similarity.
    """
    places: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        places.setdefault(text, []).append(i)
    distinct = sorted(places, key=len)
    first, often = (np.array([f(places[text]) for text in distinct], int) for f in (min, len))
    ties = _Ties(len(distinct), least, most)
    for one, other, scores in _close(distinct, least):
        ties.add(one, other, scores)
        ties.count += int((often[one] * often[other]).sum())
    kept = {(min(pair), max(pair)): score for a, b, score in ties.kept if (pair := (int(first[a]), int(first[b])))}
    for same in places.values():  # a chain ties them together as all their pairs would
        ties.count += len(same) * (len(same) - 1) // 2
        kept |= {pair: 100 for pair in pairwise(same)}
    return ties.count, dict(sorted(kept.items()))


def require_two_groups(
    groups: Sequence[Sequence[int]],
    questions: Sequence[str],
    answers: Sequence[str],
    similarity: dict[tuple[int, int], int],
    threshold: int,
    file: str,
) -> None:
    """Stop where all rows are in one group, so that none can be held out.

    Args:
        groups: the row numbers of each group.
        questions: that of each row.
        answers: the different answers of all rows.
        similarity: the pairs of `similar_pairs`.
        threshold: from this similarity on, two questions tie their rows together.
        file: what the data file is called in the message.

    Raises:
        CourseError: there is one group; the message says what ties the rows together, and what to write.
    """
    if len(groups) > 1:
        return
    import networkx as nx

    alike = nx.Graph(pair for pair, score in similarity.items() if score >= threshold)
    reason = say("equal answers and similar questions tie all rows together. Add rows that share neither with these.")
    if len(set(questions)) == 1:
        reason = say("all rows ask the same. Write other questions; what only a history says belongs into them.")
    elif len(answers) == 1:
        reason = say("all rows have the same answer. Write at least two different ones, better thirty.")
    elif len(alike) == len(questions) and nx.is_connected(alike):
        reason = say(
            "all questions are similar, some through others. Write other questions, or raise ALIKE above {threshold}.",
            threshold=threshold,
        )
    raise utils.CourseError(say("{file}: none can be held out, since {reason}", file=file, reason=reason))


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """(len(texts), WORDS) bits: one set for each character and each of its repetitions, by a hash.

    Inserting or deleting a character changes one bit at most, so the bits that differ bound the distance from below.
    """
    bits = np.zeros((len(texts), WORDS * 64), bool)
    for row, text in enumerate(texts):
        seen: Counter[str] = Counter()
        for letter in text:
            seen[letter] += 1
            bits[row, zlib.crc32(f"{letter}{seen[letter]}".encode()) % (WORDS * 64)] ^= True
    return np.packbits(bits, axis=1).view(np.uint64)


def _close(texts: Sequence[str], least: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (i, j, score) with score >= least and i < j, as arrays; the texts are sorted by their length.

    A ratio of r means that lengths a <= b differ by no more than b = a (200 - r) / r, and that (100 - r) % of both
    together are inserted or deleted at most; most pairs are ruled out by that, the rest is compared.
    """
    lengths, signs = np.array([len(text) for text in texts], np.int32), _signatures(texts)
    folded = np.bitwise_xor.reduce(signs, axis=1)  # fewer bits, the same bound: enough to rule most pairs out
    floor = least - 1  # scores are rounded
    for start in range(0, len(texts), BLOCK):
        rows = slice(start, min(start + BLOCK, len(texts)))
        longest = math.ceil(lengths[rows][-1] * (200 - floor) / max(floor, 1))
        end = int(np.searchsorted(lengths, longest, side="right"))
        for left in range(start, end, ACROSS):
            columns = slice(left, min(left + ACROSS, end))
            most = (lengths[rows, None] + lengths[None, columns]) * ((100 - floor) / 100)
            likely = np.bitwise_count(folded[rows, None] ^ folded[None, columns]) <= most
            likely &= np.arange(rows.start, rows.stop)[:, None] < np.arange(columns.start, columns.stop)[None, :]
            i, j = np.nonzero(likely)
            many = len(i) > most.size // 8
            if not many:
                differ = np.bitwise_count(signs[i + start] ^ signs[j + left]).sum(axis=1, dtype=np.int32)
                likely = differ <= most[i, j]
                i, j = i[likely], j[likely]
            if not len(i):
                continue
            how = {"scorer": fuzz.ratio, "dtype": np.uint8, "score_cutoff": floor, "workers": -1}
            if many:
                scores = process.cdist(texts[rows], texts[columns], **how)[i, j]
            else:
                scores = process.cpdist([texts[a] for a in i + start], [texts[b] for b in j + left], **how)
            found = scores >= least
            if found.any():
                yield i[found] + start, j[found] + left, scores[found].astype(int)


class _Ties:
    """Keeps pairs: all at first, later those that join two groups at their own level of similarity or below it."""

    def __init__(self, size: int, least: int, most: int) -> None:
        self.count, self.kept, self.least, self.most = 0, [], least, most
        self.parents = [list(range(size)) for _ in range(least, 101)]
        self.labels = np.tile(np.arange(size, dtype=np.int32), (101 - least, 1))

    def add(self, one: np.ndarray, other: np.ndarray, scores: np.ndarray) -> None:
        levels = scores - self.least
        if room := len(self.kept) + len(one) <= self.most:
            self.kept += zip(one.tolist(), other.tolist(), scores.tolist(), strict=True)
        groups = self.labels[levels, one], self.labels[levels, other]
        new = np.flatnonzero(groups[0] != groups[1])
        keys = np.stack([levels[new], groups[0][new], groups[1][new]])
        new = new[np.unique(keys, axis=1, return_index=True)[1]] if len(new) else new
        joined = 0
        for at in new[np.argsort(-scores[new], kind="stable")].tolist():
            a, b, score = int(one[at]), int(other[at]), int(scores[at])
            if self._join(a, b, score - self.least):
                joined += 1
                if not room:
                    self.kept.append((a, b, score))
        if len(new) - joined > 500 or joined > 500:
            self._relabel()

    def _find(self, level: int, node: int) -> int:
        parent = self.parents[level]
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    def _join(self, a: int, b: int, level: int) -> bool:
        """Join the groups of both at this level and all below; whether they were apart at this one."""
        for depth in range(level, -1, -1):
            roots = self._find(depth, a), self._find(depth, b)
            if roots[0] == roots[1]:  # then also at every level below
                return depth < level
            self.parents[depth][max(roots)] = min(roots)
        return True

    def _relabel(self) -> None:
        for level, parent in enumerate(self.parents):
            labels = np.array(parent, np.int32)
            while (further := labels[labels]).tobytes() != labels.tobytes():
                labels = further
            self.labels[level] = labels
