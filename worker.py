"""Celery's entry: `celery -A worker worker|beat|flower`."""

import sys

from pipeline import faults
from pipeline.settings import SettingsError, load_settings
from pipeline.tasks import build_app

try:
    settings = load_settings()
    faults.begin(settings, part="worker")
    app = build_app(settings)
except SettingsError as error:
    sys.exit(f"pipeline: {error}")
