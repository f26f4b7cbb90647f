"""Configs drawn at random, sensible and insane: what is built keeps every promise, anything else is refused in words.

A few hundred of them; ``python tools/fuzz_configs.py --count 5000`` draws more.
"""

import pytest
from config_contract import try_config
from random_configs import draw

COUNT, CHUNK = 320, 20


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_a_random_config_is_built_and_runs_or_is_refused_naming_the_argument(first):
    findings = []
    for seed in range(first, first + CHUNK):
        drawn = draw(seed)
        outcome = try_config(drawn)
        if outcome.finding:
            findings.append(f"{outcome.finding}\n  {drawn}\n  python tools/fuzz_configs.py --count 1 --seed {seed}")
    assert not findings, "\n".join(findings)


def test_both_happen_often():
    outcomes = [try_config(draw(seed)).built for seed in range(1000, 1040)]
    assert 8 < sum(outcomes) < 32


def test_a_seed_draws_the_same_config_again():
    assert repr(draw(11).config) == repr(draw(11).config)
    assert repr(draw(11)) != repr(draw(12))
