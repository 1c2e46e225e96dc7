"""Handwritten digits from a text prompt: no download, minutes on two cores.

  python -m ddpm_jax.main --config=configs/digits_text.py --workdir=runs/words
  python -m ddpm_jax.main --mode=sample --workdir=runs/words --prompt="a seven"

hardware  2 CPU cores (measured)
hours     0.1 (11 minutes of CPU time, measured on busy cores)
score     400 of 400 samples, of ten digits in four phrasings, one of them new,
          are what was asked for, by a classifier that is 99.4% right (measured)
"""

from ml_collections import ConfigDict

from ddpm_jax.configs import digits


def get_config() -> ConfigDict:
  c = digits.get_config('paper')
  c.steps = 3000
  c.data.captions = 'classes'
  c.data.names = (
    *('zero', 'one', 'two', 'three', 'four'),
    *('five', 'six', 'seven', 'eight', 'nine'),
  )
  # Many, of different lengths, so that the network learns the word.
  c.data.templates = (
    *('{}', 'a {}', 'the {}', 'one {}', '{} please', 'number {}'),
    *('the number {}', 'the digit {}', 'a handwritten {}', 'a small {}'),
    *('a picture of a {}', 'an image of the number {}', 'draw a {}'),
    *('please write {}', 'write a {} for me', 'show me the {}'),
    *('could you draw the number {}?', 'I want to see a {}'),
    *('a white {} on black', '{}, written by hand', 'it is a {}'),
  )
  c.condition.update(name='text', length=48, width=64)
  c.sampler.guidance = 2.0
  return c
