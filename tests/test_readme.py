"""What the README says is so."""

import pathlib
import re
import shlex

import conftest
import pytest

from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import validate

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', TEXT, re.S)
COMMANDS = [
  part.strip()
  for language, block in BLOCKS
  if language == 'bash'
  for part in re.split(r'&&|\n', block)
  if 'ddpm_jax.main' in part
]


def parsed(line):
  words = shlex.split(line.partition(' > ')[0])
  assert words[:3] == ['python', '-m', 'ddpm_jax.main']
  return command.split(words[3:])


@pytest.mark.parametrize('words', COMMANDS)
def test_its_commands_name_flags_keys_and_recipes_that_exist(
  words, monkeypatch
):
  monkeypatch.chdir(ROOT)
  flags, changes = parsed(words)
  args = command.parse(flags)
  if args.config:
    config = recipe.resolve(args.config, None, changes)
    validate.unread(config, recipe.flatten(config), changes)
  else:
    assert args.workdir or args.input


def test_its_recipes_are_all_there_are():
  named = {
    name.partition(':')[0] for name in re.findall(r'`(configs/[^`]*)`', TEXT)
  }
  files = {f'configs/{p.name}' for p in (ROOT / 'configs').glob('*.py')}
  assert named == files - {'configs/base.py'}


@pytest.mark.parametrize(
  'key', sorted(set(re.findall(r'--config\.([\w.]+)', TEXT)))
)
def test_keys_in_its_text_exist(key):
  from configs import base

  assert key in recipe.flatten(base.get_config())


@pytest.mark.parametrize('path', re.findall(r'\]\(((?!http)[^)]*)\)', TEXT))
def test_its_links_lead_somewhere(path):
  if path.startswith('#'):
    headings = re.findall(r'^#+ (.*)$', TEXT, re.M)
    slugs = [
      re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings
    ]
    assert path[1:] in slugs
  else:
    assert (ROOT / path).exists()


def test_its_python_runs():
  (code,) = [block for language, block in BLOCKS if language == 'python']
  scope = {}
  exec(code, scope)
  assert scope['x_500'].shape == (8, 8)


def test_the_small_recipe_runs_as_it_says(tmp_path, monkeypatch, capfd):
  """Its first command, made shorter still; then the one printed last."""
  (first, *_) = COMMANDS
  flags, changes = parsed(first)
  assert flags == ['--config=configs/digits.py']
  assert not changes
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  _, *tiny = conftest.UNET
  main.run([*flags, *tiny, '--config.steps=3'])
  (workdir,) = (tmp_path / 'runs').glob('digits_*')
  for name in re.findall(r'^\| `(\w+\.\w+)`', TEXT, re.M):
    assert (workdir / name).exists(), name
  last = capfd.readouterr().err.strip().splitlines()[-1]
  flags, changes = parsed(last)
  main.run([*flags, '--num_samples=3'])
  drawn = workdir / 'samples_seed0_step3_ancestral10'
  assert len(list(drawn.glob('*.png'))) == 3
  with pytest.raises(errors.UserError, match='keys differ'):
    main.run([f'--workdir={workdir}', '--config.batch_size=8'])


def test_the_tests_that_the_docs_name_are_there():
  text = ''.join(path.read_text() for path in (ROOT / 'docs').glob('*.md'))
  named = re.findall(r'`(tests/\w+\.py)::(\w+)`', text)
  assert len(named) > 20
  for file, function in named:
    assert f'def {function}(' in (ROOT / file).read_text(), function
