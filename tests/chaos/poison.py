"""Messages and events that nobody can work on; each must end in quarantine, whole, and stop nothing."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
import uuid
from typing import Any

from tests.chaos.rig import CAMPAIGN, WEBHOOK_TOKEN
from tests.chaos.runner import Round

BIG_BYTES = 50 * 1024 * 1024


def send_poison(this: Round) -> int:
    """Put poison into every queue and the webhook; return how many of them there are."""
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    tasks: list[tuple[str, str, list[Any]]] = [
        ("events", "no.such.task", ["?"]),
        ("intake", "pipeline.intake", ["not a batch"]),
        ("intake", "pipeline.intake", [{"campaign_id": "not an id!", "leads": []}]),
        ("intake", "pipeline.intake", [{"campaign_id": CAMPAIGN, "leads": "none"}]),
        ("intake", "pipeline.intake", [{"campaign_id": CAMPAIGN, "leads": [], "batch": "no uuid"}]),
        ("intake", "pipeline.intake", [1, 2, 3]),
        ("intake", "pipeline.intake", [deep]),
        ("events", "pipeline.events", [{"events": [{"body": 5}]}]),
        ("events", "pipeline.events", [{"events": [{"body": "{}", "received_at": "yesterday"}]}]),
        ("events", "pipeline.events", [{"v": 1}]),
        ("events", "no.such.task", ["x" * this.size(BIG_BYTES, BIG_BYTES // 50)]),
    ]
    rows = [  # rows that cannot be leads, in a batch that is one
        {"phone": "12345", "data": {}},
        {"phone": "9800099999"},
        "not an object",
    ]
    with this.rig.valkey.client() as client:
        for queue, task, args in tasks:
            client.lpush(queue, _envelope(queue, task, json.dumps([args, {}, {}]).encode()))
        client.lpush("intake", _envelope("intake", "pipeline.intake", b"{not json"))
        client.lpush("intake", _envelope("intake", "pipeline.intake", b'["no", "task"]'))
        good = {"campaign_id": CAMPAIGN, "batch": str(uuid.uuid4()), "leads": rows}
        client.lpush("intake", _envelope("intake", "pipeline.intake", json.dumps([[good], {}, {}]).encode()))
    bodies = [  # events: refused at the door with 400, or taken and unreadable later
        b"no json at all",
        b"[]",
        b'{"status": "completed"}',
        json.dumps({"callSid": "x" * 5000, "status": "completed"}).encode(),
        b'{"callSid": "deep", "a": ' + b"[" * 900 + b"]" * 900 + b"}",
    ]
    for body in bodies:
        _post(this, body)
        this.feed.accepted.offered.add(_digest(body))
    this.rig.note("poison in the queues and at the webhook")
    return len(tasks) + 2 + len(rows) + len(bodies)


def _envelope(queue: str, task: str, body: bytes) -> bytes:
    """A message as Celery's Redis transport writes it."""
    id_ = str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": id_, "root_id": id_, "parent_id": None, "group": None},
            "properties": {
                "correlation_id": id_,
                "delivery_mode": 2,
                "delivery_info": {"exchange": queue, "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    ).encode()


def _post(this: Round, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "x-api-key": WEBHOOK_TOKEN}
    request = urllib.request.Request(f"{this.rig.web}/webhooks/futwork", data=body, headers=headers)
    try:
        urllib.request.urlopen(request, timeout=15).close()
    except urllib.error.HTTPError as error:
        error.close()


def _digest(body: bytes) -> str:
    import hashlib

    return hashlib.sha256(body).hexdigest()
