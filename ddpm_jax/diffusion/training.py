"""The training step: pure, and independent of the number of devices."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import Array
from jaxtyping import Float
from jaxtyping import Key

from ddpm_jax.diffusion import timesteps


# Flax annotates `params` as a FrozenDict; here it is any pytree.
@typing.no_type_check
class TrainState(train_state.TrainState):
  """Everything a checkpoint holds; the rest follows from recipe and step."""

  ema_params: Any
  history: timesteps.History | None = None  # if t is drawn by `importance`


def split_batch(batch: Any, n: int) -> Any:
  """(B, ...) -> n parts (n, B/n, ...), each with rows from every device."""
  return jax.tree.map(
    lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch
  )


def train_step(
  state: TrainState,
  batch: dict[str, Any],
  *,
  loss_fn: Callable[..., tuple[Float[Array, 'B'], Any]],
  key: Key[Array, ''],
  ema: float,
  accumulate: int = 1,
  gather: Callable[[Any], Any] = lambda params: params,
  mean: Callable[[Any], Any] = lambda loss_and_grads: loss_and_grads,
  rows: Callable[[Any], Any] = lambda rows: rows,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """One step of Algorithm 1.

  Args:
    state: Parameters, their average (EMA) and the optimiser's state.
    batch: Arrays (B, ...), including `index`, the row of each example in the
      global batch.
    loss_fn: (params, key, batch, history) -> per-example losses (B,), and the
      (index, t, losses) that `timesteps.record` adds to a history.
    key: Key of the run; the step is folded in.
    ema: Decay of the average of the parameters.
    accumulate: Number of parts that the batch is processed in, one by one.
    gather: Gathers arrays that are sharded over devices.
    mean: Averages this device's (loss, gradients) over all devices.
    rows: Collects arrays with one row per example from all devices.

  Returns:
    The next state, and `loss` and `grad_norm` (before clipping).
  """
  key = jax.random.fold_in(key, state.step)
  history = gather(state.history)

  def loss(params: Any, part: Any) -> tuple[Float[Array, ''], Any]:
    losses, seen = loss_fn(gather(params), key, part, history)
    return jnp.mean(losses), seen

  def add(total: Any, part: Any) -> tuple[Any, Any]:
    (value, seen), grads = value_and_grad(state.params, part)
    total = jax.tree.map(lambda a, b: a + b / accumulate, total, (value, grads))
    return total, seen

  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  if accumulate == 1:
    (value, seen), grads = value_and_grad(state.params, batch)
    total = value, grads
  else:
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    total, seen = jax.lax.scan(add, zero, split_batch(batch, accumulate))
    seen = jax.tree.map(jnp.ravel, seen)
  mean_loss, grads = mean(total)
  if history is not None:
    history = timesteps.record(history, *rows(seen))

  apply: Any = state.apply_gradients  # which has no types
  state = apply(grads=grads, history=history)
  state = state.replace(
    ema_params=optax.incremental_update(state.params, state.ema_params, 1 - ema)
  )
  return state, {'loss': mean_loss, 'grad_norm': optax.tree.norm(grads)}
