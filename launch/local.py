"""Runs several processes on this machine, and restarts them when they fail.

  python launch/local.py --processes=4 --restarts=20 --workdir=runs/digits ...

All other flags are passed to `python -m ddpm_jax.main`.
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

STOPPED = 75  # exit code of a run that was asked to stop (EX_TEMPFAIL)
MISTAKE = 2  # exit code of a mistake of the user: a restart would not help
PATIENCE = 20  # seconds from the failure of a process until the rest are killed
PR_SET_PDEATHSIG = 1  # for prctl(2)
LONG = 600  # seconds; a run that lasted longer resets the backoff


def main() -> int:
  p = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  p.add_argument('--processes', type=int, default=2, metavar='N')
  p.add_argument(
    '--restarts', type=int, default=20, help='maximum number (default: 20)'
  )
  p.add_argument(
    '--backoff',
    type=float,
    default=1.0,
    metavar='SECONDS',
    help='wait before the first restart; doubled for each further one, up to '
    'a minute (default: 1)',
  )
  p.add_argument(
    '--dry-run', action='store_true', help='print the commands and exit'
  )
  flags, rest = p.parse_known_args()
  if flags.processes < 1:
    p.error(f'--processes={flags.processes} is not positive')
  if flags.restarts and not any(x.startswith('--workdir') for x in rest):
    p.error('name the --workdir: a restart resumes from it')
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
  """Runs the processes until they succeed or a restart makes no sense."""
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
    why = ', '.join(describe(i, code) for i, code in enumerate(codes))
    if attempt < flags.restarts:
      say(f'{why}; restart {attempt + 1} of {flags.restarts} in {wait:g} s')
      group.sleep(wait)
      wait = min(2 * wait, 60)
    if group.asked_to_stop:
      return 1
  say(f'{why}; gave up after {flags.restarts} restarts')
  return 1


class Group:
  """The running processes; forwards signals to them."""

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
    # Signals that are sent automatically may arrive twice, and so are passed on
    # as they are: a second SIGTERM would end a run at once.
    kept = number in (signal.SIGHUP, signal.SIGUSR1)
    for process in self.running:
      process.send_signal(number if kept else signal.SIGTERM)

  def run(self, commands: list[list[str]]) -> list[int]:
    """Runs commands, and returns their exit codes; -N for signal N."""
    # New sessions do not receive Ctrl-C from the terminal; `stop` forwards it.
    self.running = []
    for command in commands:
      self.running.append(
        subprocess.Popen(
          command, start_new_session=True, preexec_fn=end_with(os.getpid())
        )
      )
    if self.asked_to_stop:  # while they were started
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
  """A `preexec_fn` by which a process gets SIGTERM when `parent` is gone.

  Otherwise, if this process is killed, the others continue to train and collide
  with the next launch. None if this is not Linux.
  """
  if sys.platform != 'linux':
    return None
  prctl = ctypes.CDLL(None, use_errno=True).prctl

  def begin() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # The parent was gone before the call.
      os._exit(1)

  return begin


def describe(index: int, code: int) -> str:
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
  with contextlib.suppress(OSError):  # The terminal may be closed.
    print(f'launch: {line}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(main())
