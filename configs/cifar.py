"""CIFAR-10, 32x32, as in Ho et al. 2020.

  python -m ddpm_jax.main --config=configs/cifar.py

The data set (170 MB) is downloaded once; on a machine without a network, put
cifar-10-binary.tar.gz into a folder and set --config.data.path to it.

How to score it as the paper does: docs/evaluation.md.

`configs/cifar.py:bf16` computes activations in bfloat16, for GPUs and TPUs;
weights, loss and sampler stay in float32. docs/performance.md has its speed.

hardware  the paper: a TPU v3-8; ours: not measured
hours     the paper: 10.6 (800k steps at 21 per second); ours: not measured
score     FID 3.17, IS 9.46, ≤ 3.75 bits/dim (published, EMA, 50,000 samples);
          ours: not measured
"""

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.configs import base

DTYPES = {'paper': 'float32', 'bf16': 'bfloat16'}


def get_config(variant: str = 'paper') -> ConfigDict:
  if variant not in DTYPES:
    raise errors.unknown('variant of CIFAR-10', variant, DTYPES)
  c = base.get_config()
  c.steps = 800_000
  c.batch_size = 128
  c.data.update(
    name='tfds', tfds='cifar10', image_size=32, channels=3, flip=True
  )
  c.model.update(
    name='unet',
    predict='eps',
    variance='beta',  # "fixed large"
    channels=128,
    multipliers=(1, 2, 2, 2),
    blocks=2,
    attention=(16,),
    groups=32,
    dropout=0.1,
    dtype=DTYPES[variant],
  )
  c.schedule.update(name='linear', T=1000, beta_1=1e-4, beta_T=0.02)
  c.loss.update(name='simple', t='uniform')
  c.optimizer.update(
    learning_rate=2e-4,
    warmup=5000,
    beta_1=0.9,
    beta_2=0.999,
    eps=1e-8,
    clip=1.0,
    ema=0.9999,
  )
  c.sampler.update(name='ancestral', clip=True, weights='ema')
  c.checkpoint.update(every=5000, keep=3, keep_every=100_000)
  return c
