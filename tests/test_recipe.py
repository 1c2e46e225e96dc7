"""Recipes: overrides take the type of what they replace; JSON comes back."""

import json
import pathlib
import sys
import types

import pytest

from configs import ablation
from configs import base
from configs import lsun
from ddpm_jax import build
from ddpm_jax import errors
from ddpm_jax import ranges
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import validate
from ddpm_jax.storage import workdir

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
  validate.check(c)
  build.loss_fn(c)
  sampling.sampler(c)
  assert c.is_locked


@pytest.mark.parametrize('name', [n for n in RECIPES if n != 'base.py'])
def test_every_recipe_opens_with_command_hardware_hours_and_score(name):
  text = (CONFIGS / name).read_text().partition('\n\nfrom ')[0]
  assert f'python -m ddpm_jax.main --config=configs/{name}' in text
  for word in ('hardware', 'hours', 'score'):
    assert word in text


def test_a_recipe_is_the_same_after_json(tmp_path):
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
  assert 'batch_size (64 -> 5)' in str(caught.value)
  assert "loss.t ('uniform' -> 'stratified')" in str(caught.value)


def test_data_may_move_and_the_optimizer_change_on_purpose():
  begun = overridden(data__path='x')
  recipe.check_same(overridden(data__path='y'), begun, 'here')
  c = overridden(optimizer__learning_rate='1e-5')
  with pytest.raises(errors.UserError, match='--allow=optimizer'):
    recipe.check_same(c, begun, 'here')
  recipe.check_same(c, begun, 'here', ['optimizer'])
  assert recipe.changed(c, begun) == {'optimizer.learning_rate': [2e-4, 1e-5]}
  c = overridden(optimizer__learning_rate='1e-5', model__channels='8')
  with pytest.raises(
    errors.UserError, match=r'differ: model\.channels \('
  ) as e:
    recipe.check_same(c, begun, 'here', ['optimizer'])
  assert '--allow' not in str(e.value)


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


def test_a_long_list_of_names_is_not_printed():
  with pytest.raises(errors.UserError) as caught:
    overridden(model__chanels='3')
  message = str(caught.value)
  assert message.count('config.') == 5  # the wrong one, the guess, three
  assert 'configs/base.py' in message
  assert 'known: a, b' in str(errors.unknown('x', 'c', ['b', 'a']))


ROWS = [
  *RECIPES,
  *(f'ablation.py:{row}' for row in ablation.ROWS),
  *('digits.py:paper', 'cifar.py:bf16'),
  *(f'lsun.py:{category}' for category in lsun.STEPS),
  *('swiss_roll.py:two_moons', 'swiss_roll.py:eight_gaussians'),
]


@pytest.mark.parametrize('name', ROWS)
def test_a_recipe_has_the_values_that_runs_were_begun_with(name):
  """A run goes on with its recipe's name only where no value has changed."""
  if name == 'base.py':
    pytest.skip('the schema is no recipe of runs')
  stored = json.loads((CONFIGS.parent / 'tests' / 'recipes.json').read_text())
  # The first is whole, and the others are its differences.
  want = stored['cifar.py'] | stored[name]
  found = recipe.flatten(recipe.resolve(str(CONFIGS / name), None, {}))
  assert json.loads(json.dumps(found)) == want


@pytest.mark.parametrize('name', ROWS)
def test_every_recipe_sets_only_what_is_read_and_in_range(name):
  c = recipe.resolve(str(CONFIGS / name), None, {})
  validate.unread(c, recipe.flatten(c))


@pytest.mark.parametrize(
  ('changes', 'key'),
  [
    ({'schedule.name': 'cosine', 'schedule.beta_1': '0.1'}, 'schedule.beta_1'),
    ({'schedule.name': 'const', 'schedule.beta_1': '0.1'}, 'schedule.beta_1'),
    ({'sampler.eta': '0.5'}, 'sampler.eta'),
    (
      {'sampler.name': 'ddim', 'sampler.variance': 'beta_tilde'},
      'sampler.variance',
    ),
    ({'data.name': 'digits', 'data.path': 'here'}, 'data.path'),
    ({'data.name': 'folder', 'data.tfds': 'mnist'}, 'data.tfds'),
    ({'data.points': 'two_moons'}, 'data.points'),
    ({'model.name': 'mlp', 'model.dropout': '0.2'}, 'model.dropout'),
  ],
)
def test_a_key_that_is_set_and_not_read_is_refused(changes, key):
  c = base.get_config()
  recipe.override(c, changes)
  with pytest.raises(errors.UserError) as caught:
    validate.unread(c, changes, changes)
  assert str(caught.value).startswith(f'config.{key}=')
  assert str(caught.value).endswith(': leave it out')
  with pytest.raises(errors.UserError, match=f'set config.{key}='):
    validate.unread(c, recipe.flatten(c))  # of a file that was named
  # What a file sets for another function than the one asked for is left over.
  if name := next((k for k in changes if k.endswith('.name')), None):
    validate.unread(c, recipe.flatten(c), {name: changes[name]})
  # A run that was saved with it is not refused, nor is the default.
  validate.unread(c, changes.keys() - {key}, changes)
  validate.unread(base.get_config(), changes, changes)


def test_a_key_that_the_chosen_function_reads_is_not_refused():
  for changes in (
    {'sampler.name': 'ddim', 'sampler.eta': '0.5'},
    {'sampler.variance': 'beta_tilde'},
    {'schedule.beta_1': '0.1'},
    {'data.name': 'points', 'data.points': 'two_moons'},
    {'data.captions': 'classes', 'data.name': 'digits'},
    {'model.variance': 'beta_tilde', 'sampler.name': 'ddim'},
  ):
    c = base.get_config()
    recipe.override(c, changes)
    validate.unread(c, recipe.flatten(c), changes)


@pytest.fixture
def begun(tmp_path):
  workdir.write_config(tmp_path, recipe.to_json(base.get_config()))
  return tmp_path


def test_a_run_without_a_checkpoint_may_be_begun_again(begun):
  other = {'model.channels': '64'}
  c = recipe.resolve(None, begun, other)
  assert recipe.is_another(c, begun)
  assert not recipe.is_another(base.get_config(), begun)
  assert not recipe.is_another(c, begun / 'new')
  # What a save that was interrupted has left is no checkpoint.
  checkpoints = begun / 'checkpoints'
  (checkpoints / '40.orbax-checkpoint-tmp').mkdir(parents=True)
  recipe.resolve(None, begun, other)
  for name in ('0', '40.damaged-17'):  # 0: of a converted run
    folder = checkpoints / name
    folder.mkdir()
    with pytest.raises(errors.UserError, match='another recipe'):
      recipe.resolve(None, begun, other)
    folder.rmdir()


@pytest.mark.parametrize(
  'text',
  ['[1]', '"x"', '{"model": 3}', '{"batch_size": "4"}', '{"steps": NaN}'],
)
def test_a_saved_recipe_of_another_form_is_a_line_for_the_user(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(errors.UserError, match=r'config\.'):
    recipe.resolve(None, tmp_path, {})


BEGIN = """\
from configs import base
def get_config():
  c = base.get_config()
"""
BAD_RECIPES = {
  'nothing': (BEGIN, 'line 2: get_config returns NoneType'),
  'a dict': (
    'def get_config():\n  return {}\n',
    'line 1: .* returns dict',
  ),
  'raises': (BEGIN + '  raise OSError("a\\nb")\n', 'line 4: OSError: a b'),
  'memory': (BEGIN + '  raise MemoryError\n', 'line 4: MemoryError'),
  'syntax': ('x = 1\ndef get_config(:\n', 'line 2: SyntaxError'),
  'imports': ('import nowhere\n', 'line 1: ModuleNotFoundError: No module na'),
  'exits': ('import sys\nsys.exit(0)\n', 'line 2: SystemExit'),
  'quits': (BEGIN + '  quit()\n', 'line 4: SystemExit'),
  'loop': (
    BEGIN
    + '  c.model.channels = c.get_ref("steps")\n'
    + '  c.steps = c.model.get_ref("channels")\n  return c\n',
    'line 5: MutabilityError',
  ),
  'itself': (
    BEGIN + '  c.unlock()\n  c.me = c\n  return c\n',
    'cannot be saved',
  ),
  'object': (
    BEGIN + '  c.unlock()\n  c.mine = object()\n  return c\n',
    'line 2: get_config returns a recipe that cannot be saved',
  ),
  'empty': ('', 'no function get_config'),
  'a number': ('get_config = 3\n', 'no function get_config'),
  'a typo': (BEGIN + '  c.model.chanels = 3\n', 'line 4: AttributeError'),
  'a type': (BEGIN + '  c.steps = "x"\n', 'line 4: TypeError'),
  'a key less': (
    BEGIN + '  c.unlock()\n  del c.model.channels\n  return c\n',
    'line 2: get_config returns a recipe without model.channels',
  ),
  'no section': (
    BEGIN + '  c.unlock()\n  del c.model\n  c.model = 3\n  return c\n',
    'a recipe without model.attention',
  ),
  'wants more': ('def get_config(a):\n  return a\n', 'line 1: .*no :ARGUMENT'),
  'for ever': ('def get_config():\n  return get_config()\n', 'RecursionError'),
  'NUL': ('\0', 'SyntaxError'),
}


@pytest.mark.parametrize('name', BAD_RECIPES)
def test_a_bad_recipe_is_one_line_with_its_place(name, tmp_path):
  text, told = BAD_RECIPES[name]
  path = tmp_path / 'mine.py'
  path.write_text(text)
  with pytest.raises(errors.UserError, match=told) as caught:
    recipe.load(str(path))
  message = str(caught.value)
  assert message.startswith(str(path))
  assert '\n' not in message
  assert len(message) < len(str(path)) + 700


def test_a_file_that_is_no_text_is_no_recipe(tmp_path):
  (tmp_path / 'latin.py').write_bytes(b'x = "\xe9"\n')
  with pytest.raises(errors.UserError, match=r'latin\.py: .*SyntaxError'):
    recipe.load(f'{tmp_path}/latin.py')
  with pytest.raises(errors.UserError, match='is a folder: name a file'):
    recipe.load(str(tmp_path))


def test_an_argument_that_is_not_taken_is_said():
  path = CONFIGS / 'celebahq.py'
  with pytest.raises(errors.UserError, match=r'get_config with :x: too many'):
    recipe.load(f'{path}:x')


def test_a_variant_that_is_not_known_is_said():
  with pytest.raises(errors.UserError, match='known: paper, quick'):
    recipe.load(f'{CONFIGS}/digits.py:fast')


def test_what_a_recipe_prints_is_not_of_the_programs_output(tmp_path, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(BEGIN + '  print("here")\n  return c\n')
  recipe.load(str(path))
  assert capsys.readouterr() == ('', 'here\n')


def test_a_users_own_package_configs_is_not_ours(tmp_path, monkeypatch):
  """It is theirs whole, but for its `base`: that of a recipe is always ours."""
  theirs = tmp_path / 'configs'
  theirs.mkdir()
  (theirs / '__init__.py').write_text('STEPS = 77\n')
  (theirs / 'base.py').write_text('raise ValueError("theirs")\n')
  (theirs / 'helpers.py').write_text('from configs import STEPS\n')
  (theirs / 'digits.py').write_text('SIZE = 5\n')
  (theirs / 'mine.py').write_text(
    'from configs import base, digits, swiss_roll\n'
    'from configs.helpers import STEPS\n'
    'def get_config():\n  c = base.get_config()\n  c.steps = STEPS\n'
    '  c.batch_size = digits.SIZE\n'
    '  c.data = swiss_roll.get_config().data\n  return c\n'
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  module = types.ModuleType('configs')
  monkeypatch.setitem(sys.modules, 'configs', module)
  mine = recipe.load('configs/mine.py')
  assert (mine.steps, mine.batch_size, mine.data.name) == (77, 5, 'points')
  # What we ship is made of what we ship.
  assert recipe.load('configs/ablation.py').data.name == 'digits'
  assert recipe.defaults() == recipe.flatten(base.get_config())
  assert sys.modules['configs'] is module
  assert 'configs.helpers' not in sys.modules


@pytest.mark.parametrize('text', ['raise OSError("a\\nb")\n', 'x = (\n'])
def test_what_is_wrong_with_their_package_is_a_line_too(
  text, tmp_path, monkeypatch
):
  (tmp_path / 'configs.py').write_text(text)
  (tmp_path / 'mine.py').write_text(BEGIN)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=r'mine\.py: line 1: .*Error'):
    recipe.load('mine.py')
  assert recipe.load('configs/digits.py').data.name == 'digits'


def test_the_recipes_are_a_package_of_this_one():
  from ddpm_jax import configs
  from ddpm_jax.configs import base as theirs
  from ddpm_jax.configs import lsun as of_church

  assert sys.modules['ddpm_jax.configs'] is configs
  assert theirs.get_config() == base.get_config()
  assert of_church.get_config('church') == lsun.get_config('church')


def test_our_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert recipe.load('configs/digits.py').data.name == 'digits'
  with pytest.raises(errors.UserError, match='no such config: configs/none'):
    recipe.load('configs/none.py')
  monkeypatch.setattr(recipe, 'CONFIGS', tmp_path / 'configs')
  with pytest.raises(errors.UserError, match=r'not installed.*--config'):
    recipe.shipped('digits')


def test_a_key_is_no_section():
  saved = recipe.to_json(base.get_config())
  with pytest.raises(errors.UserError, match='steps is a section'):
    recipe.from_json(saved | {'steps': {'a': 1}})


@pytest.mark.parametrize(
  'text',
  [
    '(' * 100_000,
    '1' * 100_000,
    '1e999',
    str(10**30),
    '-1',
    '0x',
    '１.５',
    'nan',
    'None',
    'True',
    '{}',
    '[[]]',
    'x' * 1_000_000,
    '__import__("os")',
  ],
)
def test_no_text_is_taken_for_a_number_that_it_is_not(text):
  def take():
    ranges.check(recipe.flatten(overridden(steps=text)))

  with pytest.raises(errors.UserError, match=r'config\.steps=') as caught:
    take()
  assert len(str(caught.value)) < 300
