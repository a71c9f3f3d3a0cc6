"""`python -m tests.alerts [NAME…]`: run the experiments, print what was seen as a Markdown table."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.alerts.experiments import EXPERIMENTS, Seen, run
from tests.alerts.rig import Rig
from tests.alerts.watch import quickened
from tests.conftest import POSTGRES_URL


def main(names: list[str]) -> int:
    chosen = [one for one in EXPERIMENTS if not names or one.name in names]
    if unknown := set(names) - {one.name for one in EXPERIMENTS}:
        sys.stderr.write(f"no such experiment: {', '.join(unknown)}\n")
        return 2
    started, seen, failed = time.monotonic(), [], 0
    with _database() as url, tempfile.TemporaryDirectory(prefix="pipeline-alerts-") as folder:
        rig = Rig(Path(folder), url)
        try:
            rig.enqueue("calm", 3)
            for experiment in chosen:
                try:
                    seen.append(run(rig, experiment))
                    sys.stderr.write(f"{experiment.name}: seen ({time.monotonic() - started:.0f} s)\n")
                except AssertionError as error:
                    failed += 1
                    sys.stderr.write(f"{experiment.name}: NOT SEEN: {error}\n")
        finally:
            rig.end()
    _report(seen)
    alerts = {rule["alert"] for group in quickened()["groups"] for rule in group["rules"]}
    if not names and (unseen := alerts - {name for one in seen for name in one.experiment.alerts}):
        sys.stderr.write(f"never seen firing: {', '.join(sorted(unseen))}\n")
        return 1
    sys.stderr.write(f"{len(seen)} experiments seen, {failed} not, {time.monotonic() - started:.0f} s\n")
    return 1 if failed else 0


@contextmanager
def _database() -> Iterator[str]:
    server = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    name = f"pipeline_alerts_{time.time_ns()}"
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield sa.make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def _report(seen: list[Seen]) -> None:
    lines = ["| fault | alert | fired after | mend | silent after | what else fired |", "|---|---|---|---|---|---|"]
    for one in seen:
        for place, alert in enumerate(one.experiment.alerts):
            first = place == 0
            cells = (
                one.experiment.fault if first else "",
                f"`{alert}`",
                f"{one.fired_after[alert]:.0f} s",
                one.experiment.mend if first else "",
                f"{one.silent_after[alert]:.0f} s",
                ", ".join(f"`{name}`" for name in one.others) if first else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
