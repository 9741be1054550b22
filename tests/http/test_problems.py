"""Problem documents: one table, one form, one page of documentation."""

import json
import re
from pathlib import Path

import pytest

from callora.http.problems import _TABLE, PROBLEMS, ProblemRaised, problem_body, problem_for_status

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_problem_is_documented_with_its_status_and_cure() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d{3}) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(_TABLE) == len(PROBLEMS), "a code stands twice"
    assert rows == [(problem.code, str(problem.status), problem.when, problem.cure) for problem in PROBLEMS.values()]


def test_a_code_is_a_constant_name_and_its_status_an_error() -> None:
    for code, problem in PROBLEMS.items():
        assert problem.code == code
        assert re.fullmatch(r"[A-Z][A-Z_]*[A-Z]", code)
        assert 400 <= problem.status <= 599
        assert problem.message
        assert "|" not in problem.when + problem.cure


def test_a_document_is_compact_and_has_details_only_where_there_are_some() -> None:
    bare = problem_body("NOT_FOUND", None, "r-1")
    assert bare == b'{"code":"NOT_FOUND","message":"Not found","requestId":"r-1"}'
    told = json.loads(problem_body("INSUFFICIENT_BALANCE", "short", None, {"required": "0.1", "available": "0.0"}))
    assert told == {
        "code": "INSUFFICIENT_BALANCE",
        "message": "short",
        "requestId": "unknown",
        "details": {"required": "0.1", "available": "0.0"},
    }


def test_no_text_can_break_the_document() -> None:
    message = 'a "quote", a line\nbreak, \u2028 and a lone \ud800'
    assert json.loads(problem_body("BAD_REQUEST", message, "r"))["message"] == message


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 406, 408, 409, 413, 414, 415, 429, 431, 500, 502, 503, 504]
)
def test_a_bare_status_becomes_a_problem_of_that_status(status: int) -> None:
    assert problem_for_status(status).status == status


def test_a_status_without_a_problem_of_its_own_becomes_the_general_one_of_its_class() -> None:
    assert problem_for_status(418).code == "BAD_REQUEST"
    assert problem_for_status(507).code == "INTERNAL_SERVER_ERROR"


def test_a_problem_outside_the_table_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        ProblemRaised("MADE_UP")
