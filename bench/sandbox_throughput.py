"""How many POSTs a second the sandbox takes on one core.

It pins the sandbox to one core and this load generator to another, keeps a number of connections busy for some
seconds, and prints one JSON line. The generator does as little as it can: bytes made beforehand, answers counted.

    python bench/sandbox_throughput.py [--seconds 5] [--connections 32] [-- sandbox options]
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from itertools import count

import psutil

with contextlib.suppress(ImportError):
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

_START = b"HTTP/1.1 "  # of an answer, and nowhere else in it


class Client(asyncio.Protocol):
    """A keep-alive connection that has *depth* requests under way until it is stopped."""

    def __init__(self, phones: count, depth: int, latencies: list[float]) -> None:
        self._phones = phones
        self._depth = depth
        self._latencies = latencies
        self._sent: deque[float] = deque()
        self._rest = b""
        self.stopped = False
        self.drained = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._post(self._depth)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        self._rest = data[1 - len(_START) :]  # too short to be counted twice
        answered = data.count(_START)
        now = time.perf_counter()
        for _ in range(answered):
            self._latencies.append(now - self._sent.popleft())
        if not self.stopped:
            self._post(answered)
        elif not self._sent and not self.drained.done():
            self.drained.set_result(None)
            self._transport.close()

    def _post(self, number: int) -> None:
        requests = []
        for _ in range(number):
            body = b'{"recipientPhoneNumber":"%d","recipientData":{"customer_name":"Asha Rao","place":"Pune"}}' % next(
                self._phones
            )
            requests.append(
                b"POST /api/campaigns/68ecc86fd9fbecbe9431a18e/leads HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"x-api-key: sandbox-key\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            self._sent.append(time.perf_counter())
        self._transport.write(b"".join(requests))


async def load(port: int, seconds: float, connections: int, depth: int) -> tuple[list[float], float]:
    """Post for *seconds*; returns the latency of each answered POST and the time that it took."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    phones = count(6_000_000_000)
    start = time.perf_counter()
    clients = [
        (await loop.create_connection(lambda: Client(phones, depth, latencies), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    for client in clients:
        client.stopped = True
    await asyncio.wait_for(asyncio.gather(*(client.drained for client in clients)), 30)
    return latencies, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--depth", type=int, default=1, help="requests under way on each connection (pipelining)")
    parser.add_argument("sandbox", nargs="*", help="options of the sandbox, after --")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.sandbox", "--port", "0", *given.sandbox], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            ready = json.loads(process.stdout.readline())
            os.sched_setaffinity(0, {cores[-1]})
            sandbox = psutil.Process(process.pid)
            before = sum(sandbox.cpu_times()[:2])
            latencies, took = asyncio.run(load(ready["port"], given.seconds, given.connections, given.depth))
            cpu = sum(sandbox.cpu_times()[:2]) - before
            latencies.sort()
            print(
                json.dumps(
                    {
                        "posts": len(latencies),
                        "posts_per_second": round(len(latencies) / took),
                        "p50_ms": round(latencies[len(latencies) // 2] * 1000, 2),
                        "p99_ms": round(latencies[len(latencies) * 99 // 100] * 1000, 2),
                        "sandbox_cpu_share": round(cpu / took, 2),
                        "sandbox_cpu_us_per_post": round(cpu / len(latencies) * 1e6, 1),
                        "sandbox_rss_mb": round(sandbox.memory_info().rss / 1e6),
                    }
                )
            )
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
