"""What docs/extending.md says a user can add, added as it says."""

import pathlib
import re

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import validate
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules

TEXT = (pathlib.Path(__file__).parents[1] / 'docs/extending.md').read_text()
CODE = re.findall(r'```python\n(.*?)```', TEXT, re.S)
NAMES = re.findall(r'--config\.(\w+)\.name=(my_\w+)\.(\w+)', TEXT)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
  """The files of the page, in a folder that Python looks into."""
  sections = list(dict.fromkeys(NAMES))
  for (_, file, _), code in zip(sections, CODE, strict=True):
    (tmp_path / f'{file}.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)


def config(**changes):
  """Of digits; a__b='c' sets a.b=c."""
  c = recipe.load(conftest.DIGITS)
  c.model.channels = 8
  c.model.groups = 4
  recipe.override(c, {k.replace('__', '.'): str(v) for k, v in changes.items()})
  return recipe.provisional(c)


def test_the_sampler_is_ddim():
  mine = build.sampler(config(sampler__name='my_steps.ddim')).step
  network = lambda x_t, t: jnp.tanh(x_t)  # noqa: E731
  denoiser = denoisers.Denoiser(schedules.linear(50), network)
  keys = jax.random.split(jax.random.key(0), 3)
  x_t = process.normal(keys, (4, 4, 1))
  for t in (1, 7, 50):
    got = mine(denoiser, keys, x_t, t)
    want = samplers.ddim(denoiser, keys, x_t, t)
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    np.testing.assert_array_equal(got[1], want[1])


def test_the_sampler_samples_a_run(tiny_run, tmp_path):
  output = tmp_path / 'mine.npz'
  args = ['--mode=sample', f'--workdir={tiny_run[0]}', f'--output={output}']
  args += ['--num_samples=3', '--config.sampler.name=my_steps.ddim']
  main.run(args)
  with np.load(output) as file:
    assert file['images'].shape == (3, 8, 8, 1)


def test_schedule_loss_data_network_and_condition_train_together():
  c = config(
    schedule__name='my_schedules.sigmoid',
    loss__name='my_losses.absolute',
    data__name='my_data.squares',
    model__name='my_networks.plain',
    optimizer__warmup=0,
    optimizer__learning_rate=0.01,
  )
  validate.check(c)
  schedule = build.schedule(c)
  # Half of it is before the middle, of which a line has a quarter.
  assert schedule.beta[1] == pytest.approx(1e-4, rel=0.6)
  assert schedule.beta[250] < 0.0015 < 0.0185 < schedule.beta[750]
  source = dataset.source(c)
  batch = source.gather(np.arange(64)) | {'index': np.arange(64)}
  assert batch['image'].sum((1, 2, 3)).tolist() == [9 * 255] * 64
  state = jax.jit(lambda: build.init_state(c))()
  step = jax.jit(build.train_step(c, 1))
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  # Of an ε near 0 the mean of |ε| is √(2/π) = 0.80.
  assert 0.6 < losses[0] < 1.2
  assert losses[-1] < 0.8 * losses[0]


def test_the_condition_tells_even_from_odd():
  c = config(
    condition__name='my_conditions.parity',
    condition__width=8,
    condition__classes=10,
  )
  validate.check(c)
  module = build.network(c)
  x, t = jnp.zeros((4, 8, 8, 1)), jnp.full(4, 10)
  params = jax.jit(module.init)(jax.random.key(0), x, t)['params']
  # The last layers begin at 0.
  params = jax.tree.map(lambda p: p + 0.1, params)
  label = jnp.array([2, 3, 4, -1])
  out = jax.jit(build.applied(module, params, label))(x, t)
  np.testing.assert_array_equal(out[0], out[2])
  assert jnp.abs(out[0] - out[1]).max() > 1e-4
  assert jnp.abs(out[0] - out[3]).max() > 1e-4
  batch = dataset.source(c).gather(np.arange(4))
  np.testing.assert_array_equal(build.condition(c, batch), batch['label'])


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('my_steps.ddimm', "no attribute 'ddimm'"),
    ('my_stepps.ddim', "No module named 'my_stepps'"),
    ('my_steps.', 'cannot be imported'),
  ],
)
def test_code_that_is_not_there_is_a_line(name, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    validate.check(config(sampler__name=name))
  assert '\n' not in str(caught.value)


def test_a_file_that_fails_is_a_line(tmp_path):
  (tmp_path / 'my_broken.py').write_text('1 / 0')
  with pytest.raises(errors.UserError, match='ZeroDivisionError'):
    validate.check(config(sampler__name='my_broken.step'))
