"""Chaos: the real processes under faults at random moments, and the promises checked against independent books.

`python -m tests.chaos` (`make chaos`) runs every experiment at full length; `make chaos-short` runs a short
form of each. The parts, in reading order:

- `rig` starts one deployment: broker, ledger, sandbox, workers, beat, web; and can kill, stop and restart each part
- `brokers`, `ledgers`, `disk` and `clock` are what the rig stands on: a private Valkey, a private RabbitMQ or a vhost,
  a database of its own, a disk that fills up, a clock for each part
- `feed` hands leads and events in like any client, and writes down which of its requests were answered as accepted
- `books` compares three sides that do not know of each other: the feed, the ledger, the sandbox's journal
- `runner` runs an experiment round by round; `experiments` holds them, by the part that is hurt
- `mechanisms` switches off what keeps a promise, so that its experiment must break
- `quick_worker`, `quick_web` are the processes' entries; `side_by_side` and `table` are what the command does with all
  of it
"""
