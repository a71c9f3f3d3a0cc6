"""How gunicorn serves `web:app`; it reads this file by itself. Everything can be overridden on its command line.

Threads, because requests wait for the broker rather than compute, and because requests that wait together share one
publish. No access log by default; whoever turns it on finds no token in it, as in no other log.
"""

import atexit
import os
import re
import shutil
import tempfile

from gunicorn.glogging import Logger

bind = f"{os.environ.get('HOST', '0.0.0.0')}:{os.environ.get('PORT', '8000')}"  # noqa: S104 - inside its container
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
threads = int(os.environ.get("WEB_THREADS", "16"))
worker_class = "pipeline.web.serving.PatientWorker"  # threads, which no slow client can hold
timeout = 30  # seconds a worker may be silent; a hand-off takes under five even if the broker is away
graceful_timeout = 20  # seconds for running requests after SIGTERM
keepalive = 30  # seconds; Futwork may reuse its connections
limit_request_line = 2048
limit_request_fields = 50
limit_request_field_size = 4096
accesslog = None
control_socket_disable = True  # no file in the home directory of whoever runs it

_SECRET_PATH = re.compile(r"(/webhooks/+futwork)[/?][^\s\"]*", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.:-])(?:\+|%2B)?\d{10,15}(?![\w.:-])")  # where somebody asks for a lead by its number
_SECRET_HEADERS = ("x-api-key", "x-webhook-secret", "authorization", "cookie")


class DiscreetLogger(Logger):
    """Gunicorn's logger, except that no line of its logs holds the token that a webhook's path or header may hold."""

    def setup(self, cfg):
        """Set the logs up, each with the filter."""
        super().setup(cfg)
        for log in (self.error_log, self.access_log):
            if _redact not in log.filters:
                log.addFilter(_redact)

    def atoms(self, resp, req, environ, request_time):
        """What a format of the access log may name; headers with a secret are masked, whichever a format names."""
        atoms = super().atoms(resp, req, environ, request_time)
        names = [f"{{{name}}}i" for name in _SECRET_HEADERS]
        names += [f"{{http_{name.replace('-', '_')}}}e" for name in _SECRET_HEADERS]
        if "/webhooks" in environ.get("RAW_URI", ""):
            names += ["q", "{query_string}e"]  # nobody is asked to put the token there, which keeps nobody from it
        return atoms | {name: "***" for name in names if name in atoms}


def _redact(record):
    message = record.getMessage()
    clean = _NUMBER.sub("***", _SECRET_PATH.sub(r"\1/***", message))
    if clean != message:
        record.msg, record.args = clean, ()
    return True


logger_class = DiscreetLogger

# Counters of all workers are added up through files here; see pipeline/web/metrics.py.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _folder = tempfile.mkdtemp(prefix="pipeline-metrics-")
    _master = os.getpid()
    atexit.register(lambda: os.getpid() == _master and shutil.rmtree(_folder, ignore_errors=True))


def post_worker_init(worker):
    """Let this host be seen among those that serve, also while no request comes."""
    from pipeline.web import keep_heartbeat

    keep_heartbeat(worker.wsgi)


def child_exit(server, worker):  # noqa: ARG001 - gunicorn's signature
    """Tell the metrics that a worker is gone."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)
