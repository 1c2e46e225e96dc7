"""What the README and docs/ say is so: commands, keys, links and Python.

All commands are parsed. Those that work on the digits are also run, made
smaller: the quick modes in the ordinary suite, the others with -m slow.
"""

import configparser
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from PIL import Image
from sklearn import datasets

import benchmarks.__main__ as benchmarks
import ddpm_jax
from configs import base
from ddpm_jax import errors
from ddpm_jax import flags as command
from ddpm_jax import main
from ddpm_jax import recipe
from ddpm_jax import validate
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import schedules

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize('page', NAMES)
# A comment before a block of code says why it is not run; it is compiled.
BLOCK = re.compile(r'(<!-- not run: .*? -->\n)?```(\w*)\n(.*?)```', re.S)
EXTENSIONS = r'\.(png|json|jsonl|npz|npy|py|csv|md|sh|safetensors|bin|ckpt)$'


@functools.cache
def text(page):
  return (ROOT / page).read_text()


def blocks(page, language):
  found = [m.groups() for m in BLOCK.finditer(text(page))]
  return [(code, not skip) for skip, said, code in found if said == language]


@functools.cache
def prose(page):
  """The text of a page without its blocks of code."""
  return BLOCK.sub('', text(page))


def inline(page):
  """What stands in backticks in the text, as one line each."""
  return [' '.join(x.split()) for x in re.findall('`([^`]+)`', prose(page))]


def commands(page):
  """Commands of the blocks of a page, as lists of words."""
  lines = '\n'.join(code for code, _ in blocks(page, 'bash'))
  for line in re.sub(r'\\\n\s*', '', lines).splitlines():
    for part in re.split(' && ', line):
      if words := shlex.split(part, comments=True):
        yield words


def ours(words):
  """The flags of a command that is this program; else None."""
  for program in (['ddpm-jax'], ['python', '-m', 'ddpm_jax.main']):
    if words[: len(program)] == program:
      words = words[len(program) :]
      return words[: words.index('>')] if '>' in words else words
  return None


def named(page):
  """Commands that stand in the text."""
  programs = r'(ddpm-jax|python|bash|pip|mkdocs|pre-commit) '
  lines = [x for x in inline(page) if re.match(programs, x)]
  return [shlex.split(part) for x in lines for part in x.split(' && ')]


@functools.cache
def setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def check_command(words):
  """Fails if a program, flag, key, recipe or extra of it does not exist."""
  match words:
    case ['python', '-m', 'pytest', *flags]:
      markers = setup_cfg()['tool:pytest']['markers']
      for flag, value in itertools.pairwise(flags):
        assert flag != '-m' or f'\n{value}:' in markers
    case ['python', '-c', code]:
      compile(code, 'command', 'exec')
    case ['python', '-m', 'ddpm_jax.main', *_] | ['ddpm-jax', *_]:
      check_ours(ours(words))
    case ['python', '-m', 'benchmarks', *sections]:
      assert {x for x in sections if x[0] != '-'} <= set(benchmarks.SECTIONS)
    case ['python', '-m', module, *flags] if module.startswith('benchmarks.'):
      script = (ROOT / f'{module.replace(".", "/")}.py').read_text()
      for flag in flags:
        assert not flag.startswith('--') or flag.partition('=')[0] in script
    case ['python', script, *flags] if script.endswith('.py'):
      script = (ROOT / script).read_text()
      for flag in flags:
        assert not flag.startswith('--') or flag.partition('=')[0] in script
    case ['bash', script, *rest]:
      assert (ROOT / script).exists()
      if rest:
        check_command(rest)
    case ['pip', 'install', *rest]:
      extras = re.findall(r'\.\[(.*?)\]', ' '.join(rest))
      assert set(extras) <= set(setup_cfg()['options.extras_require'])
    case ['docker', 'build', *flags]:
      files = [x.removeprefix('--file=') for x in flags if '--file=' in x]
      assert all((ROOT / file).exists() for file in files)
    case ['docker', 'run', *rest]:
      check_ours(rest[rest.index('ddpm_jax') + 1 :])
    case ['mkdocs' | 'pre-commit' | 'hf', *_]:
      pass
    case _:
      raise AssertionError(f'unknown to this test: {words}')


def check_ours(words):
  args = command.parse(words)
  local = args.config and args.config.startswith('my_')
  if args.config and not local:
    config = recipe.resolve(args.config, None, args.changes)
    validate.unread(config, set(recipe.flatten(config)), args.changes)
  else:
    validate.unread(check_keys(args.changes), set(), {})
    wanted = (args.workdir, args.mode == 'train', getattr(args, 'input', None))
    assert any(wanted), words


def check_keys(changes):
  config = base.get_config()
  config.data.image_size = 8
  recipe.override(config, changes)
  return config


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """A folder that Python looks into, with the files of the pages."""
  monkeypatch.syspath_prepend(tmp_path)
  ((code, _),) = blocks('docs/python/package.md', 'python')
  (tmp_path / 'my_package').mkdir()
  (tmp_path / 'my_package/parts.py').write_text(code)
  step = next(x for x, _ in blocks('README.md', 'python') if 'def ddim' in x)
  (tmp_path / 'my_steps.py').write_text(step)
  yield tmp_path
  for name in ('my_package.parts', 'my_package', 'my_steps'):
    sys.modules.pop(name, None)


@every_page
def test_commands_are_of_flags_keys_and_recipes_that_exist(
  page, parts, monkeypatch
):
  monkeypatch.chdir(ROOT)
  for words in [*commands(page), *named(page)]:
    try:
      check_command(words)
    except Exception as e:
      raise AssertionError(shlex.join(words)) from e


@functools.cache
def all_flags():
  flags = {'--dry-run', '--processes'}  # of launch/
  flags |= {'--json', '--set'}  # of benchmarks/
  flags |= {'--cov', '--signal', '--pty', '--build-arg'}  # of other programs
  for mode in command.modes():
    flags |= set(command.parser(mode)._option_string_actions)
  return flags


@every_page
def test_flags_and_keys_in_the_text_exist(page):
  sections = recipe.to_json(base.get_config())
  for code in inline(page):
    if code.startswith('hf '):
      continue
    for flag, value in re.findall(r'(--[\w.-]+)(?:=(\S+))?', code):
      if not flag.startswith('--config.'):
        assert flag in all_flags(), code
      elif value and not value.isupper():  # such as VALUE
        check_keys({flag.removeprefix('--config.'): value.strip('"')})
    if re.search(EXTENSIONS, code):
      continue
    for key in re.findall(r'(?<![\w-])config\.([a-z_][\w.]*)', code):
      at = sections
      for part in key.split('.'):
        assert part in at, code
        at = at[part]
    section, dot, key = code.partition('=')[0].partition('.')
    if dot and section in sections and re.fullmatch(r'\w+', key):
      assert key in sections[section], code


# Paths of this repository; and those of a run, or of a package in an example.
OURS = re.compile(
  r'(benchmarks|configs|ddpm_jax|launch|docs|tests)/[\w./]+$|[\w/]+/(\w+\.py)?$'
)
THEIRS = re.compile(
  'my_|runs/|tensorboard/|wandb/|checkpoints/|unet/|scheduler/'
)


@every_page
def test_files_and_names_in_the_text_exist(page):
  for code in inline(page):
    path = code.split('::')[0].split(':')[0].removeprefix('--config=')
    if OURS.match(path) and not THEIRS.match(path):
      assert (ROOT / path).exists() or (ROOT / 'ddpm_jax' / path).exists(), code
    if re.fullmatch(r'ddpm_jax(\.\w+)+', code):
      module, _, name = code.rpartition('.')
      try:
        importlib.import_module(code)
      except ImportError:
        assert hasattr(importlib.import_module(module), name), code


def slugs(page):
  """Anchors of the headings of a page, where all makers of them agree."""
  found = re.findall(r'^#+ (.*)$', prose(page), re.M)
  return [
    x.replace('`', '').lower().replace(' ', '-')
    for x in found
    if re.fullmatch(r'[\w `-]+', x)
  ]


@every_page
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]*)\)', prose(page)):
    if re.match('https?:', target):
      continue
    path, _, anchor = target.partition('#')
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.is_file(), target
    if page.startswith('docs/'):  # the site has nothing else
      assert found.resolve().is_relative_to(ROOT / 'docs'), target
    if anchor:
      assert anchor in slugs(str(found.resolve().relative_to(ROOT))), target


def test_the_site_has_all_pages():
  site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())

  def pages(x):
    if isinstance(x, str):
      return [x]
    return [p for v in (x.values() if isinstance(x, dict) else x)
            for p in pages(v)]  # fmt: skip

  listed = [f'docs/{page}' for page in pages(site['nav'])]
  made = 'docs/tutorial.md'  # by docs/notebook.py
  assert sorted(listed) == sorted([*NAMES[1:], made])


def test_the_readme_is_one_page_in_this_order():
  assert len(text('README.md').splitlines()) <= 200
  assert text('README.md').splitlines()[2].startswith('![')
  headings = re.findall(r'^## (.*)$', prose('README.md'), re.M)
  assert headings == [
    'Install',
    'Recipes',
    'Train, resume, sample, evaluate',
    'From Python',
    'Speed',
    'Where things are',
    'Add a sampler',
    'Citation and licence',
  ]


@pytest.mark.parametrize('page', ['README.md', 'docs/recipes.md'])
def test_recipes_are_all_there_are(page):
  table = [x for x in text(page).splitlines() if x.startswith('| `configs/')]
  rows = {re.match(r'\| `(configs/\w+\.py)', row)[1] for row in table}
  files = {f'configs/{p.name}' for p in (ROOT / 'configs').glob('*.py')}
  assert rows == files - {'configs/base.py'}


def test_the_tests_that_the_docs_name_are_there():
  found = re.findall(r'`(tests/\w+\.py)::(\w+)`', ''.join(map(text, NAMES)))
  assert len(found) > 20
  for file, function in found:
    assert f'def {function}(' in (ROOT / file).read_text(), function


# What a snippet may name, made small.
TINY = {
  'steps': 3,
  'batch_size': 16,
  'model': {'name': 'two_convolutions.network'},
  'sampler': {'steps': 2},
  'log': {'every': 1},
  'num_samples': 2,
}
LONG = {'2000': '20'}  # steps, and samples


@pytest.fixture
def here(parts, tiny_run, monkeypatch):
  """A folder with what the pages name: runs, images, recipes, a package."""
  monkeypatch.chdir(parts)
  (parts / 'configs').symlink_to(ROOT / 'configs')
  shutil.copytree(tiny_run[0], parts / 'runs/digits')
  digits = datasets.load_digits().images[:6, ..., None]
  images = np.uint8(digits * 255 / 16)
  np.savez('held_out.npz', images=images)
  os.mkdir('FOLDER')
  for name, image in zip(('seven', 'one', 'mask'), images, strict=False):
    Image.fromarray(image[..., 0]).save(f'{name}.png')
    Image.fromarray(image[..., 0]).save(f'FOLDER/{name}.png')
  Image.fromarray(np.uint8(255 * (images[0, ..., 0] > 99))).save('mask.png')
  return parts


PYTHON = [page for page in NAMES if blocks(page, 'python')]


@pytest.mark.parametrize('page', PYTHON)
def test_python_runs(page, here, monkeypatch):
  """The blocks of a page one after the other, with fewer steps."""
  train = ddpm_jax.train
  monkeypatch.setattr(
    ddpm_jax, 'train', lambda *args, **keys: train(*args, **keys | TINY)
  )
  run_python(page, LONG)


def run_python(page, changes):
  scope = {'__name__': 'page'}
  for code, is_run in blocks(page, 'python'):
    for old, new in changes.items():
      code = re.sub(rf'\b{old}\b', new, code)
    compiled = compile(code, page, 'exec')
    if is_run:
      exec(compiled, scope)
  return scope


@pytest.mark.parametrize('name', ['load', 'train', 'network', 'package'])
def test_a_page_of_python_is_short(name):
  code = ''.join(x for x, _ in blocks(f'docs/python/{name}.md', 'python'))
  assert len([x for x in code.splitlines() if x.strip()]) <= 25


def test_networks_of_nnx_and_functions_have_a_loss_as_the_page_says():
  schedule = schedules.linear(T=100)
  x0, t = jnp.ones((3, 2)), jnp.array([1, 50, 100])
  keys = jax.random.split(jax.random.key(0), 3)

  class Module(nnx.Module):
    def __init__(self, rngs):
      self.out = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x_t, t):
      return self.out(x_t) + t[:, None] / 100

  def function(params, x_t, t):
    return x_t @ params + t[:, None] / 100

  graph, module = nnx.split(Module(nnx.Rngs(0)))
  ways = [
    (module, lambda params: nnx.merge(graph, params)),
    (jnp.eye(2), lambda params: functools.partial(function, params)),
  ]
  for params, network in ways:

    def loss(params, network=network):
      model = denoisers.Denoiser(schedule, network(params))
      return losses.simple(model, keys, x0, t).mean()

    grads = jax.tree.leaves(jax.grad(loss)(params))
    assert any(jnp.any(x != 0) for x in grads)


@pytest.mark.slow
def test_the_network_of_the_page_learns_its_points():
  samples = np.asarray(run_python('docs/python/network.md', {})['samples'])
  near = np.all(np.abs(np.abs(samples) - 0.5) < 0.15, axis=1)
  assert near.mean() > 0.8
  sides = samples[near] > 0
  assert np.abs(sides.mean(0) - 0.5).max() < 0.1


# Flags that make a command small, after its own.
_, *UNET = conftest.UNET
_, *CONVOLUTIONS = conftest.TINY
SMALL = {
  'train': [*CONVOLUTIONS, '--config.steps=3', '--config.sampler.steps=2'],
  'sample': ['--num_samples=2', '--config.sampler.steps=2'],
  'edit': ['--num_samples=2', '--config.sampler.steps=4'],
  'evaluate': ['--config.evaluate.images=4', '--config.evaluate.draws=2'],
  'score': ['--num_samples=20', '--config.sampler.steps=2'],
  'few_steps': ['--num_samples=20'],
  'figures': ['--config.sampler.steps=10'],
  'compress': ['--config.codec.steps=2', '--config.codec.log2_candidates=8'],
  'decompress': [],
  'compare': [],
  'benchmark': CONVOLUTIONS[:-1],  # it draws nothing
}
QUICK = ('train', 'sample', 'edit', 'evaluate')
# Runs of digits: what works on them needs no download.
DIGITS = ('digits', 'words', 'classes', 'eps_fixed', 'parts')
ON_DIGITS = re.compile(
  r'--config=configs/(digits|digits_text|ablation)\b|'
  rf'--workdir=runs(/({"|".join(DIGITS)}))?$'
)


def mode_of(words):
  named = [x.removeprefix('--mode=') for x in words if x.startswith('--mode=')]
  return named[0] if named else 'train'


def works(page, words):
  """Whether a command does, with nothing but the digits."""
  other = re.compile('--inception|--compare|--config.log.wandb')
  # Their runs have names that pages on digits use too.
  if page.startswith('docs/coming_from') or any(map(other.match, words)):
    return False
  return mode_of(words) in SMALL and any(map(ON_DIGITS.match, words))


WORKS = {
  page: found
  for page in NAMES
  if (
    found := [
      x
      for words in commands(page)
      if (x := ours(words)) is not None and works(page, x)
    ]
  )
}


def small(words, args):
  """Flags that make a command small; a run that is resumed stays as it is."""
  if args.mode == 'train' and not args.config:
    return []
  flags = SMALL[args.mode]
  if '--figure=codec' in words:
    return ['--num_samples=2']
  keys = [x for x in words if x.startswith('--config.model.')]
  if any('.model.name=' in x for x in keys):
    return [*flags, *keys]
  # Two convolutions have no such key.
  return [*UNET, *flags[len(CONVOLUTIONS) :]] if keys else flags


def run_commands(page, modes):
  ran = 0
  for words in WORKS[page]:
    args = command.parse(words)
    if args.mode not in modes:
      continue
    if args.mode == 'train' and args.workdir and args.config:
      shutil.rmtree(args.workdir, ignore_errors=True)
    elif str(args.workdir) == 'runs/classes' and not args.workdir.exists():
      label = ['--config.condition.name=label', '--workdir=runs/classes']
      main.run([*conftest.TINY[:1], *SMALL['train'], *label])
    main.run([*words, *small(words, args)])
    ran += 1
  return ran


@pytest.mark.parametrize('page', WORKS)
def test_quick_commands_run(page, here):
  run_commands(page, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize('page', WORKS)
def test_all_commands_run(page, here):
  assert run_commands(page, SMALL) == len(WORKS[page])


def test_the_first_command_runs_as_it_says(here, capfd):
  """Made shorter still; then the one that it prints last."""
  flags = next(x for words in commands('README.md') if (x := ours(words)))
  assert flags == ['--config=configs/digits.py']
  short = ['--config.steps=3', '--config.log.pictures_every=2']
  main.run([*flags, *UNET, *short])
  (workdir,) = (here / 'runs').glob('digits_*')
  table = prose('docs/quickstart.md')
  files = re.findall(r'^\| `(\w+\.\w+)`(?:, `(\w+\.\w+)`)?', table, re.M)
  for name in sum(files, ()):
    name = name.replace('_200', '_2')
    assert not name or (workdir / name).exists(), name
  last = capfd.readouterr().err.strip().splitlines()[-1]
  main.run([*ours(shlex.split(last)), '--num_samples=3'])
  drawn = workdir / 'samples_seed0_step3_ancestral10'
  assert len(list(drawn.glob('*.png'))) == 3
  assert json.loads((drawn / 'samples.json').read_text())
  with pytest.raises(errors.UserError, match='keys differ'):
    main.run([f'--workdir={workdir}', '--config.batch_size=8'])
