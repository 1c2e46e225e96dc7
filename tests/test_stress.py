"""Long lives and sudden deaths of real processes (slow)."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DIGITS

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get('KILLS', '200'))
RECIPE = [
  *(f'--config={DIGITS}', '--config.model.channels=8'),
  *('--config.model.multipliers=(1,)', '--config.model.blocks=1'),
  *('--config.model.groups=4', '--config.batch_size=8'),
  *('--config.sampler.steps=2', '--num_samples=4', '--config.log.every=1'),
  *('--config.checkpoint.every=5', '--config.checkpoint.keep=2'),
]


def program(*flags):
  return [sys.executable, '-m', 'ddpm_jax.main', *flags]


def weights(workdir):
  """The arrays of the newest checkpoint, by name, without a recipe."""
  from orbax.checkpoint import v1 as ocp

  from ddpm_jax.storage import checkpoint
  from ddpm_jax.storage import fingerprint

  step = checkpoint.steps(workdir / 'checkpoints')[-1]
  folder = workdir / 'checkpoints' / str(step)
  items = ocp.load_checkpointables(folder, {'ema': None, 'state': None})
  return {name: np.asarray(x) for name, x in fingerprint.named(items)}


def test_killed_at_200_moments_while_others_read(tmp_path, user_env):
  """Bit for bit the run that nothing happened to; readers see whole images.

  Most of a life is its start. So that many kills fall into steps and saves, a
  life is killed some time after its first line of metrics, or else early.
  """
  draw = random.Random(0)
  steps = 40_000  # more than all lives together make
  killed = tmp_path / 'killed'
  start = program(*RECIPE, f'--config.steps={steps}', f'--workdir={killed}')
  read = program('--mode=sample', f'--workdir={killed}', '--num_samples=2')
  readers: dict[int, subprocess.Popen] = {}
  read_well = 0

  def look_at_readers():
    nonlocal read_well
    for number in (0, 1):
      reader = readers.get(number)
      if reader and reader.poll() is None:
        continue
      if reader:
        err = reader.stderr.read()
        assert 'Traceback' not in err, err
        assert reader.returncode == 0 or 'error: no ' in err, err
        read_well += reader.returncode == 0
      out = tmp_path / 'seen' / f'{number}_{time.time_ns()}'
      readers[number] = subprocess.Popen(
        [*read, f'--output={out}'],
        env=user_env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )

  log = killed / 'metrics.jsonl'
  for number in range(KILLS):
    if number % 10 == 5:  # there is something to read
      look_at_readers()
    before = log.stat().st_size if log.exists() else 0
    life = subprocess.Popen(
      start, env=user_env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if number % 5 == 4:  # anywhere, most of all in its start
      time.sleep(draw.uniform(0, 8))
    else:
      late = time.monotonic() + 300
      while not log.exists() or log.stat().st_size <= before:
        assert life.poll() is None, life.stderr.read().decode()
        assert time.monotonic() < late
        time.sleep(0.02)
        before = min(before, log.stat().st_size if log.exists() else 0)
      time.sleep(draw.uniform(0, 4))
    life.send_signal(signal.SIGKILL)
    err = life.communicate()[1].decode()
    assert 'Traceback' not in err, err
  for reader in readers.values():
    reader.kill()
    reader.communicate()
  assert read_well >= KILLS // 20

  # It goes on to its end, a few steps further; the other goes there at once.
  reached = int(log.read_text().splitlines()[-1].split(':')[1].split(',')[0])
  end = f'--config.steps={reached + 10}'
  undisturbed = tmp_path / 'undisturbed'
  for folder in (killed, undisturbed):
    subprocess.run(
      program(*RECIPE, end, f'--workdir={folder}'),
      env=user_env,
      check=True,
      capture_output=True,
    )
  want, got = weights(undisturbed), weights(killed)
  assert want.keys() == got.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  assert not list((killed / 'checkpoints').glob('*.damaged-*'))
  assert not list((killed / 'checkpoints').glob('*tmp*'))
  picture = 'samples.png'
  assert (killed / picture).read_bytes() == (undisturbed / picture).read_bytes()


def test_a_long_run_does_not_grow(tmp_path, user_env):
  """1,500 steps and 60 saves: memory, threads and open files stay."""
  life = subprocess.Popen(
    program(
      *RECIPE,
      *('--config.steps=1500', '--config.checkpoint.every=25'),
      f'--workdir={tmp_path / "run"}',
    ),
    env=user_env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  log, seen = tmp_path / 'run' / 'metrics.jsonl', []
  status = pathlib.Path(f'/proc/{life.pid}')
  while life.poll() is None:
    time.sleep(0.2)
    if not log.exists():
      continue
    try:
      lines = (status / 'status').read_text().splitlines()
      files = len(list((status / 'fd').iterdir()))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
      continue
    fields = dict(line.split(':\t', 1) for line in lines if ':\t' in line)
    step = log.read_text().count('\n')
    if 'VmRSS' in fields and step < 1490:
      memory = int(fields['VmRSS'].split()[0]) / 1024
      seen.append((step, memory, int(fields['Threads']), files))
  assert life.returncode == 0, life.stderr.read()
  early = [row for row in seen if 300 <= row[0] < 600]
  late = [row for row in seen if row[0] >= 1200]
  assert early
  assert late
  # A save in flight has a few of each; what leaks has one more at each save.
  grown = [
    max(row[i] for row in late) - max(row[i] for row in early)
    for i in (1, 2, 3)
  ]
  assert grown[0] < 30  # MiB; the state is 0.1
  assert grown[1] <= 6
  assert grown[2] <= 9
