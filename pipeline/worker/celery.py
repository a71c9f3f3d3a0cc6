"""Celery's entry, which it finds by itself: `celery -A pipeline.worker worker|beat|flower`."""

import sys

from pipeline.extras import MissingExtra
from pipeline.settings import SettingsError, load_settings

try:
    from pipeline.observability import error_reporting
    from pipeline.worker.app import build_app

    settings = load_settings()
    error_reporting.begin(settings, part="worker")
    app = build_app(settings)
except (MissingExtra, SettingsError) as error:
    sys.exit(f"pipeline: {error}")
