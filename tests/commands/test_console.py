"""How the command line is stopped."""

from __future__ import annotations

import signal

import pytest

from limbeck.commands.console import STOPPED, StopRequest
from limbeck.types import UserError


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.promise("R14")
def test_the_first_signal_asks_and_the_second_stops_at_once(first, second, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest().listening() as stop:
        assert not stop()
        signal.raise_signal(first)
        assert stop() and "stopping after this step" in capsys.readouterr().err
        with pytest.raises(UserError, match=STOPPED):
            signal.raise_signal(second)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
