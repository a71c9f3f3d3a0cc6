"""The sandbox calls leads and delivers events; its settings, its journal and its command."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from collections import Counter

import pytest

from pipeline.sandbox.options import checked
from pipeline.sandbox.server import run_in_thread
from tests.integration.sandbox.conftest import HEADERS, LEADS, Client, calling, settled
from tests.waiting import patience

# Calls and webhooks.


def test_every_accepted_lead_is_called_and_its_last_event_delivered(hook):
    with calling(hook, faults="reset_before=0.1,reset_after=0.1,500=0.1,502=0.1,malformed=0.1", seed=3) as (
        box,
        client,
    ):
        for number in range(60):
            client.post(str(9_800_000_000 + number))
        accepted = {entry["lead_id"] for entry in box.journal() if entry["accepted"]}
        counters = settled(box, len(accepted))
        events = box.webhooks()
    assert 30 < len(accepted) == counters["accepted"] < 60
    assert counters["webhooks"]["delivered"] == counters["webhooks"]["events"] == len(hook.bodies) == len(events)
    assert {event["lead_id"] for event in events if event["last"] and event["delivered"]} == accepted
    received = Counter(json.loads(body)["callSid"] for body in hook.bodies)
    assert received == Counter(event["call_sid"] for event in events)
    assert len(received) == len(accepted)


def test_webhooks_go_to_the_whole_url_with_the_token_over_few_connections(hook):
    with calling(hook, webhook_token="hook-token", webhook_concurrency=2) as (sandbox, client):
        for number in range(20):
            client.post(str(9_810_000_000 + number))
        settled(sandbox, 20)
    assert set(hook.paths) == {"/hook?from=futwork"}
    assert {headers["x-api-key"] for headers in hook.headers} == {"hook-token"}
    assert {headers["Content-Type"] for headers in hook.headers} == {"application/json"}
    assert hook.connections <= 2


def test_without_a_webhook_nobody_is_called(sandbox, client):
    before = sandbox.stats()
    client.post()
    after = sandbox.stats()
    assert after["accepted"] == before["accepted"] + 1
    assert (after["calls"], after["webhooks"]["events"]) == (0, 0)


def test_an_event_is_retried_until_the_webhook_takes_it(hook):
    hook.statuses = [500, 503, 302]
    with calling(hook, lifecycle="final", webhook_backoff_seconds=0.01) as (sandbox, client):
        client.post()
        counters = settled(sandbox, 1)
        [event] = sandbox.webhooks()
    assert counters["webhooks"] == {
        "events": 1, "sent": 4, "delivered": 1, "refused": 0, "failed": 0, "lost": 0, "pending": 0,
    }  # fmt: skip
    assert (event["attempts"], event["response"], event["delivered"]) == (4, 200, True)
    assert len(hook.bodies) == 4
    assert len(set(hook.bodies)) == 1


def test_an_event_is_given_up_when_its_retries_are_used_up(hook):
    hook.statuses = [500] * 10
    with calling(hook, lifecycle="final", webhook_retries=2, webhook_backoff_seconds=0.01) as (sandbox, client):
        client.post()
        counters = settled(sandbox, 1)
        [event] = sandbox.webhooks()
    assert (counters["webhooks"]["sent"], counters["webhooks"]["failed"]) == (3, 1)
    assert (event["outcome"], event["delivered"], event["response"]) == ("failed", False, 500)


def test_an_event_for_a_webhook_that_is_away_is_retried_and_given_up(hook):
    url = hook.url
    with socket.create_server(("127.0.0.1", 0)) as taken:
        away = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    settings = {"lifecycle": "final", "webhook_retries": 100, "webhook_backoff_seconds": 0.01, "webhook": away}
    with calling(hook, **settings) as (sandbox, client):
        client.post()
        sandbox.wait(lambda counters: counters["webhooks"]["sent"] >= 3)
        assert sandbox.stats()["webhooks"]["pending"] == 1
        assert [event["delivered"] for event in sandbox.webhooks()] == [None]
        sandbox.change(webhook=url)
        assert settled(sandbox, 1)["webhooks"]["delivered"] == 1


def test_duplicates_arrive_twice_and_lost_events_never(hook):
    with calling(hook, lifecycle="final", faults="dup=1") as (sandbox, client):
        client.post("9820000000")
        settled(sandbox, 1)
        sandbox.change(faults="lost=1")
        client.post("9820000001")
        counters = settled(sandbox, 2)
        events = sandbox.webhooks()
    assert len(hook.bodies) == 2
    assert hook.bodies[0] == hook.bodies[1]
    assert (counters["webhooks"]["delivered"], counters["webhooks"]["lost"]) == (2, 1)
    assert sorted(event["kind"] for event in events if event["phone"] == "9820000000") == ["duplicate", "event"]
    assert [event["attempts"] for event in events if event["phone"] == "9820000001"] == [0]


def test_a_malformed_copy_may_be_refused_and_is_not_retried(hook):
    with calling(hook, lifecycle="final", webhook_concurrency=1, webhooks_paused=True) as (sandbox, client):
        sandbox.change(faults="malformed_webhook=1")
        client.post()
        kinds = [event["kind"] for event in sandbox.webhooks()]
        hook.statuses = [400 if kind == "malformed" else 200 for kind in kinds]
        sandbox.flush_webhooks()
        sandbox.change(webhooks_paused=False)
        counters = settled(sandbox, 1)
    assert sorted(kinds) == ["event", "malformed"]
    assert (counters["webhooks"]["delivered"], counters["webhooks"]["refused"], len(hook.bodies)) == (1, 1, 2)


def test_reordered_events_arrive_in_another_order(hook):
    settings = {"faults": "reorder=1", "lifecycle": "full", "call_seconds": 0.2, "no_answer": 0, "busy": 0, "failed": 0}
    with calling(hook, **settings) as (sandbox, client):
        client.post()
        settled(sandbox, 1)
    arrived = [json.loads(body)["status"] for body in hook.bodies]
    start = ["initiated", "ringing", "in-progress"]
    ends = (["call-disconnected", "completed"], ["call-disconnected"], ["completed"])
    assert sorted(arrived) in [sorted(start + end) for end in ends]
    assert arrived not in [start + end for end in ends]


def test_paused_webhooks_wait_and_a_flush_makes_them_due(hook):
    with calling(hook, call_seconds=3600) as (sandbox, client):
        client.post()
        waiting = sandbox.stats()["webhooks"]["pending"]
        client.control(webhooks_paused=True)
        assert client.request("POST", "/_webhooks/flush").content == {"flushed": waiting}
        assert (sandbox.stats()["webhooks"]["sent"], hook.bodies) == (0, [])
        client.control(webhooks_paused=False)
        settled(sandbox, 1)
    assert len(hook.bodies) == waiting > 0


# Control and the command.


def test_settings_are_read_and_changed_together_or_not_at_all(sandbox, client):
    answer = client.control(latency_ms=1, faults="500=0.5", campaigns=["c9"])
    assert answer.status == 200
    assert answer.content == client.get("/_control")
    assert (answer.content["latency_ms"], answer.content["faults"]) == (1, {"500": 0.5})

    refused = client.control(latency_ms=2, rate="often")
    assert refused.status == 422
    assert refused.content["message"].startswith("rate: 'often' is not a rate")
    assert client.get("/_control")["latency_ms"] == 1
    assert client.control(refuse_now="soon").status == 422
    assert client.request("POST", "/_control", "{").status == 400


def test_counters_add_up():
    with run_in_thread(checked({"faults": "wild,refused=0,stall=0", "campaigns": ["c1", "c2"]})) as sandbox:
        client = Client(sandbox.port)
        for number in range(90):
            client.post(str(9_900_000_000 + number), path=f"/api/campaigns/c{number % 3}/leads")
        counters, journal = client.get("/_stats"), client.lines("/_journal")
    assert counters["received"] == len(journal) == 90
    assert [entry["seq"] for entry in journal] == list(range(1, 91))
    assert counters["accepted"] == sum(entry["accepted"] for entry in journal)
    assert counters["accepted"] + sum(counters["rejected"].values()) == sum(counters["statuses"].values()) == 90
    assert counters["outcomes"] == Counter(entry["outcome"] for entry in journal)
    assert counters["statuses"] == Counter(str(entry["status"] or "none") for entry in journal)
    assert counters["rejected"]["404"] == 30
    assert counters["campaigns"]["c0"]["accepted"] == 0
    assert {name: tally["received"] for name, tally in counters["campaigns"].items()} == {"c0": 30, "c1": 30, "c2": 30}
    assert counters["max_received_in_a_second"] <= 90


def test_a_long_journal_is_read_whole():
    with (
        run_in_thread() as sandbox,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=patience())) as connection,
    ):
        for number in range(2000):
            lead = {"recipientPhoneNumber": str(9_000_000_000 + number), "recipientData": {"note": "x" * 2000}}
            connection.request("POST", LEADS, json.dumps(lead), HEADERS)
            connection.getresponse().read()
        connection.request("GET", "/_journal")
        lines = connection.getresponse().read().splitlines()
        assert [json.loads(line)["seq"] for line in lines] == list(range(1, 2001))


def test_the_command_says_when_it_is_ready_keeps_its_journal_and_ends_on_a_signal(tmp_path):
    file = tmp_path / "journal.ndjson"
    file.write_text('{"seq": "of an earlier run"}\n')
    command = [sys.executable, "-m", "pipeline.sandbox", "--port", "0", "--journal", str(file), "--api-key", "k"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = json.loads(process.stdout.readline())
            client = Client(ready["port"])
            assert ready == {"ready": True, "url": f"http://127.0.0.1:{client.port}/api", "port": client.port}
            assert client.post().status == 401
            assert client.post(headers=HEADERS | {"x-api-key": "k"}).status in {200, 201}
            assert [json.loads(line)["seq"] for line in file.read_text().splitlines()] == ["of an earlier run", 1, 2]
            assert [entry["seq"] for entry in client.lines("/_journal")] == [1, 2]
        finally:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=patience())
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults", "500=2"], "Error: faults: the share of 500 is 2.0; it must be between 0 and 1"),
        (["--rate", "5"], "Error: rate: '5' is not a rate; write a whole number and a unit, such as 50/s"),
        (["--busy", "many"], "Error: Invalid value for '--busy': 'many' is not a valid float."),
    ],
)
def test_wrong_use_of_the_command_is_refused_with_a_sentence(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.sandbox", *arguments], capture_output=True, text=True, timeout=patience()
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.sandbox", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=patience(),
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
