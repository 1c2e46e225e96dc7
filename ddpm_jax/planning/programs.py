"""The compiled programs of a recipe, with the shapes of their arguments."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import drawing
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes

IMAGES = 50_000  # Number of samples, as for FID in papers.


class Program(NamedTuple):
  """A program to compile, and how its costs are counted.

  Attributes:
    jitted: The jitted function.
    args: Shapes, dtypes and shardings of the arguments.
    turns: Iterations of its main loop, which the compiler counts once.
    images: Images drawn, or trained on, per call.
  """

  jitted: Any
  args: tuple[Any, ...]
  turns: int
  images: int


def train(config: ConfigDict, mesh: jax.sharding.Mesh) -> Program:
  """The training step, as `trainer.loop` compiles it."""
  init = functools.partial(build.init_state, config)
  state = meshes.abstract_state(init, mesh)
  step = engines.Jit(mesh).compile_step(
    build.train_step(config, meshes.num_shards(mesh)), state
  )
  return Program(
    step, (state, batch(config, mesh)), config.accumulate, config.batch_size
  )


def batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The shapes of a batch of the recipe's data."""
  n = config.batch_size
  dtype = jnp.uint8 if recipe.image_size(config) else jnp.float32
  shapes: dict[str, Any] = {
    'image': jax.ShapeDtypeStruct((n, *recipe.shape(config)), dtype),
    'index': jax.ShapeDtypeStruct((n,), jnp.int32),
    'label': jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  if config.condition.name not in ('', 'label'):
    # With one caption per image.
    shapes['text'] = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((n, 1, *x.shape[1:]), x.dtype),
      conditions(config, n),
    )
  return placed(shapes, mesh)


def conditions(config: ConfigDict, n: int) -> Any:
  """The shapes of n encoded texts."""
  return jax.eval_shape(lambda: build.encoder(config).nothing(n))


def placed(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  sharding = meshes.over_batch(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )


def draw(config: ConfigDict, mesh: jax.sharding.Mesh) -> Program:
  """The sampler, as `drawing.sampler` compiles it."""
  init = functools.partial(build.init_state, config)
  params = meshes.abstract_state(init, mesh).ema_params
  n = drawing.at_a_time(config, mesh, IMAGES)
  shard = functools.partial(meshes.shard_rows, mesh=mesh)
  sampler = sampling.sampler(config, shard=shard)
  rows: dict[str, Any] = {
    'seed': jax.ShapeDtypeStruct((n,), jnp.uint32),
    'index': jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  if config.condition.name not in ('', 'label'):
    rows['condition'] = conditions(config, n)
  compiled = engines.Jit(mesh).jit_map(sampler, params)
  return Program(
    compiled, (params, placed(rows, mesh)), config.sampler.steps, n
  )
