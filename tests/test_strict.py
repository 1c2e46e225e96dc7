"""What conftest.py and setup.cfg make an error is one in every test."""

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.models import layers
from ddpm_jax.models import mlp

pytestmark = pytest.mark.smoke

S = schedules.linear(10)


def wrong_noise():
  x0 = jnp.zeros((4, 2, 3))
  return process.q_sample(S, x0, 5, jnp.zeros((4, 2, 1)))


def wrong_keys():
  keys = jax.random.split(jax.random.key(0), 3)
  denoiser = denoisers.Denoiser(S, lambda x, t: x)
  return samplers.greedy(denoiser, keys, jnp.zeros((4, 2)), 5)


def wrong_times():
  return layers.time_embedding(jnp.ones((4, 1), int), 8)


def wrong_input():
  net = mlp.MLP(3, 4)
  return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((4, 3)), S.time)


@pytest.mark.parametrize(
  'call', [wrong_noise, wrong_keys, wrong_times, wrong_input]
)
def test_a_shape_that_the_signature_does_not_allow_is_refused(call):
  with pytest.raises(jaxtyping.TypeCheckError):
    call()


def test_a_broadcast_that_adds_an_axis_is_refused():
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones(3) + jnp.ones((2, 3))


def test_a_nan_is_an_error_where_it_arises(no_nans):
  with pytest.raises(FloatingPointError):
    jnp.log(-jnp.ones(1))


@pytest.mark.parametrize('module', ['ddpm_jax.build', 'jax'])
@pytest.mark.parametrize('kind', [DeprecationWarning, UserWarning])
def test_a_warning_is_an_error(kind, module):
  """So what is deprecated is called in no test, for that warns."""
  with pytest.raises(kind):
    warnings.warn_explicit('some', kind, 'some.py', 1, module)
