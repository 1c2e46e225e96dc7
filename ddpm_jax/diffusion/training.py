"""The training step: pure, and blind to how many devices there are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
  """What a checkpoint must hold; the rest follows from recipe and step."""

  ema_params: Any


def split_batch(batch: Any, n: int) -> Any:
  """(B, ...) -> n parts (n, B/n, ...), each with rows from every device."""
  return jax.tree.map(
    lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch
  )


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  loss_fn: Callable[..., jax.Array],
  key: jax.Array,
  ema: float,
  accumulate: int = 1,
  gather: Callable[[Any], Any] = lambda params: params,
  mean: Callable[[Any], Any] = lambda loss_and_grads: loss_and_grads,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of Algorithm 1.

  Args:
    state: parameters, their average (EMA), the optimiser's state.
    batch: arrays (B, ...), among them `index`, the row of each example in the
      whole batch.
    loss_fn: (params, key, batch) -> per-example losses (B,).
    key: of the run; the step is folded in.
    ema: decay of the average of the parameters.
    accumulate: parts that the batch is worked through in.
    gather: brings together parameters that are spread over devices.
    mean: (loss, gradients) of this device's examples -> those of all.

  Returns:
    The next state, and `loss` and `grad_norm` (before clipping).
  """
  key = jax.random.fold_in(key, state.step)

  def loss(params: Any, part: Any) -> jax.Array:
    return jnp.mean(loss_fn(gather(params), key, part))

  def add(total: Any, part: Any) -> tuple[Any, None]:
    value = jax.value_and_grad(loss)(state.params, part)
    return jax.tree.map(lambda a, b: a + b / accumulate, total, value), None

  if accumulate == 1:
    total = jax.value_and_grad(loss)(state.params, batch)
  else:
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    total, _ = jax.lax.scan(add, zero, split_batch(batch, accumulate))
  mean_loss, grads = mean(total)

  state = state.apply_gradients(grads=grads)
  state = state.replace(
    ema_params=optax.incremental_update(state.params, state.ema_params, 1 - ema)
  )
  return state, {'loss': mean_loss, 'grad_norm': optax.tree.norm(grads)}
