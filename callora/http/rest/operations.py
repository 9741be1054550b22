"""Operations: every REST route declared once, for the router, the validation and the OpenAPI document alike.

An operation says what it takes, what it answers, who may ask and which problems it can end in. Nothing reaches its
handler that does not fit its forms, and nothing leaves it that the document does not show.
"""

import hashlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, Generic, TypeVar, cast

import attrs
import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers, MultiDict
from werkzeug.exceptions import MethodNotAllowed

from callora.actors.intents import EXIT_SECONDS_MAX, Intents, KeptAnswer
from callora.http.problems import CONTENT_TYPE, ProblemRaised
from callora.http.rest.forms import Form, read_body, read_texts
from callora.http.rest.frame import EXCHANGE, Exchange
from callora.http.rest.idempotency import REPLAYED, begin, fingerprint, presented_key
from callora.http.rest.identity import Authenticator, Identity
from callora.ledger.faults import OutcomeUnknown, StoreUnavailable

P = TypeVar("P", bound=Form)
Q = TypeVar("Q", bound=Form)
B = TypeVar("B", bound=Form)


BODY_BYTES_AT_ONCE: Final = 32 * 1024
"""A larger body is read in a thread: calls that are being proxied do not wait for it."""


class Empty(Form):
    """Nothing."""


class Access(Enum):
    """Who may ask."""

    PUBLIC = "public"
    """Anyone; credentials are not looked at."""
    USER = "user"
    """A person who is logged in."""
    ADMIN = "admin"
    """An operator. Every access is audited."""
    SERVICE = "service"
    """A service that has the service token. Every access is counted, and audited where the operation says so."""


@attrs.frozen
class Ask(Generic[P, Q, B]):
    """One request that fits its operation's forms."""

    path: P
    query: Q
    body: B
    identity: Identity | None
    """None where the operation is public."""
    headers: Headers
    exchange: Exchange
    idempotency_key: str | None = None
    """The client's name for the intent, where the operation takes one and it was sent."""
    raw: bytes = b""
    """The body as it came, where the operation takes it so."""

    @property
    def user_id(self) -> str:
        """The person who asks; only where the operation is a person's."""
        assert self.identity is not None
        assert self.identity.user_id is not None
        return self.identity.user_id


@attrs.frozen
class Answer:
    """A success. What it carries is a form, bytes of the operation's media type, a stream of them, or nothing."""

    body: Form | bytes | AsyncIterator[bytes] | None = None
    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    keep: bool = True
    """False: a repetition under the same Idempotency-Key is carried out again, since not everything was done."""


@attrs.frozen
class Text:
    """An answer that is not JSON."""

    media_type: str
    description: str
    endless: bool = False
    """Whether it lasts for as long as its client stays."""


Handler = Callable[[Ask[Any, Any, Any]], Awaitable[Answer]]


@attrs.frozen
class Operation:
    """One route and method."""

    method: str
    path: str
    """With parameters in braces: `/api/keys/{keyId}`."""
    operation_id: str
    summary: str
    description: str
    tag: str
    access: Access
    audited: bool
    """Whether every access is noted in the audit, whatever comes of it."""
    path_form: type[Form]
    query_form: type[Form]
    body_form: type[Form] | None
    answers: Mapping[int, type[Form] | Text | None]
    problems: tuple[str, ...]
    """Codes besides those that follow from the declaration itself."""
    etag: bool
    """Whether a GET's answer carries an ETag and honours If-None-Match."""
    idempotency_key: str
    """`none`, `optional` or `required`: what the operation does with an Idempotency-Key. Its success is kept as it was
    given, so it must hold no secret; and what it does must repeat safely, since a process may die before it is kept."""
    body_bytes_max: int | None
    """Where the operation takes a larger body than REQUEST_BODY_LIMIT."""
    urlencoded: bool
    """Whether the body may be an HTML form's as well; only for bodies that are texts."""
    raw_body: tuple[str, ...]
    """Media types whose body is handed over as it came, in place of a form's."""
    alias_of: str | None
    """The canonical path of a second name."""
    handler: Handler


URLENCODED: Final = "application/x-www-form-urlencoded"
_PARAMETER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Routes:
    """The operations of one noun, in the order of the document."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.operations: list[Operation] = []

    def add(
        self,
        method: str,
        path: str,
        *,
        access: Access,
        answers: Mapping[int, type[Form] | Text | None],
        path_form: type[Form] = Empty,
        query: type[Form] = Empty,
        body: type[Form] | None = None,
        problems: Sequence[str] = (),
        etag: bool = False,
        idempotency_key: str = "none",
        body_bytes_max: int | None = None,
        urlencoded: bool = False,
        raw_body: Sequence[str] = (),
        audited: bool = False,
        aliases: Sequence[str] = (),
    ) -> Callable[[Handler], Handler]:
        """Declare an operation; its handler's name is its id, the first line of its docstring its summary."""

        def declare(handler: Handler) -> Handler:
            summary, _, rest = (handler.__doc__ or "").strip().partition("\n")
            name = getattr(handler, "__name__", "")
            assert summary, f"{name} needs a docstring"
            assert body is None or not raw_body, f"{name}: a form or what came"
            if idempotency_key != "none":
                assert access is not Access.PUBLIC, f"{name}: a key belongs to who asks"
                assert not any(isinstance(each, Text) for each in answers.values()), f"{name}: only JSON is kept"
            for number, each in enumerate((path, *aliases)):
                assert set(_PARAMETER.findall(each)) == set(path_form.model_fields), f"{each}: parameters and form"
                self.operations.append(
                    Operation(
                        method=method,
                        path=each,
                        operation_id=name + "_alias" * bool(number),
                        summary=summary.rstrip("."),
                        description=" ".join(rest.split()),
                        tag=self.tag,
                        access=access,
                        audited=audited or access is Access.ADMIN,
                        path_form=path_form,
                        query_form=query,
                        body_form=body,
                        answers=answers,
                        problems=tuple(problems),
                        etag=etag,
                        idempotency_key=idempotency_key,
                        body_bytes_max=body_bytes_max,
                        urlencoded=urlencoded,
                        raw_body=tuple(raw_body),
                        alias_of=path if number else None,
                        handler=handler,
                    )
                )
            return handler

        return declare


Admit = Callable[[str, str, str], None]
"""Takes a method and path's request by someone (`user:…`, `ip:…`) from his rate limit, or raises TOO_MANY_REQUESTS."""
Audit = Callable[[Identity | None, Operation, Exchange, int, Mapping[str, str]], Awaitable[None]]
"""Writes a line of the audit: who, what, from where, with which status, and the path's parameters."""
Count = Callable[[str, int], None]
"""Counts an access by a service: the operation's id and the answer's status."""


@attrs.frozen
class Doors:
    """What stands before every handler."""

    authenticator: Authenticator
    admit: Admit
    audit: Audit
    count: Count
    intents: Intents | None = None
    """Needed where any operation takes an Idempotency-Key."""


def bind(app: QuartTrio, operations: Sequence[Operation], doors: Doors) -> None:
    """Give the app a route for each operation."""
    for operation in operations:
        rule = _PARAMETER.sub(r"<\1>", operation.path)
        app.add_url_rule(
            rule,
            endpoint=operation.operation_id,
            view_func=_view(operation, doors),
            methods=[operation.method],
        )
    for path, taken in _beside(operations).items():
        app.add_url_rule(
            _PARAMETER.sub(r"<\1>", path),
            endpoint=f"none of {path}",
            view_func=_refuse_method({each.method for each in operations if each.path == path}),
            methods=sorted(taken),
        )


def _beside(operations: Sequence[Operation]) -> dict[str, set[str]]:
    """Return, by path, methods that it lacks and a path with a parameter in the place of one of its words has.

    The router would take such a request for the other path, and the word for its parameter's value.
    """
    found: dict[str, set[str]] = {}
    for narrow, wide in itertools.permutations({each.path for each in operations}, 2):
        words, others = narrow.split("/"), wide.split("/")
        if len(words) != len(others) or not all(
            other == word or _PARAMETER.fullmatch(other) for word, other in zip(words, others, strict=True)
        ):
            continue
        methods = {path: {each.method for each in operations if each.path == path} for path in (narrow, wide)}
        if lacking := methods[wide] - methods[narrow]:
            found.setdefault(narrow, set()).update(lacking)
    return found


def _refuse_method(methods: set[str]) -> Callable[..., Awaitable[Response]]:
    allowed = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())

    async def view(**_: str) -> Response:
        await trio.lowlevel.checkpoint()
        raise MethodNotAllowed(sorted(allowed))

    return view


def _view(operation: Operation, doors: Doors) -> Callable[..., Awaitable[Response]]:
    async def view(**parameters: str) -> Response:
        exchange = cast(Exchange, cast(dict[str, Any], request.scope)[EXCHANGE])
        if operation.access in (Access.ADMIN, Access.SERVICE):
            return await _noted(operation, doors, exchange, parameters)
        identity = None
        if operation.access is Access.USER:
            try:
                identity = await doors.authenticator.user(request.headers)
            except ProblemRaised:
                doors.admit(operation.method, operation.path, exchange.caller)
                raise
        caller = f"user:{identity.user_id}" if identity is not None else exchange.caller
        doors.admit(operation.method, operation.path, caller)
        return await _carry_out(operation, doors, await _read(operation, identity, exchange, parameters))

    return view


async def _noted(operation: Operation, doors: Doors, exchange: Exchange, parameters: Mapping[str, str]) -> Response:
    """Carry out an operator's or a service's request, and note it whatever came of it, before it is answered."""
    identity: Identity | None = None
    status = 500
    try:
        identity = await _privileged(operation, doors, exchange)
        response = await _carry_out(operation, doors, await _read(operation, identity, exchange, parameters))
        status = response.status_code
        return response
    except ProblemRaised as problem:
        status = problem.problem.status
        raise
    except StoreUnavailable:
        status = 503
        raise
    except OutcomeUnknown:
        status = 504
        raise
    finally:
        if operation.access is Access.SERVICE:
            doors.count(operation.operation_id, status)
        if operation.audited:
            await doors.audit(identity, operation, exchange, status, parameters)  # noqa: ASYNC102 - shields itself


async def _privileged(operation: Operation, doors: Doors, exchange: Exchange) -> Identity:
    if operation.access is Access.ADMIN:
        doors.admit(operation.method, operation.path, exchange.caller)
        return await doors.authenticator.admin(request.headers, exchange.client)
    try:
        return doors.authenticator.service(request.headers)
    except ProblemRaised:
        # Who guesses is limited; a service speaks for many and is not.
        doors.admit(operation.method, operation.path, exchange.caller)
        raise


async def _read(
    operation: Operation, identity: Identity | None, exchange: Exchange, parameters: Mapping[str, str]
) -> Ask[Any, Any, Any]:
    """Return what is asked, or raise everything that is wrong with it."""
    path, wrong_path = read_texts(operation.path_form, "path", MultiDict(parameters))
    query, wrong_query = read_texts(operation.query_form, "query", request.args)
    body: Form | None = None
    raw: bytes | None = None
    wrong_body: list[dict[str, str]] = []
    if operation.raw_body:
        if request.mimetype not in operation.raw_body:
            raise ProblemRaised("UNSUPPORTED_MEDIA_TYPE", f"Send the body as {' or '.join(operation.raw_body)}")
        raw = cast(bytes, await request.get_data(as_text=False))
    elif operation.body_form is not None:
        if operation.urlencoded and request.mimetype == URLENCODED:
            body, wrong_body = read_texts(operation.body_form, "body", await request.form)
        elif request.mimetype == CONTENT_TYPE:
            data = cast(bytes, await request.get_data(as_text=False))
            if len(data) > BODY_BYTES_AT_ONCE:
                body, wrong_body = await trio.to_thread.run_sync(read_body, operation.body_form, data)
            else:
                body, wrong_body = read_body(operation.body_form, data)
        else:
            raise ProblemRaised("UNSUPPORTED_MEDIA_TYPE", "Send the body as application/json")
    wrong = [*wrong_path, *wrong_query, *wrong_body]
    if wrong:
        raise ProblemRaised("VALIDATION_ERROR", details=wrong)
    key = None
    if operation.idempotency_key != "none":
        key = presented_key(request.headers, body, required=operation.idempotency_key == "required")
    return Ask(path, query, body, identity, request.headers, exchange, key, raw or b"")


async def _carry_out(operation: Operation, doors: Doors, ask: Ask[Any, Any, Any]) -> Response:
    """Do what is asked: once for an Idempotency-Key, and then the same answer again."""
    if ask.idempotency_key is None:
        return _respond(operation, await operation.handler(ask))
    assert doors.intents is not None
    assert ask.identity is not None, "nobody's key"
    same = fingerprint(request.method, request.full_path, ask.body)
    begun = await begin(doors.intents, ask.identity.actor, ask.idempotency_key, same)
    if isinstance(begun, KeptAnswer):
        ask.exchange.audit_details["replayed"] = "true"
        return Response(begun.body, begun.status, {**begun.headers, **REPLAYED}, content_type=CONTENT_TYPE)
    kept: KeptAnswer | None = None
    try:
        answer = await operation.handler(ask)
        response = _respond(operation, answer)
        if answer.keep:
            kept = KeptAnswer(response.status_code, answer.headers, await response.get_data(as_text=False))
        return response
    finally:
        # Also when who asked has gone: what was done is done, and what was not is free to be done at once.
        with trio.move_on_after(EXIT_SECONDS_MAX, shield=True):
            await (doors.intents.forget(begun) if kept is None else doors.intents.keep(begun, kept))


def _respond(operation: Operation, answer: Answer) -> Response:
    promised = operation.answers[answer.status]
    headers = dict(answer.headers)
    if promised is None:
        assert answer.body is None
        return Response(b"", answer.status, headers)
    if isinstance(promised, Text):
        assert answer.body is not None
        assert not isinstance(answer.body, Form)
        response = Response(answer.body, answer.status, headers, content_type=promised.media_type)
        # A stream ends by itself: who takes nothing of it is cut off by the listener, whatever the framework would do.
        response.timeout = None
        return response
    assert isinstance(answer.body, promised), f"{operation.operation_id} answers {type(answer.body).__name__}"
    document = answer.body.model_dump_json(by_alias=True).encode()
    if operation.etag:
        tag = f'"{hashlib.sha256(document).hexdigest()[:32]}"'
        headers |= {"ETag": tag, "Cache-Control": "no-cache"}
        if _matches(request.headers.get("If-None-Match"), tag):
            return Response(b"", 304, headers)
    return Response(document, answer.status, headers, content_type=CONTENT_TYPE)


def _matches(condition: str | None, tag: str) -> bool:
    """Tell whether If-None-Match names the tag, compared weakly: RFC 9110 §13.1.2."""
    if condition is None:
        return False
    candidates = [each.strip().removeprefix("W/") for each in condition.split(",")]
    return tag in candidates or candidates == ["*"]
