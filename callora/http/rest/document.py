"""The OpenAPI 3.1 document, made of the declarations that the routes are validated by."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic.json_schema import models_json_schema

from callora.http.problems import PROBLEMS
from callora.http.rest.forms import Form
from callora.http.rest.operations import URLENCODED, Access, Operation, Text

ALIAS_OF: Final = "x-alias-of"
"""Names the path that an operation is a second name of."""
_REFERENCE: Final = "#/components/schemas/{model}"
_PROBLEM_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["code", "message", "requestId"],
    "properties": {
        "code": {"type": "string", "description": "What programs compare; the catalogue is docs/errors.md."},
        "message": {"type": "string"},
        "requestId": {"type": "string"},
        "details": {
            "description": "A list of wrong fields for VALIDATION_ERROR, a small object for refusals.",
            "anyOf": [
                {"type": "object"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["field", "message", "code"],
                        "properties": {name: {"type": "string"} for name in ("field", "message", "code")},
                    },
                },
            ],
        },
    },
    "additionalProperties": False,
}
_SECURITY: Final[dict[Access, list[dict[str, list[str]]]]] = {
    Access.PUBLIC: [],
    Access.USER: [{"session": []}],
    Access.ADMIN: [{"adminKey": []}, {"session": []}],
    Access.SERVICE: [{"serviceToken": []}],
}
_SCHEMES: Final = {
    "session": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "An access token, from logging in; 15 minutes. For operators its role must be admin.",
    },
    "adminKey": {"type": "apiKey", "in": "header", "name": "X-Admin-Api-Key", "description": "ADMIN_API_KEY."},
    "serviceToken": {"type": "http", "scheme": "bearer", "description": "INTERNAL_SERVICE_TOKEN."},
}
_USER_PROBLEMS: Final = (
    "UNAUTHORIZED",
    "INVALID_AUTH_HEADER",
    "MISSING_TOKEN",
    "INVALID_TOKEN",
    "MISSING_CLAIMS",
    "TOKEN_EXPIRED",
    "TOKEN_NOT_ACTIVE",
    "REVOKED_TOKEN",
)
_ALWAYS: Final = (
    "VALIDATION_ERROR",  # if only for an unknown query parameter
    "INTERNAL_SERVER_ERROR",
    "SERVICE_UNAVAILABLE",
    "TOO_MANY_REQUESTS",
    "REQUEST_HEADER_TOO_LARGE",
)
_KEYED: Final = (
    "INVALID_IDEMPOTENCY_KEY",
    "IDEMPOTENCY_KEY_REUSE_MISMATCH",
    "IDEMPOTENCY_IN_PROGRESS",
)


def implied_problems(operation: Operation) -> tuple[str, ...]:
    """Return every code that the operation may answer, those that follow from its declaration included."""
    codes = [*operation.problems, *_ALWAYS]
    if operation.access in (Access.USER, Access.ADMIN):
        codes += _USER_PROBLEMS
    if operation.access is Access.SERVICE:
        codes.append("UNAUTHORIZED")
    if operation.access is Access.ADMIN:
        codes += ("FORBIDDEN", "IP_NOT_ALLOWED")
    if operation.body_form is not None or operation.raw_body:
        codes += ("UNSUPPORTED_MEDIA_TYPE", "REQUEST_BODY_TOO_LARGE", "REQUEST_TIMEOUT")
    if operation.idempotency_key != "none":
        codes += _KEYED
    return tuple(dict.fromkeys(codes))


def make_document(operations: Sequence[Operation], *, version: str) -> dict[str, Any]:
    """Return the document of these operations.

    Args:
        version: of the API, as `/api/health` reports it.
    """
    modes: list[tuple[type[Form], Literal["validation", "serialization"]]] = []
    for operation in operations:
        modes += ((form, "validation") for form in (operation.path_form, operation.query_form))
        if operation.body_form is not None:
            modes.append((operation.body_form, "validation"))
        modes += ((form, "serialization") for form in operation.answers.values() if isinstance(form, type))
    references, definitions = models_json_schema(list(dict.fromkeys(modes)), ref_template=_REFERENCE)
    schemas: dict[str, Any] = definitions.get("$defs", {})

    def schema_of(form: type[Form], mode: Literal["validation", "serialization"]) -> dict[str, Any]:
        return dict(references[(form, mode)])

    def properties_of(form: type[Form]) -> tuple[dict[str, Any], Sequence[str]]:
        schema = schemas[schema_of(form, "validation")["$ref"].rpartition("/")[2]]
        return schema.get("properties", {}), schema.get("required", ())

    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schema_of, properties_of)
    used = _reachable(paths, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Callora",
            "version": version,
            "summary": "Prepaid, pay-per-call API access: accounts, marketplace, keys, vaults, usage and billing",
            "description": (
                "Amounts are decimal strings of USDC with 7 places. Lists are paged by an opaque cursor. Whatever is "
                "not a success is a problem document."
            ),
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in operations)],
        "paths": paths,
        "components": {
            "schemas": {"Problem": _PROBLEM_SCHEMA, **{name: schemas[name] for name in sorted(used)}},
            "securitySchemes": _SCHEMES,
        },
    }


def _operation(operation: Operation, schema_of: Any, properties_of: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.operation_id,
        "summary": operation.summary,
        "tags": [operation.tag],
        "security": _SECURITY[operation.access],
        "parameters": [*_parameters(operation, properties_of)],
        "responses": _responses(_answers(operation, schema_of), _problems(operation)),
    }
    if operation.description:
        made["description"] = operation.description
    if operation.alias_of is not None:
        made[ALIAS_OF] = operation.alias_of
    if operation.body_form is not None:
        made["requestBody"] = {
            "required": True,
            "content": {
                media_type: {"schema": schema_of(operation.body_form, "validation")}
                for media_type in ("application/json", *((URLENCODED,) if operation.urlencoded else ()))
            },
        }
    if operation.raw_body:
        made["requestBody"] = {
            "required": True,
            "content": {media_type: {"schema": _RAW_SCHEMAS[media_type]} for media_type in operation.raw_body},
        }
    return made


_RAW_SCHEMAS: Final[dict[str, Any]] = {
    "application/json": {"type": ["object", "array"]},
    "application/x-ndjson": {"type": "string"},
}


def _parameters(operation: Operation, properties_of: Any) -> list[dict[str, Any]]:
    parameters = []
    for place, form in (("path", operation.path_form), ("query", operation.query_form)):
        properties, required = properties_of(form)
        for name, schema in properties.items():
            shown = {key: value for key, value in schema.items() if key not in ("title", "description")}
            parameter = {"name": name, "in": place, "required": place == "path" or name in required}
            shown = _without_null(shown)
            if "description" in schema:
                parameter["description"] = schema["description"]
            parameters.append({**parameter, "schema": shown})
    if operation.idempotency_key != "none":
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": operation.idempotency_key == "required",
                "description": "Names this intent: a repetition gets the first answer and does nothing again.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
            }
        )
    if operation.etag:
        parameters.append({"name": "If-None-Match", "in": "header", "required": False, "schema": {"type": "string"}})
    return parameters


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """An optional parameter is left out, never null."""
    options = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(options) == len(schema.get("anyOf", ())):
        return schema
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return {**rest, **options[0]} if len(options) == 1 else {**rest, "anyOf": options}


def _answers(operation: Operation, schema_of: Any) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for status, form in operation.answers.items():
        described: dict[str, Any] = {"description": _REASONS.get(status, "Success")}
        if isinstance(form, Text):
            described = {"description": form.description, "content": {_essence(form): {"schema": _text_schema(form)}}}
        elif form is not None:
            described["content"] = {"application/json": {"schema": schema_of(form, "serialization")}}
        if operation.etag and status == 200:
            described["headers"] = {"ETag": {"schema": {"type": "string"}}}
        answers[str(status)] = described
    if operation.etag:
        answers["304"] = {"description": "Not modified"}
    return answers


def _essence(text: Text) -> str:
    return text.media_type.partition(";")[0]


def _text_schema(text: Text) -> dict[str, Any]:
    return {"type": "object"} if _essence(text) == "application/json" else {"type": "string"}


_REASONS: Final = {200: "Success", 201: "Created", 202: "Accepted", 204: "Done; no content"}


def _responses(answers: dict[str, Any], problems: dict[str, Any]) -> dict[str, Any]:
    """Return both; a status that is an answer and a problem, as of a probe, has either form."""
    merged = {**answers, **problems}
    for status in answers.keys() & problems.keys():
        schemas = [each["content"]["application/json"]["schema"] for each in (answers[status], problems[status])]
        merged[status] = {
            "description": f"{answers[status]['description']}, or {problems[status]['description']}",
            "content": {"application/json": {"schema": {"anyOf": schemas}}},
        }
    return merged


def _problems(operation: Operation) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in implied_problems(operation):
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    return {
        str(status): {
            "description": ", ".join(codes),
            "content": {
                "application/json": {
                    "schema": {
                        "allOf": [
                            {"$ref": "#/components/schemas/Problem"},
                            {"properties": {"code": {"enum": codes}}},
                        ]
                    }
                }
            },
        }
        for status, codes in sorted(by_status.items())
    }


def _reachable(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            reference = node.get("$ref")
            name = re.fullmatch(r"#/components/schemas/(.+)", reference) if isinstance(reference, str) else None
            if name is not None and name[1] in schemas and name[1] not in found:
                found.add(name[1])
                walk(schemas[name[1]])
            for each in node.values():
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    walk(paths)
    return found
