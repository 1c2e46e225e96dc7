"""A user's recipe: it imports our base, their helpers and their network."""

from configs import base
from configs import helpers


def get_config():
  c = base.get_config()
  c.steps = helpers.STEPS
  c.data.update(name='digits', image_size=8, channels=1)
  c.model.name = 'own_network.network'
  c.sampler.steps = 2
  return c
