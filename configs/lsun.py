"""LSUN Bedroom, Church or Cat, 256x256, as in Ho et al. 2020.

  python -m ddpm_jax.main --config=configs/lsun.py:bedroom \\
      --config.data.path=FOLDER

FOLDER holds the images of one category, exported from LSUN's LMDB as files of
any format; the shorter side is resized to 256 pixels, and the centre is
cropped.

bedroom_large is the paper's larger network, with "approximately 256 million
parameters by increasing filter count"; 192 filters instead of 128 give
255,677,955.

hardware  the paper: a TPU v3-8; ours: not measured
hours     bedroom 303, church 152, cat 227 (2.4M, 1.2M, 1.8M steps at the
          paper's 2.2 per second); bedroom_large: not published (1.15M steps);
          ours: not measured
score     FID: bedroom 6.36, bedroom_large 4.90, church 7.89, cat 19.75
          (published); ours: not measured
"""

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.configs import celebahq

STEPS = {
  'bedroom': 2_400_000,
  'bedroom_large': 1_150_000,
  'church': 1_200_000,
  'cat': 1_800_000,
}


def get_config(category: str = 'bedroom') -> ConfigDict:
  if category not in STEPS:
    raise errors.unknown('LSUN category', category, STEPS)
  c = celebahq.get_config()
  c.steps = STEPS[category]
  category, _, large = category.partition('_')
  if large:
    c.model.channels = 192
  c.data.path = f'data/lsun/{category}'
  # The paper flips all but Bedroom; the authors' code does not flip Cat. We
  # follow the paper.
  c.data.flip = category != 'bedroom'
  return c
