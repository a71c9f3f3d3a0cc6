"""The pipeline between a backend and the Futwork AI Platform: leads in, calls out.

A lead's journey, and the modules in its order:

1. `producer` checks a row and publishes it in a batch; `enqueue` returns its id. From here on it is never lost.
2. `intake` writes the batch to the `ledger`, each lead once: **queued**.
3. `dispatch` reserves a slot of the shared rate limit (`coordination`), claims the lead: **sending**, and `futwork`
   posts it.
4. The answer decides (`domain`): **submitted**, queued again for later, **uncertain**, **rejected** or **exhausted**.
5. Futwork calls the person and posts what happened to `web`, which passes it to the `broker` at once.
6. `events` stores the event as it came, folds it into its call, and finds the lead: **called**.
7. `sweep` finds what a dead process left behind.

>>> from pipeline import enqueue
>>> report = enqueue("68ecc86fd9fbecbe9431a18e", [{"phone": "9999789877", "data": {"customer_name": "Asha"}}])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.broker import BrokerUnavailable
    from pipeline.domain.campaign import InvalidCampaignId
    from pipeline.domain.lead import InvalidLead, Lead
    from pipeline.producer import EnqueueFailed, EnqueueReport, Producer, RefusedRow, enqueue
    from pipeline.settings import ProducerSettings, SettingsError

__version__ = "0.2.0"

__all__ = [
    "BrokerUnavailable",
    "EnqueueFailed",
    "EnqueueReport",
    "InvalidCampaignId",
    "InvalidLead",
    "Lead",
    "Producer",
    "ProducerSettings",
    "RefusedRow",
    "SettingsError",
    "enqueue",
]

_ELSEWHERE = {
    "BrokerUnavailable": "broker",
    "InvalidCampaignId": "domain.campaign",
    "InvalidLead": "domain.lead",
    "Lead": "domain.lead",
    "ProducerSettings": "settings",
    "SettingsError": "settings",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing a part does not import the whole."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(f"pipeline.{_ELSEWHERE.get(name, 'producer')}"), name)
