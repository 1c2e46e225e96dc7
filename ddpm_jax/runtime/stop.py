"""Ctrl-C and SIGTERM, as a request that a loop can honour at the next step."""

import contextlib
import os
import signal
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def requests() -> Iterator[Callable[[int], bool]]:
  """Gives a function that tells, before each step, whether to stop there.

  Of several processes one is asked, and all stop at the same step. The second
  signal is not held back: it ends the program as it would have.
  """
  if jax.process_count() > 1:
    with _of_many() as asked_at:
      yield asked_at
    return
  asked: list[int] = []
  usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def restore() -> None:
    for number, handler in usual.items():
      signal.signal(number, handler)

  def ask(signum: int, frame: Any) -> None:
    del frame
    asked.append(signum)
    restore()

  for number in usual:
    signal.signal(number, ask)
  try:
    yield lambda step: bool(asked)
  finally:
    restore()


@contextlib.contextmanager
def _of_many() -> Iterator[Callable[[int], bool]]:
  """SIGTERM is heard by JAX, which tells the others; Ctrl-C becomes one."""

  def ask(signum: int, frame: Any) -> None:
    del signum, frame
    signal.signal(signal.SIGINT, usual)
    os.kill(os.getpid(), signal.SIGTERM)

  usual = signal.signal(signal.SIGINT, ask)
  try:
    yield multihost_utils.reached_preemption_sync_point
  finally:
    signal.signal(signal.SIGINT, usual)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
