"""The status pages under `/ops`: one look tells how it stands and what needs a person.

They are off unless `OPS_USERS` is set. Every page is made on the server and works without JavaScript; the script only
fetches the page again and puts its changing part in place. Pages share the process with the webhook, so few are made
at a time, on connections of their own whose statements are bounded.

- `layout`: what every page goes through
- `access`: passwords, sessions, tries, turns
- `sign_in`, `queries`, `actions`: the pages to sign in at, to look at, and what changes something
- `needs`, `health`: what wants a person
- `masking`, `charts`: how it looks, and what a viewer may see of it
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
