"""Makes inception.npz: what others' networks say of the same random weights.

  pip install torch torchvision pytorch-fid torch-fidelity
  python tests/golden/make_inception.py

No weights are kept: `state` draws them anew from their names, random statistics
of the batch norms included. The features are thinned out, to a few kilobytes.
"""

import pathlib
import tempfile
import zlib

import numpy as np

FILE = pathlib.Path(__file__).with_name('inception.npz')
SHAPES = ((2, 32, 32, 3), (1, 340, 290, 3))  # to be enlarged, and to be reduced


def images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES]


def state(shapes):
  """Weights by name, of the shapes given: {name: shape}."""
  return {name: draw(name, shape) for name, shape in shapes.items()}


def draw(name, shape):
  x = np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 0.5
  if name.endswith('conv.weight'):
    # A little more than keeps the size of activations, as the mean is lost.
    x *= np.sqrt(24 / np.prod(shape[1:]))
  elif name.endswith(('bn.weight', 'running_var')):
    x += 1
  elif name == 'fc.weight':
    x *= 0.02
  return x.astype(np.float32)


def thinned(x):
  return x.reshape(len(x), -1)[:, ::17]


def main():
  import pytorch_fid.inception as theirs
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as fidelity

  network = theirs._inception_v3(num_classes=1008, aux_logits=False)
  shapes = {n: x.shape for n, x in network.state_dict().items() if x.ndim}
  weights = {name: torch.tensor(x) for name, x in state(shapes).items()}
  theirs.load_state_dict_from_url = lambda url, progress: weights
  pytorch_fid = theirs.InceptionV3([3]).eval()
  with tempfile.NamedTemporaryFile(suffix='.pth') as file:
    torch.save(weights, file.name)
    original = fidelity.FeatureExtractorInceptionV3(
      'random', ['2048', 'logits_unbiased'], file.name
    )
  spatial = []
  original.Mixed_6d.branch1x1.register_forward_hook(
    lambda module, x, y: spatial.append(y[:, :7].permute(0, 2, 3, 1))
  )

  found = {}
  with torch.no_grad():
    for i, x in enumerate(images()):
      x = torch.tensor(x.transpose(0, 3, 1, 2))
      pool, logits = original(x)
      found[f'tensorflow_{i}_pool'] = pool
      found[f'tensorflow_{i}_spatial'] = spatial.pop()
      found[f'tensorflow_{i}_logits'] = logits
      found[f'pytorch_fid_{i}_pool'] = pytorch_fid(x / 255)[0]
  found = {name: thinned(x.numpy()) for name, x in found.items()}
  np.savez_compressed(FILE, **found)
  for name, x in found.items():
    print(name, x.shape, x.mean(), x.std())


if __name__ == '__main__':
  main()
