"""Which members of other libraries we rely on that these do not promise, and why; the first test to fail without them.

A private member has a name with an underscore. An undocumented one has none, but its library may rename it all the
same. Where a library promises a way, we take that.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pipeline

ROOT = Path(__file__).parents[2]
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, with an underscore so that no field can clash


@dataclass(frozen=True, slots=True)
class Internal:
    """A member of another library that it does not promise."""

    owner: str
    """A class or a module, as `module:Class` or `module`."""
    member: str
    used_in: str
    """The file of ours, from the root."""
    why: str
    """What would break without it: the promise, and the experiment or test that shows it."""


_TRANSPORT = "pipeline/broker/redis_transport.py"
_CONSUMER = "pipeline/worker/consumer.py"
_REQUEST = "pipeline/worker/request.py"
_APP = "pipeline/worker/app.py"

PRIVATE = [
    Internal(
        "kombu.transport.redis:Channel", "_brpop_start", _TRANSPORT,
        "a message enters the unacked set in the step that takes it, or a machine that is gone takes it along;"
        " experiment frozen-machine --without booked-delivery",
    ),
    Internal(
        "kombu.transport.redis:Channel", "_brpop_read", _TRANSPORT,
        "reads what `_brpop_start` asked for; what is no message is quarantined and does not end the worker;"
        " experiment poison",
    ),
    Internal(
        "kombu.transport.redis:Channel", "_in_poll", _TRANSPORT,
        "`_brpop_start` must set it and `_brpop_read` reset it, or kombu's poller asks twice over one connection",
    ),
    Internal(
        "kombu.transport.redis:Channel", "_brpop_sent_at", _TRANSPORT,
        "kombu drops a connection whose answer is overdue by it: how a worker notices a frozen broker;"
        " experiment stall",
    ),
    Internal(
        "kombu.transport.virtual:Transport", "_deliver", _TRANSPORT,
        "gives a message to the consumer of its queue; kombu has no public way",
    ),
]  # fmt: skip

UNDOCUMENTED = [
    Internal(
        "kombu.transport.redis:Channel", member, _TRANSPORT,
        "a connection that was closed raises an error of the connection and not one that ends the worker;"
        " test_a_connection_that_was_given_up_does_not_take_the_worker_with_it",
    )
    for member in ("pool", "async_pool")
] + [
    Internal(
        "kombu.transport.redis:Channel", "maybe_reauth", _TRANSPORT,
        "a credential that was replaced reaches the connection that waits, as after kombu's own BRPOP",
    ),
    Internal(
        "kombu.transport.redis:QoS", "append", _TRANSPORT,
        "a message is written into the unacked set once; test_a_message_is_written_into_the_unacked_set_once",
    ),
    *(
        Internal(
            "kombu.transport.redis:QoS", member, _TRANSPORT,
            "a failed acknowledgement frees its prefetch place, or the worker lives and takes nothing more;"
            " test_lost_acknowledgements.py",
        )
        for member in ("ack", "reject")
    ),
    Internal(
        "kombu.transport.redis:QoS", "visibility_timeout", _TRANSPORT,
        "clocks that are set back strand no message; experiment clock-jump",
    ),
    *(
        Internal(
            f"kombu.transport.redis:{name}", "connection_errors", _TRANSPORT,
            "a server that refuses for a while does not end the worker; test_worker_broker_refuses.py",
        )
        for name in ("Transport", "SentinelTransport")
    ),
    Internal(
        "kombu:Connection", "get_transport_cls", _TRANSPORT,
        "our transport stays when kombu goes on to another address; test_worker_connection.py",
    ),
    Internal("celery.app.amqp:AMQP", "Connection", _TRANSPORT, "how a Celery app gets our connection"),
    *(
        Internal(
            "celery.worker.consumer:Consumer", member, _CONSUMER,
            "what Celery would drop is quarantined; experiment poison --without quarantine",
        )
        for member in (
            "create_task_handler", "on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error",
        )
    ),
    *(
        Internal(
            "celery.worker.consumer:Consumer", member, _CONSUMER,
            "kombu 5.7 fails on a closed channel to Redis, which would end the worker; experiment valkey-kill",
        )
        for member in ("call_soon_ack", "on_connection_error_after_connected")
    ),
    Internal(
        "celery.worker.consumer:Consumer", "on_connection_error_before_connected", _CONSUMER,
        "a worker does not connect some hundred times a second to a broker that refuses;"
        " test_worker_broker_refuses.py",
    ),
    *(
        Internal(
            "celery.worker.request:Request", member, _REQUEST,
            "no argument of a foreign producer is shown, and none costs a worker a process; test_discretion.py",
        )
        for member in ("request_dict", "info")
    ),
    Internal(
        "celery.worker.request:Request", "eta", _REQUEST,
        "the retry of a host whose clock is ahead is not held back; test_clocks.py",
    ),
    *(
        Internal(
            "billiard.pool", member, _APP,
            "a child that ends waits 2 s and not 30 s for its parent, or a deployment's grace period runs out;"
            " test_a_child_of_a_worker_that_shuts_down_does_not_wait_half_a_minute_to_end",
        )
        for member in ("GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT", "GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL")
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", [*PRIVATE, *UNDOCUMENTED], ids=lambda one: f"{one.owner}.{one.member}")
def test_the_member_is_still_there(one: Internal) -> None:
    module, _, name = one.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, name) if name else owner
    assert hasattr(owner, one.member), f"{one.owner} has no {one.member} any more. {one.used_in} needs it: {one.why}"


@pytest.mark.parametrize("one", [*PRIVATE, *UNDOCUMENTED], ids=lambda one: f"{one.owner}.{one.member}")
def test_it_is_still_needed(one: Internal) -> None:
    assert one.member in (ROOT / one.used_in).read_text(), f"{one.used_in} uses {one.member} no more: delete the entry"


def test_no_other_private_member_of_a_library_is_used() -> None:
    listed = {(one.used_in, one.member) for one in PRIVATE}
    found = {*_foreign_attributes(), *_overridden()} - listed
    assert found == set(), "use a public way, or add it to PRIVATE with the promise that needs it"


def _foreign_attributes() -> Iterator[tuple[str, str]]:
    """Private attributes in our code that nothing of ours defines, so they belong to an object of a library."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "pipeline").rglob("*.py"))}
    ours = {name for tree in trees.values() for node in ast.walk(tree) for name in _defined(node)} | NAMED_TUPLE
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in ours:
                yield str(path.relative_to(ROOT)), node.attr


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.attr if isinstance(node, ast.Attribute) else node.id


def _overridden() -> Iterator[tuple[str, str]]:
    """Private names that a class of ours shares with a class of a library that it inherits from."""
    for cls in _our_classes():
        ours = [base for base in cls.__mro__ if base.__module__.startswith("pipeline")]
        theirs = [base for base in cls.__mro__ if base not in ours and base is not object]
        for base in ours:
            for name in _private_names(base):
                if any(hasattr(other, name) for other in theirs):
                    path = Path(str(importlib.import_module(base.__module__).__file__)).relative_to(ROOT)
                    yield str(path), name


def _our_classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if module.name.endswith(("__main__", ".env", "worker.celery", "web.wsgi")) or ".versions." in module.name:
            continue  # each runs something when it is imported
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and value.__module__ == module.name:
                yield value


@cache
def _private_names(cls: type[Any]) -> frozenset[str]:
    """The private names that the body of a class defines, reads or sets."""
    tree = ast.parse(Path(str(importlib.import_module(cls.__module__).__file__)).read_text())
    [body] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__] or [None]
    if body is None:
        return frozenset()
    names = {name for node in ast.walk(body) for name in _defined(node)}
    names |= {node.attr for node in ast.walk(body) if isinstance(node, ast.Attribute)}
    return frozenset(name for name in names if _is_private(name)) - NAMED_TUPLE


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
