"""A TCP relay that puts a distance between a client and a server on one machine.

Every chunk arrives half a round trip after it was sent, in both directions, and a new connection costs one round trip
before its first byte moves. Chunks in flight overlap: latency is added, bandwidth is not taken away.
"""

import argparse
import asyncio

CHUNK = 256 * 1024
CHUNKS_IN_FLIGHT = 256


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Passes on what `reader` gets, each chunk `delay` seconds later, until its end."""
    clock = asyncio.get_running_loop().time
    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_IN_FLIGHT)

    async def receive() -> None:
        data = b"some"
        while data:
            data = await reader.read(CHUNK)
            await chunks.put((clock() + delay, data))

    async def send() -> None:
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(due - clock())
            if not data:
                break
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async with asyncio.TaskGroup() as both:
        both.create_task(receive())
        both.create_task(send())


async def relay(client: tuple, target: int, round_trip: float) -> None:
    """Serves one connection."""
    client_reader, client_writer = client
    server_writer = None
    try:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target, limit=CHUNK)
        await asyncio.sleep(round_trip)
        async with asyncio.TaskGroup() as both:
            both.create_task(forward(client_reader, server_writer, round_trip / 2))
            both.create_task(forward(server_reader, client_writer, round_trip / 2))
    except* OSError:
        pass  # One side hung up; the other learns it by the close below.
    finally:
        for writer in filter(None, (client_writer, server_writer)):
            writer.close()


async def serve(listen: int, target: int, round_trip: float) -> None:
    """Relays every connection to `listen` until the process is ended."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await relay((reader, writer), target, round_trip)

    server = await asyncio.start_server(accepted, "127.0.0.1", listen, limit=CHUNK)
    await server.serve_forever()


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("listen", type=int, help="port to listen on")
    parser.add_argument("target", type=int, help="port to connect to")
    parser.add_argument("milliseconds", type=float, help="round trip to add")
    args = parser.parse_args()
    asyncio.run(serve(args.listen, args.target, args.milliseconds / 1000))


if __name__ == "__main__":
    main()
