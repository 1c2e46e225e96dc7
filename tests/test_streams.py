"""Streams that are closed, that break, or that lead to a full disk."""

import fcntl
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import termios
import time

import conftest
import pytest

from ddpm_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[1]

# Results on stdout, the rest on stderr, as main does it; then a file.
TALK = """
import logging, sys, warnings
from ddpm_jax import errors
from ddpm_jax import streams

streams.secure()
logging.basicConfig()
code = 0
try:
  with open(sys.argv[1], 'w') as file:
    for i in range(2000):
      print('result', i, '\\u03bc\\udc80')
      print('progress', i, '\\u03bc\\udc80', file=sys.stderr)
    logging.warning('of logging')
    warnings.warn('of warnings')
    file.write('the end')
  streams.check()
except errors.RunError as e:
  print(e, file=sys.stderr)
  code = 1
sys.exit(code)
"""


def shell(redirections):
  """To be followed by a command, which it runs with these."""
  return ['bash', '-c', f'"$@" {redirections}', 'bash']


@pytest.fixture
def talk(tmp_path):
  """Runs TALK to its end, with redirections: (exit code, stdout, stderr)."""

  def talk(redirections, **env):
    program, file = tmp_path / 'talk.py', tmp_path / 'file'
    program.write_text(TALK)
    done = subprocess.run(
      [*shell(redirections), sys.executable, str(program), str(file)],
      env=os.environ | {'PYTHONPATH': str(ROOT)} | env,
      capture_output=True,
      timeout=60,
    )
    assert file.read_text() == 'the end', done.stderr
    return done.returncode, done.stdout, done.stderr

  return talk


@pytest.mark.parametrize(
  'redirections',
  [
    '2>&-',
    '>&-',
    '<&-',
    '<&- >&- 2>&-',
    '2>/dev/full',
    '2> >(head -1 >/dev/null)',
    '> >(head -1 >/dev/null)',
    '> >(head -1 >/dev/null) 2>&1',
  ],
)
def test_a_stream_that_is_closed_or_breaks_changes_nothing(talk, redirections):
  code, _, err = talk(redirections)
  assert code == 0
  assert b'Traceback' not in err
  assert b'Broken pipe' not in err


def test_a_full_disk_behind_stdout_is_an_error_in_one_line(talk):
  code, out, err = talk('>/dev/full')
  assert (code, out) == (1, b'')
  last = err.splitlines()[-1]
  assert last == b'cannot write to stdout: No space left on device'


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8', 'cp1252'])
def test_what_an_encoding_does_not_have_is_a_question_mark(talk, encoding):
  code, out, err = talk('', PYTHONIOENCODING=f'{encoding}:strict')
  assert code == 0
  mu = '\u03bc' if encoding == 'utf-8' else '?'
  assert out.decode(encoding).startswith(f'result 0 {mu}?\n')
  assert err.decode(encoding).splitlines()[0].startswith('progress 0 ')


def unread(pipe):
  """The bytes that wait in it."""
  return struct.unpack('i', fcntl.ioctl(pipe, termios.FIONREAD, b'1234'))[0]


def test_a_pipe_that_is_full_is_waited_for(tmp_path):
  """Also where another program has made it non-blocking."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import os\nfrom ddpm_jax import streams\n'
    'os.set_blocking(1, False)\nstreams.secure()\n'
    'print("x" * 1_000_000)\nstreams.check()\n'
  )
  command = [sys.executable, str(program)]
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
    size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
    late = time.monotonic() + 60
    while unread(process.stdout) <= size - 4096:  # but for a page
      assert process.poll() is None
      assert time.monotonic() < late
      time.sleep(0.01)
    assert len(process.stdout.read()) == 1_000_001
  assert process.returncode == 0


@pytest.fixture
def compare(tmp_path, env):
  """Runs --mode=compare of an evaluated run, with redirections."""

  def compare(redirections, *args):
    folder = tmp_path / 'runs' / 'a'
    folder.mkdir(parents=True)
    (folder / 'evaluation.json').write_text('{"bits_per_dim": 3}')
    command = [sys.executable, '-m', 'ddpm_jax.main', '--mode=compare', *args]
    return subprocess.run(
      [*shell(redirections), *command, f'--workdir={folder.parent}'],
      env=env,
      capture_output=True,
      text=True,
      timeout=120,
    )

  return compare


@pytest.mark.parametrize(
  ('redirections', 'args', 'code', 'err'),
  [
    ('>&-', [], 0, ''),
    ('<&- 2>&-', ['--nonsense'], 2, ''),
    ('> >(exit)', [], 0, ''),
    (
      '>/dev/full',
      [],
      1,
      'stopped: cannot write to stdout: No space left on device\n',
    ),
    (
      '>/dev/full',
      ['--help'],
      1,
      'stopped: cannot write to stdout: No space left on device\n',
    ),
  ],
)
def test_the_program_exits_with_the_right_code(
  compare, redirections, args, code, err
):
  done = compare(redirections, *args)
  assert (done.returncode, done.stdout, done.stderr) == (code, '', err)


@pytest.fixture
def train(env, tmp_path):
  """Starts a run that would take long; kills it in the end."""
  started = []

  def train(*before, **options):
    workdir = tmp_path / 'run'
    args = ['--config.steps=100000', '--config.checkpoint.every=100000']
    program = [sys.executable, '-m', 'ddpm_jax.main', *conftest.TINY, *args]
    process = subprocess.Popen(
      [*before, *program, f'--workdir={workdir}'], env=env, **options
    )
    started.append(process)
    wait_for(workdir, 2, process)
    return process, workdir

  yield train
  for process in started:
    process.kill()
    process.wait()


def steps(workdir):
  file = workdir / 'metrics.jsonl'
  text = file.read_text() if file.exists() else ''
  lines = [x for x in text.splitlines(keepends=True) if x[-1] == '\n']
  return json.loads(lines[-1])['step'] if lines else 0


def wait_for(workdir, step, process):
  late = time.monotonic() + 200
  while steps(workdir) < step:
    assert process.poll() is None
    assert time.monotonic() < late
    time.sleep(0.02)


@pytest.mark.slow
def test_a_lost_terminal_saves_the_run(train):
  """The kernel sends SIGHUP; a shell sends another."""
  master, slave = os.openpty()
  options = dict.fromkeys(['stdin', 'stdout', 'stderr'], slave)
  process, workdir = train('setsid', '--ctty', **options)
  os.close(slave)
  os.close(master)
  process.send_signal(signal.SIGHUP)
  assert process.wait(timeout=60) == 0
  assert checkpoint.steps(workdir / 'checkpoints')


@pytest.mark.slow
def test_nohup_and_a_lost_reader_change_nothing_and_SIGUSR1_saves(train):
  inside, outside = os.pipe()
  process, workdir = train('nohup', stdout=outside, stderr=outside)
  os.close(inside)
  os.close(outside)
  process.send_signal(signal.SIGHUP)
  # Past the next line of the bar, which comes after 10 seconds.
  time.sleep(11)
  wait_for(workdir, steps(workdir) + 100, process)
  process.send_signal(signal.SIGUSR1)
  assert process.wait(timeout=60) == 0
  assert checkpoint.steps(workdir / 'checkpoints')
