"""A taskiq task a lead, which posts it with aiohttp and retries.

Shape: taskiq's guide, "State and events" (one client session a worker process, made at its start-up) and "Available
middlewares" (retries); taskiq-redis' README (the stream broker, which is the one that acknowledges, or with
TASKIQ_BROKER=list the list broker, which is faster and loses what a worker held); aiohttp's "Client quickstart" (one
session for all requests, the answer read). uvloop is installed, as taskiq's "Installation" advises, and JSON by orjson.

Run as a module it puts the leads of stdin, one JSON object a line, into the queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import aiohttp
from taskiq import SimpleRetryMiddleware, TaskiqEvents, TaskiqState
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import ListQueueBroker, RedisStreamBroker

BASE_URL = os.environ.get("FUTWORK_BASE_URL", "")
CONCURRENCY = 100  # taskiq's default for tasks at once in a process, which is aiohttp's for connections, too
_KICKS_AT_ONCE = 200

_kind = ListQueueBroker if os.environ.get("TASKIQ_BROKER") == "list" else RedisStreamBroker
broker = _kind(os.environ["BROKER_URL"]).with_serializer(ORJSONSerializer())
broker.add_middlewares(SimpleRetryMiddleware(default_retry_count=8))


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def open_session(state: TaskiqState) -> None:
    """One session a process."""
    state.session = aiohttp.ClientSession(
        headers={"x-api-key": "sandbox-key"}, timeout=aiohttp.ClientTimeout(total=35, connect=5)
    )


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def close_session(state: TaskiqState) -> None:
    """Close what was opened."""
    await state.session.close()


@broker.task("submit_lead", retry_on_error=True)
async def submit_lead(campaign_id: str, phone: str, data: dict) -> None:
    """Post one lead."""
    async with broker.state.session.post(
        f"{BASE_URL}/campaigns/{campaign_id}/leads", json={"recipientPhoneNumber": phone, "recipientData": data}
    ) as response:
        response.raise_for_status()
        await response.read()


async def fill() -> None:
    """Put the leads of stdin into the queue."""
    await broker.startup()
    waiting: list = []
    for line in sys.stdin:
        lead = json.loads(line)
        waiting.append(submit_lead.kiq(lead["campaign"], lead["phone"], lead["data"]))
        if len(waiting) == _KICKS_AT_ONCE:
            await asyncio.gather(*waiting)
            waiting.clear()
    await asyncio.gather(*waiting)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(fill())
