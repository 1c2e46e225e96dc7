"""Signals that ask a loop to stop."""

import signal
import time

import pytest

from ddpm_jax.parallel import stop


def heard(asked, seconds):
  late = time.monotonic() + seconds
  while not asked(1) and time.monotonic() < late:
    time.sleep(0.01)
  return asked(1)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGUSR1'])
def test_a_signal_is_a_request_that_is_answered_once(name, capsys):
  number = signal.Signals[name]
  before = signal.getsignal(number)
  with stop.requests() as asked:
    assert not asked(1)
    signal.raise_signal(number)
    assert heard(asked, 60)
  assert capsys.readouterr().err == 'stopping after this step\n'
  assert signal.getsignal(number) == before


@pytest.mark.parametrize(
  'names',
  [
    ['SIGHUP', 'SIGHUP'],  # of a terminal, and of the shell in it
    ['SIGTERM', 'SIGHUP'],  # of systemd
    ['SIGUSR1', 'SIGTERM'],  # of Slurm
  ],
)
def test_those_that_come_by_themselves_may_come_together(
  names, capsys, monkeypatch
):
  monkeypatch.setattr(stop, '_quit', lambda signum: print('quit', signum))
  with stop.requests() as asked:
    for name in names:
      signal.raise_signal(signal.Signals[name])
      assert heard(asked, 60)
    time.sleep(0.2)
  assert capsys.readouterr() == ('', 'stopping after this step\n')


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_second_one_of_a_person_ends_it(name, capsys, monkeypatch):
  monkeypatch.setattr(stop, '_quit', lambda signum: print('quit'))
  with stop.requests() as asked:
    for _ in range(2):
      signal.raise_signal(signal.Signals[name])
      assert heard(asked, 60)
    time.sleep(0.2)
  assert capsys.readouterr().out == 'quit\n'


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1'])
def test_what_is_ignored_stays_so(name, monkeypatch):
  """As nohup does it."""
  number = signal.Signals[name]
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with stop.requests() as asked:
      signal.raise_signal(number)
      assert not heard(asked, 0.3)
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, before)


def test_a_second_interrupt_of_a_python_program_is_an_exception():
  with stop.interrupts() as asked:
    assert not asked(0)
    signal.raise_signal(signal.SIGINT)
    assert asked(1)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
