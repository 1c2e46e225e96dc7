"""CelebA-HQ, 256x256, as in Ho et al. 2020; from a folder of images.

  python -m ddpm_jax.main --config=configs/celebahq.py \\
      --config.data.path=FOLDER

FOLDER holds the 30,000 images, in any format and size of at least 256 pixels.

hardware  the paper: a TPU v3-8; ours: not measured
hours     the paper: 63 (0.5M steps at 2.2 per second); ours: not measured
score     the paper prints samples only; ours: not measured
"""

from ml_collections import ConfigDict

from ddpm_jax.configs import cifar


def get_config() -> ConfigDict:
  c = cifar.get_config()
  c.steps = 500_000
  c.batch_size = 64
  c.data.update(name='folder', path='data/celebahq', image_size=256)
  c.model.update(multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
  c.optimizer.learning_rate = 2e-5
  c.model.variance = 'beta_tilde'
  c.sampler.batch_size = 128
  return c
