#!/usr/bin/env python3
"""A synchronous standby that keeps nothing: it acknowledges WAL after a given time, as a store would that cost no work at all.

The measure that commits at --rpo 0 are held against (the prototype of the design slept in the same way). Arguments: socket directory, port, milliseconds
of sleep, acknowledgements on their way at once. Speaks the streaming replication protocol (manual, "Streaming Replication Protocol").
"""

import select
import socket
import struct
import sys
import time
from collections import deque

NAME = "sleeper"
POSTGRES_EPOCH = 946_684_800
# A keepalive is answered at least this often, so that the server does not take us for dead.
STATUS_SECONDS = 5.0


class Connection:
    """A walreceiver's connection over a Unix socket, without a password."""

    def __init__(self, directory: str, port: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"{directory}/.s.PGSQL.{port}")
        words = ["user", "postgres", "replication", "true", "application_name", NAME]
        body = struct.pack("!I", 196608) + b"".join(word.encode() + b"\0" for word in words) + b"\0"
        self.socket.sendall(struct.pack("!I", len(body) + 4) + body)
        self._buffer = b""
        self._until(b"Z")

    def query(self, text: str) -> list[list[bytes]]:
        """Rows of a replication command."""
        self._send(b"Q", text.encode() + b"\0")
        return [row(body) for kind, body in self._until(b"Z") if kind == b"D"]

    def stream(self, lsn: str) -> None:
        """Begins to receive WAL."""
        self._send(b"Q", f"START_REPLICATION PHYSICAL {lsn}".encode() + b"\0")
        self._until(b"W")

    def status(self, received: int, flushed: int) -> None:
        """Says how far WAL has come, and how far it is kept."""
        now = int((time.time() - POSTGRES_EPOCH) * 1_000_000)
        self._send(b"d", b"r" + struct.pack("!QQQQB", received, flushed, 0, now, 0))

    def messages(self, patience: float):
        """What has come, after at most so many seconds."""
        if select.select([self.socket], [], [], max(patience, 0))[0]:
            received = self.socket.recv(1 << 18)
            if not received:
                sys.exit("the server has closed the connection")
            self._buffer += received
        while (message := self._next()) is not None:
            yield message

    def _until(self, last: bytes) -> list[tuple[bytes, bytes]]:
        seen = []
        while True:
            while (message := self._next()) is None:
                received = self.socket.recv(1 << 18)
                if not received:
                    sys.exit("the server has closed the connection")
                self._buffer += received
            if message[0] == b"E":
                sys.exit(message[1].decode(errors="replace"))
            seen.append(message)
            if message[0] == last:
                return seen

    def _next(self) -> tuple[bytes, bytes] | None:
        if len(self._buffer) < 5:
            return None
        length = struct.unpack("!I", self._buffer[1:5])[0] + 1
        if len(self._buffer) < length:
            return None
        message, self._buffer = (self._buffer[:1], self._buffer[5:length]), self._buffer[length:]
        return message

    def _send(self, kind: bytes, body: bytes) -> None:
        self.socket.sendall(kind + struct.pack("!I", len(body) + 4) + body)


def row(body: bytes) -> list[bytes]:
    """The columns of a DataRow."""
    columns, at = [], 2
    for _ in range(struct.unpack("!H", body[:2])[0]):
        length = struct.unpack("!i", body[at:at + 4])[0]
        columns.append(body[at + 4:at + 4 + max(length, 0)])
        at += 4 + max(length, 0)
    return columns


def main() -> None:
    """Acknowledges until it is killed."""
    directory, port, sleep, in_flight = sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000, int(sys.argv[4])
    connection = Connection(directory, port)
    start = connection.query("IDENTIFY_SYSTEM")[0][2].decode()
    connection.stream(start)
    high, low = start.split("/")
    received = sent = flushed = (int(high, 16) << 32) + int(low, 16)
    on_their_way: deque[tuple[float, int]] = deque()
    told = time.monotonic()
    while True:
        now = time.monotonic()
        while on_their_way and on_their_way[0][0] <= now:
            flushed = on_their_way.popleft()[1]
            connection.status(received, flushed)
            told = now
        if received > sent and len(on_their_way) < in_flight:
            on_their_way.append((now + sleep, received))
            sent = received
            continue
        if now - told > STATUS_SECONDS:
            connection.status(received, flushed)
            told = now
        patience = on_their_way[0][0] - now if on_their_way else STATUS_SECONDS
        for kind, body in connection.messages(patience):
            if kind == b"d" and body[:1] == b"w":
                received = struct.unpack("!Q", body[1:9])[0] + len(body) - 25
            elif kind == b"d" and body[:1] == b"k" and body[17]:
                connection.status(received, flushed)
            elif kind == b"E":
                sys.exit(body.decode(errors="replace"))


if __name__ == "__main__":
    main()
