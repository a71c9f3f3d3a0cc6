"""What each answer of Futwork makes of its lead, and what goes wrong between answer and record."""

import threading
from collections import Counter, deque
from contextlib import suppress
from email.utils import format_datetime

import pytest
import sqlalchemy as sa

from pipeline.futwork import with_curl, with_requests
from pipeline.futwork.wire import taken
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from tests.conftest import CAMPAIGN
from tests.integration.dispatch.conftest import CONCURRENCY, OTHER, always, hang_up, now, opened, seconds, when_accepted
from tests.raw_server import raw_server
from tests.waiting import patience

# The outcome table, row by row

IN_40 = "in forty seconds"


BACKOFF = (10, 600)


NOW = (0, 5)


@pytest.mark.parametrize(
    ("status", "body", "header", "state", "outcome", "attempts", "due", "hold"),
    [
        (200, b'{"data":{"_id":"68ecc93cd9fbecbe9431a2a1"}}', "", "submitted", "accepted", 1, NOW, None),
        (202, b"", "", "submitted", "accepted", 1, NOW, None),
        (200, b'{"success":false,"message":"no"}', "", "rejected", "rejected", 1, NOW, None),
        (200, b'{"error":"no"}', "", "rejected", "rejected", 1, NOW, None),
        (429, b"slow", "Retry-After: 1000", "queued", "throttled", 0, (995, 1000), None),
        (429, b"slow", f"Retry-After: {IN_40}", "queued", "throttled", 0, (35, 400), None),
        (429, b"slow", "", "queued", "throttled", 0, (10, 300), None),
        (503, b"busy", "Retry-After: 1000", "queued", "busy", 1, (995, 1000), None),
        (503, b"busy", "", "queued", "busy", 1, BACKOFF, None),
        (421, b"busy", "", "queued", "busy", 1, BACKOFF, None),
        (500, b"oops", "", "uncertain", "failed", 1, NOW, None),
        (501, b"oops", "", "uncertain", "failed", 1, NOW, None),
        (502, b"gate", "", "uncertain", "uncertain", 1, NOW, None),
        (504, b"gate", "", "uncertain", "uncertain", 1, NOW, None),
        (408, b"late", "", "uncertain", "uncertain", 1, NOW, None),
        (401, b"key", "", "queued", "refused_key", 0, (10, 300), "refused_key"),
        (403, b"key", "", "queued", "refused_key", 0, (10, 300), "refused_key"),
        (404, b"gone", "", "queued", "refused_campaign", 0, (10, 300), "refused_campaign"),
        (302, b"moved", "Location: /elsewhere", "queued", "refused_campaign", 0, (10, 300), "refused_campaign"),
        (400, b"bad", "", "rejected", "rejected", 1, NOW, None),
        (409, b"dup", "", "rejected", "rejected", 1, NOW, None),
        (413, b"big", "", "rejected", "rejected", 1, NOW, None),
        (422, b"bad", "", "rejected", "rejected", 1, NOW, None),
        (418, b"tea", "", "rejected", "rejected", 1, NOW, None),
    ],
)
def test_each_answer_makes_of_its_lead_what_the_table_says(
    each_bench, status, body, header, state, outcome, attempts, due, hold
):
    bench = each_bench
    bench.take_in()
    date = format_datetime(now() + seconds(40), usegmt=True)
    with raw_server(always(f"{status} X", body, *filter(None, [header.replace(IN_40, date)]))) as server:
        started = now()
        done = bench.dispatcher(server.url).run(CAMPAIGN)
    story = bench.story()
    assert (story["state"], story["attempts"]) == (state, attempts)
    assert [(one["outcome"], one["http_status"]) for one in story["attempts_made"]] == [(outcome, status)]
    assert seconds(due[0]) <= story["due_at"] - started + seconds(1) and story["due_at"] - now() <= seconds(due[1])
    if state == "submitted":
        assert story["reason"] is None
        assert story["submitted_at"] is not None
        assert story["futwork_lead_id"] == ("68ecc93cd9fbecbe9431a2a1" if body else None)
    else:
        assert story["reason"] == f"{outcome}: HTTP {status} {body.decode()}"
        assert story["attempts_made"][0]["excerpt"] == f"HTTP {status} {body.decode()}"
        assert (story["submitted_at"], story["futwork_lead_id"]) == (None, None)
    assert dict(done.outcomes) == {outcome: 1}
    assert done.ended == ("held" if hold else "limit" if outcome == "throttled" else "idle")
    assert bench.campaign()["hold_kind"] == hold
    assert not done.more


@pytest.mark.parametrize(
    ("handle", "why"),
    [
        (hang_up, "the connection was closed without an answer"),
        (lambda peer: peer.hang(), "no answer within the time allowed"),
    ],
)
def test_a_request_without_an_answer_leaves_its_lead_uncertain(each_bench, handle, why):
    each_bench.take_in()
    with raw_server(handle) as server:
        each_bench.dispatcher(server.url, read_timeout_seconds=0.3).run(CAMPAIGN)
    story = each_bench.story()
    assert (story["state"], story["attempts"], story["reason"]) == ("uncertain", 1, f"uncertain: {why}")
    assert [one["http_status"] for one in story["attempts_made"]] == [None]


def test_a_request_that_did_not_leave_is_tried_again_later(each_bench):
    each_bench.take_in()
    with raw_server(hang_up) as server:
        url = server.url
    each_bench.dispatcher(url).run(CAMPAIGN)
    story = each_bench.story()
    assert (story["state"], story["attempts"]) == ("queued", 1)
    assert story["reason"] == "not_sent: the connection was refused or could not be made"
    assert seconds(10) < story["due_at"] - now() < seconds(600)


@pytest.mark.parametrize("policy", [{}, {"max_attempts": 3}])
def test_a_lead_is_tried_no_more_often_than_allowed(each_bench, policy):
    bench = each_bench
    bench.take_in(**policy)
    with raw_server(always("503 Busy", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url, max_attempts=8 if policy else 3)
        states = []
        for _ in range(5):
            dispatcher.run(CAMPAIGN)
            states.append(bench.story()["state"])
            bench.make_due()
    assert states == ["queued", "queued", "exhausted", "exhausted", "exhausted"]
    assert len(bench.story()["attempts_made"]) == 3


@pytest.mark.parametrize(
    ("setting", "policy", "state"),
    [
        ("uncertain", {}, "uncertain"),
        ("retry", {}, "queued"),
        ("uncertain", {"on_server_error": "retry"}, "queued"),
        ("retry", {"on_server_error": "uncertain"}, "uncertain"),
    ],
)
def test_a_server_error_is_what_the_settings_and_the_campaign_say(each_bench, setting, policy, state):
    each_bench.take_in(**policy)
    with raw_server(always("500 Oops", b"{}")) as server:
        each_bench.dispatcher(server.url, on_server_error=setting).run(CAMPAIGN)
    assert (each_bench.story()["state"], each_bench.story()["attempts"]) == (state, 1)


def test_throttling_never_exhausts_a_lead(bench):
    bench.take_in()
    with raw_server(always("429 Slow", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url, max_attempts=2)
        for _ in range(4):
            assert dispatcher.run(CAMPAIGN).outcomes == {"throttled": 1}
            bench.make_due()
            bench.valkey.flushall()  # the pause is over
    assert (bench.story()["state"], bench.story()["attempts"]) == ("queued", 0)


def test_a_lead_that_would_be_due_after_its_time_is_expired(each_bench):
    each_bench.take_in(max_age=60)
    with raw_server(always("503 Busy", b"{}", "Retry-After: 100")) as server:
        each_bench.dispatcher(server.url).run(CAMPAIGN)
    assert (each_bench.story()["state"], each_bench.story()["attempts"]) == ("expired", 1)


def test_a_lead_that_is_too_old_is_not_sent(bench):
    bench.take_in(max_age=-1)
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url).run(CAMPAIGN)
        assert server.connections == 0
    assert (done.ended, done.more, done.posts) == ("idle", False, 0)


# Accidents


def test_a_ledger_that_is_away_for_a_moment_loses_no_outcome(postgres_ledger, postgres_url, valkey, make_settings):
    with opened(postgres_ledger, valkey, make_settings) as bench:
        bench.take_in(40)
        name = sa.make_url(postgres_url).database
        server = sa.create_engine(sa.make_url(postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT")

        def lock_out():
            with server.connect() as connection:
                connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
                connection.execute(
                    sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                    {"name": name},
                )
                threading.Event().wait(0.6)  # time itself is the subject
                connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))

        with run_in_thread(Options(latency_ms=100)) as sandbox:
            accident = when_accepted(sandbox, CONCURRENCY, lock_out)
            dispatcher = bench.dispatcher(sandbox.url)
            with suppress(sa.exc.OperationalError):  # nothing more can be claimed just now
                dispatcher.run(CAMPAIGN)
            accident.join()
            server.dispose()
            accepted = sandbox.stats()["accepted"]
            assert bench.states() == dict(Counter({"submitted": accepted, "queued": 40 - accepted}) - Counter())
            dispatcher.run(CAMPAIGN)
            assert bench.states() == {"submitted": 40}
            assert sandbox.stats()["duplicates"] == 0


def test_a_fault_in_a_slice_records_what_is_out_and_leaves_nothing_to_the_next_campaign(bench):
    bench.take_in(50)
    bench.take_in(5, campaign=OTHER, first=1000)
    looks = []

    def stopping():
        looks.append(1)
        if len(looks) == 3:
            raise RuntimeError("a fault")
        return False

    with run_in_thread(Options(latency_ms=50)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, stopping=stopping)
        with pytest.raises(RuntimeError, match="a fault"):
            dispatcher.run(CAMPAIGN)
        accepted = sandbox.stats()["accepted"]
        assert accepted >= CONCURRENCY
        assert bench.states() == {"submitted": accepted, "queued": 50 - accepted}
        assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None
        assert dispatcher.run(OTHER).outcomes == {"accepted": 5}
        assert bench.states(OTHER) == {"submitted": 5}


@pytest.mark.parametrize(("engine", "module"), [("curl", with_curl), ("requests", with_requests)])
def test_a_dispatcher_that_is_told_to_end_at_once_waits_for_nothing(bench, monkeypatch, engine, module):
    """A quick stop raises SystemExit anywhere, also after an answer was taken and before it is counted."""
    bench.take_in(20)
    signals = [SystemExit]

    def interrupted(*args, **options):
        replies = taken(*args, **options)
        if replies and signals:
            raise signals.pop()
        return replies

    monkeypatch.setattr(module, "taken", interrupted)
    with run_in_thread(Options(latency_ms=20)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, futwork_http_engine=engine)

        def run():
            with suppress(SystemExit):
                dispatcher.run(CAMPAIGN)

        running = threading.Thread(target=run, daemon=True)  # one that waits for ever must not hold up the suite
        running.start()
        running.join(patience())
        assert not running.is_alive()
        assert not signals
        assert bench.states() == {"sending": CONCURRENCY, "queued": 20 - CONCURRENCY}
        assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None


def test_what_an_answer_says_never_breaks_the_record(each_bench):
    bench = each_bench
    bench.take_in(6)
    bodies = deque(
        [
            b'{"leadId":"nul \\u0000 inside"}',
            b'{"leadId":"' + b"x" * 500 + b'"}',
            '{"leadId":"आशा"}'.encode(),
            b'{"success":false,"message":"\\u0000 \x00 \xff\xfe \xed\xa0\x80"}',
            b"\x00" * 2000,
            b'{"leadId":{"$oid":"1"},"id":[1]}',
        ]
    )
    with raw_server(lambda peer: [peer.answer("200 OK", bodies.popleft()) for _ in iter(peer.request, b"")]) as server:
        done = bench.dispatcher(server.url, dispatch_concurrency=1).run(CAMPAIGN)
    assert sum(done.outcomes.values()) == 6
    assert {lead["futwork_lead_id"] for lead in bench.leads()} == {None}
    assert set(bench.states()) <= {"submitted", "rejected"}


def test_no_phone_number_and_no_key_is_logged(bench, capsys, caplog):
    caplog.set_level("DEBUG")
    bench.take_in(30)

    def handle(peer):
        while request := peer.request():
            peer.answer("401 No", b'{"message":"refused: sandbox-key for ' + request.rpartition(b"\r\n\r\n")[2] + b'"}')

    with raw_server(handle) as server:
        bench.dispatcher(server.url).run(CAMPAIGN)
    output = "".join(capsys.readouterr()) + caplog.text
    assert "campaign held" in output
    assert "sandbox-key" not in output
    assert "98000000" not in output
    assert "sandbox-key" not in str(bench.campaign()) + str([bench.story(number) for number in range(30)])
