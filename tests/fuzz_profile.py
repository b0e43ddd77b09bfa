"""How much the tests in tests/fuzz try, and what became of it.

In the suite each of them tries a few examples, always the same. `FUZZ_EXAMPLES=2000 python -m pytest -q tests/fuzz`
is the campaign of docs/robustness.md: that many new ones each, and a table of what was refused and what was right.
"""

import contextlib
import os
import signal
from collections import Counter, defaultdict

from hypothesis import HealthCheck, Phase, settings

CAMPAIGN = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COUNTS: dict[str, Counter] = defaultdict(Counter)  # kind of input -> outcome -> how often


def tried(examples: int):
    """Return the settings of a test that tries `examples` in the suite, `FUZZ_EXAMPLES` in a campaign."""
    return settings(
        max_examples=CAMPAIGN or examples,
        derandomize=not CAMPAIGN,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate] + ([] if CAMPAIGN else [Phase.shrink]),
        suppress_health_check=list(HealthCheck),
    )


def count(kind: str, outcome: str) -> None:
    """Note that one input of that kind was "refused" (with a clear error) or "right" (equal to the oracle)."""
    COUNTS[kind][outcome] += 1


@contextlib.contextmanager
def within(seconds: float):
    """Fail when the block takes longer: a hang is as bad as a traceback."""

    def stop(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
