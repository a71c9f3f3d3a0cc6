"""A simulator of the Futwork AI Platform, for tests, demos and rehearsals.

It takes leads as the integration guide describes, then "calls" them and posts the life cycle of each call to a
webhook. It can be made to misbehave in every way that a client must survive, and it keeps a journal of what reached
it: the ground truth that a test compares with what a client believes.

It imports nothing else of `pipeline`, so that both sides can only agree by both being right.

    options.py      every setting, its default and its check
    reception.py    a POST arrives: checks, limits, decision, acceptance
    decisions.py    what happens to a POST, drawn from the seed
    answers.py      the shapes of an answer's body
    calls.py        an accepted lead becomes a call and its webhook events
    transcripts.py  what is said on the call
    webhooks.py     events on their way to the webhook
    journal.py      what reached the sandbox, in order
    rates.py        rate limit and busiest second
    control.py      the `/_…` endpoints
    protocol.py     HTTP/1.1 on a connection
    server.py       the listener, its refusals, start and stop
"""
