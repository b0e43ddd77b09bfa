"""One signal asks, a second one ends: alone at once, below a launcher not when it is an echo of the first."""

import os
import signal

import pytest

from retinanet.engine import signals
from retinanet.engine.signals import stop_request


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in signals._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_a_second_one_ends_at_once(number):
    before = signal.getsignal(number)
    with stop_request() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request and request.name == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("launcher", signals._LAUNCHERS)
def test_a_launcher_may_repeat_the_signal_for_two_seconds(launcher, monkeypatch):
    monkeypatch.setenv(launcher, "1")
    now = iter([100.0, 101.9, 102.1])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
