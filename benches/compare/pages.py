"""The pages of a cluster as they are on disk: which have changed, and whether a restored table has the same."""

import array
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

PAGE = 8192
CHUNK = 128 * PAGE
WORDS_IN_PAGE = PAGE // 4
# The main fork of a relation, in one of its files of 1 GB.
MAIN_FORK = re.compile(r"\d+(\.\d+)?")


def changed(data_dir: Path, since: str) -> tuple[int, int]:
    """How many pages of all databases are newer than a position in WAL, and how many there are."""
    lsn = position(since)
    newer = total = 0
    for path in data_dir.glob("base/*/*"):
        if MAIN_FORK.fullmatch(path.name):
            for chunk in chunks(path):
                words = array.array("I", chunk[: len(chunk) // PAGE * PAGE])
                # A page begins with its LSN, the upper half first.
                found = [high << 32 | low for high, low in zip(words[::WORDS_IN_PAGE], words[1::WORDS_IN_PAGE])]
                newer += sum(1 for page in found if page > lsn)
                total += len(found)
    return newer, total


def checksum(data_dir: Path, relation: str) -> int:
    """A checksum over the main fork of a relation, named by its path in the data directory."""
    first = data_dir / relation
    others = sorted(first.parent.glob(f"{first.name}.*"), key=lambda path: int(path.suffix[1:]))
    total = 0
    for path in (first, *others):
        for chunk in chunks(path):
            total = zlib.crc32(chunk, total)
    return total


def position(lsn: str) -> int:
    """PostgreSQL's way to write a position in WAL, as a number."""
    high, _, low = lsn.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def chunks(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
