"""Handwritten digits, asked for in words: no download, minutes on two cores.

  python -m ddpm_jax.main --config=configs/digits_text.py --workdir=runs/words
  python -m ddpm_jax.main --mode=sample --workdir=runs/words --prompt="a seven"

hardware  2 CPU cores (measured)
hours     TODO
score     TODO
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  c = digits.get_config()
  c.steps = 3000
  c.data.captions = 'classes'
  c.data.names = (
    *('zero', 'one', 'two', 'three', 'four'),
    *('five', 'six', 'seven', 'eight', 'nine'),
  )
  c.data.templates = (
    '{}',
    'a {}',
    'the number {}',
    'the digit {}',
    'a handwritten {}',
    'a picture of a {}',
    'draw a {}',
    'please write {}',
  )
  c.condition.update(name='text', length=32, width=64)
  c.sampler.guidance = 2.0
  return c
