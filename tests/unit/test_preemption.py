import os
import signal

import pytest
import torch

from kdad_dist.runtime.preemption import Agreement, StopRequest, Verdict

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


def test_a_signal_a_file_and_the_clock_each_ask_to_stop(tmp_path):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in before:
            stop = StopRequest(tmp_path)
            assert stop.poll() is None
            os.kill(os.getpid(), number)
            assert signal.Signals(number).name in (stop.poll() or "")
        assert "max_time" in (StopRequest(tmp_path, max_minutes=0).poll() or "")
        (tmp_path / "PREEMPT").touch()
        assert "PREEMPT" in (StopRequest(tmp_path).poll() or "")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends_at_once(tmp_path):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopRequest(tmp_path)
        with stop.heeding_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert "SIGINT" in (stop.poll() or "")
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
