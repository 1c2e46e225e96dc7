"""`--mode=evaluate`: the same numbers on any devices, and honest ones."""

import contextlib
import functools
import io
import shutil

import jax
import numpy as np
import pytest
import tiny

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax.diffusion import likelihood
from ddpm_jax.evaluation import bound
from ddpm_jax.evaluation import record


@pytest.fixture(scope='module')
def measured(tiny_run, tmp_path_factory):
  """(the bound that is added, stdout): of the newest weights, of older ones,
  and of those without the average."""
  workdir = tmp_path_factory.mktemp('evaluate') / 'run'
  shutil.copytree(tiny_run[0], workdir)
  args = ['--mode=evaluate', f'--workdir={workdir}']
  args += ['--config.evaluate.images=11', '--config.evaluate.draws=4']
  args += ['--config.parallel.data=1']
  found = []
  for which in ([], ['--step=160'], ['--config.evaluate.weights=raw']):
    with contextlib.redirect_stdout(io.StringIO()) as out:
      main.run([*args, *which])
    found.append((record.read(workdir)['bounds'][-1], out.getvalue()))
  return found


def test_the_parts_make_the_whole(measured):
  e, out = measured[0]
  total = e['L_T'] + e['L_1_to_T-1'] + e['L_0']
  assert e['bits_per_dim'] == pytest.approx(total, rel=1e-9)
  assert e['rate'] + e['distortion'] == pytest.approx(total, rel=1e-9)
  assert e['images'] == 11
  assert e['times_an_image'] == 5
  assert not e['exact_in_t']
  assert 0 < e['rmse'] < 255
  assert f'{e["bits_per_dim"]:.4f}' in out
  assert 'Monte Carlo' in out


def test_raw_weights_and_other_steps_are_other_weights(measured, tiny_run):
  found = [e for e, _ in measured]
  assert [f['step'] for f in found] == [200, 160, 200]
  assert [f['weights'] for f in found] == ['EMA', 'EMA', 'raw']
  assert len({f['bits_per_dim'] for f in found}) == 3
  # Without a key of its own it evaluates the weights that sample.
  changes = {'sampler.weights': 'raw', 'parallel.data': '1'}
  config = recipe.resolve(None, tiny_run[0], changes)
  kind, step, _ = runs.restore(
    *(config, build.mesh(config), tiny_run[0]), key=record.weights_key(config)
  )
  assert (kind, step) == ('raw', 200)


def bound_of(config, params, images, seed=0):
  return bound.bound_of(
    *(
      config,
      build.engine(config),
      params,
      dataset.source(config),
      images,
      seed,
    )
  )


def test_images_are_evaluated_alike_in_batches_of_any_size():
  """Of 19 images in batches of 8 the last is not full."""
  rough = dict(evaluate__draws='3')
  some, all_ = (
    bound_of(tiny.config(evaluate__batch_size=n, **rough), tiny.weights(), 19)
    for n in ('8', '100')
  )
  assert some.terms.shape == (19, 4)
  np.testing.assert_array_equal(some.t, all_.t)
  # Sums in another order.
  np.testing.assert_allclose(some.terms, all_.terms, rtol=1e-4)


def test_monte_carlo_agrees_with_exact_within_its_error():
  exact, rough = (
    bound.summary(bound_of(config, tiny.weights(), 64, seed), tiny.T)
    for config, seed in (
      (tiny.config(evaluate__draws='0'), 0),
      (tiny.config(evaluate__draws='40'), 3),
    )
  )
  assert exact['L_t_by_t']['t'] == list(range(1, tiny.T + 1))
  by_t = np.array(exact['L_t_by_t']['bits_per_dim'])
  assert by_t[1:].sum() == pytest.approx(exact['L_1_to_T-1'], rel=1e-6)
  # The error of `rough` holds that of the images, which both share, as well.
  gap = abs(rough['bits_per_dim'] - exact['bits_per_dim'])
  assert gap < 5 * rough['standard_error']


def test_a_trained_network_beats_an_untrained_one():
  config = tiny.config(evaluate__draws='0', optimizer__warmup='0')
  source, step = dataset.source(config), build.train_step(config, 1)
  state = jax.jit(functools.partial(build.init_state, config))()
  untrained, index = state.params, np.arange(16)
  batches = [
    source.gather(64 + 16 * i + index) | {'index': index} for i in range(100)
  ]
  batches = jax.tree.map(lambda *rows: np.stack(rows), *batches)
  state, _ = jax.jit(functools.partial(jax.lax.scan, step))(state, batches)
  before, after = (
    sum(likelihood.totals(bound_of(config, x, 64), tiny.T))
    for x in (untrained, state.params)
  )
  # Of the same images and noise: five standard errors of the gain.
  gain = before - after
  assert gain.mean() > 5 * gain.std() / np.sqrt(64)


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--workdir=measured/none'], 'measured/none'),
    (['--output=here'], '--output'),
    (['--config.sampler.variance=learned'], 'does not fit'),
    (['--config.sampler.variance=betta'], "'beta'"),
    (['--config.evaluate.batch_size=0'], 'evaluate.batch_size'),
  ],
)
def test_mistakes_are_one_line(args, message, tiny_run):
  args = ['--mode=evaluate', f'--workdir={tiny_run[0]}', *args]
  with pytest.raises(errors.UserError, match=message):
    main.run(args)
