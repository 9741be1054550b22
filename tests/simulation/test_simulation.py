"""Seeds: each is a world of its own, and in none of them is a rule broken."""

import os

import pytest

from tests.simulation.world import run_world, simulate

SEEDS = 200
PROOF_SEEDS = 5000


def run_seeds(seeds: range) -> None:
    """Run worlds until one breaks a rule, and say how to repeat it."""
    for seed in seeds:
        wrong = simulate(seed)
        if wrong:
            repeat = f"SIMULATION_SEED={seed} pytest tests/simulation -k one_seed"
            pytest.fail("\n".join((f"seed {seed}; repeat it with: {repeat}", *wrong[:10])), pytrace=False)


def test_no_rule_is_broken_under_many_seeds() -> None:
    run_seeds(range(SEEDS))


@pytest.mark.proof
def test_no_rule_is_broken_under_thousands_of_seeds() -> None:
    run_seeds(range(SEEDS, SEEDS + PROOF_SEEDS))


@pytest.mark.parametrize("seed", range(10))
def test_a_seed_makes_the_same_world_every_time(seed: int) -> None:
    def told() -> list[str]:
        return [f"{sent.at} {sent.command} {sent.answer!r}" for sent in run_world(seed).auditor.sent]

    assert told() == told()


def test_no_rule_is_broken_under_one_seed_of_your_choice() -> None:
    seed = int(os.environ.get("SIMULATION_SEED", "0"))
    run_seeds(range(seed, seed + 1))
