"""Webhook events on their way: due times, bounded concurrency, keep-alive connections, retries with backoff."""

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

from pipeline.sandbox.calls import Event, Lead, plan
from pipeline.sandbox.journal import Journal
from pipeline.sandbox.options import Options

_LONGEST_BACKOFF_SECONDS = 30.0


class Webhooks:
    """Plans a call for each accepted lead and posts its events to the webhook when they are due.

    An event is settled as `delivered` (2xx), `failed` (retries used up), `refused` (a malformed body got another
    answer than 2xx, which is right) or `lost` (the fault of that name), and is written to the record then.
    """

    def __init__(self, options: Options) -> None:
        self.calls = 0
        self.sent = 0
        self.planned = 0
        self.settled: Counter[str] = Counter()
        self._options = options
        self._record = Journal()
        self._pending: dict[int, Event] = {}
        self._schedule: list[tuple[float, int, Event]] = []
        self._ready: deque[Event] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due: float | None = None
        self._closed = False
        self._idle: list[_Connection] = []
        self._posting: set[asyncio.Task[None]] = set()

    @property
    def options(self) -> Options:
        """The settings in force; events that are planned already keep their plan."""
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        if options.webhook != self._options.webhook:
            self._close_idle()
        self._options = options
        self._pump()

    def call(self, lead: Lead) -> None:
        """Start the call of *lead*; without a webhook URL nobody would hear of it, so there is none."""
        if self._options.webhook is None:
            return
        self.calls += 1
        now = datetime.now(UTC)
        start = asyncio.get_running_loop().time()
        for seconds, event in plan(lead, self._options, now):
            self.planned += 1
            event.number = self.planned
            event.created = now.timestamp() + seconds
            if event.outcome == "lost":
                self._settle(event)
                continue
            self._pending[event.number] = event
            heapq.heappush(self._schedule, (start + seconds, event.number, event))
        self._pump()

    def flush(self) -> int:
        """Make everything that is scheduled due now, in the order of its due times; returns how many that are."""
        flushed = len(self._schedule)
        self._ready.extend(event for _, _, event in sorted(self._schedule, key=lambda entry: entry[:2]))
        self._schedule.clear()
        self._pump()
        return flushed

    def stats(self) -> dict[str, int]:
        """Counters; `events` is the sum of `pending` and the four ways to be settled."""
        outcomes = {name: self.settled[name] for name in ("delivered", "refused", "failed", "lost")}
        return {"events": self.planned, "sent": self.sent, **outcomes, "pending": len(self._pending)}

    def lines(self) -> Iterator[bytes]:
        """Yield the record as JSON lines: events in the order in which they were settled, then those pending."""
        pending = list(self._pending.values())
        yield from self._record.chunks()  # its end is fixed now, together with the list above
        for event in pending:
            yield orjson.dumps(event.as_json(), option=orjson.OPT_APPEND_NEWLINE)

    async def close(self) -> None:
        """Stop posting; what is pending stays pending."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._posting:
            task.cancel()
        await asyncio.gather(*self._posting, return_exceptions=True)
        self._close_idle()
        self._record.close()

    def _pump(self) -> None:
        """Post what is due as far as concurrency allows, and set the timer for what is due next."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._schedule and self._schedule[0][0] <= now:
            self._ready.append(heapq.heappop(self._schedule)[2])
        while self._ready and len(self._posting) < self._options.webhook_concurrency and self._may_post():
            task = loop.create_task(self._post(self._ready.popleft()))
            self._posting.add(task)
            task.add_done_callback(self._posted)
        due = self._schedule[0][0] if self._schedule else None
        if due == self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due is None else loop.call_at(due, self._ring)
        self._timer_due = due

    def _ring(self) -> None:
        self._timer = self._timer_due = None
        self._pump()

    def _may_post(self) -> bool:
        return not self._closed and not self._options.webhooks_paused and self._options.webhook is not None

    def _posted(self, task: asyncio.Task[None]) -> None:
        self._posting.discard(task)
        if not task.cancelled():
            task.result()
            self._pump()

    async def _post(self, event: Event) -> None:
        """Post *event* once; settle it, or schedule it again."""
        options = self._options
        event.attempts += 1
        self.sent += 1
        try:
            async with asyncio.timeout(options.webhook_timeout_seconds):
                event.response = await self._exchange(options, event.body())
        except OSError:  # TimeoutError among them
            event.response = None
        if event.response is not None and 200 <= event.response < 300:
            event.outcome = "delivered"
        elif event.kind == "malformed" and event.response is not None:
            event.outcome = "refused"
        elif event.attempts > options.webhook_retries:
            event.outcome = "failed"
        else:
            backoff = min(options.webhook_backoff_seconds * 2 ** (event.attempts - 1), _LONGEST_BACKOFF_SECONDS)
            heapq.heappush(self._schedule, (asyncio.get_running_loop().time() + backoff, event.number, event))
            return
        del self._pending[event.number]
        self._settle(event)

    def _settle(self, event: Event) -> None:
        self.settled[event.outcome] += 1
        self._record.append(event.as_json())

    async def _exchange(self, options: Options, body: bytes) -> int:
        url = urlsplit(str(options.webhook))
        connection = await self._connect(str(url.hostname), url.port or 80)
        try:
            status = await connection.post(
                _request(url.netloc, url.path or "/", url.query, options.webhook_token, body)
            )
        except BaseException:
            connection.close()
            raise
        if connection.reusable and self._options.webhook == options.webhook:
            self._idle.append(connection)
        else:
            connection.close()
        return status

    async def _connect(self, host: str, port: int) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        return connection

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    """One keep-alive connection to the webhook, with one request under way at most."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    async def post(self, request: bytes) -> int:
        """Send *request*, and return the status of its answer; raises OSError when the connection breaks."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the webhook closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return self._break(ConnectionAbortedError("the webhook answered before it was asked"))
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(ConnectionAbortedError(f"the webhook's answer is not HTTP: {error}"))

    def on_message_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:
            return
        self.reusable = self.reusable and self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        self._break(ConnectionResetError(f"the webhook closed the connection: {exc or 'no answer'}"))

    def _break(self, error: OSError) -> None:
        self.reusable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _request(host: str, path: str, query: str, token: str | None, body: bytes) -> bytes:
    target = f"{path}?{query}" if query else path
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    key = f"x-api-key: {token}\r\n" if token else ""
    return f"{head}{key}User-Agent: futwork-sandbox\r\n\r\n".encode() + body
