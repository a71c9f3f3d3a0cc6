"""The client of Futwork with each engine, and servers that answer it."""

import ssl
import subprocess

import pytest

from pipeline.domain.lead import Outcome
from pipeline.futwork import Futwork
from tests.conftest import make_claim
from tests.waiting import patience, until

KEY = "a-key-that-must-not-show"


LEAD_ID = "68ecc93cd9fbecbe9431a2a1"


@pytest.fixture(params=["requests", "curl"])
def engine(request):
    """Each engine in turn: all that is promised here holds for both."""
    if request.param == "curl":
        pytest.importorskip("pycurl")
    return request.param


@pytest.fixture
def make_futwork(make_settings, engine):
    made = []

    def make(url, **overrides):
        values = {
            "futwork_base_url": url,
            "futwork_api_key": KEY,
            "futwork_http_engine": engine,
            "dispatch_concurrency": 1,
            "connect_timeout_seconds": patience(1.0),
            "read_timeout_seconds": 30.0,
        }
        made.append(Futwork(make_settings(**(values | overrides))))
        return made[-1]

    yield make
    for futwork in made:
        futwork.close()


def post(futwork, *claims, account="default"):
    """The answers of claims, in the order of the claims."""
    claims = claims or (make_claim(),)
    futwork.send(claims, account=account)
    answers = []

    def complete():
        answers.extend(futwork.receive(wait=0.2))
        return len(answers) == len(claims)

    until(complete, what=lambda: f"only {len(answers)} answers came")
    order = [claim.token for claim in claims]
    return sorted(answers, key=lambda answer: order.index(answer.claim.token))


def answering(*replies):
    """A handler that gives each connection's requests these replies in turn, the last one ever after."""

    def handle(peer):
        turn = 0
        while peer.request():
            peer.answer(*replies[min(turn, len(replies) - 1)])
            turn += 1

    return handle


# Not sent: no byte of the request left


def not_sent(answer):
    return (answer.outcome, answer.http_status) == (Outcome.NOT_SENT, None)


@pytest.fixture
def self_signed(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
             "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl is not there")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


# Uncertain: it may have arrived


def partly(data, *, then):
    def handle(peer):
        peer.request()
        peer.send(data)
        then(peer)

    return handle


def nothing(peer):
    """Close the connection."""
