"""The whole OpenAPI document against the whole service, by generated requests, fitting and not."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.http.test_route_matrix import ENVIRON
from tests.support.rest import ADMIN_KEY, rest_client
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


@pytest.mark.parametrize("asker", ["person", "operator"])
@pytest.mark.parametrize(
    ("phases", "examples"),
    [("examples,fuzzing", 3), pytest.param("examples,coverage,fuzzing", 60, marks=pytest.mark.proof)],
    ids=["slice", "proof"],
)
@pytest.mark.timeout(1800)
async def test_every_answer_is_one_that_the_document_shows(
    database_url: str, tmp_path: Path, asker: str, phases: str, examples: int
) -> None:
    async with running_service(database_url, ENVIRON) as service, rest_client(service) as client:
        someone = await Wallet().log_in(client)
        credentials = {
            "person": f"Authorization: Bearer {someone.access_token}",
            "operator": f"X-Admin-Api-Key: {ADMIN_KEY}",
        }
        theirs = "--exclude-path-regex" if asker == "person" else "--include-path-regex"
        done = await trio.run_process(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/api/openapi.json"),
                *("--header", credentials[asker], "--checks", ",".join(CHECKS), "--max-examples", str(examples)),
                *("--phases", phases, "--continue-on-failure", "--no-color", "--suppress-health-check", "all"),
                # The person must not end his own session, with which all the rest would be refused.
                *(theirs, "^/api/admin|/refund$" + ("|/revoke-all$|^/api-keys" if asker == "person" else "")),
            ],
            cwd=tmp_path,
            check=False,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, done.stdout.decode()[-12000:]
