"""A plan says what a run would be, without running it."""

import contextlib
import functools
import importlib.util
import io
import json

import jax
import numpy as np
import pytest

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import advice
from ddpm_jax.planning import hlo
from ddpm_jax.planning import measure
from ddpm_jax.planning import programs
from ddpm_jax.planning import table
from ddpm_jax.planning import topology

pytestmark = pytest.mark.eight_devices

TINY = [
  '--mode=plan',
  '--config=configs/digits.py',
  '--config.model.channels=8',
  '--config.model.multipliers=(1,)',
  '--config.batch_size=32',
  '--config.sampler.steps=10',
  '--config.sampler.batch_size=32',
]
ONE = '--config.parallel.data=1'
DATA = '--config.parallel.data=8'
FSDP = '--config.parallel.fsdp=8'
ROWS = '--config.parallel.spatial=4'


@functools.cache
def planned(*flags, topology='cpu:8'):
  """The object that is printed, which is all that is."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    main.run([*TINY, f'--topology={topology}', '--json', *flags])
  return json.loads(out.getvalue())


def config(*flags):
  names, changes = command.split([*TINY, *flags])
  return recipe.resolve(names[1].partition('=')[2], None, changes)


@functools.cache
def alone(of, *flags):
  """What `planned` has of one program, such as `programs.draw`."""
  c = config(*flags)
  there = topology.find('cpu:8')
  return measure.program(of(c, build.mesh(c, devices=there.devices)), there)


def test_it_plans_the_very_program_that_trains():
  """Compiled for real arrays, on the devices that are here."""
  c = config(FSDP)
  mesh = build.mesh(c)
  init = functools.partial(build.init_state, c)
  state = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
    meshes.abstract_state(init, mesh),
  )
  engine = engines.Jit(mesh)
  step = engine.compile_step(
    build.train_step(c, meshes.num_shards(mesh)), state
  )
  rows = {
    'image': np.zeros((32, 8, 8, 1), np.uint8),
    'index': np.arange(32, dtype=np.int32),
    'label': np.zeros(32, np.int32),
  }
  real = step.lower(state, engine.put(rows)).compile()
  found, plan = hlo.of(real), alone(programs.train, FSDP)
  assert found.peak == plan['peak_bytes']
  assert found.flops == plan['flops']
  assert {k: c.bytes for k, c in found.collectives.items()} == {
    k: c['bytes'] for k, c in plan['collectives'].items()
  }


def test_fsdp_leaves_an_eighth_of_the_state_on_a_device():
  """Less a few arrays of one number, which do not divide."""
  whole, cut = planned(DATA), alone(programs.train, FSDP)
  assert whole['state_bytes'] / cut['state_bytes'] == pytest.approx(8, rel=0.02)
  # What the compiler counts as arguments is that and a few images.
  images = 32 / 8 * (8 * 8 + 4 + 4)
  assert cut['argument_bytes'] == pytest.approx(
    cut['state_bytes'] + images, rel=0.01
  )


def test_the_state_is_weights_average_and_two_moments():
  c = config(ONE)
  params = jax.eval_shape(lambda: build.init_state(c)).params
  weights = sum(x.size * 4 for x in jax.tree.leaves(params))
  # And the numbers of steps.
  assert planned(ONE)['state_bytes'] == pytest.approx(4 * weights, abs=20)
  assert planned(ONE)['sampler']['state_bytes'] == weights


def test_eight_devices_do_an_eighth_each_of_the_work():
  one, eight = planned(ONE), planned(DATA)
  # Not the optimiser's part, which each does whole.
  assert one['flops'] / eight['flops'] == pytest.approx(8, rel=0.15)
  assert one['collectives'] == {}
  assert set(eight['collectives']) == {'all-reduce'}


def test_the_gradients_are_summed_once():
  c = config(DATA)
  params = jax.eval_shape(lambda: build.init_state(c)).params
  weights = sum(x.size * 4 for x in jax.tree.leaves(params))
  # And the loss. Biases that are added to each other have one gradient.
  assert planned(DATA)['collectives']['all-reduce']['bytes'] == pytest.approx(
    weights, rel=0.02
  )


def test_rows_over_devices_share_the_activations():
  """Halos and what is gathered for attention are not shared."""
  one, cut = planned(ONE), alone(programs.train, ONE, ROWS)
  assert one['activation_bytes'] / cut['activation_bytes'] > 2.5
  assert one['flops'] / cut['flops'] == pytest.approx(4, rel=0.3)
  # Rows go to neighbours, and whole images nowhere: at most keys or values.
  assert cut['collectives']['collective-permute']['count'] > 10
  gathers = cut['collectives']['all-gather']
  assert gathers['bytes'] <= gathers['count'] * 32 * 8 * 8 * 8 * 4
  assert one['state_bytes'] == cut['state_bytes']


def test_the_sampler_counts_each_of_its_steps():
  ten = planned(ONE)['sampler']
  five = alone(programs.draw, ONE, '--config.sampler.steps=5')
  for key, ratio in dict(flops=2, bytes=2, activation_bytes=1).items():
    # Noise is drawn, and pixels are rounded, once.
    assert ten[key] / five[key] == pytest.approx(ratio, rel=0.01), key


def test_parts_of_a_batch_count_as_often_as_they_are_worked_on():
  whole = planned(ONE)
  parts = alone(programs.train, ONE, '--config.accumulate=4')
  # The optimiser's part is counted with each: it is small.
  assert parts['flops'] == pytest.approx(whole['flops'], rel=0.15)
  assert parts['activation_bytes'] < whole['activation_bytes'] / 2


def test_nothing_of_a_run_talks_to_the_host():
  assert planned(DATA)['host_transfers'] == 0
  assert planned(DATA)['sampler']['host_transfers'] == 0


def test_what_a_processor_has_and_takes_is_not_known():
  plan = planned(DATA)
  for key in ('fits', 'roofline_seconds', 'train_hours', 'advice'):
    assert plan[key] is None, key


@pytest.mark.parametrize(
  'flags',
  [
    ('--config.condition.name=label', '--config.condition.classes=10'),
    ('--config.condition.name=text', '--config.data.captions=classes'),
    ('--config.loss.t=importance', '--config.loss.name=vlb'),
  ],
  ids=['label', 'text', 'importance'],
)
def test_no_data_are_needed_to_know_their_shapes(flags):
  """The shapes are those of batches as they are."""
  c = config(
    ONE, '--config.data.names=("0","1","2","3","4","5","6","7","8","9")', *flags
  )
  mesh = build.mesh(c)
  _, rows = programs.train(c, mesh).args
  source = dataset.source(c)
  real = source.gather(np.arange(32)) | {'index': np.arange(32, dtype=np.int32)}

  def shapes(tree):
    return {
      jax.tree_util.keystr(path): (x.dtype, x.ndim, x.shape[0], x.shape[2:])
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
      if 'id' not in jax.tree_util.keystr(path)
    }

  assert shapes(rows) == shapes(real)


def test_the_table_says_what_the_object_says():
  text = table.markdown(planned(ONE))
  assert 'configs/digits.py on cpu:8: 1 device(s)' in text
  state = planned(ONE)['state_bytes']
  assert f'| state | {state / 2**10:.4g} KiB |' in text
  assert '| collectives | none | none |' in text


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'such as --topology=v5e:4x4'),
    (['--topology=v5e-16'], 'known: cpu:8, h100:1x8'),
    (['--topology=cpu:8', '--config.parallel.engine=pmap'], 'engine=jit'),
    (['--topology=cpu:8', '--config.batch_size=12'], 'not divisible by 8'),
    (['--topology=cpu:8', '--config.parallel.spatial=3'], 'spatial=3'),
    (['--mode=train', '--topology=cpu:8'], '--topology is for --mode=plan'),
  ],
)
def test_what_cannot_be_planned_is_a_line(flags, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    main.run([*TINY, *flags])
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.5G '
      'of 15.75G hbm. Exceeded hbm capacity by 1.75G.',
      17.5 * 2**30,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (20.00G) exceeds available HBM (15.75G).',
      20 * 2**30 + 1000,
    ),
    ('RESOURCE_EXHAUSTED: no sizes', None),
  ],
)
def test_sizes_are_read_from_the_compilers_refusal(message, expected):
  assert measure.needed(message, 1000) == expected


def test_changes_are_cheap_ones_first_and_keep_the_training_as_it_is():
  c = config(DATA, '--config.batch_size=32')
  changes = list(advice.smaller(c, build.mesh(c)))
  fsdp = {'parallel.data': 1, 'parallel.fsdp': 8}
  assert changes == [
    fsdp,
    fsdp | {'accumulate': 2},
    fsdp | {'accumulate': 4},
    fsdp | {'accumulate': 4, 'model.remat': True},
  ]
  for change in changes:
    other = advice.changed(c, change)
    recipe.check_same(
      advice.changed(other, {'accumulate': 1, 'model.remat': False}), c, ''
    )
    programs.train(other, build.mesh(other))  # which is not refused


def test_a_sampler_that_does_not_fit_takes_fewer_images_at_a_time():
  """On processors of which each has 3 images' worth of memory, not 4."""
  c, there = config(DATA), topology.find('cpu:8')
  mesh = build.mesh(c, devices=there.devices)
  known = planned(DATA)['sampler']
  images = known['peak_bytes'] - known['state_bytes']
  small = topology.Chip(memory=known['state_bytes'] + images * 0.75)
  there = there._replace(chip=small)
  draw = measure.program(programs.draw(c, mesh), there)
  assert draw['fits'] is False
  found = advice.of_sampling(c, there, mesh, draw)
  assert found['change'] == '--config.sampler.batch_size=16'
  assert found['fits'] is True
  # The half of what images took.
  assert found['peak_bytes'] == pytest.approx(found['estimated_bytes'], rel=0.1)


needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='no libtpu'
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
  'topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']
)
def test_a_tpu_has_a_roofline(topology):
  plan = planned(topology=topology)
  chip = topology.TPUS[topology.partition(':')[0]]
  assert plan['devices'] == 4
  assert plan['fits'] is True
  assert plan['memory_bytes'] == chip.memory
  seconds = max(plan['flops'] / chip.flops, plan['bytes'] / chip.bandwidth)
  assert plan['roofline_seconds'] == pytest.approx(seconds)
  assert plan['train_hours'] == pytest.approx(2000 * seconds / 3600)
  assert plan['images_per_second'] == pytest.approx(32 / seconds)
  # The compiler's own model of the chip is no faster than the roofline, and of
  # such small operations not a hundred times slower.
  assert 0.9 < plan['optimal_seconds'] / seconds < 100


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_sums_all_gradients_at_once():
  """Even of more than 256 arrays, which is where its compiler would stop."""
  deep = '--config.model.multipliers=(1,1,1,1)', '--config.model.blocks=2'
  arrays = jax.eval_shape(lambda: build.init_state(config(*deep))).params
  assert len(jax.tree.leaves(arrays)) > 256
  plan = planned(*deep, topology='v5e:2x2')
  assert plan['collectives']['all-reduce']['count'] == 1


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_a_chip_is_told_what_would():
  """65,536 images at a time; that the advice fits is the compiler's word."""
  plan = planned(
    '--config.batch_size=65536',
    '--config.model.channels=128',
    topology='v5e:1x1',
  )
  assert plan['fits'] is plan['train_fits'] is False
  assert plan['peak_bytes'] > plan['memory_bytes']
  assert plan['sampler']['fits'] is True
  assert '--config.accumulate=' in plan['advice']['change']
  assert plan['advice']['fits'] is True
  assert plan['advice']['peak_bytes'] < plan['memory_bytes']


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec('jax_cuda13_plugin'), reason='no CUDA plugin'
)
def test_a_gpu_has_memory_and_collectives():
  plan = planned(topology='h100:1x4')
  assert plan['devices'] == 4
  assert plan['fits'] is True
  assert 'all-reduce' in plan['collectives']
  assert plan['roofline_seconds'] is None
