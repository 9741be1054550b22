"""Seeds of chain trouble: in none of them is anything submitted twice, lost, or left in an unknown state."""

import os

import pytest

from tests.simulation.chain_world import run_chain_world, simulate_chain

LEDGERS = 300
SEEDS = 6
PROOF_LEDGERS = 1000
PROOF_SEEDS = 100
"""Worlds of PROOF_LEDGERS each: 100 000 ledgers, those of coming to rest not counted."""


def run_seeds(seeds: range, ledgers: int) -> None:
    """Run worlds until one breaks a rule, and say how to repeat it."""
    for seed in seeds:
        wrong = simulate_chain(seed, ledgers)
        if wrong:
            settings = f"CHAIN_SEED={seed} CHAIN_LEDGERS={ledgers}"
            repeat = f"{settings} pytest tests/simulation/test_chain.py -k one_seed"
            pytest.fail("\n".join((f"seed {seed}; repeat it with: {repeat}", *wrong[:10])), pytrace=False)


def test_nothing_is_submitted_twice_or_lost_under_many_seeds() -> None:
    run_seeds(range(SEEDS), LEDGERS)


@pytest.mark.proof
def test_nothing_is_submitted_twice_or_lost_in_a_hundred_thousand_ledgers() -> None:
    run_seeds(range(1000, 1000 + PROOF_SEEDS), PROOF_LEDGERS)


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_makes_the_same_chain_every_time(seed: int) -> None:
    def told() -> list[str]:
        world = run_chain_world(seed, 100)
        return [*world.log.events, *map(str, world.sky.count.items()), *world.sky.everything]

    assert told() == told()


def test_nothing_is_submitted_twice_or_lost_under_one_seed_of_your_choice() -> None:
    seed, ledgers = int(os.environ.get("CHAIN_SEED", "0")), int(os.environ.get("CHAIN_LEDGERS", "100"))
    run_seeds(range(seed, seed + 1), ledgers)
