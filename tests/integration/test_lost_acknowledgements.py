"""An acknowledgement whose answer is lost: the worker goes on, and the broker delivers what it still has."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
import redis

from pipeline.broker.redis_transport import WorkerConnection
from pipeline.observability.logs import logger
from tests.waiting import patience

QUEUE = kombu.Queue("acknowledged", kombu.Exchange("acknowledged", type="direct"), routing_key="acknowledged")
PREFETCH = 2
log = logger(__name__)


class ResettingProxy:
    """Passes on what a Redis client and its server say, and ends a connection that acknowledges while `resetting`.

    *arrives* says whether the server gets the acknowledgement and only its answer is lost, or the server gets nothing.
    Connections on which nothing is acknowledged, such as the one on which messages are taken, live on.
    """

    def __init__(self, server: tuple[str, int], *, arrives: bool) -> None:
        self.resetting = False
        self.resets = 0
        self._server = server
        self._arrives = arrives
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends a waiting accept
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                doomed = threading.Event()
                threading.Thread(target=self._commands, args=(client, server, doomed), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server, doomed), daemon=True).start()

    def _commands(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self.resetting and b"HDEL" in data:
                    self.resets += 1
                    doomed.set()
                    if not self._arrives:
                        break
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answers(client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while (data := server.recv(65536)) and not doomed.is_set():
                client.sendall(data)
        for one in (client, server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture(params=[True, False], ids=["it arrives", "it does not arrive"])
def proxy(request: pytest.FixtureRequest, valkey_url: str) -> Iterator[ResettingProxy]:
    """A proxy before the private Valkey."""
    address = urlsplit(valkey_url)
    made = ResettingProxy((address.hostname or "127.0.0.1", address.port or 6379), arrives=request.param)
    yield made
    made.close()


@pytest.mark.parametrize("settle", ["ack", "reject"])
def test_as_many_lost_acknowledgements_as_a_worker_has_places_do_not_stop_it(
    proxy: ResettingProxy, valkey: redis.Redis, settle: str
) -> None:
    """Seen with two processes and two resets: the worker lived, and took not one task more until it was restarted."""
    options = {"visibility_timeout": 1, "unacked_restore_throttle": 1}
    received: list[Any] = []
    with WorkerConnection(f"redis://127.0.0.1:{proxy.port}/0", transport_options=options) as connection:
        consumer = connection.Consumer(QUEUE, callbacks=[lambda _, message: received.append(message)])
        consumer.qos(prefetch_count=PREFETCH)
        consumer.consume()
        for number in range(PREFETCH):
            _publish(connection, number)
        _drain(connection, lambda: len(received) == PREFETCH)
        assert not consumer.channel.qos.can_consume()

        proxy.resetting = True
        for message in received:
            if settle == "ack":
                message.ack_log_error(log, connection.connection_errors)
            else:
                message.reject_log_error(log, connection.connection_errors)
        proxy.resetting = False
        assert proxy.resets >= PREFETCH
        assert [message.acknowledged for message in received] == [False] * PREFETCH
        assert consumer.channel.qos.can_consume()

        _publish(connection, "next")

        def all_done() -> bool:
            for message in received[PREFETCH:]:
                if not message.acknowledged:
                    message.ack()
            consumer.channel.qos.restore_visible(interval=1)
            taken = [message.payload for message in received[PREFETCH:]]
            return "next" in taken and not valkey.hlen("unacked") and not valkey.llen("acknowledged")

        _drain(connection, all_done)


def _publish(connection: kombu.Connection, payload: object) -> None:
    with connection.clone() as other:
        other.Producer().publish(payload, exchange=QUEUE.exchange, routing_key=QUEUE.routing_key, declare=[QUEUE])


def _drain(connection: kombu.Connection, condition: Any) -> None:
    deadline = time.monotonic() + patience()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
