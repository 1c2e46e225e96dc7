"""Ctrl-C and SIGTERM, as a request that a loop can honour at the next step."""

import contextlib
import signal
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def requests() -> Iterator[Callable[[], bool]]:
  """Gives a function that tells whether a stop was asked for.

  The second signal is not held back: it ends the program as it would have.
  """
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
    yield lambda: bool(asked)
  finally:
    restore()
