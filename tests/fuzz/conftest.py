"""The table at the end of a campaign."""

from fuzz_profile import CAMPAIGN, COUNTS


def pytest_terminal_summary(terminalreporter):
    if CAMPAIGN:
        for kind, outcomes in sorted(COUNTS.items()):
            cells = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
            terminalreporter.write_line(f"{kind:32} {sum(outcomes.values()):8}: {cells}")
