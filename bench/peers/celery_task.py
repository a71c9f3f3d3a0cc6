"""A plain Celery task a lead, which posts it with requests and retries.

Shape: the Celery user guide, "Tasks: automatic retry for known exceptions" (autoretry_for, retry_backoff), and
"Optimizing: prefetch limits" (a high multiplier for many short tasks), with results ignored as "Ignore results you
don't want" advises. SHARED_SESSION=1 keeps connections, as the requests documentation advises under "Session objects".
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import requests
from celery import Celery

QUEUE = "celery"
BASE_URL = os.environ.get("FUTWORK_BASE_URL", "")
CAMPAIGN = "68ecc86fd9fbecbe9431a18e"

app = Celery("peer", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)

post = requests.Session().post if os.environ.get("SHARED_SESSION") == "1" else requests.post


@app.task(autoretry_for=(requests.RequestException,), retry_backoff=True, max_retries=8)
def submit_lead(campaign_id: str, phone: str, data: dict) -> None:
    """Post one lead."""
    response = post(
        f"{BASE_URL}/campaigns/{campaign_id}/leads",
        json={"recipientPhoneNumber": phone, "recipientData": data},
        headers={"x-api-key": "sandbox-key"},
        timeout=(5, 30),
    )
    response.raise_for_status()


def enqueue_all(rows: Iterable[dict]) -> None:
    """One message a lead."""
    for row in rows:
        submit_lead.delay(CAMPAIGN, row["phone"], row["data"])
