"""Ctrl-C and SIGTERM, as a request that a loop can honour at the next step."""

import contextlib
import signal
from collections.abc import Callable
from collections.abc import Iterator


@contextlib.contextmanager
def requests() -> Iterator[Callable[[], bool]]:
  """Gives a function that tells whether a stop was asked for.

  The second signal is not held back: it ends the program as it would have.
  """
  asked = []
  usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def ask(signum, frame):
    del frame
    asked.append(signum)
    for number, handler in usual.items():
      signal.signal(number, handler)

  for number in usual:
    signal.signal(number, ask)
  try:
    yield lambda: bool(asked)
  finally:
    for number, handler in usual.items():
      signal.signal(number, handler)
