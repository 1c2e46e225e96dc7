"""Recipes: overrides take the type of what they replace; JSON comes back."""

import pathlib

import pytest

from configs import base
from ddpm_jax import checks
from ddpm_jax import errors
from ddpm_jax import functions
from ddpm_jax import recipe

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
RECIPES = sorted(p.name for p in CONFIGS.glob('*.py'))


def overridden(**changes):
  c = base.get_config()
  recipe.override(c, {k.replace('__', '.'): v for k, v in changes.items()})
  return c


@pytest.mark.parametrize(
  ('key', 'text', 'value'),
  [
    ('steps', '7', 7),
    ('model__dropout', '0', 0.0),
    ('model__dropout', '1e-1', 0.1),
    ('model__multipliers', '(1, 2)', (1, 2)),
    ('model__multipliers', '[1, 2]', (1, 2)),
    ('data__flip', 'false', False),
    ('data__flip', 'True', True),
    ('data__path', '007', '007'),
    ('data__image_size', '16', 16),
    ('data__image_size', '(16, 24)', (16, 24)),
  ],
)
def test_text_becomes_the_type_of_the_key(key, text, value):
  flat = recipe.flatten(overridden(**{key: text}))
  found = flat[key.replace('__', '.')]
  assert found == value
  assert type(found) is type(value)


def test_sampler_steps_follow_T_and_T_does_not_follow_them():
  assert base.get_config().sampler.steps == 1000
  assert overridden(schedule__T='200').sampler.steps == 200
  fewer = overridden(sampler__steps='50')
  assert fewer.schedule.T == 1000
  assert fewer.sampler.steps == 50


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_builds(name):
  c = recipe.load(str(CONFIGS / name))
  checks.basics(c)
  functions.loss_fn(c)
  functions.sampler(c, seed=0)
  assert c.is_locked


@pytest.mark.parametrize('name', [n for n in RECIPES if n != 'base.py'])
def test_every_recipe_opens_with_command_hardware_hours_and_score(name):
  text = (CONFIGS / name).read_text().partition('\n\nfrom ')[0]
  assert f'python -m ddpm_jax.main --config=configs/{name}' in text
  for word in ('hardware', 'hours', 'score'):
    assert word in text


def test_a_recipe_is_the_same_after_json(tmp_path):
  from ddpm_jax.runtime import workdir

  c = overridden(data__image_size='(16, 24)')
  workdir.write_config(tmp_path, recipe.to_json(c))
  back = recipe.resolve(None, tmp_path, {})
  assert recipe.flatten(back) == recipe.flatten(c)
  recipe.check_same(back, c, 'here')


def test_what_is_learned_must_not_change_and_the_rest_may():
  recipe.check_same(
    overridden(steps='5', sampler__steps='9', parallel__engine='pmap'),
    base.get_config(),
    'here',
  )
  with pytest.raises(errors.UserError) as caught:
    recipe.check_same(
      overridden(batch_size='5', loss__t='stratified'),
      base.get_config(),
      'here',
    )
  assert 'batch_size (128 -> 5)' in str(caught.value)
  assert "loss.t ('uniform' -> 'stratified')" in str(caught.value)


def test_a_path_of_the_data_may_be_named_later_but_not_changed():
  recipe.check_same(overridden(data__path='x'), base.get_config(), 'here')
  with pytest.raises(errors.UserError, match=r"data\.path \('x' -> 'y'\)"):
    recipe.check_same(
      overridden(data__path='y'), overridden(data__path='x'), 'here'
    )


def test_an_unknown_key_names_the_nearest():
  with pytest.raises(errors.UserError, match=r"'config\.model\.channels'"):
    overridden(model__chanels='3')


def test_a_recipe_saved_before_a_key_was_there_is_as_it_was():
  c = base.get_config()
  saved = recipe.to_json(c)
  del saved['condition'], saved['sampler']['guidance'], saved['log']['every']
  again = recipe.from_json(saved)
  assert recipe.flatten(again) == recipe.flatten(c)
  recipe.check_same(c, again, 'here')
