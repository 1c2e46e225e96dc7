"""Your own images: a folder of PNG, JPEG, WebP, AVIF or PPM files.

  python -m ddpm_jax.main --config=configs/folder.py --config.data.path=FOLDER

They are cropped to squares and resized to 64x64; --config.data.image_size=128
makes them larger (a multiple of 8). For one GPU or more; on two CPU cores a
step takes seconds (less with --config.model.channels=32
--config.data.image_size=32).

hardware, hours and score: not measured; they depend on the images
"""

from ml_collections import ConfigDict

from ddpm_jax.configs import cifar


def get_config() -> ConfigDict:
  c = cifar.get_config()
  c.steps = 200_000
  c.batch_size = 64
  c.data.update(name='folder', image_size=64)
  c.optimizer.warmup = 1000
  c.sampler.batch_size = 64
  c.checkpoint.update(every=2000, keep_every=50_000)
  c.log.pictures_every = 10_000
  return c
