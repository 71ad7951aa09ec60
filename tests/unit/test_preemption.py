import os
import signal

import pytest
import torch

from kdad_dist.errors import Preempted
from kdad_dist.runtime import stopping
from kdad_dist.runtime.preemption import Agreement, Verdict
from kdad_dist.runtime.stopping import (
    LAUNCHER,
    Stop,
    StopRequest,
    forget_requests,
    interrupts_prevail,
)

CPU = torch.device("cpu")


def test_a_bad_step_is_named_one_check_later_and_the_first_one_counts():
    agreement = Agreement(CPU, every=4)
    verdicts = []
    for step in range(1, 13):
        agreement.note(step, torch.tensor(step not in {3, 6}))
        verdicts.append(agreement.check(step, stop=False, save=False))
    assert verdicts[:7] == [Verdict()] * 7
    assert verdicts[7].first_bad == 3


def test_settling_tells_at_once():
    agreement = Agreement(CPU, every=100)
    agreement.note(1, torch.tensor(True))
    assert agreement.settle() == Verdict()
    agreement.note(2, torch.tensor(False))
    assert agreement.settle().first_bad == 2


def test_wishes_to_stop_and_to_save_come_back_one_check_later():
    agreement = Agreement(CPU, every=2)
    assert agreement.check(2, stop=True, save=True) == Verdict()
    assert agreement.check(3, stop=False, save=False) == Verdict()
    assert agreement.check(4, stop=False, save=False) == Verdict(None, stop=True, save=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_stop_and_only_where_it_is_heeded(tmp_path, number):
    before = signal.getsignal(number)
    with StopRequest(tmp_path).heeded() as stop:
        assert stop.poll() is None
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert signal.Signals(number).name in (stop.poll() or "")
    assert signal.getsignal(number) is before


def test_a_file_and_the_clock_ask_to_stop(tmp_path):
    assert "max_time" in (StopRequest(tmp_path, max_minutes=0).poll() or "")
    (tmp_path / "PREEMPT").touch()
    assert f"found {tmp_path / 'PREEMPT'}" == StopRequest(tmp_path).poll()


def test_the_disk_is_not_looked_at_every_time(tmp_path, monkeypatch):
    stop = StopRequest(tmp_path)
    monkeypatch.setattr(stopping, "LOOK_EVERY", 1000.0)
    assert stop.poll() is None
    (tmp_path / "PREEMPT").touch()
    assert stop.poll() is None
    stop._looked -= 1001
    assert stop.poll()


def test_what_one_process_is_asked_reaches_another_between_two_pieces_of_its_work(tmp_path):
    asked, other = (Stop(StopRequest(tmp_path), tmp_path, "work", "goes on") for _ in range(2))
    asked.request.reason = "received SIGTERM"
    with pytest.raises(Preempted, match="work stopped before it was done: received SIGTERM"):
        asked.check()
    with pytest.raises(Preempted, match="received SIGTERM"):
        other.check()
    other.over = True
    other.check()


def test_a_request_of_an_earlier_command_is_forgotten(tmp_path):
    for name in ("PREEMPT", "stopped.txt"):
        (tmp_path / name).touch()
    forget_requests(tmp_path)
    Stop(StopRequest(tmp_path), tmp_path, "work", "goes on").check()


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends_at_once(tmp_path):
    before, stop = signal.getsignal(signal.SIGINT), StopRequest(tmp_path)
    with stop.heeding_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        assert "SIGINT" in (stop.poll() or "")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("heeded", [False, True], ids=["at once", "after a first"])
def test_a_ctrl_c_that_a_library_takes_for_a_failure_is_one_all_the_same(tmp_path, heeded):
    stop = StopRequest(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        stop.heeding_interrupts() if heeded else interrupts_prevail(),
    ):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("half an import") from None


def test_a_ctrl_c_that_a_shell_has_us_ignore_is_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path).heeding_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failure_that_no_ctrl_c_caused_stays_what_it_is():
    with pytest.raises(RecursionError), interrupts_prevail():
        raise RecursionError


def test_a_ctrl_c_that_the_launcher_passes_on_is_not_the_second_one(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "none")
    monkeypatch.setattr(stopping, "ECHO", 1000.0)
    stop = StopRequest(tmp_path)
    with stop.heeding_interrupts():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert "SIGINT" in (stop.poll() or "")
        os.kill(os.getpid(), signal.SIGINT)
        stop._said -= 1001
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
