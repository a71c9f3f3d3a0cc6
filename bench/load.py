"""A load generator for HTTP: keep-alive connections, each with one request under way, latencies counted.

`python -m bench.load URL --seconds 3 --connections 32` posts webhook events and prints one JSON line. It is a process
of its own, with bytes made beforehand, so that it takes as little as it can from the server that it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from itertools import count
from urllib.parse import urlsplit

from bench.calls import event_bodies

with contextlib.suppress(ImportError):
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

_DISTINCT = 500


class Client(asyncio.Protocol):
    """One connection that posts the next event as soon as the last was answered."""

    def __init__(self, requests: list[bytes], numbers: count, latencies: list[float]) -> None:
        self._requests = requests
        self._numbers = numbers
        self._latencies = latencies
        self._rest = b""
        self._sent = 0.0
        self.stopped = False
        self.wrong = 0
        self.drained = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        self._transport = transport
        self._post()

    def data_received(self, data: bytes) -> None:
        """Count an answer once it is whole."""
        self._rest += data
        head, found, body = self._rest.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        self._rest = b""
        self._latencies.append(time.perf_counter() - self._sent)
        self.wrong += b" 200 " not in head[:20]
        if self.stopped:
            self._transport.close()
        else:
            self._post()

    def connection_lost(self, _error: Exception | None) -> None:
        """End; a connection that the server ended counts as a wrong answer."""
        self.wrong += not self.stopped
        if not self.drained.done():
            self.drained.set_result(None)

    def _post(self) -> None:
        number = next(self._numbers)
        # A number in each event makes it another event, of the same length.
        request = self._requests[number % len(self._requests)].replace(b"NNNNNNNNNNNN", b"%012d" % number)
        self._sent = time.perf_counter()
        self._transport.write(request)


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise ValueError("the answer has no Content-Length")


async def load(url: str, seconds: float, connections: int) -> dict[str, float]:
    """Post for *seconds* over *connections* connections."""
    where = urlsplit(url)
    requests = [
        b"POST %b HTTP/1.1\r\nHost: %b\r\nx-api-key: bench-token\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (where.path.encode(), where.netloc.encode(), len(body), body)
        for body in event_bodies(_DISTINCT)
    ]
    loop, latencies, numbers = asyncio.get_running_loop(), [], count(time.time_ns() % 10**11)
    started = time.perf_counter()
    clients = [
        (await loop.create_connection(lambda: Client(requests, numbers, latencies), where.hostname, where.port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    for client in clients:
        client.stopped = True
    await asyncio.wait_for(asyncio.gather(*(client.drained for client in clients)), 30)
    took = time.perf_counter() - started
    latencies.sort()
    return {
        "requests": len(latencies),
        "per_second": len(latencies) / took,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
        "wrong": sum(client.wrong for client in clients),
    }


def main() -> None:
    """Run the load of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=32)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(load(given.url, given.seconds, given.connections))))


if __name__ == "__main__":
    main()
