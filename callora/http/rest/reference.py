"""The reference page: the OpenAPI document as HTML, made here, whole without the internet and without any script."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from callora.http.rest.document import ALIAS_OF
from callora.http.rest.forms import INT64_MAX

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --strong: #0a7d5c; }
@media (prefers-color-scheme: dark) { :root { --strong: #5fd3b0; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; display: grid; grid-template-columns: 17rem minmax(0, 1fr); }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1.5rem 1rem;
  border-right: 1px solid var(--line); }
nav a { display: block; color: inherit; text-decoration: none; font-size: 13px; padding: 1px 0; }
nav a:hover { color: var(--strong); }
nav h2 { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; margin: 1.2rem 0 .3rem; opacity: .7; }
main { padding: 2rem clamp(1rem, 4vw, 4rem); max-width: 60rem; }
h1 { margin: 0; }
section > h2 { margin: 3rem 0 0; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
article { margin: 2rem 0; scroll-margin-top: 1rem; }
article h3 { margin: 0; font-size: 1.05rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
.route { background: var(--soft); padding: .4rem .6rem; border-radius: 6px; overflow-wrap: anywhere; }
.method { font-weight: 700; color: var(--strong); margin-right: .5rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-top: 1px solid var(--line); }
th { font-size: 12px; opacity: .7; font-weight: 600; border: 0; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
pre { background: var(--soft); padding: .6rem; border-radius: 6px; overflow-x: auto; }
@media (max-width: 50rem) { body { display: block; } nav { position: static; height: auto; border: 0; } }
"""

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)
"""Lets the page's own style through and nothing else."""
_METHODS: Final = ("get", "post", "put", "patch", "delete")


def render(document: Mapping[str, Any]) -> bytes:
    """Return the page that shows an OpenAPI document of ours."""
    info = document["info"]
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {tag["name"]: [] for tag in document["tags"]}
    aliases: dict[tuple[str, str], list[str]] = {}
    for path, item in document["paths"].items():
        for method in _METHODS:
            operation = item.get(method)
            if operation is not None and ALIAS_OF in operation:
                aliases.setdefault((method, operation[ALIAS_OF]), []).append(path)
            elif operation is not None:
                by_tag[operation["tags"][0]].append((method, path, operation))
    schemas = document["components"]["schemas"]
    body = "".join(
        (
            "<nav>",
            *(_index(tag, operations) for tag, operations in by_tag.items()),
            f"</nav><main><h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            f"<p>{escape(info['summary'])}. {escape(info['description'])}</p>",
            '<p>For programs: <a href="/api/openapi.json">openapi.json</a>. Calls themselves go to ',
            "<code>/v1/call/{api}/…</code> with an API key.</p>",
            *(_section(tag, operations, aliases, schemas) for tag, operations in by_tag.items()),
            "</main>",
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    ).encode()


def _index(tag: str, operations: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    links = "".join(
        f'<a href="#{escape(operation["operationId"])}">{escape(operation["summary"])}</a>'
        for _, _, operation in operations
    )
    return f"<h2>{escape(tag)}</h2>{links}"


def _section(
    tag: str,
    operations: list[tuple[str, str, Mapping[str, Any]]],
    aliases: Mapping[tuple[str, str], list[str]],
    schemas: Mapping[str, Any],
) -> str:
    articles = "".join(
        _article(method, (path, *aliases.get((method, path), ())), operation, schemas)
        for method, path, operation in operations
    )
    return f"<section><h2>{escape(tag)}</h2>{articles}</section>"


def _article(method: str, paths: Sequence[str], operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    return "".join(
        (
            f'<article id="{escape(operation["operationId"])}"><h3>{escape(operation["summary"])}</h3>',
            f'<p class="route"><span class="method">{method.upper()}</span>',
            " or ".join(f"<code>{escape(path)}</code>" for path in paths),
            "</p>",
            f"<p>{escape(operation['description'])}</p>" if "description" in operation else "",
            f"<p>Needs {_needs(operation)}.</p>",
            *_parameters(operation),
            *_body(operation, schemas),
            *_answers(operation, schemas),
            "</article>",
        )
    )


def _needs(operation: Mapping[str, Any]) -> str:
    names = {name for scheme in operation["security"] for name in scheme}
    if "adminKey" in names:
        return "the admin key in <code>X-Admin-Api-Key</code>, or an operator's access token"
    return "an access token in <code>Authorization: Bearer</code>" if names else "no credentials"


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    rows = "".join(
        f"<tr><td><code>{escape(each['name'])}</code></td><td>{escape(each['in'])}"
        f"{', required' if each['required'] else ''}</td><td>{_kind(each['schema'])}</td>"
        f"<td>{escape(each.get('description', ''))}</td></tr>"
        for each in operation["parameters"]
    )
    if rows:
        yield f"<table><tr><th>parameter</th><th>where</th><th>form</th><th>meaning</th></tr>{rows}</table>"


def _body(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        yield f"<h4>Body</h4>{_fields(schema, schemas)}"


def _answers(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    for status, answer in operation["responses"].items():
        described = f"<code>{status}</code> {escape(answer['description'])}"
        content = answer.get("content", {}).get("application/json")
        if int(status) < 400 and content is not None:
            yield f"<details><summary>{described}</summary>{_fields(content['schema'], schemas)}</details>"
        elif int(status) < 400:
            yield f"<p>{described}</p>"
    codes = "".join(
        f"<tr><td><code>{status}</code></td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
        if int(status) >= 400
    )
    yield f"<details><summary>Problems</summary><table>{codes}</table></details>"


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int = 0) -> str:
    resolved = schemas[_name(schema)] if "$ref" in schema else schema
    properties = resolved.get("properties", {})
    if not properties:
        return f"<pre>{escape(json.dumps(resolved, indent=1))}</pre>"
    required = resolved.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{'required' if name in required else ''}</td>"
        f"<td>{_kind(each)}</td><td>{escape(each.get('description', ''))}"
        f"{_nested(each, schemas, depth)}</td></tr>"
        for name, each in properties.items()
    )
    return f"<table><tr><th>field</th><th></th><th>form</th><th>meaning</th></tr>{rows}</table>"


def _nested(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int) -> str:
    inner = schema.get("items", schema)
    candidates = [each for each in (inner, *inner.get("anyOf", ())) if "$ref" in each]
    if not candidates or depth >= 3:
        return ""
    name = _name(candidates[0])
    return f"<details><summary>{escape(name)}</summary>{_fields(candidates[0], schemas, depth + 1)}</details>"


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return escape(_name(schema))
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(
            f"<code>{escape(each if isinstance(each, str) else json.dumps(each))}</code>"
            for each in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (
            ("minimum", "from"),
            ("maximum", "to"),
            ("minLength", "at least"),
            ("maxLength", "at most"),
        )
        if key in schema and schema[key] != INT64_MAX
    ]
    kind = escape(schema.get("format") or schema.get("type", "any"))
    return f"{kind} <small>{escape(', '.join(bounds))}</small>" if bounds else kind
