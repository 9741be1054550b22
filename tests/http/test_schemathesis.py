"""The whole OpenAPI document against the whole service, by generated requests, fitting and not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.http.test_route_matrix import ENVIRON
from tests.support.chain_service import sandbox_settings
from tests.support.rest import ADMIN_KEY, SERVICE_TOKEN, rest_client
from tests.support.service import running_service
from tests.support.wallets import Wallet

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)

OPERATORS = "^(/api)?/admin|^/api/billing/refund$"
CONFIGURATION = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
"""
"""A body that is longer than any may be is refused for that, whatever else is wrong with it."""

_LONG_RUN = re.compile(r"(.)\1{80,}")
"""Said once: a body that is too long is not to be read in full."""

SERVICES = "^/api/billing/(holds|transactions|keys)|/spending$|^/v1/(ingest|status)"


@pytest.mark.parametrize("asker", ["person", "operator", "service"])
@pytest.mark.parametrize(
    "extent",
    [
        # The slice asks the same of every tree; the long run looks further each time and prints its seed.
        ("--phases", "examples,fuzzing", "--max-examples", "3", "--generation-deterministic"),
        pytest.param(("--phases", "examples,coverage,fuzzing", "--max-examples", "60"), marks=pytest.mark.proof),
    ],
    ids=["slice", "proof"],
)
@pytest.mark.timeout(1800)
async def test_every_answer_is_one_that_the_document_shows(
    database_url: str, tmp_path: Path, asker: str, extent: tuple[str, ...]
) -> None:
    async with (
        sandbox_settings() as chain,
        running_service(database_url, {**ENVIRON, **chain}) as service,
        rest_client(service) as client,
    ):
        someone = await Wallet().log_in(client)
        credentials = {
            "person": f"Authorization: Bearer {someone.access_token}",
            "operator": f"X-Admin-Api-Key: {ADMIN_KEY}",
            "service": f"Authorization: Bearer {SERVICE_TOKEN}",
        }
        # The person must not end his own session: all the rest would be refused with it. A stream does not end.
        paths = {
            "person": ("--exclude-path-regex", f"{OPERATORS}|{SERVICES}|/revoke-all$|/sessions/|^/api-keys|/sse$"),
            "operator": ("--include-path-regex", OPERATORS),
            "service": ("--include-path-regex", SERVICES),
        }
        await trio.Path(tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
        done = await trio.run_process(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/api/openapi.json"),
                *("--header", credentials[asker], "--checks", ",".join(CHECKS), *extent),
                *("--continue-on-failure", "--no-color", "--suppress-health-check", "all", "--request-timeout", "60"),
                *paths[asker],
            ],
            cwd=tmp_path,
            check=False,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, _LONG_RUN.sub(r"\1…", done.stdout.decode())[-12000:]
