"""The WSGI app, built from the environment; `python -m pipeline.web` serves it, and so can any other WSGI server."""

import sys

from pipeline.extras import MissingExtra
from pipeline.observability import error_reporting, tracing
from pipeline.observability.logs import configure_logs
from pipeline.settings import SettingsError, load_settings

try:
    from pipeline.web.app import create_app

    settings = load_settings()
    error_reporting.begin(settings, part="web")
    tracing.begin(settings, part="web")
except (MissingExtra, SettingsError) as error:
    sys.exit(f"pipeline: {error}")
configure_logs(settings)
app = create_app(settings)
tracing.watch(app)
