"""The experiments, by the part that is hurt."""

from tests.chaos.experiments import brokers, events, futwork, ledgers, web, workers

__all__ = ["brokers", "events", "futwork", "ledgers", "web", "workers"]
