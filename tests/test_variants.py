"""Every function of mathematics, plain, under jit, on a device, under pmap.

`TRACED` has a row for each: small arrays to call it with, and the shapes and
types that it returns. `HOST` has those that make Python's numbers and NumPy's
tables before anything is traced. A new function needs a row in one of them.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from ddpm_jax import diffusion
from ddpm_jax.compression import codec
from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import editing
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import spacings
from ddpm_jax.diffusion import timesteps
from ddpm_jax.diffusion import training
from ddpm_jax.diffusion import variances
from ddpm_jax.study import two_term

# chex tries pmap where there are several.
pytestmark = pytest.mark.eight_devices

T, B, IMAGE = 8, 4, (2, 3, 1)
D, K = 6, 2  # numbers in an image; losses in a history
S = schedules.linear(T, 0.01, 0.4)


def draw(seed: int, shape: tuple[int, ...] = (B, *IMAGE)) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, B)
GRAYS = jax.random.randint(jax.random.key(1), (B, *IMAGE), 0, 256, jnp.uint8)
X0, OTHER = GRAYS / 127.5 - 1, -GRAYS[::-1] / 127.5 + 1
X_T, EPS, OUT, TWICE = draw(2), draw(3), draw(4), draw(5, (B, 2, 3, 2))
t, TIMES = jnp.int32(5), jnp.array([1, 3, 6, 8], jnp.int32)
MATRIX = draw(6, (D, D)) / 2
ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-3))
LOG_VAR = jnp.array([-1.0, -2.0, -3.0, -4.0])
PREVIOUS = samplers.Previous(OTHER, jnp.full(B, t + 1))
HISTORY = timesteps.History(draw(7, (T, K)) ** 2, jnp.full(T, K + 1))
WORDS = jax.random.bits(KEY, (2,), jnp.uint32)
KL = draw(8, (B, D)) ** 2
CODE = codec.Code(jnp.zeros((2, B), jnp.int32), jnp.zeros((2, B, D), jnp.int32))


def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
  """One matrix, and a little of t."""
  mixed = jnp.tanh(x_t.reshape(len(x_t), D) @ MATRIX).reshape(x_t.shape)
  return mixed * (1 + process.per_example(t, x_t) / T)


def of_variance_too(x_t: jax.Array, t: jax.Array) -> jax.Array:
  out = network(x_t, t)
  return jnp.concatenate([out, out**2 - 1], axis=-1)


def conditional(x_t: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
  shift = process.per_example(context, x_t)
  return of_variance_too(x_t + shift, t)


def loss_fn(params: Any, key: Any, batch: Any, history: Any) -> Any:
  """Losses (B,) of a matrix that takes the noise out of an image."""
  noise = jax.vmap(lambda i: draw_of(key, i))(batch['index'])
  x = batch['image'].reshape(-1, D)
  losses = jnp.mean(((x + noise) @ params['w'] - noise) ** 2, axis=1)
  return losses, (batch['index'], 1 + batch['index'], losses)


def draw_of(key: jax.Array, i: jax.Array) -> jax.Array:
  return jax.random.normal(jax.random.fold_in(key, i), (D,))


def state(history: timesteps.History | None = None) -> training.TrainState:
  params = {'w': MATRIX}
  return training.TrainState.create(
    apply_fn=None,
    params=params,
    ema_params=params,
    tx=ADAM,
    history=history,
  ).replace(step=jnp.int32(3))


def like(x: Any) -> Any:
  """The shapes and types of a tree."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def array(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, kind)


f32, f64, i32, i64, u32, u8 = (
  functools.partial(array, kind)
  for kind in (np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint8)
)
x = f32(B, *IMAGE)


class Row(NamedTuple):
  fn: Callable  # what is not an array is bound: schedule, network, sizes
  args: tuple
  want: Any  # shapes and types


METRICS = {'loss': f32(), 'grad_norm': f32()}
BATCH = {'image': X0, 'index': jnp.arange(B)}
STEP = functools.partial(training.train_step, loss_fn=loss_fn, key=KEY, ema=0.9)
DENOISER = denoisers.Denoiser(S, network)
LEARNED = DENOISER._replace(
  network=of_variance_too, variance=variances.learned_range
)
CONDITIONAL = DENOISER._replace(network=conditional)
JUMPS = codec.jumps(DENOISER, 2)


# name, and after a space what is special about the call.
TRACED = {
  'schedules.log_ratio': Row(
    lambda s, t: schedules.log_ratio(S, s, t), (TIMES - 1, TIMES), f32(B)
  ),
  'schedules.log_snr': Row(lambda t: schedules.log_snr(S, t), (TIMES,), f32(B)),
  'process.normal': Row(lambda keys: process.normal(keys, IMAGE), (KEYS,), x),
  'process.q_sample': Row(
    functools.partial(process.q_sample, S), (X0, TIMES, EPS), x
  ),
  'process.q_step': Row(
    functools.partial(process.q_step, S), (X0, TIMES, EPS), x
  ),
  'process.q_between': Row(
    functools.partial(process.q_between, S), (X0, TIMES // 2, TIMES, EPS), x
  ),
  'process.per_example': Row(process.per_example, (TIMES, X0), i32(B, 1, 1, 1)),
  'process.q_posterior': Row(
    functools.partial(process.q_posterior, S),
    (X0, X_T, TIMES),
    (x, f32(B, 1, 1, 1)),
  ),
  'process.q_sigma': Row(
    lambda *a: process.q_sigma(S, *a, eta=0.5),
    (X0, X_T, TIMES),
    (x, f32(B, 1, 1, 1)),
  ),
  'process.example_mean': Row(process.example_mean, (X0,), f32(B)),
  'denoiser.output': Row(
    functools.partial(denoisers.output, DENOISER), (X_T, t), (x, None)
  ),
  'denoiser.output learned': Row(
    functools.partial(denoisers.output, LEARNED), (X_T, TIMES), (x, x)
  ),
  'denoiser.x0_hat': Row(
    functools.partial(denoisers.x0_hat, DENOISER), (X_T, t), x
  ),
  'denoiser.p_mean_variance': Row(
    functools.partial(
      denoisers.p_mean_variance, DENOISER._replace(predict=predictions.v)
    ),
    (X_T, TIMES),
    (x, f32(B, 1, 1, 1), x),
  ),
  'denoiser.p_mean_variance learned': Row(
    functools.partial(denoisers.p_mean_variance, LEARNED),
    (X_T, TIMES),
    (x, x, x),
  ),
  'denoiser.strided': Row(
    lambda x_t, t: denoisers.x0_hat(denoisers.strided(DENOISER, 3), x_t, t),
    (X_T, TIMES // 3),
    x,
  ),
  'denoiser.split': Row(denoisers.split, (OUT, X_T), (x, None)),
  'denoiser.split learned': Row(denoisers.split, (TWICE, X_T), (x, x)),
  'predictions.posterior_coefs': Row(
    lambda t: predictions.posterior_coefs(S, t), (t,), (f32(), f32())
  ),
  'predictions.posterior_mean': Row(
    functools.partial(predictions.posterior_mean, S), (X0, X_T, t), x
  ),
  'variances.beta': Row(lambda t: variances.beta(S, None, t), (t,), f32()),
  'variances.beta_tilde': Row(
    lambda t: variances.beta_tilde(S, None, t), (t,), f32()
  ),
  'variances.learned': Row(
    functools.partial(variances.learned, S), (OUT, t), x
  ),
  'variances.learned_range': Row(
    functools.partial(variances.learned_range, S), (OUT, t), x
  ),
  'timesteps.uniform': Row(
    lambda key, i: timesteps.uniform(key, i, B, T), (KEY, t), i32()
  ),
  'timesteps.antithetic': Row(
    lambda key, i: timesteps.antithetic(key, i, B, T), (KEY, t), i32()
  ),
  'timesteps.stratified': Row(
    lambda key, i: timesteps.stratified(key, i, B, T), (KEY, t), i32()
  ),
  'timesteps.importance': Row(
    lambda key, i, p: timesteps.importance(key, i, B, T, p),
    (KEY, t, jnp.full(T, 1 / T)),
    i32(),
  ),
  'timesteps.no_history': Row(
    lambda losses: timesteps.no_history(*losses.shape),
    (HISTORY.losses,),
    like(HISTORY),
  ),
  'timesteps.probabilities': Row(timesteps.probabilities, (HISTORY,), f32(T)),
  'timesteps.record': Row(
    timesteps.record,
    (HISTORY, jnp.arange(B), TIMES, LOG_VAR**2),
    like(HISTORY),
  ),
  'samplers.sample': Row(
    lambda keys, x_T: samplers.sample(
      samplers.dpm_solver_pp_2m_sde, DENOISER, keys, x_T, snapshots=2
    ),
    (KEYS, X_T),
    samplers.Sampled(x, f32(2, B, *IMAGE), i32(B)),
  ),
  'guidance.guided': Row(
    lambda x_t, t, given, nothing: guidance.guided(
      *(CONDITIONAL, given, nothing),
      scale=3,
      interval=(0.2, 0.8),
      rescale=0.5,
    ).network(x_t, t),
    (X_T, TIMES, LOG_VAR, jnp.zeros(B)),
    f32(B, 2, 3, 2),
  ),
  'guidance.conditioned': Row(
    lambda x_t, t, given: guidance.conditioned(CONDITIONAL, given).network(
      x_t, t
    ),
    (X_T, TIMES, LOG_VAR),
    f32(B, 2, 3, 2),
  ),
  'likelihood.normal_kl': Row(likelihood.normal_kl, (X0, EPS, X_T, OUT), x),
  'likelihood.decoder_log_prob': Row(
    likelihood.decoder_log_prob, (X0, X_T, OUT), x
  ),
  'likelihood.prior': Row(
    functools.partial(likelihood.prior, S), (X0,), f32(B)
  ),
  'likelihood.terms': Row(
    functools.partial(likelihood.terms, DENOISER),
    (KEYS, X0, TIMES),
    (f32(B), f32(B)),
  ),
  'likelihood.term': Row(
    functools.partial(
      likelihood.term,
      LEARNED._replace(predict=predictions.x0, variance=variances.learned),
    ),
    (X0, X_T, t),
    (f32(B), f32(B)),
  ),
  'likelihood.bound': Row(
    functools.partial(likelihood.bound, DENOISER),
    (KEYS, X0),
    likelihood.Bound(f32(B), i32(B, T), f32(B, T), f32(B, T)),
  ),
  'likelihood.bound drawn': Row(
    functools.partial(likelihood.bound, DENOISER, draws=2),
    (KEYS, X0),
    likelihood.Bound(f32(B), i32(B, 3), f32(B, 3), f32(B, 3)),
  ),
  'two_term.log_normal': Row(two_term.log_normal, (X0, X_T, OUT), x),
  'two_term.bound': Row(
    functools.partial(two_term.bound, DENOISER),
    (KEYS, X0),
    likelihood.Bound(f32(B), i32(B, T), f32(B, T), f32(B, T)),
  ),
  'editing.between': Row(
    lambda first, keys, x_t, t, previous: editing.between(
      samplers.ancestral, first, 2
    )(DENOISER, keys, x_t, t, previous),
    (TIMES, KEYS, X_T, t, PREVIOUS),
    (x, x),
  ),
  'editing.interpolate': Row(
    functools.partial(editing.interpolate, S),
    (X0, OTHER, t, jnp.float32(0.3), EPS),
    x,
  ),
  'editing.inpaint': Row(
    lambda x0, mask, keys, x_t, t, previous: editing.inpaint(
      samplers.dpm_solver_pp_2m, x0, mask
    )(DENOISER, keys, x_t, t, previous),
    (X0[0], X0[0] > 0, KEYS, X_T, t, PREVIOUS),
    (x, x),
  ),
  'editing.invert': Row(
    functools.partial(editing.invert, DENOISER), (KEYS, X0, t), (x, x)
  ),
  'editing.slerp': Row(editing.slerp, (X0, X_T, jnp.float32(0.3)), x),
  'codec.jumps': Row(
    lambda x_t, k: denoisers.x0_hat(codec.jumps(DENOISER, 2), x_t, k),
    (X_T, jnp.int32(2)),
    x,
  ),
  'codec.errors': Row(
    functools.partial(codec.errors, JUMPS), (KEYS, X0), f32(2, B)
  ),
  'codec.run': Row(
    lambda key, x_T, squares, code, x0, sending: codec.run(
      *(JUMPS, key, x_T),
      rules=codec.Rules(log2_candidates=4, group_bits=3.0),
      squares=squares,
      code=code,
      x0=x0,
      sending=sending,
    ),
    (KEY, X_T, jnp.full(2, 0.1), CODE, X0, jnp.array(True)),
    codec.Passed(like(CODE), u8(3, B, *IMAGE), u32(3, B), f32(2, B)),
  ),
  'codec.group_sums': Row(
    codec.group_sums,
    (KL.T,),
    [f32(n, B) for n in (6, 3, 2, 2, 1)],
  ),
  'codec.group_size': Row(lambda kl: codec.group_size(kl, 4.0), (KL,), i32(B)),
  'codec.candidates': Row(
    codec.candidates,
    (WORDS, jnp.arange(5), jnp.arange(D)[:, None]),
    (f32(D, 5), f32(D, 5)),
  ),
  'codec.score': Row(codec.score, (X0, KL[0, 0]), x),
  'codec.choose': Row(
    functools.partial(codec.choose, log2_candidates=4),
    (
      *(WORDS, X0.reshape(B, D), jnp.float32(0.5), jnp.float32(0.7)),
      jnp.array([0, 1, 3, 4]),
    ),
    i32(B, D),
  ),
  'codec.checksum': Row(codec.checksum, (X_T,), u32(B)),
  'pixels.to_float': Row(pixels.to_float, (GRAYS,), x),
  'pixels.to_uint8': Row(pixels.to_uint8, (X_T,), u8(B, *IMAGE)),
  'pixels.random_flip': Row(pixels.random_flip, (KEYS, X0), x),
  'training.split_batch': Row(
    lambda batch: training.split_batch(batch, 2),
    (BATCH,),
    {'image': f32(2, 2, *IMAGE), 'index': i32(2, 2)},
  ),
  'training.train_step': Row(STEP, (state(), BATCH), (like(state()), METRICS)),
  'training.train_step accumulating': Row(
    functools.partial(STEP, accumulate=2),
    (state(HISTORY), BATCH),
    (like(state(HISTORY)), METRICS),
  ),
}
for kind in ('eps', 'x0', 'v', 'mu'):
  predict = getattr(predictions, kind)
  for field in ('target', 'to_x0', 'mean'):
    TRACED[f'predictions.{kind}.{field}'] = Row(
      functools.partial(getattr(predict, field), S), (X0, EPS, t), x
    )
  TRACED[f'predictions.{kind}.log_gain'] = Row(
    functools.partial(predict.log_gain, S), (t,), f32()
  )
for name, denoiser in (
  ('simple', DENOISER._replace(predict=predictions.mu)),
  ('min_snr', DENOISER._replace(predict=predictions.v)),
  ('vlb', DENOISER),
  ('hybrid', LEARNED),
  ('two_noise', DENOISER._replace(predict=predictions.x0)),
  ('one_noise', DENOISER),
  ('x_prev', DENOISER),
):
  TRACED[f'losses.{name}'] = Row(
    functools.partial(getattr(losses, name), denoiser),
    (KEYS, X0, TIMES),
    f32(B),
  )
for name, denoiser, options in (
  ('ancestral', DENOISER, {}),
  ('greedy', DENOISER._replace(predict=predictions.x0), {}),
  ('ddim', DENOISER, dict(eta=0.5)),
  ('dpm_solver_pp_2m', DENOISER, {}),
  ('dpm_solver_pp_2m_sde', DENOISER._replace(clip=False), {}),
  ('heun', DENOISER, {}),
):
  TRACED[f'samplers.{name}'] = Row(
    functools.partial(getattr(samplers, name), denoiser, **options),
    (KEYS, X_T, t, PREVIOUS),
    (x, x),
  )

# Made on the host, in Python and NumPy's float64, before anything is traced:
# what needs the values of sizes and of tables, not just their shapes.
BETA = np.linspace(0.01, 0.4, T)
PARTS = likelihood.Bound(*np.ones((4, B, T), np.float32))._replace(
  prior=np.ones(B, np.float32)
)
TABLES = {
  'schedules.from_beta': Row(schedules.from_beta, (BETA,), like(S)),
  'schedules.zero_terminal_snr': Row(
    schedules.zero_terminal_snr, (S,), like(S)
  ),
  'schedules.stride': Row(
    lambda steps: schedules.stride(S, steps), (3,), like(JUMPS.schedule)
  ),
  'likelihood.totals': Row(
    lambda parts: likelihood.totals(parts, T), (PARTS,), (f64(B),) * 3
  ),
  'codec.expected': Row(
    functools.partial(codec.expected, JUMPS.schedule),
    (np.full(2, 0.1),),
    f64(2),
  ),
  'codec.geometric': Row(codec.geometric, (T, 3), i64(4)),
}
for name in (
  *('linear', 'sqrt_linear', 'scaled_linear', 'quad', 'sqrt', 'const'),
  *('warmup10', 'warmup50', 'jsd', 'su', 'cosine'),
):
  TABLES[f'schedules.{name}'] = Row(getattr(schedules, name), (T,), like(S))
for name in ('linear', 'quadratic', 'quad', 'leading'):
  TABLES[f'spacings.{name}'] = Row(getattr(spacings, name), (T, 3), i64(4))
# The same, of Python alone; with values.
NUMBERS = {
  'schedules.ends_in_noise': Row(schedules.ends_in_noise, (S,), False),
  'variances.is_learned': Row(variances.is_learned, ('learned_range',), True),
  'samplers.nfe': Row(samplers.nfe, ('heun', 3), 5),
  'editing.jumps': Row(editing.jumps, (3, 1, 2), [3, 3, 2, 2, 1]),
  'codec.sizes': Row(codec.sizes, (5,), [1, 2, 3, 4, 6]),
}
HOST = TABLES | NUMBERS


def public() -> Iterator[str]:
  """All public functions of mathematics, those of a prediction too."""
  modules = [codec, two_term]
  for info in pkgutil.iter_modules(diffusion.__path__):
    modules += [importlib.import_module(f'{diffusion.__name__}.{info.name}')]
  for module in modules:
    file = module.__name__.rpartition('.')[2]
    for name, value in vars(module).items():
      if name.startswith('_') or inspect.isclass(value):
        continue
      if isinstance(value, predictions.Prediction):
        for field, part in value._asdict().items():
          if callable(part):
            yield f'{file}.{name}.{field}'
      elif getattr(value, '__module__', '') == module.__name__:
        yield f'{file}.{name}'


def test_every_public_function_has_a_row():
  rows = [name.split()[0] for name in (*TRACED, *HOST)]
  assert sorted(set(rows)) == sorted(public())
  assert not set(TRACED) & set(HOST)


@functools.cache
def plain(name: str) -> Any:
  row = TRACED[name]
  return row.fn(*row.args)


# The same operations, one by one, on the same arrays. The others are compiled
# as one program, which XLA fuses: float32 (6e-8) rounded in another order, some
# tens of times.
SAME = chex.ChexVariantType.WITHOUT_JIT, chex.ChexVariantType.WITH_DEVICE


class Traced(chex.TestCase):
  # Not on NumPy's arrays: the signatures name JAX's.
  @chex.variants(
    with_jit=True, without_jit=True, with_device=True, with_pmap=True
  )
  @parameterized.named_parameters((f'_{name}', name) for name in TRACED)
  def test_all_ways_to_call_it_agree(self, name):
    row, kind = TRACED[name], self.variant.type
    fn = self.variant(row.fn, n_devices=2, reduce_fn=None)
    got = fn(*row.args)
    if kind is chex.ChexVariantType.WITH_PMAP:
      got, other = (jax.tree.map(lambda x, i=i: x[i], got) for i in (0, 1))
      chex.assert_trees_all_equal(got, other)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, row.want)
    chex.assert_tree_all_finite(got)
    if kind in SAME:
      chex.assert_trees_all_equal(got, plain(name))
    else:
      chex.assert_trees_all_close(got, plain(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', TABLES)
def test_a_table_made_on_the_host_has_its_shape_and_is_finite(name):
  row = TABLES[name]
  got = row.fn(*row.args)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, row.want)
  if isinstance(got, schedules.Schedule):  # whose last log may be that of 0
    got = got._replace(log_alpha_bar=got.log_alpha_bar[:-1])
  chex.assert_tree_all_finite(got)


@pytest.mark.parametrize('name', NUMBERS)
def test_a_number_made_on_the_host_is_of_python(name):
  row = NUMBERS[name]
  got = row.fn(*row.args)
  assert got == row.want
  assert type(got) is type(row.want)


@pytest.mark.parametrize('name', HOST)
def test_what_is_made_on_the_host_cannot_be_traced(name):
  """Else it belongs into `TRACED`."""
  row = HOST[name]
  with pytest.raises((TypeError, AttributeError)):
    jax.eval_shape(row.fn, *row.args)
