"""The benchmark measures what runs; no time is asserted."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from configs import swiss_roll
from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.planning import bench
from ddpm_jax.planning import profile
from ddpm_jax.planning import timing

pytestmark = pytest.mark.eight_devices

# Points: their network is soon compiled.
SMALL = [
  '--mode=benchmark',
  '--config=configs/swiss_roll.py',
  '--config.model.channels=32',
  '--config.model.blocks=1',
  '--config.batch_size=16',
]


def said(*flags):
  """What it prints with --json, measured in a hurry."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench, 'SECONDS', 0.05)
    lines = []
    patch.setattr('builtins.print', lambda *words, **_: lines.append(*words))
    main.run([*SMALL, '--json', *flags])
  [line] = lines  # nothing else goes to stdout
  return json.loads(line)


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
  """(the JSON of a small network on 2 devices, its trace's folder)."""
  trace = tmp_path_factory.mktemp('trace')
  devices = '--config.parallel.data=1', '--config.parallel.fsdp=2'
  return said(f'--profile={trace}', *devices), trace


def forward(config):
  """FLOP of the kernels of a network, for one example."""
  init = functools.partial(build.init_state, config)
  # A kernel of a convolution is at work at all pixels, here 64.
  places = {2: 1, 4: 64}
  return sum(
    2 * x.size * places.get(x.ndim, 0)
    for x in jax.tree.leaves(jax.eval_shape(init).params)
  )


def test_the_work_is_three_times_that_of_the_kernels_forward(printed):
  """Forward, and backward to inputs and to kernels."""
  found, _ = printed
  assert (found['devices'], found['batch_size']) == (2, 16)
  c = swiss_roll.get_config()
  c.model.update(channels=32, blocks=1)
  work = found['results']['train step, work']['value']
  assert 0.8 < work / (3 * 16 * forward(c)) < 1.5


def test_what_is_measured_lies_between_its_least_and_its_most(printed):
  spreads = [x for x in printed[0]['results'].values() if 'low' in x]
  assert len(spreads) > 5
  for x in spreads:
    assert x['low'] <= x['value'] <= x['high']


def test_the_least_time_is_the_highest_speed():
  spread = timing.Spread(median=2.0, low=1.0, high=4.0)
  speed = bench.rate(16, spread)
  assert speed == dict(value=8.0, low=4.0, high=16.0, unit='images/s')


def test_its_memory_is_that_of_the_state_and_no_second_copy(printed):
  found, _ = printed
  value = {name: x['value'] for name, x in found['results'].items()}
  # Weights, EMA and two moments of Adam, float32; FSDP halves nearly all.
  state = 4 * 4 * found['parameters']
  donated = value['train step, memory a device, donated']
  assert 0.5 * state <= donated < 0.6 * state
  # The batch and its index are not donated: 8 points of 8 bytes a device.
  assert value['train step, memory a device, arguments'] - donated < 1000


def test_the_profile_opens_and_names_operations(printed):
  _, trace = printed
  [file] = trace.rglob('*.xplane.pb')
  names = {name for name, _ in profile.operations(file)}
  assert any('dot' in name for name in names)
  assert list(trace.rglob('*.trace.json.gz'))  # for Perfetto


def test_a_comparison_prints_ratios(printed, tmp_path):
  found, _ = printed
  file = tmp_path / 'earlier.json'
  doubled = {
    name: x | {'value': 2 * x['value']} for name, x in found['results'].items()
  }
  file.write_text(json.dumps({'results': doubled}))
  lines = bench.table({}, found['results'], bench.read(file)).split('\n')
  assert len(lines) == 1 + len(doubled)
  assert all(line.endswith('0.50 x earlier') for line in lines[1:])


@pytest.mark.parametrize('text', ['', '[1]', '{"a": 1}'])
def test_a_wrong_file_to_compare_with_is_one_line(tmp_path, text):
  file = tmp_path / 'wrong.json'
  file.write_text(text)
  with pytest.raises(errors.UserError, match='is not what'):
    main.run([*SMALL, f'--compare={file}'])


@pytest.mark.slow
def test_rows_and_parts_of_a_batch_are_as_much_work(tmp_path, monkeypatch):
  monkeypatch.setattr(bench, 'SECONDS', 0.05)
  axes = dict(parallel__spatial='2', accumulate='2')
  c = tiny.config(model__name='unet', **axes)
  made = bench.Bench(c, build.engine(c), bench.data(c), tmp_path)
  dict(made.compilation())
  work = dict(made.train_step())['train step, work']['value']
  # Each part counts the optimiser, and neighbours have rows in common.
  assert 0.8 < work / (3 * c.batch_size * forward(c)) < 2


def test_a_folder_for_the_profile_that_cannot_be_is_one_line(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(errors.UserError, match='is a file'):
    main.run([*SMALL, f'--profile={file}'])


def test_noise_stands_in_for_data_that_are_not_here(tmp_path):
  c = recipe.load('configs/folder.py')
  c.data.path = str(tmp_path / 'nowhere')
  source = bench.data(c)
  assert source.gather(jnp.arange(2))['image'].shape == (2, 64, 64, 3)


def test_the_purpose_of_an_operation_is_read_from_the_program():
  def f(x, w):
    return jnp.sum(jnp.sin(x @ w))

  x, w = jnp.ones((8, 16)), jnp.ones((16, 4))
  compiled = jax.jit(jax.grad(f, 1)).lower(x, w).compile()
  kinds = set(profile.named(compiled.as_text()).values())
  assert 'forward dot_general' in kinds
  assert any(kind.startswith('backward ') for kind in kinds)


def test_a_clock_counts_every_call_but_the_first():
  calls = []
  took = timing.clock(lambda: calls.append(0), seconds=0, least=4)
  assert len(calls) == 5
  assert 0 < took.low <= took.median <= took.high


@pytest.mark.slow
def test_two_processes_measure_together(user_env):
  root = pathlib.Path(__file__).parents[1]
  program = [sys.executable, root / 'launch' / 'local.py', '--processes=2']
  run = subprocess.run(
    [*program, '--restarts=0', *SMALL, '--json'],
    env=user_env,
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(run.stdout)
  assert (found['processes'], found['devices']) == (2, 2)
  assert run.stderr.count('measuring: checkpoints') == 1
