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

from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax.runtime import checkpoint
from ddpm_jax.runtime import processes

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
def popen():
  """Starts a program; kills it in the end."""
  started = []

  def popen(command, env):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
      command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )
    started.append(process)
    return process

  yield popen
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture
def start(popen, env):
  """Starts the program as n processes, or `only` some of them."""

  def start(n, *args, devices=1, only=None):
    command = [sys.executable, '-m', 'ddpm_jax.main', *map(str, args)]
    where = f'--coordinator=127.0.0.1:{free_port()}'
    return [
      popen(
        [*command, where, f'--num_processes={n}', f'--process_id={i}']
        if n > 1
        else command,
        env | {'JAX_NUM_CPU_DEVICES': str(devices)},
      )
      for i in only or range(n)
    ]

  return start


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


# What two do is up to the last argument; no model, so nothing is compiled.
PEERS = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from ddpm_jax import errors
from ddpm_jax.runtime import processes

port, n, me, what = int(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
with processes.together(
  f'127.0.0.1:{port}', n, me, start_timeout=60, peer_timeout=10, can_stop=True
):
  exec(what)
print('after', file=sys.stderr)
"""


@pytest.fixture
def peers(popen, env):
  """Starts n processes that do `what`."""

  def peers(n, what):
    port = str(free_port())
    command = [sys.executable, '-c', PEERS, port, str(n)]
    return [popen([*command, str(i), what], env) for i in range(n)]

  return peers


WAIT = 'multihost_utils.process_allgather(np.ones(1))'


def test_one_that_is_mistaken_ends_both_at_once(peers):
  """While process 0 waits for it, and would for minutes."""
  what = f'if me: raise errors.UserError("no such file")\n{WAIT}'
  first, other = ends(peers(2, what), timeout=60)
  assert first == (2, '', 'error: no such file (process 1)\n')
  assert other == (2, '', '')


def test_a_fault_of_ours_keeps_its_traceback_and_ends_both(peers):
  what = f'if me: print(1 / 0)\n{WAIT}'
  (code, _, err), (other, _, trace) = ends(peers(2, what), timeout=60)
  assert (code, other) == (1, 1)
  assert err == 'failed: ZeroDivisionError: division by zero (process 1)\n'
  assert 'Traceback' in trace


def test_they_end_together_and_the_first_one_speaks(peers):
  """Also where it has more to do than the others, or all exit with a code."""
  what = 'print("said", me)\nif not me: time.sleep(3)\nsys.exit(75)'
  assert ends(peers(2, what)) == [(75, 'said 0\n', ''), (75, '', '')]


@pytest.mark.slow
def test_the_first_one_may_be_killed_too_and_one_may_just_hang(peers):
  what = f'if not me: os.kill(os.getpid(), signal.SIGKILL)\n{WAIT}'
  (code, _, _), (other, _, err) = ends(peers(2, what), timeout=60)
  assert (code, other) == (-signal.SIGKILL, 1)
  assert err.startswith('stopped: process 0 of 2 went away')
  # Only JAX's heartbeats, of peer_timeout = 10 seconds here, tell of this.
  what = f'if me: os.kill(os.getpid(), signal.SIGSTOP)\n{WAIT}'
  first, _ = peers(2, what)
  ((code, _, err),) = ends([first], timeout=90)
  assert code == -signal.SIGABRT
  assert 'heartbeat' in err


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--num_processes=0'], '--num_processes=0 is not positive'),
    (['--num_processes=2'], '--num_processes needs --coordinator'),
    (['--coordinator=a:1'], '--coordinator needs --num_processes'),
    (['--process_id=1'], '--process_id needs --coordinator'),
    (['--coordinator=a:1', '--process_id=1'], 'needs --num_processes'),
    (['--coordinator=a:1', '--num_processes=2'], 'needs --process_id'),
    (['--coordinator=a', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=a:b', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=:1', '--num_processes=2', '--process_id=1'], 'HOST:PORT'),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], '0..1'),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=-1'], '0..1'),
    (['--start_timeout=0'], 'start_timeout=0 is not positive'),
    (['--peer_timeout=1'], 'peer_timeout=1 is not 2 or more'),
  ],
)
def test_flags_that_do_not_do_are_one_line(flags, message):
  with pytest.raises(errors.UserError) as caught:
    main.run([f'--config={conftest.DIGITS}', *flags])
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_one_that_nobody_comes_to_does_not_wait_for_ever(start, tmp_path):
  args = ['--start_timeout=3', *TINY, f'--workdir={tmp_path}']
  found = ends([*start(2, *args, only=[0]), *start(2, *args, only=[1])], 60)
  for i, (code, _, err) in enumerate(found):
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith(f'stopped: process {i} of 2 has not met the others')
    assert 'within 3 seconds (--start_timeout)' in line


CLUSTERS = {
  'nothing': ({}, False),
  'Slurm, in srun': (
    {'SLURM_STEP_NODELIST': 'a,b', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '0'},
    True,
  ),
  'Slurm, one task': ({'SLURM_STEP_NODELIST': 'a', 'SLURM_NTASKS': '1'}, False),
  'Slurm, not in srun': ({'SLURM_NTASKS': '2'}, False),
  'MPI': ({'OMPI_COMM_WORLD_SIZE': '4'}, True),
  'GKE, hosts of a slice': ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
  'GKE, one host': ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
  'Kubernetes, not a job': ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
}


@pytest.mark.parametrize('name', CLUSTERS)
def test_a_cluster_is_known_by_its_variables(name, monkeypatch):
  for key in list(os.environ):
    if key.startswith(('SLURM_', 'OMPI_', 'TPU_', 'KUBERNETES_', 'JOB_')):
      monkeypatch.delenv(key)
  variables, several = CLUSTERS[name]
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  assert processes.found() == several
