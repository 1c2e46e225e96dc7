"""Several processes on this machine, started again when they fail.

  python launch/local.py --processes=4 --restarts=20 --workdir=runs/digits ...

What is not a flag of its own goes to `python -m ddpm_jax.main`.
"""

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

STOPPED = 75  # what a run that was asked to stop exits with (EX_TEMPFAIL)
MISTAKE = 2  # of the user: to try it again would not help
PATIENCE = 20  # seconds that a process has to end after another has
PR_SET_PDEATHSIG = 1  # of prctl(2)
LONG = 600  # seconds after which a failure is not one more of a series


def main() -> int:
  p = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument('--processes', type=int, default=2, metavar='N')
  p.add_argument(
    '--restarts', type=int, default=20, help='at most (default: 20)'
  )
  p.add_argument(
    '--backoff',
    type=float,
    default=1.0,
    metavar='SECONDS',
    help='before the first restart; twice as long before each more, up to a '
    'minute (default: 1)',
  )
  p.add_argument(
    '--dry-run', action='store_true', help='print what would be started'
  )
  flags, rest = p.parse_known_args()
  if flags.processes < 1:
    p.error(f'--processes={flags.processes} is not positive')
  if flags.restarts and not any(x.startswith('--workdir') for x in rest):
    p.error('name the --workdir: it is where a restart goes on')
  if flags.dry_run:
    print('\n'.join(map(shlex.join, commands(flags.processes, 'PORT', rest))))
    return 0
  return supervise(flags, rest)


def commands(n: int, port: Any, rest: list[str]) -> list[list[str]]:
  main = [sys.executable, '-m', 'ddpm_jax.main', *rest]
  main += [f'--stopped_code={STOPPED}', f'--num_processes={n}']
  if n == 1:
    return [main]
  where = f'--coordinator=127.0.0.1:{port}'
  return [[*main, where, f'--process_id={i}'] for i in range(n)]


def supervise(flags: argparse.Namespace, rest: list[str]) -> int:
  """Runs them until they are done, or it makes no sense to go on."""
  group = Group()
  wait = flags.backoff
  for attempt in range(flags.restarts + 1):
    begun = time.monotonic()
    codes = group.run(commands(flags.processes, free_port(), rest))
    if not any(codes):
      return 0
    if MISTAKE in codes:
      return MISTAKE
    if group.asked_to_stop:
      return 0 if set(codes) <= {0, STOPPED} else 1
    if time.monotonic() - begun > LONG:
      wait = flags.backoff
    why = ', '.join(told(i, code) for i, code in enumerate(codes))
    if attempt < flags.restarts:
      say(f'{why}; restart {attempt + 1} of {flags.restarts} in {wait:g} s')
      group.sleep(wait)
      wait = min(2 * wait, 60)
    if group.asked_to_stop:
      return 1
  say(f'{why}; gave up after {flags.restarts} restarts')
  return 1


class Group:
  """The processes, and the signals that are passed on to them."""

  def __init__(self) -> None:
    self.running: list[subprocess.Popen] = []
    self.asked_to_stop = False
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self.stop)
    for number in (signal.SIGHUP, signal.SIGUSR1):
      if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
        signal.signal(number, self.stop)

  def stop(self, number: int, frame: Any) -> None:
    del frame
    self.asked_to_stop = True
    # One that comes by itself may come twice, and must not quit at once.
    kept = number in (signal.SIGHUP, signal.SIGUSR1)
    for process in self.running:
      process.send_signal(number if kept else signal.SIGTERM)

  def run(self, commands: list[list[str]]) -> list[int]:
    """The exit codes, once all have ended; -N if by signal N."""
    # In a session of their own: Ctrl-C comes from us, and once.
    self.running = []
    for command in commands:
      self.running.append(
        subprocess.Popen(
          command, start_new_session=True, preexec_fn=end_with(os.getpid())
        )
      )
    if self.asked_to_stop:  # in between
      self.stop(signal.SIGTERM, None)
    late = None
    while any(process.poll() is None for process in self.running):
      if late is None and any(process.poll() for process in self.running):
        late = time.monotonic() + PATIENCE
      if late and time.monotonic() > late:
        for process in self.running:
          process.kill()
      time.sleep(0.05)
    return [process.returncode for process in self.running]

  def sleep(self, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not self.asked_to_stop:
      time.sleep(0.05)


def end_with(parent: int) -> Callable[[], None] | None:
  """For a new process: that it gets SIGTERM when `parent` is gone.

  Were we killed, they would train on, and a new launch would meet them. Only
  Linux can do this.
  """
  if sys.platform != 'linux':
    return None
  prctl = ctypes.CDLL(None, use_errno=True).prctl

  def begin() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # It was gone before that.
      os._exit(1)

  return begin


def told(index: int, code: int) -> str:
  if code == STOPPED:
    return f'process {index} stopped'
  if code < 0:
    with contextlib.suppress(ValueError):
      return f'process {index} ended by {signal.Signals(-code).name}'
  return f'process {index} exited with {code}'


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def say(line: str) -> None:
  with contextlib.suppress(OSError):  # A terminal may be lost.
    print(f'launch: {line}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(main())
