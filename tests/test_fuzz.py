"""The targets of the fuzzer on hypothesis's bytes, and on its corpus."""

from __future__ import annotations

import random

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = {name: [file.read_bytes() for file in sorted((fuzz.CORPUS / name).iterdir())] for name in fuzz.TARGETS}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_the_corpus(name: str) -> None:
    """Each seed holds, and so does each with some of its bytes changed, repeated, or left out."""
    dice = random.Random(name)
    for seed in SEEDS[name]:
        fuzz.TARGETS[name](seed)
        for _ in range(100):
            mutant = bytearray(seed)
            for _ in range(dice.randint(1, 3)):
                at, end = sorted(dice.randrange(len(mutant) + 1) for _ in range(2))
                kind = dice.randrange(3)
                mutant[at : at + 1 if kind == 0 else end] = dice.choice(
                    [dice.randbytes(1), mutant[at:end] * 2, b""]
                )  # fmt: skip
            fuzz.TARGETS[name](bytes(mutant))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes(name: str) -> None:
    """Each target holds for any bytes, and for any text."""

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode)))
    def holds(raw: bytes) -> None:
        fuzz.TARGETS[name](raw)

    holds()
