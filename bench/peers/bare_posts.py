"""The least that a POST costs with the HTTP client of the curl engine: prepared bodies, nothing decided, nothing kept.

Shape: pycurl's documentation, "CurlMulti objects": add the handles, `perform`, `info_read`, `select`. With ONE_BY_ONE=1
it is its quickstart's loop over one handle. Prints the CPU microseconds a POST, without those of making the bodies.

    python -m bench.peers.bare_posts URL NUMBER CONCURRENCY
"""

from __future__ import annotations

import json
import os
import sys
import time

import pycurl

from bench import fake_leads


def prepared(url: str) -> pycurl.Curl:
    """A handle for POSTs that wants only its body."""
    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.POST, 1)
    handle.setopt(pycurl.HTTPHEADER, ["x-api-key: sandbox-key", "Content-Type: application/json", "Expect:"])
    handle.setopt(pycurl.WRITEFUNCTION, lambda _data: None)
    return handle


def post_all(url: str, bodies: list[bytes], concurrency: int) -> None:
    """Post every body, *concurrency* at once."""
    multi, left, out = pycurl.CurlMulti(), iter(bodies), 0
    handles = [prepared(url) for _ in range(concurrency)]
    for handle, body in zip(handles, left, strict=False):
        handle.setopt(pycurl.POSTFIELDS, body)
        multi.add_handle(handle)
        out += 1
    while out:
        multi.perform()
        more = 1
        while more:
            more, done, failed = multi.info_read()
            if failed:
                raise RuntimeError(failed[0][2])
            for handle in done:
                multi.remove_handle(handle)
                out -= 1
                if (body := next(left, None)) is not None:
                    handle.setopt(pycurl.POSTFIELDS, body)
                    multi.add_handle(handle)
                    out += 1
        multi.select(1.0)


def post_one_by_one(url: str, bodies: list[bytes]) -> None:
    """Post every body over one handle."""
    handle = prepared(url)
    for body in bodies:
        handle.setopt(pycurl.POSTFIELDS, body)
        handle.perform()


def main(url: str, number: int, concurrency: int) -> None:
    """Metric, and print."""
    bodies = [
        json.dumps({"recipientPhoneNumber": row["phone"], "recipientData": row["data"]}).encode()
        for row in fake_leads.rows(number)
    ]
    before = time.process_time()
    if os.environ.get("ONE_BY_ONE") == "1":
        post_one_by_one(url, bodies)
    else:
        post_all(url, bodies, concurrency)
    print(json.dumps({"us": (time.process_time() - before) / number * 1e6}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
