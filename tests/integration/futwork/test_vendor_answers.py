"""Each raw answer of the corpus, given to each engine: its outcome, its lead's id, its wait."""

from datetime import timedelta

import pytest

from pipeline.domain.lead import Outcome
from tests.conftest import make_claim
from tests.corpus.vendor_answers import ANSWERS, outcome_of
from tests.integration.futwork.conftest import post
from tests.raw_server import raw_server


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case.name)
def test_an_answer_has_its_outcome(make_futwork, engine, case):
    """Answers that leave the connection open are given twice: the second must not be mixed up with the first."""

    def handle(peer):
        while peer.request():
            peer.send(case.raw)
            if not case.keeps:
                return

    outcome, why = case.differs.get(engine, (case.outcome, ""))
    with raw_server(handle) as server:
        futwork = make_futwork(server.url, read_timeout_seconds=5)
        answers = [post(futwork)[0] for _ in range(2 if case.keeps else 1)]
        assert [answer.outcome for answer in answers] == [outcome] * len(answers), why
        if engine not in case.differs:
            wait = None if case.retry_after is None else timedelta(seconds=case.retry_after)
            assert {(answer.futwork_lead_id, answer.retry_after) for answer in answers} == {(case.lead_id, wait)}
            assert server.connections == 1


def test_an_engine_differs_only_on_the_safe_side():
    differing = [(case.name, *found) for case in ANSWERS for found in case.differs.values()]
    assert {outcome for _, outcome, _ in differing} == {Outcome.UNCERTAIN}
    assert all(why for _, _, why in differing)


def test_every_status_has_its_outcome(make_futwork):
    statuses = list(range(200, 600))
    left = iter(statuses)

    def handle(peer):
        while peer.request():
            peer.answer(f"{next(left)} Whatever", b"")

    with raw_server(handle) as server:
        futwork = make_futwork(server.url)
        answers = post(futwork, *(make_claim(number) for number in range(len(statuses))))
        assert server.connections == 1
    assert {answer.http_status: answer.outcome for answer in answers if answer.http_status} == {
        status: outcome_of(status) for status in statuses
    }
