"""Many records made by several processes that share a store: each takes the next piece of work that nobody is at.

A record asked for twice at once is made once, the other process waits (`store`). So processes that go through one list in one
order would wait for each other at its every entry. Here each claims a piece before it starts, passes over what others hold, and
comes back to it when nothing else is left to begin; then the record lies there and is read. `sharing` is for cells that wait for
nothing and are best taken by groups that share their pictures; this is for records that are made from others.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import distributed
from ..claims import claimed
from ..errors import InputError

if TYPE_CHECKING:
    from .context import Record, Study


@dataclass(frozen=True)
class Piece:
    """A piece of work: a name that no other has, what finds or makes its record, and the names of those it is made from."""

    name: str
    run: Callable[[], Record]
    after: tuple[str, ...] = ()


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, each once (the first of those that share a name), none before what it is made from; else in the order given.

    Raises:
        InputError: a piece that waits for one that is not there, or pieces that wait for each other.
    """
    first: dict[str, Piece] = {}
    for piece in pieces:
        first.setdefault(piece.name, piece)
    missing = sorted({name for piece in first.values() for name in piece.after} - set(first))
    if missing:
        raise InputError(f"there is no piece of work {missing[0]!r} for others to wait for")
    out: dict[str, Piece] = {}
    while len(out) < len(first):
        before = len(out)
        for piece in first.values():
            if piece.name not in out and all(name in out for name in piece.after):
                out[piece.name] = piece
        if len(out) == before:
            raise InputError(f"pieces of work wait for each other: {', '.join(name for name in first if name not in out)}")
    return list(out.values())


def share(study: Study, pieces: Sequence[Piece], name: str) -> dict[str, Record]:
    """Every piece's record, by the piece's name, in their order; shared out among all processes that are at `name` in this store.

    What another process made is read, not made again. Claims lie in <store>/`name`, as empty files. Processes of one launch
    (`distributed`) work together on each piece instead, in one order.

    Raises:
        InputError: as `in_order`, before any work; and what pieces raise.
    """
    from tqdm import tqdm

    ordered = in_order(pieces)
    alone = study.store.frozen or distributed.size() > 1  # nothing to share out: all is read, or all is done by all
    folder = study.store.root / name
    if not alone:
        with contextlib.suppress(OSError):  # where no claim can lie the work is simply done
            folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Record] = {}

    def taken(piece: Piece, wait: bool) -> bool:
        file = folder / f".{hashlib.sha256(piece.name.encode()).hexdigest()[:16]}.lock"
        with contextlib.nullcontext(True) if alone else claimed(file, piece.name, wait) as mine:
            if mine:
                done[piece.name] = piece.run()
                bar.update()
            return mine

    def ready(piece: Piece) -> bool:
        return all(other in done for other in piece.after)

    left = ordered
    with tqdm(total=len(ordered), desc=f"{study.notebook}: {name}", delay=2, disable=not study.progress) as bar:
        while left:
            rest = [piece for piece in left if not (ready(piece) and taken(piece, wait=False))]
            if len(rest) == len(left):  # others are at all that could be begun
                held = next(piece for piece in rest if ready(piece))
                taken(held, wait=True)
                rest.remove(held)
            left = rest
    return {piece.name: done[piece.name] for piece in ordered}
