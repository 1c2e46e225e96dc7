"""Handwritten digits, 8x8: no download, minutes on two CPU cores.

  python -m ddpm_jax.main --config=configs/digits.py

The data are the 1,797 digits that scikit-learn ships. To be quick, it predicts
v with a cosine schedule, and the learning rate decays (docs/performance.md has
the sweep). `configs/digits.py:paper` trains as the paper does: ε, a linear
schedule and a constant learning rate, with a larger network.

hardware  2 CPU cores (measured)
hours     3 minutes, with compilation and sample images (measured)
score     a classifier of real digits (98% right) is more than 90% sure of 90%
          of 512 samples, and of 97% of real digits; `paper`: 88% of 256
          (measured)
"""

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.configs import base

VARIANTS = 'quick', 'paper'


def get_config(variant: str = 'quick') -> ConfigDict:
  if variant not in VARIANTS:
    raise errors.unknown('variant of the digits', variant, VARIANTS)
  c = base.get_config()
  c.batch_size = 64
  c.data.update(name='digits', image_size=8, channels=1, flip=False)
  c.model.update(
    channels=32,
    multipliers=(1, 1),
    blocks=1,
    attention=(4,),
    groups=8,
    dropout=0.0,
    predict='v',
    variance='beta_tilde',
  )
  c.schedule.name = 'cosine'
  c.loss.t = 'stratified'
  c.steps = 1200
  c.optimizer.update(learning_rate=3e-3, warmup=100, decay='linear', ema=0.99)
  c.checkpoint.update(every=500, keep_every=0)
  c.log.update(every=10, pictures_every=200, pictures_steps=25)
  if variant == 'paper':
    c.steps = 2000
    c.model.update(multipliers=(1, 2), predict='eps', variance='beta')
    c.schedule.name = 'linear'
    c.optimizer.update(learning_rate=1e-3, decay='', ema=0.995)
    c.log.update(pictures_every=0, pictures_steps=0)
  return c
