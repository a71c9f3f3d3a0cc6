"""Celery's request, the message of one task in a worker, without personal data where it can be seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.request import Request

from pipeline.domain.campaign import InvalidCampaignId, check_campaign_id

RETRY_SECONDS = 2  # until the message of a process that crashed is tried again
_EMBEDDED = frozenset({"callbacks", "errbacks", "chain", "chord"})


class DiscreetRequest(Request):
    """A task's message, described by us and not by its producer.

    Producers without our code let Celery describe the arguments, which are personal data, for events and Flower.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        headers = dict(options.pop("headers", None) or message.headers)
        args, kwargs, embedded = options["body"] if options.get("decoded") else message.payload
        _check(headers, args, kwargs, embedded)
        headers |= {
            "argsrepr": describe_arguments(headers["task"], args),
            "kwargsrepr": "{…}" if kwargs else "{}",
            "shadow": None,  # the name that its producer would show in logs
            "timelimit": None,  # a limit that its producer set would lose the message
        }
        super().__init__(message, headers=headers, **options)
        self._latest_retry = datetime.now(UTC) + timedelta(seconds=RETRY_SECONDS) if headers.get("retries") else None

    @property
    def eta(self) -> datetime | None:
        """When to run it; that of a retry never further ahead than we set it, for our hosts' clocks differ."""
        eta: datetime | None = super().eta
        return min(eta, self._latest_retry) if eta and self._latest_retry else eta

    @property
    def request_dict(self) -> dict[str, Any]:
        """What a child gets beside the body: plain values only.

        A value that cannot be pickled, such as one that is nested too deeply, would cost the worker one of its
        processes for ever. The arguments are in the body anyway.
        """
        plain = {name: value for name, value in super().request_dict.items() if isinstance(value, str | int | float)}
        return plain | {"delivery_info": {"redelivered": bool(self.delivery_info["redelivered"])}}

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - never the arguments themselves
        """What `celery inspect` and Flower show."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown


def describe_arguments(task: str, args: Any) -> str:
    """What the arguments are about, without personal data: the campaign, and how many leads or events."""
    first = args[0] if args else None
    if isinstance(first, dict):
        try:
            about = [check_campaign_id(first.get("campaign_id"))]  # type: ignore[arg-type]  # it checks the type too
        except InvalidCampaignId:
            about = []
        about += [f"{len(first[name])} {name}" for name in ("leads", "events") if isinstance(first.get(name), list)]
        return f"({', '.join(about) or '…'})"
    if task == "pipeline.dispatch" and isinstance(first, str):
        return f"({first[:64]})"
    return "(…)" if args else "()"


def _check(headers: dict[str, Any], args: Any, kwargs: Any, embedded: Any) -> None:
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise InvalidTaskError("its body must be [[arguments], {named arguments}, {…}]")
    if embedded is not None and (not isinstance(embedded, dict) or not _EMBEDDED.issuperset(embedded)):
        raise InvalidTaskError(f"the third part of its body may hold {', '.join(sorted(_EMBEDDED))}")
    if not isinstance(headers.get("id"), str) or not isinstance(headers.get("retries") or 0, int):
        raise InvalidTaskError("its id must be text, and its retries a number")
