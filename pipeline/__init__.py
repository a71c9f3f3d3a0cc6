"""The pipeline between a backend and the Futwork AI Platform: leads in, calls out.

A lead's journey, and the modules in its order:

1. `producer` checks a row and publishes it in a batch; `enqueue` returns its id. From here on it is never lost.
2. `intake` writes the batch to the `ledger`, each lead once: **queued**.
3. `dispatch` takes a slot from the shared `limiter`, claims the lead: **sending**, and `futwork` posts it.
4. The answer decides: **submitted**, or queued for later, **uncertain**, **rejected**, **exhausted** (`lead`).
5. Futwork calls the person and posts what happened to `web`, which hands it over at once (`broker`).
6. `events` keeps the event as it came, merges it into its `call`, and finds the lead: **called**.
7. `sweep` finds whatever a dead process left behind.

>>> from pipeline import enqueue
>>> report = enqueue("68ecc86fd9fbecbe9431a18e", [{"phone": "9999789877", "data": {"customer_name": "Asha"}}])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.domain.lead import Lead
    from pipeline.producer import EnqueueFailed, EnqueueReport, Producer, RefusedRow, enqueue

__version__ = "0.2.0"

__all__ = ["EnqueueFailed", "EnqueueReport", "Lead", "Producer", "RefusedRow", "enqueue"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that importing a part does not import the whole."""
    if name == "Lead":
        from pipeline.domain.lead import Lead

        return Lead
    if name in __all__:
        from pipeline import producer

        return getattr(producer, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
