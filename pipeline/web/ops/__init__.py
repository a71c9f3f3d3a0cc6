"""The status pages under `/ops`: the state of the pipeline, and what needs attention.

They are off unless `OPS_USERS` is set. Every page is made on the server and works without JavaScript; the script only
fetches the page again and replaces the part that changes. Pages share the process with the webhook, so few are made
at a time, on connections of their own whose statements are bounded.

- `layout`: what every page goes through
- `access`: passwords, sessions, sign-in attempts, page slots
- `sign_in`, `queries`, `actions`: the sign-in, the pages that show, the forms that change
- `filter_form`: which leads a form means
- `masking`, `charts`: how values look, and what a viewer may see of them
"""

from flask import Flask

from pipeline.settings import Settings
from pipeline.web.ops import actions, queries, sign_in
from pipeline.web.ops.layout import Ops, blueprint

__all__ = ["actions", "attach", "queries", "sign_in"]


def attach(app: Flask, settings: Settings) -> None:
    """Add the pages to the app."""
    app.extensions["pipeline-ops"] = Ops(settings)
    app.register_blueprint(blueprint)
