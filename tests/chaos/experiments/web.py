"""The web process and its parts, killed."""

from __future__ import annotations

from tests.chaos.runner import Round, experiment

# The web process


@experiment("web-worker", proves="an event is answered only when it is in the broker or on disk")
def kill_web_workers(this: Round) -> None:
    """Kill the server's processes in the middle of requests."""
    this.feed.leads(this.size(250, 60), seconds=4, by="http")
    this.feed.events(this.size(400, 100), seconds=4, clients=8)
    for _ in range(this.size(8, 4)):
        this.rig.pause(0.2, 0.7)
        this.rig.kill_child("web")


@experiment("web-master", proves="the same, when the whole web server dies")
def kill_web_master(this: Round) -> None:
    """Kill the server as a whole, and its main process alone, in the middle of requests."""
    this.feed.leads(this.size(250, 60), seconds=5, by="http")
    this.feed.events(this.size(300, 80), seconds=5, clients=8)
    this.rig.pause(0.5, 1.5)
    this.rig.kill_whole("web", down_seconds=0.5)
    this.rig.pause(2.5, 3.5)
    this.rig.kill_parent("web")
