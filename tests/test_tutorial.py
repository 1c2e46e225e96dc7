"""The notebook of the docs: its names, its pictures, and what it computes."""

import ast
import re
import resource
import subprocess
import sys
import types

import numpy as np
import pytest
from sklearn import datasets
from sklearn import neural_network

from docs import notebook

TEXT = notebook.TUTORIAL.read_text()
# The points alone, few of them, hardly trained, in hardly any steps.
SHORTER = {
  'moons[:2000]': 'moons[:40]',
  'POINT_STEPS = 2000': 'POINT_STEPS = 3',
  'batch_size=512': 'batch_size=8',
  '(3, 10, 30, 100)': '(2, 3, 4, 5)',
}


def test_its_names_exist():
  tree, scope = ast.parse(TEXT), {}
  imports = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
  exec(compile(ast.Module(imports, []), 'imports', 'exec'), scope)
  used = [
    (scope[node.value.id], node.attr)
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and isinstance(scope.get(node.value.id), types.ModuleType)
  ]
  assert len(used) > 50
  assert [
    f'{m.__name__}.{name}' for m, name in used if not hasattr(m, name)
  ] == []


def test_its_page_shows_the_pictures_that_there_are():
  page = notebook.to_markdown(TEXT)
  shown = re.findall(r'!\[.+\]\(tutorial/(.*)\)', page)
  assert shown == list(dict.fromkeys(shown))
  pictures = list(notebook.PICTURES.iterdir())
  assert sorted(shown) == sorted(path.name for path in pictures)
  assert sum(path.stat().st_size for path in pictures) < 300_000


def test_its_page_has_all_of_its_code():
  page = notebook.to_markdown(TEXT)
  blocks = '\n'.join(re.findall(r'```python\n(.*?)```', page, re.S))
  assert ast.dump(ast.parse(blocks)) == ast.dump(ast.parse(TEXT))


def test_its_points_run(tmp_path):
  """Each equation, by hand, is the function beside it: it says so itself."""
  text, _, _ = TEXT.partition('# ## Digits\n')
  for old, new in SHORTER.items():
    assert text.count(old) == 1, old
    text = text.replace(old, new)
  scope = notebook.run(text, tmp_path)
  assert np.isfinite(scope['clouds'][-1]).all()
  assert len(list(tmp_path.glob('*.png'))) == 5


@pytest.mark.slow
def test_all_of_it_runs_in_ten_minutes_of_two_cores(tmp_path, user_env):
  code = (
    'import pathlib, sys\nimport numpy as np\nfrom docs import notebook\n'
    'folder = pathlib.Path(sys.argv[1])\n'
    'scope = notebook.run(notebook.TUTORIAL.read_text(), folder)\n'
    'np.savez(folder / "x.npz", moons=scope["moons"], '
    'cloud=scope["clouds"][-1], digits=scope["drawn"].x_0)\n'
  )
  command = [sys.executable, '-W', 'error', '-c', code, str(tmp_path)]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(command, env=user_env, check=True)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert seconds < 2 * 600
  drawn = {path.name for path in tmp_path.glob('*.png')}
  assert drawn == {path.name for path in notebook.PICTURES.iterdir()}
  with np.load(tmp_path / 'x.npz') as found:
    assert_on_the_moons(found['cloud'], found['moons'])
    assert_digits(found['digits'])


def assert_on_the_moons(cloud, moons):
  distance = np.linalg.norm(cloud[:, None] - moons[None], axis=2).min(1)
  assert np.quantile(distance, 0.95) < 0.1  # the moons' own width
  # On both of them.
  np.testing.assert_allclose(cloud.mean(0), moons.mean(0), atol=0.1)
  np.testing.assert_allclose(cloud.std(0), moons.std(0), atol=0.1)


def assert_digits(x):
  """A classifier of real digits is sure of most of them."""
  real, labels = datasets.load_digits(return_X_y=True)
  judge = neural_network.MLPClassifier((128,), max_iter=300, random_state=0)
  judge.fit(real / 16, labels)
  sure = judge.predict_proba((x.reshape(len(x), -1) + 1) / 2).max(1) > 0.9
  print(f'sure of {sure.mean():.3f}')
  assert sure.mean() > 0.7
