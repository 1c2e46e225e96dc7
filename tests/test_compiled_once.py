"""The loops of training and sampling: one program, nothing moved unasked."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from ddpm_jax import build
from ddpm_jax import functions
from ddpm_jax import recipe
from ddpm_jax.data import pipeline
from ddpm_jax.jobs import sample
from ddpm_jax.jobs import train
from ddpm_jax.runtime import parallel

BOTH = pytest.mark.parametrize('how', parallel.ENGINES)


def start(how='jit'):
  """(recipe, mesh, state) of a tiny run on two devices."""
  c = digits.get_config()
  changes = {
    'steps': 5,
    'batch_size': 8,
    'model.channels': 8,
    'model.multipliers': (1,),
    'model.groups': 4,
    'schedule.T': 20,
    'sampler.steps': 4,
    'sampler.batch_size': 4,
    'log.every': 2,
    'log.pictures_every': 2,
    'checkpoint.every': 2,
    'parallel.engine': how,
    'parallel.data': 2,
  }
  recipe.override(c, {name: str(value) for name, value in changes.items()})
  mesh = build.mesh(c)
  return (
    c,
    mesh,
    parallel.init_state(functools.partial(functions.init_state, c), mesh),
  )


def traced_once(fn):
  """`fn`, which may be traced only once from here on."""
  chex.clear_trace_counter()

  @chex.assert_max_traces(n=1)
  def once(*args, **kwargs):
    return fn(*args, **kwargs)

  return once


def loop(folder, how, before=lambda step: None, wrap=lambda fn: fn):
  """Runs the loop of `--mode=train`; `before` is called before each step."""
  c, mesh, state = start(how)
  batches = pipeline.batches(build.source(c), batch_size=8, seed=0)
  seen = []
  train.train(
    *(c, mesh, folder, wrap(functions.train_step(c, 2)), state, batches),
    save=lambda state, step: seen.append(('saved', step)),
    pictures=lambda params, suffix: seen.append(('drawn', suffix)),
    stop_asked=before,
  )
  return seen


@BOTH
def test_training_traces_its_step_once(tmp_path, how):
  seen = loop(tmp_path, how, wrap=traced_once)
  assert seen == [
    *(('saved', 2), ('drawn', '_2'), ('saved', 4), ('drawn', '_4')),
    ('saved', 5),
  ]


def test_training_compiles_its_step_once():
  """Nor do the arrays of a state that a step returns lie otherwise."""
  c, mesh, state = start()
  step = parallel.compile_step(functions.train_step(c, 2), mesh, 'jit', state)
  batches = pipeline.batches(build.source(c), batch_size=8, seed=0)
  for _ in range(3):
    state, _ = step(state, parallel.put(next(batches), mesh, 'jit'))
  assert step._cache_size() == 1


@BOTH
def test_sampling_traces_its_program_once(how):
  """Also where the last batch is not full."""
  c, mesh, state = start(how)
  draw = traced_once(functions.sampler(c, seed=0))
  size, batch = sample.drawer(c, mesh, 10, draw)
  assert size == 4
  for first in range(0, 10, size):
    batch(state.ema_params, first)


def test_the_guard_sees_what_is_moved_unasked():
  """Else the two tests below would say nothing."""
  unasked = pytest.raises(RuntimeError, match='host-to-device')
  with jax.transfer_guard('disallow'), unasked:
    jnp.negative(np.ones(3))


def test_training_moves_nothing_unasked(tmp_path):
  """From the first step on, with logs, as the loop of `--mode=train` does it.

  What comes back is asked for too; on CPUs it is no copy, and no guard sees it.
  """
  with contextlib.ExitStack() as stack:

    def guard(step):
      if step == 0:
        stack.enter_context(jax.transfer_guard('disallow'))

    loop(tmp_path, 'jit', before=guard)


def test_sampling_moves_nothing_unasked():
  c, mesh, state = start()
  size, batch = sample.drawer(c, mesh, 8, functions.sampler(c, seed=0))
  with jax.transfer_guard('disallow'):
    for first in range(0, 8, size):
      batch(state.ema_params, first)
