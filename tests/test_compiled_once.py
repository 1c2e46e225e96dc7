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
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import trainer
from ddpm_jax.data import pipeline
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.storage import boards

pytestmark = pytest.mark.eight_devices
BOTH = pytest.mark.parametrize('how', engines.ENGINES)


def start(how):
  """(recipe, engine, state) of a tiny run on two devices."""
  c = digits.get_config('paper')
  changes = {
    'steps': 5,
    'batch_size': 8,
    'model.channels': 4,
    'model.multipliers': (1,),
    'model.attention': (),
    'model.groups': 2,
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
  engine = build.engine(c)
  init = functools.partial(build.init_state, c)
  return c, engine, meshes.init_state(init, engine.mesh)


def traced_once(fn):
  """`fn`, which may be traced only once from here on."""
  chex.clear_trace_counter()

  @chex.assert_max_traces(n=1)
  def once(*args, **kwargs):
    return fn(*args, **kwargs)

  return once


@pytest.fixture
def compiled():
  """A list that grows with every program that XLA compiles, or has cached."""
  seen = []

  def heard(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(heard)
  yield seen
  jax.monitoring.unregister_event_duration_listener(heard)


@BOTH
def test_training_is_one_program_and_moves_nothing_unasked(
  tmp_path, how, compiled
):
  """The loop of `--mode=train`, with its logs, from the first step on.

  Metrics are asked for. (On CPUs that is no copy, and no guard would see it.)
  """
  c, engine, state = start(how)
  step_fn = traced_once(build.train_step(c, 2))
  batches = pipeline.batches(dataset.source(c), batch_size=8, seed=0)
  seen, counts = [], []
  with contextlib.ExitStack() as stack:

    def before(step):
      if step == 0:
        stack.enter_context(jax.transfer_guard('disallow'))
      counts.append(len(compiled))

    trainer.loop(
      *(c, engine, tmp_path, step_fn, state, batches),
      save=lambda state, step: seen.append(step),
      preview=lambda params, suffix: seen.append(suffix),
      stop_asked=before,
      board=boards.Board(),
    )
  assert seen == [2, '_2', 4, '_4', 5]
  assert counts == [counts[0]] + [counts[0] + 1] * 4
  assert len(compiled) == counts[-1]


@BOTH
def test_sampling_is_one_program_and_moves_nothing_unasked(how, compiled):
  """Also where the last batch is not full."""
  c, engine, state = start(how)
  draw = traced_once(sampling.sampler(c))
  size, batch = drawing.drawer(c, engine, 10, draw)
  assert size == 4
  before = len(compiled)
  with jax.transfer_guard('disallow'):
    for first in range(0, 10, size):
      # Another seed is another input, and no other program.
      batch(state.ema_params, seed=first, start=first)
      assert len(compiled) == before + 1


def test_the_guard_sees_what_is_moved_unasked():
  """Else the two tests above would say nothing of it."""
  unasked = pytest.raises(RuntimeError, match='host-to-device')
  with jax.transfer_guard('disallow'), unasked:
    jnp.negative(np.ones(3))
