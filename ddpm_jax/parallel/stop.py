"""Ctrl-C and SIGTERM, as a request that a loop can honour at the next step.

So are SIGHUP, of a terminal that is lost, and SIGUSR1, which Slurm can send;
but where they were ignored at the start, as by nohup, they stay so.
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
# A second one of these ends the program at once. Of others it may well come by
# itself: a shell passes on the SIGHUP that the terminal has sent too.
_INSISTENT = signal.SIGINT, signal.SIGTERM


@contextlib.contextmanager
def requests() -> Iterator[Callable[[int], bool]]:
  """Gives a function that tells, before each step, whether to stop there.

  Of several processes one is asked, and all stop at the same step. The first
  signal is answered at once, and a second SIGINT or SIGTERM ends the program at
  once, even while XLA compiles. What is being saved then is as after a kill:
  the checkpoint before it is whole.
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
def second_quits() -> Iterator[None]:
  """Ctrl-C raises KeyboardInterrupt as ever; a second one ends the program.

  The first may have to wait for a compilation or for a batch, and says so.
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
  """SIGTERM is heard by JAX, which tells the others; the rest become one.

  JAX keeps SIGTERM to itself until the step at which all stop.
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
  """SIGHUP and SIGUSR1, where this program was not told to ignore them."""
  numbers = signal.SIGHUP, signal.SIGUSR1
  return [s for s in numbers if signal.getsignal(s) != signal.SIG_IGN]


def _quit(signum: int) -> None:
  """Ends this program, and the other processes of a run, at once."""
  if signum == signal.SIGTERM:
    processes.leave(128 + signum, '')
  error = KeyboardInterrupt()
  processes.end_all(error)
  processes.leave(*errors.verdict(error))


@contextlib.contextmanager
def _heard(hear: Callable[[int], None], *signals: int) -> Iterator[None]:
  """Calls hear(signum) at once, in a thread, in the place of a handler."""
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

  Handlers in Python wait until a call of C++ returns, and a compilation is one
  call of half a minute. The byte that Python writes into a socket does not.
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
