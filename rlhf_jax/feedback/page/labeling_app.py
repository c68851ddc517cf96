"""The application behind the labelling page.

Every answer is in the store before the page says so, and the server itself remembers nothing, so that it can be killed
and started again at any time. A form contains the number of judgements of its item that the labeler has given before;
if it arrives twice, it is stored once, and if it comes from an outdated window, it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_jax.feedback import judgements, store, store_export
from rlhf_jax.feedback.page import answer_forms, live_policy, protection, sessions, text_display
from rlhf_jax.feedback.page.page_options import Options

MAX_REVISIONS = 100
"""Number of judgements of one labeler about one item."""


def make_app(opened: store.Store, options: Options) -> Any:
    """Returns the ASGI application of the labelling page."""
    page = _Page(opened, options)
    methods = {
        "/": ("GET", page.home),
        "/sign-in": ("POST", page.sign_in),
        "/sign-out": ("POST", page.sign_out),
        "/instructions": ("GET", page.instructions),
        "/judge": ("GET", page.show_item),
        "/answers": ("GET", page.answers),
        "/report": ("GET", page.report),
        "/export": ("GET", page.export),
        "/static/page.css": ("GET", page.style),
        "/static/page.js": ("GET", page.script),
        "/favicon.ico": ("GET", lambda request: Response(status_code=204)),
    }
    routes = [Route(path, _endpoint(function), methods=[method]) for path, (method, function) in methods.items()]
    routes.append(Route("/judge", _endpoint(page.judge), methods=["POST"]))
    if options.policy is not None:
        routes.append(Route("/chat", _endpoint(page.show_chat), methods=["GET"]))
        # People who wait for the policy do not keep others from labelling.
        writing = anyio.CapacityLimiter(4)
        routes.append(Route("/chat", _endpoint(page.chat, writing), methods=["POST"]))
    if options.report is not None:
        routes.append(Route("/labelers", _endpoint(page.labelers), methods=["GET"]))
    return protection.Protection(
        Starlette(routes=routes, exception_handlers={HTTPException: page.error, 500: page.error}),
        hosts=options.hosts,
        secure=options.secure,
        requests_per_second=options.requests_per_second,
    )


def _endpoint(
    function: Callable[[Request], Response], limiter: anyio.CapacityLimiter | None = None
) -> Callable[[Request], Any]:
    async def call(request: Request) -> Response:
        try:
            return await anyio.to_thread.run_sync(function, request, limiter=limiter)
        except store.StoreUnavailableError as error:
            raise HTTPException(503, "The store is busy. Nothing is lost; try again.") from error
        except store.StoreError as error:  # which may name files of the server
            raise HTTPException(400, "The store has refused this. Reload the page.") from error
        except ValueError as error:  # a form that is no answer
            raise HTTPException(400, str(error)) from error

    return call


class _Page:
    """The functions that answer requests; each runs in a thread of its own."""

    def __init__(self, opened: store.Store, options: Options) -> None:
        self._store, self._options = opened, options
        self._waiting: set[str] = set()
        """Labelers to whom the policy is writing."""
        self._lock = threading.Lock()
        self._failures = protection.Rate(1 / 6, 20)  # wrong access secrets with one token: 20, then 10 per minute
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("rlhf_jax.feedback.page"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(
            parts=text_display.parts, visible=text_display.visible, content=text_display.content
        )
        files = importlib.resources.files("rlhf_jax.feedback.page") / "static"
        self._static = {name: (files / name).read_bytes() for name in ("page.css", "page.js")}

    # --------------------------------------------------------------------------------------------------- everybody

    def style(self, request: Request) -> Response:
        return self._file("page.css", "text/css")

    def script(self, request: Request) -> Response:
        return self._file("page.js", "text/javascript")

    def _file(self, name: str, media_type: str) -> Response:
        return Response(self._static[name], media_type=media_type, headers={"Cache-Control": "no-cache"})

    def error(self, request: Request, error: Exception) -> Response:
        """Says what was wrong with a request, in the form that its sender reads."""
        code, detail = 500, "The server has failed. Nothing is lost; try again."
        if isinstance(error, HTTPException):
            if error.status_code == 303 and error.headers:
                return _redirect(error.headers["Location"])
            code, detail = error.status_code, error.detail
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(str(text_display.visible(detail).striptags()), code)
        who = None if code >= 500 else self._session(request)
        return self._render("error.html", request, who, status=code, code=code, detail=detail)

    def home(self, request: Request) -> Response:
        who = self._session(request)
        if who is None:
            return self._render(
                "sign_in.html", None, secret_needed=self._options.access_secret is not None, failed=False
            )
        return _redirect("/report" if who.role == "owner" else "/instructions")

    def sign_in(self, request: Request) -> Response:
        form, expected = answer_forms.fields(request.scope["body"]), self._options.access_secret
        who = self._store.authenticate(form.get("token", "").strip())
        if who is not None and not self._failures.allows(who.name, cost=0.0):
            raise HTTPException(429, "Too many attempts to sign in; wait a minute.")
        known = expected is None or sessions.equal(form.get("secret", "").strip(), expected)
        if who is None or not known:
            if who is not None:
                self._failures.allows(who.name)
            return self._render("sign_in.html", None, status=403, secret_needed=expected is not None, failed=True)
        response = _redirect("/")
        response.set_cookie(
            protection.COOKIE,
            sessions.start(self._store, who.name),
            max_age=int(sessions.LIFETIME),
            httponly=True,
            samesite="strict",
            secure=self._options.secure,
        )
        return response

    # -------------------------------------------------------------------------------------------- who is signed in

    def sign_out(self, request: Request) -> Response:
        self._form(request)
        sessions.end(self._store, protection.session_secret(request.headers) or "")
        response = _redirect("/")
        response.delete_cookie(protection.COOKIE, httponly=True, samesite="strict", secure=self._options.secure)
        return response

    def instructions(self, request: Request) -> Response:
        who = self._required(request)
        return self._render("instructions.html", request, who, text=self._options.instructions)

    def show_item(self, request: Request) -> Response:
        """Shows the next item, or, with ``item``, one that was assigned to the labeler before."""
        who = self._required(request)
        if (chosen := request.query_params.get("item")) is not None:
            return self._item_page(request, who, self._assigned(who, chosen))
        options = self._options
        found = self._store.assign(
            who.name, set_name=options.set_name, lease=options.lease, max_judgements=options.max_judgements
        )
        return self._render("done.html", request, who) if found is None else self._item_page(request, who, found)

    def judge(self, request: Request) -> Response:
        who, form = self._required(request), self._form(request)
        assignment = self._assigned(who, form.get("item", ""))
        self._record(who, form, assignment)
        return _redirect("/judge")

    def answers(self, request: Request) -> Response:
        """Lists what the labeler has judged, the last one first."""
        who = self._required(request)
        shown = []
        for each in self._store.latest(self._options.set_name, labeler=who.name)[:-201:-1]:
            assignment = self._store.assigned(who.name, each.item)
            if assignment is not None:
                shown.append((each.item, assignment.item, answer_forms.describe(_as_shown(assignment, each.judgement))))
        return self._render("answers.html", request, who, found=shown)

    def show_chat(self, request: Request) -> Response:
        who = self._required(request)
        id = request.query_params.get("conversation")
        if id == "new":
            return _redirect(f"/chat?conversation={live_policy.new_id()}")
        chat = live_policy.find(self._store, who.name, self._options.chat_set, id, worse=self._options.red_team)
        return self._chat_page(request, who, chat)

    def chat(self, request: Request) -> Response:
        """Sends a message to the policy, or chooses one of its answers."""
        who, form, options = self._required(request), self._form(request), self._options
        if "item" in form:
            assignment = self._assigned(who, form["item"])
            if "conversation" not in assignment.item.metadata:
                raise HTTPException(404, "The item is not part of a chat.")
            self._record(who, form, assignment, worse=options.red_team)
            return _redirect(f"/chat?conversation={assignment.item.metadata['conversation']}")
        chat = live_policy.find(
            self._store, who.name, options.chat_set, form.get("conversation", ""), worse=options.red_team
        )
        with self._lock:
            if who.name in self._waiting:
                raise HTTPException(429, "The assistant is still answering your last message.")
            self._waiting.add(who.name)
        try:
            self._say(who, form, chat)
        finally:
            self._waiting.discard(who.name)
        return _redirect(f"/chat?conversation={chat.id}")

    def _say(self, who: store.Labeler, form: dict[str, str], chat: live_policy.Conversation) -> None:
        options = self._options
        assert options.policy is not None
        live_policy.say(
            self._store,
            who.name,
            chat,
            form.get("message", ""),
            turn=form.get("turn", ""),
            policy=options.policy,
            set_name=options.chat_set,
            describe=lambda text: judgements.Completion(text, options.policy_name, options.sampling),
            domain="red team" if options.red_team else "",
        )

    # ------------------------------------------------------------------------------------------------- the owner

    def report(self, request: Request) -> Response:
        who = self._required(request, role="owner")
        people = [each for each in self._store.labelers() if each.role == "labeler"]
        rows = [(each.name, each.revoked, self._progress(each.name)) for each in people]
        return self._render("report.html", request, who, rows=rows, has_report=self._options.report is not None)

    def labelers(self, request: Request) -> Response:
        self._required(request, role="owner")
        assert self._options.report is not None
        disposition = {"Content-Disposition": 'attachment; filename="labelers.html"'}
        return HTMLResponse(self._options.report(), headers=disposition)

    def export(self, request: Request) -> Response:
        self._required(request, role="owner")
        rows = store_export.rows(self._store, self._options.set_name)
        lines = [json.dumps(row.fields, ensure_ascii=False) + "\n" for row in rows if row.skipped is None]
        disposition = {"Content-Disposition": 'attachment; filename="comparisons.jsonl"'}
        return Response("".join(lines), media_type="application/jsonl", headers=disposition)

    def _progress(self, labeler: str) -> store.Progress:
        options = self._options
        return self._store.progress(labeler, set_name=options.set_name, max_judgements=options.max_judgements)

    # --------------------------------------------------------------------------------------------------- in common

    def _session(self, request: Request) -> store.Labeler | None:
        secret = protection.session_secret(request.headers)
        return None if secret is None else sessions.find(self._store, secret)

    def _required(self, request: Request, *, role: str | None = None) -> store.Labeler:
        who = self._session(request)
        if who is None:
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                raise HTTPException(303, headers={"Location": "/"})
            raise HTTPException(401, "You are not signed in. Your answer is kept; reload this page and sign in again.")
        if role is not None and who.role != role:
            raise HTTPException(403, f"Only the {role} of the store may do this.")
        return who

    def _form(self, request: Request) -> dict[str, str]:
        """Returns the fields of a form that this page has sent to this session."""
        form = answer_forms.fields(request.scope["body"])
        secret = protection.session_secret(request.headers) or ""
        if not sessions.equal(form.get("form_token", ""), sessions.form_token(secret)):
            raise HTTPException(403, "The form is from another session. Your answer is kept; reload this page.")
        return form

    def _assigned(self, who: store.Labeler, item: str) -> store.Assignment:
        found = self._store.assigned(who.name, item)
        if found is None:
            raise HTTPException(404, "You have not been asked about this item.")
        return found

    def _record(
        self, who: store.Labeler, form: dict[str, str], assignment: store.Assignment, *, worse: bool = False
    ) -> None:
        item, order = assignment.item, assignment.order
        said = answer_forms.judgement(form, kind=item.kind, n=len(order))
        said = (answer_forms.reversed_scale(said) if worse else said).in_item_order(order)
        given = len(self._store.history(labeler=who.name, item=assignment.id))
        if given >= MAX_REVISIONS:
            raise HTTPException(400, "This answer has been changed too often.")
        if form.get("revision", "") not in map(str, range(given + 1)):
            raise HTTPException(400, "The form is not one of this page; reload it.")
        try:
            self._store.record(who.name, assignment.id, said, key=f"page {assignment.id} {form['revision']}")
        except store.KeyUsedError as error:
            raise HTTPException(
                409, "You have answered this in another window, and that answer is kept. Reload this page."
            ) from error

    def _item_page(self, request: Request, who: store.Labeler, assignment: store.Assignment) -> Response:
        before = self._store.history(labeler=who.name, item=assignment.id)
        return self._render(
            "item.html",
            request,
            who,
            **_shown(who, assignment, before[-1].judgement if before else None, len(before)),
            progress=self._progress(who.name),
            action="/judge",
        )

    def _chat_page(self, request: Request, who: store.Labeler, chat: live_policy.Conversation) -> Response:
        waiting = {} if chat.waiting is None else _shown(who, chat.waiting, None, 0)
        red_team = self._options.red_team
        return self._render("chat.html", request, who, chat=chat, red_team=red_team, action="/chat", **waiting)

    def _render(
        self,
        template: str,
        request: Request | None,
        who: store.Labeler | None = None,
        *,
        status: int = 200,
        **names: Any,
    ) -> Response:
        secret = None if request is None else protection.session_secret(request.headers)
        text = self._templates.get_template(template).render(
            who=who,
            has_chat=self._options.policy is not None,
            set_name=self._options.set_name,
            form_token=None if secret is None else sessions.form_token(secret),
            **names,
        )
        return HTMLResponse(text, status)


def _shown(
    who: store.Labeler, assignment: store.Assignment, before: judgements.Judgement | None, revision: int
) -> dict[str, Any]:
    """Returns what the templates need to show an item in the order of an assignment."""
    item, order = assignment.item, assignment.order
    return {
        "id": assignment.id,
        "draft": hashlib.sha256(f"{who.name} {assignment.id} {revision}".encode()).hexdigest()[:16],
        "item": item,
        "completions": [_message(item.completions[i]) for i in order],
        "values": {} if before is None else answer_forms.values(_as_shown(assignment, before)),
        "revision": revision,
        "flags": judgements.FLAGS,
        "letters": answer_forms.LETTERS,
        "degrees": answer_forms.DEGREES,
    }


def _as_shown(assignment: store.Assignment, said: judgements.Judgement) -> judgements.Judgement:
    """Converts a judgement to the order in which the completions are shown."""
    order = assignment.order
    return said.in_item_order(sorted(range(len(order)), key=lambda place: order[place]))


def _message(completion: judgements.Completion) -> dict[str, Any]:
    return {"content": completion.text, **completion.extra}


def _redirect(path: str) -> Response:
    return RedirectResponse(path, 303)
