"""What every page goes through: the visitor and their rights, how many pages at a time, headers, errors as pages."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property

from flask import Blueprint, Response, current_app, g, redirect, render_template, request, url_for
from werkzeug.exceptions import Forbidden, HTTPException, TooManyRequests
from werkzeug.wrappers import Response as AnyResponse

from pipeline.coordination.marks import Marks
from pipeline.ledger import Ledger, SchemaMismatch, ledger_is_at_fault, open_ledger
from pipeline.observability.logs import logger
from pipeline.observability.redaction import mask_values
from pipeline.settings import Settings
from pipeline.status.actions import ACTIONS
from pipeline.status.snapshot import Watch
from pipeline.web.ops import masking
from pipeline.web.ops.access import COOKIE, PREFIX, Gatekeeper, Turnstile, Visitor
from pipeline.wiring import Services, services

log = logger(__name__)

STATEMENT_SECONDS = 5.0  # of a page's query; none takes near as long, and a stuck one must not hold a thread for ever
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
_OPEN = ("ops.sign_in", "ops.static")

blueprint = Blueprint(
    "ops", __name__, url_prefix="/ops", template_folder="templates", static_folder="static", static_url_path="/static"
)


class Ops:
    """What the pages of one process need."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.turnstile = Turnstile()
        self.gatekeeper = Gatekeeper(settings, marks=lambda: self.marks)

    @property
    def services(self) -> Services:
        """The services of this process."""
        return services(self.settings)

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger over connections of the pages' own."""
        return open_ledger(self.settings.database_url, statement_seconds=STATEMENT_SECONDS)

    @cached_property
    def watch(self) -> Watch:
        """What takes the snapshots that the overview shows."""
        seconds = STATEMENT_SECONDS
        return Watch(self.services, ledger=lambda: self.ledger, statement_seconds=seconds, patience_seconds=seconds + 1)

    @cached_property
    def marks(self) -> Marks:
        """Where ended sessions and sign-in attempts are marked for all processes."""
        return Marks(self.services.redis_if_any, prefix=PREFIX)


def ops() -> Ops:
    """The pages' parts of the app at hand."""
    found: Ops = current_app.extensions["pipeline-ops"]
    return found


def visitor() -> Visitor:
    """The visitor of this request."""
    found: Visitor = g.visitor
    return found


def now() -> datetime:
    """The time of this request by the ledger's clock, by which every due time was set."""
    moment: datetime = ops().ledger.now()
    g.moment = moment
    return moment


def see(value: object) -> object:
    """A value as this visitor may see it."""
    return value if visitor().may_change else mask_values(value)


@blueprint.before_request
def _admit() -> AnyResponse | None:
    """Admit only visitors who are signed in; let only operators change something, and only by a form of our pages."""
    if request.endpoint in _OPEN:
        if request.method == "POST":
            _take_a_slot()
        return None
    found = ops().gatekeeper.visitor(request.cookies.get(COOKIE, ""))
    if found is None:
        if request.method == "POST" or "X-Refresh" in request.headers:
            return Response("signed out", 401)
        target = request.full_path.rstrip("?") if request.endpoint != "ops.overview" else None
        return redirect(url_for("ops.sign_in", next=target), 303)
    g.visitor = found
    if request.method == "POST":
        if not found.knows(request.form.get("csrf", "")) or request.headers.get("Sec-Fetch-Site") == "cross-site":
            raise Forbidden("This form is not of the page that you are signed in to. Go back, load the page again.")
        if request.endpoint not in ("ops.sign_out", "ops.find_leads") and not found.may_change:
            raise Forbidden("Your role is viewer: it shows everything and changes nothing.")
    _take_a_slot()
    return None


def _take_a_slot() -> None:
    if not ops().turnstile.enter():
        raise TooManyRequests("The pages are busy.")
    g.holds_slot = True


@blueprint.teardown_request
def _leave(_error: BaseException | None) -> None:
    if g.pop("holds_slot", False):
        ops().turnstile.leave()


@blueprint.after_request
def _guard(answer: Response) -> Response:
    answer.headers["Content-Security-Policy"] = _POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["X-Frame-Options"] = "DENY"
    answer.headers["Referrer-Policy"] = "same-origin"
    answer.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    if request.endpoint != "ops.static":
        answer.headers["Cache-Control"] = "no-store"
    return answer


@blueprint.context_processor
def _for_templates() -> dict[str, object]:
    known = g.get("visitor")
    return {
        "visitor": known,
        "ACTIONS": ACTIONS,
        "csrf": known.csrf if known else "",
        "now": g.get("moment") or datetime.now(UTC),
        "note": ops().gatekeeper.read_note(request.args.get("note", "")),
    }


for _name in masking.FILTERS:
    blueprint.add_app_template_filter(masking.FILTERS[_name], f"ops_{_name}")


@blueprint.errorhandler(HTTPException)
def _explain(error: HTTPException) -> tuple[str, int] | AnyResponse:
    if isinstance(error, TooManyRequests):
        page = render_template("ops/trouble.html", title="Busy", text="The pages are busy. Try again in a moment.")
        return Response(page, 503, {"Retry-After": "2"})
    code = error.code or 500
    return render_template("ops/trouble.html", title=error.name, text=error.description), code


@blueprint.errorhandler(Exception)
def _fail(error: Exception) -> tuple[str, int]:
    if isinstance(error, SchemaMismatch):
        text = f"The ledger cannot be used: {error}."
    elif ledger_is_at_fault(error) or isinstance(error, OSError):
        text = "The ledger does not answer, or took too long. The webhook goes on without it; see pipeline doctor."
    else:
        log.error("a page failed", error=type(error).__name__, exc_info=error)
        page = render_template("ops/trouble.html", title="Internal error", text="See the log of the web process.")
        return page, 500
    log.warning("a page could not be made", error=type(error).__name__)
    return render_template("ops/trouble.html", title="The ledger is away", text=text), 503


@blueprint.get("/<path:_rest>")
def _nothing(_rest: str) -> tuple[str, int]:
    return render_template("ops/trouble.html", title="Not found", text="There is no such page."), 404
