"""Handwritten digits, 8x8: no download, minutes on two CPU cores.

  python -m ddpm_jax.main --config=configs/digits.py

The data are the 1,797 digits that scikit-learn ships.

hardware  2 CPU cores (measured)
hours     3 minutes, with compilation and sample images (measured)
score     a classifier of real digits (98% right) is more than 90% sure of 85%
          of 256 samples, and of 92% of real digits (measured)
"""

from ml_collections import ConfigDict

from ddpm_jax.configs import base


def get_config() -> ConfigDict:
  c = base.get_config()
  c.steps = 2000
  c.batch_size = 64
  c.data.update(name='digits', image_size=8, channels=1, flip=False)
  c.model.update(
    channels=32,
    multipliers=(1, 2),
    blocks=1,
    attention=(4,),
    groups=8,
    dropout=0.0,
  )
  c.loss.t = 'stratified'
  c.optimizer.update(learning_rate=1e-3, warmup=100, ema=0.995)
  c.checkpoint.update(every=500, keep_every=0)
  c.log.every = 10
  return c
