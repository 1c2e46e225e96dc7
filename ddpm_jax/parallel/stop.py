"""Turns signals into requests that a loop honours at its next step.

The signals are Ctrl-C, SIGTERM, SIGHUP (from a terminal that is lost) and
SIGUSR1 (which Slurm can send). SIGHUP and SIGUSR1 stay ignored if they are
ignored at the start, as under nohup.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from ddpm_jax import errors
from ddpm_jax.parallel import processes
from ddpm_jax.storage import logs

_STOPPING = 'stopping after this step'
_AGAIN = f'{_STOPPING}; press again to quit'
# A second one of these ends the program at once. Other signals may arrive twice
# by themselves: terminal and shell both send SIGHUP.
_INSISTENT = signal.SIGINT, signal.SIGTERM


@contextlib.contextmanager
def requests() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step that says whether to stop before it.

  If one of several processes gets the signal, all stop at the same step. The
  first signal is acknowledged at once. A second SIGINT or SIGTERM ends the
  program at once, even while XLA compiles. A checkpoint that is being saved
  then is lost, as after a kill; the one before it is intact.
  """
  if jax.process_count() > 1:
    with _of_many() as asked_at:
      yield asked_at
    return
  asked: list[int] = []

  def hear(signum: int) -> None:
    if signum in asked and signum in _INSISTENT:
      _quit(signum)
    asked.append(signum)
    if signum == signal.SIGINT or len(asked) == 1:
      logs.say(_AGAIN if signum == signal.SIGINT else _STOPPING)

  with _heard(hear, signal.SIGTERM, signal.SIGINT, *_others()):
    yield lambda step: bool(asked)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[int], bool]]:
  """Like `requests`, for a caller in Python, whose program must not end.

  It handles Ctrl-C alone, in the main thread alone. The first one is a request
  to stop, and a second one raises KeyboardInterrupt.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return
  asked: list[int] = []

  def hear(signum: int, frame: object) -> None:
    del frame
    if asked:
      raise KeyboardInterrupt
    asked.append(signum)
    logs.say(_STOPPING)

  before = signal.signal(signal.SIGINT, hear)
  try:
    yield lambda step: bool(asked)
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def second_quits() -> Iterator[None]:
  """Makes a second Ctrl-C end the program; the first raises as usual.

  Python raises KeyboardInterrupt only after a compilation or a batch, so a
  message says that the first one has been noticed.
  """
  asked: list[int] = []

  def hear(signum: int) -> None:
    if asked:
      _quit(signum)
    asked.append(signum)
    logs.say('stopping; press again to quit')

  with _listener(hear, signal.SIGINT):
    yield


@contextlib.contextmanager
def _of_many() -> Iterator[Callable[[int], bool]]:
  """Like `requests`, for several processes.

  JAX handles SIGTERM and agrees with the other processes on the step to stop
  at. Other signals are turned into a SIGTERM.
  """
  asked: list[int] = []

  def hear(signum: int) -> None:
    if signum in asked and signum in _INSISTENT:
      _quit(signum)
    asked.append(signum)
    if signum == signal.SIGINT or len(asked) == 1:
      logs.say(_AGAIN if signum == signal.SIGINT else _STOPPING)
    if len(asked) == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def asked_at(step: int) -> bool:
    stops = multihost_utils.reached_preemption_sync_point(step)
    if stops and not asked:
      logs.say(_STOPPING)
    return stops

  try:
    with _heard(hear, signal.SIGINT, *_others()):
      yield asked_at
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _others() -> list[int]:
  """Returns SIGHUP and SIGUSR1, without those that are ignored."""
  numbers = signal.SIGHUP, signal.SIGUSR1
  return [s for s in numbers if signal.getsignal(s) != signal.SIG_IGN]


def _quit(signum: int) -> None:
  """Ends this process and the others of the run at once."""
  if signum == signal.SIGTERM:
    processes.leave(128 + signum, '')
  error = KeyboardInterrupt()
  processes.end_all(error)
  processes.leave(*errors.verdict(error))


@contextlib.contextmanager
def _heard(hear: Callable[[int], None], *signals: int) -> Iterator[None]:
  """Calls hear(signum) at once, in a thread, and disables Python's handlers."""
  before = {s: signal.signal(s, lambda *_: None) for s in signals}
  try:
    with _listener(hear, *signals):
      yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _listener(hear: Callable[[int], None], *signals: int) -> Iterator[None]:
  """Calls hear(signum) at once, in a thread, beside Python's handlers.

  Handlers in Python run only after a call of C++ returns, and a compilation is
  one call of half a minute. The byte that Python writes into the wake-up socket
  arrives at once.
  """
  inside, outside = socket.socketpair()

  def listen() -> None:
    while number := outside.recv(1):
      if number[0] in signals:
        hear(number[0])

  inside.setblocking(False)
  previous = signal.set_wakeup_fd(inside.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=listen, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(previous)
    inside.close()
    thread.join()
    outside.close()
