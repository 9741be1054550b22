"""docs/sandbox.md names every route, method and result code of the sandbox, and for each a test that is there."""

import re
from pathlib import Path

import pytest
from stellar_sdk import xdr

from callora.stellar.sandbox.codes import operation_code_name, transaction_code
from callora.stellar.sandbox.horizon import Horizon
from callora.stellar.sandbox.rpc import Rpc
from callora.stellar.sandbox.soroban.limits import Limits
from callora.stellar.sandbox.soroban.simulation import Simulator
from tests.support.sandbox import make_town

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sandbox.md").read_text()
ENUMERATIONS = (
    xdr.PaymentResultCode,
    xdr.CreateAccountResultCode,
    xdr.ChangeTrustResultCode,
    xdr.SetOptionsResultCode,
    xdr.ManageDataResultCode,
    xdr.BumpSequenceResultCode,
    xdr.SetTrustLineFlagsResultCode,
    xdr.InvokeHostFunctionResultCode,
    xdr.ExtendFootprintTTLResultCode,
    xdr.RestoreFootprintResultCode,
    xdr.TransactionResultCode,
    xdr.OperationResultCode,
)


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its head."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n##")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def known_tests() -> set[str]:
    """Return the names of the tests of the sandbox, those in classes with their class."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        inside = ""
        for line in path.read_text().splitlines():
            if match := re.match(r"class (Test\w+)", line):
                inside = match[1] + "."
            elif match := re.match(r"(    )?(?:async )?def (test_\w+)", line):
                found.add((inside if match[1] else "") + match[2])
    return found


@pytest.mark.parametrize("title", ["Horizon", "RPC", "Result codes of transactions", "Result codes of operations"])
def test_every_row_names_a_test_that_is_there(title: str) -> None:
    known = known_tests()
    for *_, named in rows(title):
        if named.startswith("`"):
            assert named.strip("`") in known
        else:
            assert named.startswith(("not modelled", "the network itself"))


def test_every_route_of_horizon_has_a_row() -> None:
    told = " ".join(row[0] for row in rows("Horizon"))
    town = make_town()
    for method, pattern, _ in Horizon(town.sandbox.nodes["a"], "")._routes:
        path = re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda found: "{" + found[1] + "}", pattern.pattern)
        for name, shown in (("account", "id"), ("ledger", "sequence"), ("operation", "id")):
            path = path.replace("{" + name + "}", "{" + shown + "}")
        first = path.replace("{kind}", "transactions" if "{hash}" not in path else "operations")
        assert f"`{method} {first}`" in told, path


def test_every_method_of_rpc_has_a_row() -> None:
    told = {row[0].strip("`") for row in rows("RPC")}
    assert told == set(Rpc(Simulator(Limits(), "docs"))._methods)


def test_every_result_code_has_a_row() -> None:
    text = " ".join(row[0] for title in ("transactions", "operations") for row in rows(f"Result codes of {title}"))
    told = set(re.findall(r"\w+", text))
    names = {code.name for codes in ENUMERATIONS for code in codes} - {"opINNER"}
    assert told == names


def test_the_names_of_result_codes_are_as_written() -> None:
    for name, written, _ in rows("Result codes of transactions"):
        if written:
            assert transaction_code(xdr.TransactionResultCode[name]) == written.strip("`")
    for name, written, _ in rows("Result codes of operations"):
        if written:
            (code,) = (codes[name] for codes in ENUMERATIONS if name in codes.__members__)
            assert operation_code_name(code.name) == written.strip("`")
