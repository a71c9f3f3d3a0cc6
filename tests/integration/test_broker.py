"""Publishing to real brokers: Valkey and RabbitMQ that answer, refuse, freeze and come back."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
import redis
from celery import Celery

from pipeline import EnqueueFailed, enqueue
from pipeline.broker import MESSAGE_VERSION, QUEUES, Broker, BrokerUnavailable, WebEvent, celery_app, decode_events
from pipeline.broker import publisher as broker_module
from pipeline.broker.gate import EventGate
from pipeline.broker.spool import Spool
from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from pipeline.settings import Settings, SettingsError
from pipeline.wiring import Services
from pipeline.worker import guard
from tests.conftest import CAMPAIGN
from tests.waiting import patience, until

LONGEST_SECONDS = 5.0


def broker_at(url: str) -> Broker:
    return Broker(celery_app(Settings(_env_file=None, broker_url=url), works=False))


def given_up(call: Callable[[], object]) -> tuple[float, str]:
    """How long it takes until the broker is given up, and the reason."""
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable) as caught:
        call()
    return time.monotonic() - started, str(caught.value)


def fails_in(call: Callable[[], object]) -> float:
    return given_up(call)[0]


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except BrokerUnavailable:
        return False
    return True


def messages_of(url: str, queue: str) -> list[Any]:
    """The first arguments of all messages in a queue, taken out."""
    taken = []
    with kombu.Connection(url) as connection, connection.SimpleQueue(queue) as simple:
        while True:
            try:
                message = simple.get(block=False)
            except simple.Empty:
                return taken
            taken.append(message.payload[0][0])
            message.ack()


class Proxy:
    """A TCP proxy that can freeze: connections stay open, and nothing passes any more."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._flows = threading.Event()
        self._flows.set()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self._ended = True
        self._flows.set()
        self._thread.join(patience())
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # they are sockets
        self._selector.close()

    def _run(self) -> None:
        while not self._ended:
            ready = self._selector.select(0.05)
            self._flows.wait()
            for key, _ in ready:
                if key.fileobj is self._listener:
                    near, _ = self._listener.accept()
                    far = socket.create_connection(self._target)
                    self._selector.register(near, selectors.EVENT_READ, far)
                    self._selector.register(far, selectors.EVENT_READ, near)
                elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # else closed with its other end
                    self._pass_on(key.fileobj, key.data)  # type: ignore[arg-type]  # they are sockets

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            data = source.recv(65536)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (source, target):
                self._selector.unregister(end)
                end.close()


@pytest.fixture
def rabbitmq(rabbitmq_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """RabbitMQ without our queues, for one test at a time on this machine."""
    with rabbitmq_alone(rabbitmq_url):
        yield rabbitmq_url


@contextlib.contextmanager
def rabbitmq_alone(url: str) -> Iterator[None]:
    import fcntl
    import tempfile

    def forget() -> None:
        with kombu.Connection(url) as connection:
            for name in QUEUES:
                connection.default_channel.queue_delete(name)

    with (Path(tempfile.gettempdir()) / "pipeline-tests-rabbitmq.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        forget()
        yield
        forget()


@pytest.fixture(params=["valkey", "rabbitmq"])
def url(request: pytest.FixtureRequest) -> str:
    """A broker that answers and has no queue of ours, once Valkey and once RabbitMQ."""
    if request.param == "rabbitmq":
        return request.getfixturevalue("rabbitmq")
    request.getfixturevalue("valkey")
    return request.getfixturevalue("valkey_url")


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A Valkey of the test's own, with its process id."""
    with embedded_broker(tmp_path / "own") as url, contextlib.closing(redis.Redis.from_url(url)) as client:
        pid = int(client.info()["process_id"])
        try:
            yield url, pid
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        yield server.getsockname()[1]


def test_a_published_message_is_in_its_queue_as_a_celery_task_of_plain_json(url: str) -> None:
    broker = broker_at(url)
    broker.publish("pipeline.intake", {"v": 1, "name": "नमस्ते"}, about="(abc, 1 leads)")
    assert broker.depths() == {"intake": 1, "dispatch": 0, "events": 0, "upkeep": 0}
    with kombu.Connection(url) as connection, connection.SimpleQueue("intake") as simple:
        message = simple.get(timeout=patience())
        message.ack()
    assert message.content_type == "application/json"
    assert message.headers["task"] == "pipeline.intake"
    assert message.headers["argsrepr"] == "(abc, 1 leads)"
    assert message.headers["kwargsrepr"] == "{}"
    assert message.payload == [[{"v": 1, "name": "नमस्ते"}], {}, message.payload[2]]


@pytest.mark.parametrize("expires", [None, 60.0])
def test_what_lies_in_a_redis_queue_is_what_celery_and_kombu_would_put_there(
    expires: float | None, valkey: redis.Redis, valkey_url: str
) -> None:
    """Any Celery worker, Flower and kombu's own ways of giving a message back read it; so it must not differ at all."""
    app = celery_app(Settings(_env_file=None, broker_url=valkey_url), works=False)
    payload = {"v": 1, "name": "नमस्ते", "text": 'quotes " and \\', "none": None}
    options = {"argsrepr": "(abc)", "kwargsrepr": "{}", "expires": expires, "ignore_result": True}
    Broker(app).publish("pipeline.dispatch", payload, about="(abc)", expires_seconds=expires)
    app.send_task("pipeline.dispatch", args=[payload], mandatory=True, **options)
    with app.connection_for_write() as connection:
        connection.default_channel.client.connection_pool.disconnect()
    theirs, ours = [json.loads(one) for one in valkey.lrange("dispatch", 0, -1)]

    assert list(ours) == list(theirs)
    for part in ("headers", "properties"):
        assert list(ours[part]) == list(theirs[part])
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    ids = {ours["headers"]["id"], ours["properties"]["delivery_tag"], theirs["headers"]["id"]}
    assert len(ids) == 3
    for one in (ours, theirs):
        assert one["headers"].pop("root_id") == one["headers"].pop("id") == one["properties"].pop("correlation_id")
        assert uuid.UUID(one["properties"].pop("delivery_tag"))
        until_when = one["headers"].pop("expires")
        assert (until_when is None) == (expires is None)
        del one["body"]
    assert ours == theirs


def test_a_task_that_a_task_sends_names_its_parent(valkey: redis.Redis, valkey_url: str) -> None:
    """Flower shows which batch woke a dispatcher."""
    broker = broker_at(valkey_url)
    works = Celery("works", set_as_current=False)

    @works.task(bind=True)
    def stage(task: Any) -> str:
        broker.publish("pipeline.dispatch", CAMPAIGN, about="()")
        return str(task.request.id)

    parent = stage.apply(task_id=str(uuid.uuid4())).get()
    headers = json.loads(valkey.lindex("dispatch", 0))["headers"]
    assert (headers["parent_id"], headers["root_id"]) == (parent, parent)


@pytest.mark.parametrize(
    ("task", "queue"),
    [
        ("pipeline.intake", "intake"),
        ("pipeline.dispatch", "dispatch"),
        ("pipeline.events", "events"),
        ("pipeline.sweep", "upkeep"),
        ("pipeline.tidy", "upkeep"),
    ],
)
def test_each_task_has_its_queue(task: str, queue: str, valkey: redis.Redis, valkey_url: str) -> None:
    broker = broker_at(valkey_url)
    broker.publish(task, 1, about="()")
    assert broker.depths() == dict.fromkeys(QUEUES, 0) | {queue: 1}


def test_depths_count_what_waits_and_a_fresh_broker_has_none(url: str) -> None:
    broker = broker_at(url)
    assert broker.depths() == dict.fromkeys(QUEUES, 0)
    for number in range(3):
        broker.publish("pipeline.events", number, about="()")
    broker.publish("pipeline.sweep", 1, about="()")
    assert broker.depths() == {"intake": 0, "dispatch": 0, "events": 3, "upkeep": 1}


def test_a_fresh_broker_without_queues_answers_a_ping(url: str) -> None:
    broker_at(url).ping()


def test_a_message_that_expires_says_when(valkey: redis.Redis, valkey_url: str) -> None:
    broker_at(valkey_url).publish("pipeline.dispatch", CAMPAIGN, about="()", expires_seconds=60)
    with kombu.Connection(valkey_url) as connection, connection.SimpleQueue("dispatch") as simple:
        message = simple.get(timeout=patience())
        message.ack()
    left = datetime.fromisoformat(message.headers["expires"]) - datetime.now(UTC)
    assert 50 < left.total_seconds() <= 60


def test_many_threads_publish_over_one_broker_and_each_message_arrives_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "_SLOT_WAIT_SECONDS", 60)  # forty threads over ten connections, on any machine
    broker = broker_at(url)
    with ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(400)))
    assert broker.depths()["events"] == 400
    assert sorted(messages_of(url, "events")) == list(range(400))


def test_rabbitmq_confirms_each_message_before_publish_returns(rabbitmq: str) -> None:
    """A queue that refuses by `reject-publish` shows it: without confirms the message would vanish in silence."""
    with kombu.Connection(rabbitmq) as connection:
        channel = connection.default_channel
        bound = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare("events", durable=True, auto_delete=False, arguments=bound)
        kombu.Producer(channel).publish("the one that fits", routing_key="events")
        until(lambda: channel.queue_declare("events", passive=True).message_count == 1)
    app = celery_app(Settings(_env_file=None, broker_url=rabbitmq), works=False)
    for queue in app.amqp.queues.values():
        queue.no_declare = True  # it is there already, with its bound
    broker = Broker(app)
    with pytest.raises(BrokerUnavailable):
        broker.publish("pipeline.events", 1, about="()")
    assert broker.depths()["events"] == 1


@pytest.mark.parametrize("kind", ["valkey", "rabbitmq"])
def test_a_message_whose_queue_was_deleted_is_not_lost_but_finds_a_new_one(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """RabbitMQ confirms a message that fits no queue, and drops it."""
    url = request.getfixturevalue("valkey_url" if kind == "valkey" else "rabbitmq")
    broker = broker_at(url)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(30)))
        if kind == "valkey":
            request.getfixturevalue("valkey").flushall()
        else:
            with kombu.Connection(url) as connection:
                connection.default_channel.queue_delete("events")
        list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(100)))
    assert sorted(messages_of(url, "events")) == list(range(100))


# A broker that is not there


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_refuses_is_given_up_in_time(scheme: str) -> None:
    broker = broker_at(f"{scheme}://127.0.0.1:{free_port()}/")
    for call in (lambda: broker.publish("pipeline.events", 1, about="()"), broker.ping, broker.depths):
        assert fails_in(call) < patience(LONGEST_SECONDS)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_accepts_and_never_answers_is_given_up_in_time(scheme: str, silent_port: int) -> None:
    broker = broker_at(f"{scheme}://guest:guest@127.0.0.1:{silent_port}/")
    for call in (lambda: broker.publish("pipeline.events", 1, about="()"), broker.ping, broker.depths):
        assert fails_in(call) < patience(LONGEST_SECONDS)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_speaks_another_language_is_given_up_in_time(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        broker = broker_at(f"{scheme}://guest:guest@127.0.0.1:{server.getsockname()[1]}/")
        assert fails_in(lambda: broker.publish("pipeline.events", 1, about="()")) < patience(LONGEST_SECONDS)
        assert fails_in(broker.ping) < patience(LONGEST_SECONDS)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(patience())


def test_wrong_credentials_are_told_without_the_password(rabbitmq_url: str) -> None:
    parts = urlsplit(rabbitmq_url)
    broker = broker_at(f"amqp://nobody:hunter2@{parts.hostname}:{parts.port or 5672}//")
    with pytest.raises(BrokerUnavailable) as caught:
        broker.ping()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_enqueue_is_told_within_five_seconds_that_the_broker_is_silent(scheme: str, silent_port: int) -> None:
    settings = Settings(_env_file=None, broker_url=f"{scheme}://guest:guest@127.0.0.1:{silent_port}/")
    started = time.monotonic()
    with pytest.raises(EnqueueFailed) as caught:
        enqueue(CAMPAIGN, [{"phone": "9999789877", "data": {}}], settings=settings)
    assert time.monotonic() - started < patience(LONGEST_SECONDS)
    assert caught.value.not_accepted == (0,)
    assert caught.value.report.accepted == 0


def test_without_a_broker_url_the_error_says_what_to_set() -> None:
    with pytest.raises(SettingsError, match="BROKER_URL is not set: give the address of a Redis, Valkey or RabbitMQ"):
        celery_app(Settings(_env_file=None), works=False)


# A broker that freezes while it is used, and comes back


@contextlib.contextmanager
def freezable(
    kind: str, request: pytest.FixtureRequest
) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    if kind == "valkey":
        url, pid = request.getfixturevalue("own_valkey")
        yield url, lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT)
        return
    parts = urlsplit(request.getfixturevalue("rabbitmq"))
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 5672)
    try:
        userinfo = parts.netloc.rpartition("@")[0]
        yield f"amqp://{userinfo}@127.0.0.1:{proxy.port}{parts.path}", proxy.freeze, proxy.thaw
    finally:
        proxy.close()


@pytest.mark.parametrize("kind", ["valkey", "rabbitmq"])
def test_a_broker_that_freezes_in_use_is_given_up_in_time_and_used_again_when_it_is_back(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with freezable(kind, request) as (url, freeze, thaw):
        broker = broker_at(url)
        broker.publish("pipeline.events", "before", about="()")
        freeze()
        for call in (lambda: broker.publish("pipeline.events", "frozen", about="()"), broker.ping, broker.depths):
            assert fails_in(call) < patience(LONGEST_SECONDS)
        thaw()
        broker.publish("pipeline.events", "after", about="()")
        broker.ping()
        # What a frozen broker was sent may arrive in the end, but what it did not take was never called accepted.
        found = messages_of(url, "events")
        assert found[0] == "before"
        assert found[-1] == "after"
        assert set(found) <= {"before", "frozen", "after"}


@pytest.mark.parametrize("kind", ["valkey"])
def test_many_threads_do_not_queue_up_behind_a_frozen_broker(kind: str, request: pytest.FixtureRequest) -> None:
    with freezable(kind, request) as (url, freeze, thaw):
        broker = broker_at(url)
        with ThreadPoolExecutor(40) as pool:
            list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(40)))
            freeze()
            waits = list(
                pool.map(lambda _: given_up(lambda: broker.publish("pipeline.events", 1, about="()")), range(40))
            )
            thaw()
            assert max(seconds for seconds, _ in waits) < patience(LONGEST_SECONDS)
            # There are ten connections; a late call may have had the place of one that gave up.
            assert 0 < sum("all connections wait" in reason for _, reason in waits) <= 30
            until(lambda: succeeds(lambda: broker.publish("pipeline.events", 1, about="()")))
            list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(40)))
        assert broker.depths()["events"] >= 80


@pytest.mark.parametrize("kind", ["valkey", "rabbitmq"])
def test_events_are_answered_in_time_while_the_broker_is_frozen_and_reach_it_when_it_is_back(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventGate, "RETRY_SECONDS", 0.2)
    with freezable(kind, request) as (url, freeze, thaw):
        spool = Spool(tmp_path / "spool", max_bytes=10_000_000)
        gate = EventGate(broker_at(url), spool)
        events = [WebEvent(b'{"callSid":"CA%03d"}' % number, datetime.now(UTC)) for number in range(90)]
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(gate.submit, events[:30]))
            freeze()
            started = time.monotonic()
            list(pool.map(gate.submit, events[30:60]))
            assert time.monotonic() - started < patience(2 * LONGEST_SECONDS)  # one group waits, those after it do not
            started = time.monotonic()
            list(pool.map(gate.submit, events[60:]))
            assert time.monotonic() - started < patience(2)
        assert gate.spooled == 60
        thaw()
        until(lambda: spool.size()[0] == 0)
        until(lambda: gate._drainer is None)
        found = {event.body for message in messages_of(url, "events") for event in decode_events(message)}
        assert found == {event.body for event in events}


def test_a_broker_that_was_restarted_is_used_again_by_the_same_process(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "first") as url:
        broker = broker_at(url)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: broker.publish("pipeline.events", number, about="()"), range(16)))
    assert fails_in(lambda: broker.publish("pipeline.events", 0, about="()")) < patience(LONGEST_SECONDS)
    port = urlsplit(url).port
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.devstack.embedded_valkey.free_port", lambda: port)
        with embedded_broker(tmp_path / "second") as again:
            assert again == url
            for number in range(16):  # also those whose connection is from before
                broker.publish("pipeline.events", number, about="()")
            assert broker.depths()["events"] == 16


def test_calls_of_enqueue_share_their_connections(own_valkey: tuple[str, int]) -> None:
    url, _ = own_valkey
    settings = Settings(_env_file=None, broker_url=url)
    for number in range(20):
        enqueue(CAMPAIGN, [{"phone": f"98{number:08d}", "data": {}}], settings=settings)
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        assert client.info("clients")["connected_clients"] <= 4


def test_a_newer_message_is_back_in_its_queue_while_the_worker_that_left_it_rests(
    make_settings: Callable[..., Settings], valkey_url: str, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back after the rest, it was taken by the same process again, and a newer one that was idle never got it."""
    mine = Services(make_settings(broker_url=valkey_url))
    task: Any = SimpleNamespace(name="pipeline.events", request=SimpleNamespace(id="x"))
    while_it_rests: list[int] = []
    monkeypatch.setattr(guard, "_pause", lambda: while_it_rests.append(mine.broker.depths()["events"]))

    assert guard._left_to_newer(mine, task, {"v": MESSAGE_VERSION + 1, "events": []})
    assert while_it_rests == [1]
    assert not guard._left_to_newer(mine, task, {"v": MESSAGE_VERSION, "events": []})
    assert mine.broker.depths()["events"] == 1
