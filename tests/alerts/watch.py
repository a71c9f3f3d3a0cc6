"""The alert rules with short times, and a real Prometheus that evaluates them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from pipeline.devstack.embedded_valkey import free_port
from tests.conftest import missing
from tests.waiting import until

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
WINDOW = "20s"
PATIENCE = "2s"

THRESHOLDS = {
    "PipelineLedgerSlow": ("> 10", "> 3"),
    "PipelineSweepStopped": ("> 120", "> 25"),  # tidy ends every 15 seconds
    "PipelineWorkPastDue": ("> 300", "> 3"),
    "PipelineEventLag": ("> 60", "> 1"),
}
"""The only numbers of the expressions that are others here: ages that would take minutes to come about."""


def quickened() -> dict[str, Any]:
    """The rules as they are deployed, but with windows of 20 seconds, 2 seconds' patience, and smaller ages."""
    rules: dict[str, Any] = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = re.sub(r"\[\d+m\]", f"[{WINDOW}]", rule["expr"])
        if rule["alert"] in THRESHOLDS:
            slow, quick = THRESHOLDS[rule["alert"]]
            assert slow in rule["expr"], rule
            rule["expr"] = rule["expr"].replace(slow, quick)
        if "for" in rule:
            rule["for"] = PATIENCE
    return rules


class Prometheus:
    """A Prometheus of our own that scrapes one web process every second."""

    def __init__(self, folder: Path, target: str) -> None:
        if shutil.which("prometheus") is None:
            missing("prometheus", "install Debian's package `prometheus`")
        folder.mkdir()
        self._folder = folder
        self._port = free_port()
        self._target = target
        (folder / "alerts.yml").write_text(yaml.safe_dump(quickened()))
        self._write(1)
        arguments = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
        arguments += [f"--web.listen-address=127.0.0.1:{self._port}"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(["prometheus", *arguments], cwd=folder, stdout=log, stderr=log)
        try:
            until(self._ready, what=(folder / "prometheus.log").read_text)
        except BaseException:
            self.end()
            raise

    def pace(self, seconds: int) -> None:
        """Scrape every so many seconds from now on; a scrape may take as long."""
        self._write(seconds)
        self._process.send_signal(signal.SIGHUP)

    def _write(self, seconds: int) -> None:
        job = {"job_name": "pipeline", "static_configs": [{"targets": [self._target]}]}
        times = {"scrape_interval": f"{seconds}s", "scrape_timeout": f"{seconds}s", "evaluation_interval": "1s"}
        configuration = {"global": times, "rule_files": ["alerts.yml"], "scrape_configs": [job]}
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire now, each with what tells it from its like: the queue, the campaign, the status."""
        found = set()
        for alert in self._ask("alerts")["alerts"]:
            labels = alert["labels"]
            if alert["state"] == "firing":
                told = (labels.get(name) for name in ("queue", "campaign", "status", "task", "account"))
                found.add((labels["alertname"], next(filter(None, told), "")))
        return found

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that an expression gives now."""
        result: list[dict[str, Any]] = self._ask("query", query=expression)["result"]
        return result

    def unhealthy(self) -> list[str]:
        """The errors of rules that could not be evaluated."""
        groups = self._ask("rules")["groups"]
        return [rule["lastError"] for group in groups for rule in group["rules"] if rule["health"] == "err"]

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(self._url("-/ready"), timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def _ask(self, what: str, **arguments: str) -> Any:
        url = self._url(f"api/v1/{what}?{urllib.parse.urlencode(arguments)}")
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}/{path}"
