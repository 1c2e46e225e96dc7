"""Several real processes on one machine: the same numbers, and one end."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest

from ddpm_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
# Smaller still than conftest's, for every process but the first one compiles
# all of it anew.
TINY = [
  *conftest.TINY,
  '--config.model.attention=()',
  '--config.schedule.T=20',
  '--config.schedule.beta_T=0.5',
  '--config.sampler.steps=5',
  '--config.checkpoint.every=10',
]


@pytest.fixture(scope='module')
def env(user_env):
  return user_env | {'XLA_FLAGS': os.environ['XLA_FLAGS']}


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.fixture
def start(env):
  """Starts the program as n processes; kills them in the end."""
  started = []

  def start(n, *args, devices=1):
    where = f'--coordinator=127.0.0.1:{free_port()}'
    flags = [
      [where, f'--num_processes={n}', f'--process_id={i}'] for i in range(n)
    ]
    processes = [
      subprocess.Popen(
        [sys.executable, '-m', 'ddpm_jax.main', *map(str, args), *more],
        env=env | {'JAX_NUM_CPU_DEVICES': str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for more in (flags if n > 1 else [[]])
    ]
    started.extend(processes)
    return processes

  yield start
  for process in started:
    process.kill()
    process.communicate()


def ends(processes, timeout=300):
  """[(exit code, stdout, stderr)] of all, which must end in time."""
  late = time.monotonic() + timeout
  found = []
  for process in processes:
    out, err = process.communicate(timeout=max(late - time.monotonic(), 0.1))
    found.append((process.returncode, out, err))
  return found


@pytest.fixture
def run(start):
  """Runs it to its end: the stderr of process 0; the others say nothing."""

  def run(n, *args, **options):
    first, *others = ends(start(n, *args, **options))
    assert first[:2] == (0, ''), first
    assert others == [(0, '', '')] * (n - 1)
    return first[2]

  return run


def lines(workdir):
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [
    json.loads(x) for x in text.splitlines(keepends=True) if x[-1] == '\n'
  ]


def wait_for_step(workdir, step, processes):
  late = time.monotonic() + 200
  while not any(line['step'] >= step for line in lines(workdir)):
    assert all(p.poll() is None for p in processes), ends(processes)
    assert time.monotonic() < late
    time.sleep(0.01)


def test_a_story_of_two_processes_and_one(start, run, tmp_path):
  """Stopped, killed, and gone on with alone: it is the run of one process."""
  one, story = tmp_path / 'one', tmp_path / 'story'
  run(1, *TINY, '--config.steps=60', f'--workdir={one}')
  args = [*TINY, '--config.steps=60', f'--workdir={story}']

  pair = start(2, *args)
  wait_for_step(story, 5, pair)
  pair[1].send_signal(signal.SIGTERM)
  (code, out, err), (other, _, noise) = ends(pair, timeout=60)
  assert (code, out, other) == (0, '', 0), err
  assert re.fullmatch(r'(W.*SIGTERM caught.*\n)?', noise)  # JAX's word on it
  assert err.count(f'python -m ddpm_jax.main --workdir={story}') == 1
  (*_, stopped) = checkpoint.steps(story / 'checkpoints')
  assert 5 <= stopped < 60

  pair = start(2, *args)
  wait_for_step(story, stopped + 12, pair)
  pair[1].kill()
  began = time.monotonic()
  (code, _, err), _ = ends(pair, timeout=60)
  assert time.monotonic() - began < 20
  assert code == 1
  assert f'going on from step {stopped}' in err
  assert err.splitlines()[-1].startswith('stopped: process 1 of 2 went away')

  err = run(1, *args)
  assert 'going on from step ' in err
  a, b = lines(one), lines(story)
  assert [line['step'] for line in b] == list(range(1, 61))
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      [line[name] for line in b], [line[name] for line in a], rtol=2e-3
    )
