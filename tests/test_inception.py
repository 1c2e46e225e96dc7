"""Inception-v3: what others' networks say of the same weights and images."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.ndimage
from golden import make_inception

from ddpm_jax import errors
from ddpm_jax.metrics import inception
from ddpm_jax.metrics import weights


def drawn():
  """Random weights of the network that is `inception.Inception` now."""
  shapes = {}
  flat = jax.tree_util.tree_leaves_with_path(inception.parameters())
  for path, leaf in flat:
    *names, kind = (key.key for key in path)
    name, n = '.'.join(names), leaf.shape[-1]
    if name == 'fc':
      shapes['fc.weight'] = leaf.shape[::-1]
    elif kind == 'kernel':
      h, w, m, _ = leaf.shape
      shapes[f'{name}.conv.weight'] = (n, m, h, w)
      for part in ('weight', 'bias', 'running_mean', 'running_var'):
        shapes[f'{name}.bn.{part}'] = (n,)
  return make_inception.state(shapes)


state = functools.cache(drawn)


@pytest.fixture(scope='module')
def params():
  return inception.from_torch(state())


@pytest.fixture(scope='module')
def features(params):
  """By the way in: of each of the golden images, a dictionary of arrays."""
  apply = jax.jit(inception.Inception().apply)

  def of(way):
    images = make_inception.images()
    ready = jnp.concatenate([way(x) for x in images])
    every = apply({'params': params}, ready)._asdict()
    ends = np.cumsum([len(x) for x in images])[:-1]
    parts = {name: np.split(x, ends) for name, x in every.items()}
    return [{name: x[i] for name, x in parts.items()} for i in range(2)]

  ways = inception.tensorflow, inception.pytorch_fid
  return {way: of(way) for way in ways}


@pytest.mark.parametrize('way', [inception.tensorflow, inception.pytorch_fid])
def test_features_are_those_of_torch_fidelity_and_of_pytorch_fid(features, way):
  """Of the same random weights and statistics; see golden/make_inception.py."""
  compared = []
  with np.load(make_inception.FILE) as golden:
    for i, found in enumerate(features[way]):
      for name, x in found.items():
        key = f'{way.__name__}_{i}_{name}'
        if key in golden:
          want, got = golden[key], make_inception.thinned(np.asarray(x))
          # float32 sums in another order.
          assert np.abs(got - want).max() < 1e-4 * want.std(), key
          compared.append(name)
  assert set(compared) >= {'pool'}
  assert len(compared) == {'tensorflow': 6, 'pytorch_fid': 2}[way.__name__]


def test_the_two_ways_in_are_not_the_same(features):
  """Else the comparison above could not tell them apart."""
  a, b = (of[0]['pool'] for of in features.values())
  assert np.abs(a - b).max() > 1e-2 * a.std()


@pytest.mark.parametrize('size', [(32, 32), (5, 7), (299, 299), (400, 310)])
@pytest.mark.parametrize(
  ('way', 'shift'), [('tensorflow', 0), ('pytorch_fid', 0.5)]
)
def test_resizing_is_linear_interpolation_at_those_places(size, way, shift):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
  at = [(np.arange(299) + shift) * n / 299 - shift for n in size]
  want = [
    scipy.ndimage.map_coordinates(
      channel.astype(float),
      np.meshgrid(*at, indexing='ij'),
      order=1,
      mode='nearest',
    )
    for channel in np.moveaxis(image[0], -1, 0)
  ]
  got = np.asarray(getattr(inception, way)(image))[0]
  scale, centre = {'tensorflow': (128, 128), 'pytorch_fid': (127.5, 127.5)}[way]
  # float32 of numbers up to 255
  np.testing.assert_allclose(
    got * scale + centre, np.moveaxis(want, 0, -1), atol=1e-3
  )


def test_weights_of_another_network_are_named():
  good = state()
  without = {k: x for k, x in good.items() if k != 'Mixed_7c.branch1x1.bn.bias'}
  with pytest.raises(ValueError, match='no Mixed_7c'):
    inception.from_torch(without)
  with pytest.raises(ValueError, match=r'fc.weight is \(1000, 2048\)'):
    inception.from_torch(good | {'fc.weight': np.zeros((1000, 2048))})
  with pytest.raises(ValueError, match=r'unknown .*bias'):
    inception.from_torch(good | {'AuxLogits.fc.bias': np.zeros(3)})
  # As they come: they do nothing here.
  more = {'fc.bias': np.zeros(1008), 'a.bn.num_batches_tracked': np.array(0)}
  inception.from_torch(good | more)
  assert weights.digest(good | more) != weights.digest(good)


def test_a_file_of_weights_is_read_or_refused_in_a_line(tmp_path, params):
  path = tmp_path / 'inception.safetensors'
  safetensors.numpy.save_file(state(), path)
  loaded = weights.load(path)
  chex.assert_trees_all_equal(loaded.params, params)
  assert loaded.digest == weights.digest(state())

  path.write_bytes(path.read_bytes()[:1000])
  safetensors.numpy.save_file({'x': np.zeros(3)}, tmp_path / 'x.safetensors')
  (tmp_path / 'x.pth').write_bytes(b'no pickle')
  for name, message in (
    ('none.pth', 'not a file.*pytorch-fid/releases'),
    ('inception.safetensors', 'cannot be read'),
    ('x.safetensors', 'not of the 2015 Inception network .it has no Conv2d_1a'),
    ('x.pth', 'cannot be read|needs the package torch'),
  ):
    with pytest.raises(errors.UserError, match=message) as caught:
      weights.load(tmp_path / name)
    assert '\n' not in str(caught.value)
