"""The messages that one link showed of an all-reduce -> which of its messages they are, as far as that can be proven.

Messages of one collective keep their order on a link, so where none was missed they are the first, the second and so
on. Behind a loss, the bytes that were missed say how many messages were: TCP counts them all, and what else may have
been among them is known, most of the time. A message whose head was missed has its end before the next head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attack.decode.gloo.framing import Message
from attack.decode.gloo.head import HEAD_BYTES, Kind, Slot
from attack.decode.gloo.network import Link, Rest, Tail, doubted
from attack.decode.gloo.ring import Part, Ring, align, costs
from attack.decode.notes import Notes


class Step(NamedTuple):
    """What was under way beside an all-reduce."""

    rings: Mapping[int, Ring]
    """By tag, itself and the others of its step. All ranks wait for those of a step before they begin the next."""
    last: int
    """The last tag that may have been under way beside them."""
    between: float
    """Bytes that a link may have carried between the step before and this one, at most."""

    def slack(self, rank: int) -> int:
        """Most bytes of announcements on a rank's link: one of each message that it sends, and of two ranks the other
        answers on the same link."""
        senders = {rank, 1 - rank} if next(iter(self.rings.values())).world == 2 else {rank}
        return HEAD_BYTES * sum(len(ring.sent_by(sender)[0]) for ring in self.rings.values() for sender in senders)


def place(step: Step, tag: int, rank: int, link: Link, notes: Notes) -> tuple[list[tuple[Part, Message]], Rest | None]:
    """What a rank's link showed of one of a step's all-reduces, with what each message carries; and what is known to
    be missing at its end, for who reads the next."""
    seen = link.slots.get((Kind.ALLREDUCE, tag), [])
    parts, expected = step.rings[tag].sent_by(rank)
    lengths = tuple(len(one.message.payload) for one in seen)
    first = min(step.rings)
    later = [epoch for other, (epoch, _) in link.spans.items() if other > step.last]
    low = max([link.floor, *(epoch for other, (_, epoch) in link.spans.items() if other < first)])
    high = min(later, default=len(link.losses))
    alone = step.last == tag == first
    if lengths == expected or (low == high and lengths == expected[: len(lengths)]):
        whole = lengths == expected and alone
        rest = Rest(seen[-1].epoch if seen else low, 0, step.slack(rank)) if whole else None
        return list(zip(parts, (one.message for one in seen), strict=False)), rest
    groups = [[one for one in seen if one.epoch == epoch] for epoch in range(low, high + 1)]
    if sum(map(len, groups)) != len(seen):
        notes.add(f"flow {link.flow}: messages of collective {tag} out of order: not believed")
        return [], None
    others = _missing_beside(step, tag, rank, link)
    over = _last_epoch(step, link, least=low)
    capacities = _capacities(step, rank, link, range(low + 1, high + 1), over=over, others=others)
    sizes = [[len(one.message.payload) for one in group] for group in groups]
    starts = align(sizes, [(0, 0), *capacities], expected, ended=bool(later))
    if all(start is None for start, group in zip(starts, groups, strict=True) if group) and seen:
        notes.add(f"flow {link.flow}: the place of messages of collective {tag} cannot be proven: left out")
    placed: list[tuple[Part, Message]] = []
    for start, group in zip(starts, groups, strict=True):
        if start is not None:
            placed += zip(parts[start:], (one.message for one in group), strict=False)
    ends = [None if start is None else start + len(group) for start, group in zip(starts, groups, strict=True)]
    if step.last == max(step.rings) and not others:
        for index in range(1, over - low + 1):
            start, end, tail = starts[index], ends[index - 1], link.tails.get(low + index)
            if tail is not None and start is not None and end is not None and end < start:
                ending = _ending(tail, Slot(Kind.ALLREDUCE, tag, 0), expected[start - 1], link)
                placed.append((parts[start - 1], ending))
    rest = _rest(ends[over - low], costs(expected), over, high, step.slack(rank)) if alone and later else None
    return placed, rest


def _missing_beside(step: Step, tag: int, rank: int, link: Link) -> int:
    """Bytes of the other all-reduces of a step that did not come."""
    return sum(
        costs(ring.sent_by(rank)[1])[-1] - link.passed.get(other, 0)
        for other, ring in step.rings.items()
        if other != tag
    )


def _last_epoch(step: Step, link: Link, *, least: int) -> int:
    """Up to where a link is known to have carried nothing else than a step's all-reduces, once they had begun."""
    final = max(step.rings)
    signs = [link.spans[tag][1] for tag in step.rings if tag in link.spans]
    return max(
        least, min([max(signs, default=least), *(epoch for tag, (epoch, _) in link.spans.items() if tag > final)])
    )


def _capacities(
    step: Step, rank: int, link: Link, epochs: range, *, over: int, others: int
) -> list[tuple[float, float]]:
    """Before each epoch, how many bytes of an all-reduce can have been missed: at least, and at most."""
    slack, before = step.slack(rank) + others, link.rest
    begun = min((link.spans[tag][0] for tag in step.rings if tag in link.spans), default=over)
    answer: list[tuple[float, float]] = []
    for epoch in epochs:
        least, most = 0.0, link.losses[epoch - 1]
        if before is not None and before.epoch <= epoch <= begun:
            most -= before.size if epoch == before.epoch else 0
            least = most - slack - before.slack - step.between
        elif begun < epoch <= over:
            least = most - slack
        exact = step.last == max(step.rings) and epoch <= over and most < float("inf")
        answer.append((max(least, 0.0) if exact else 0.0, most))
    return answer


def _ending(tail: Tail, slot: Slot, length: int, link: Link) -> Message:
    """A message of which only what came before the next head was seen: announcements have no payload, so they would
    have shown their heads."""
    payload, begin, at = bytearray(length), tail.end - length, 0
    holes = []
    last, data = tail.fragments[-1]
    if last + len(data) == tail.end and len(data) >= HEAD_BYTES:
        for offset, data in tail.fragments:
            if piece := data[max(begin - offset, 0) :]:
                start = max(offset - begin, 0)
                holes.append((at, start))
                payload[start : start + len(piece)] = piece
                at = start + len(piece)
    holes.append((at, length))
    message = Message(slot, payload, tuple(hole for hole in holes if hole[0] < hole[1]), begin)
    for start, stop in link.doubts:
        message = doubted(message, start, stop)
    return message


def _rest(end: int | None, cost: Sequence[int], over: int, high: int, slack: int) -> Rest | None:
    """What is still missing when the link has come past a step, if all of it is missing in one place."""
    if end is None or (high > over + 1 and end < len(cost) - 1):
        return None
    return Rest(high, cost[-1] - cost[end], slack)
