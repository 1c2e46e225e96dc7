"""Which weights images are drawn with, and what is said of them."""

import json

import jax
import numpy as np
import pytest

from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import run as runs
from ddpm_jax import samples
from ddpm_jax import validate
from ddpm_jax.evaluation import record
from ddpm_jax.storage import workdir


def config_of(**changes):
  config = recipe.shipped('digits')
  recipe.override(config, {k.replace('__', '.'): v for k, v in changes.items()})
  return config


@pytest.mark.parametrize(
  ('ema', 'step', 'told'),
  [
    ('0.9999', 600, '94%'),
    ('0.9999', 29_000, '6%'),
    ('0.9999', 30_000, ''),  # below 5%
    ('0.995', 2000, ''),
    ('0.9999', 0, ''),  # nothing was trained
  ],
)
def test_an_average_of_mostly_random_weights_is_warned_of(
  ema, step, told, tmp_path, capsys
):
  config = config_of(optimizer__ema=ema)
  runs.warn_of_ema(config, tmp_path, step)
  config.steps = step
  runs.warn_before_training(config, tmp_path)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == (2 if told else 0)
  for line in lines:
    assert f'{told} of the EMA weights' in line
    assert '--config.sampler.weights=raw' in line
    assert '--config.optimizer.ema=0.99' in line


def test_an_average_that_is_not_used_is_not_warned_of_before_training(
  tmp_path, capsys
):
  config = config_of(steps='600', optimizer__ema='0.9999')
  config.sampler.weights = 'raw'
  runs.warn_before_training(config, tmp_path)
  assert not capsys.readouterr().err


def test_an_average_of_imported_weights_is_good(tmp_path, capsys):
  config = config_of(steps='600', optimizer__ema='0.9999')
  workdir.mark_imported(tmp_path, 'google/ddpm-cifar10-32')
  runs.warn_of_ema(config, tmp_path, 600)
  runs.warn_before_training(config, tmp_path)
  assert not capsys.readouterr().err


def test_the_key_chooses_the_weights(tiny_run, capsys):
  config = recipe.resolve(None, tiny_run[0], {})
  mesh = build.mesh(config)
  found = {}
  for weights in ('ema', 'raw'):
    config.sampler.weights = weights
    found[weights] = runs.restore(config, mesh, tiny_run[0])
  assert [name for name, *_ in found.values()] == ['EMA', 'raw']
  ema, raw = (jax.tree.leaves(params) for *_, params in found.values())
  gaps = [float(np.abs(a - b).max()) for a, b in zip(ema, raw, strict=True)]
  assert max(gaps) > 0
  # Of 200 steps with 0.995: 37%.
  said = capsys.readouterr().err
  assert said.count('37% of the EMA weights of step 200') == 1
  assert '--config.optimizer.ema=0.985 or less' in said


@pytest.mark.parametrize('key', ['sampler.weights', 'evaluate.weights'])
def test_unknown_weights_are_refused_at_once(key):
  config = recipe.shipped('digits')
  recipe.override(config, {key: 'best'})
  with pytest.raises(errors.UserError, match=rf"{key}.*known: ('', )?ema, raw"):
    validate.check(config)


def test_evaluate_has_the_weights_that_sample_unless_it_is_told():
  key = record.weights_key
  assert key(config_of()) == 'sampler.weights'
  assert key(config_of(evaluate__weights='ema')) == 'evaluate.weights'


def test_samples_say_how_they_were_made(tiny_run, tmp_path, capsys):
  args = ['--mode=sample', f'--workdir={tiny_run[0]}', '--num_samples=2']
  args += ['--config.sampler.steps=2', f'--output={tmp_path / "a"}']
  main.run([*args, '--config.sampler.weights=raw', '--seed=3'])
  said = capsys.readouterr().err
  assert 'with the raw weights of step 200' in said
  assert 'warning' not in said
  told = json.loads((tmp_path / 'a' / 'samples.json').read_text())
  for key, value in {
    'run': str(tiny_run[0]),
    'step': 200,
    'weights': 'raw',
    'seed': 3,
    'sampler': 'ancestral',
    'steps': 2,
    'guidance': 1.0,
    'images': 2,
    'complete': True,
  }.items():
    assert told[key] == value
  with pytest.raises(errors.UserError, match=r"weights \('raw' there, 'EMA'"):
    main.run([*args, '--seed=3'])


def test_the_order_of_prompts_and_labels_is_told(tmp_path):
  config = config_of(condition__name='label', condition__classes='10')
  args = command.parse(
    ['--mode=sample', f'--workdir={tmp_path}', '--num_samples=4']
  )
  told = samples.description(config, args, 'EMA', 9, ['3', '5'])
  assert told['labels'] == ['3', '5']
  assert told['order'] == 'image i is of labels[i // 4]'
  told = samples.description(config, args, 'EMA', 9, [])
  assert told['order'] == 'image i is of class i % 10'


@pytest.mark.parametrize(
  ('changes', 'wanted', 'name'),
  [
    ({}, [], 'seed1_step9_ancestral1000'),
    (
      {'sampler__name': 'ddim', 'sampler__steps': '50', 'sampler__eta': '0.5'},
      [],
      'seed1_step9_ddim50_eta0.5',
    ),
    (
      {'condition__name': 'text', 'sampler__guidance': '2.0'},
      ['a/red car', '../b'],
      'seed1_step9_ancestral1000_guidance2_a-red-car-b',
    ),
    (
      {'sampler__steps': '50', 'sampler__spacing': 'quadratic'},
      [],
      'seed1_step9_ancestral50_quadratic',
    ),
  ],
)
def test_folders_are_named_by_their_settings(changes, wanted, name):
  assert samples.settings(config_of(**changes), 'EMA', 9, 1, wanted) == name


def test_raw_weights_are_in_the_name():
  assert samples.settings(config_of(), 'raw', 9, 1, []).endswith('_raw')
