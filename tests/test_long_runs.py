"""The long runs (make attack, faults, soak, fuzz), each in a version of a few seconds."""

from __future__ import annotations

from collections.abc import Callable

import attack
import faults
import pytest
import soak


@pytest.mark.parametrize(
    ("run", "seconds"), [(attack.attack, 1.5), (faults.network_faults, 1.0), (faults.kills, 0.3), (soak.soak, 1.0)]
)
def test_short_version(run: Callable[[float], None], seconds: float) -> None:
    """It holds: good visitors are served beside the attackers, faults leave nothing wrong behind, nothing grows."""
    run(seconds)
