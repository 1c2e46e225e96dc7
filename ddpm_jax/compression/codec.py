"""An implementation of algorithms 3 and 4: a code for samples of q  (sec. 4.3).

The sender transmits x_s ~ q(x_s | x_t, x_0), for decreasing times, to a
receiver that knows p(x_s | x_t). The code is a Poisson functional
representation (Li & El Gamal 2018): both sides draw the same candidates z_1,
z_2, ... from p, and the sender transmits the i with the largest
(q/p)(z_i) / a_i, where a_1 < a_2 < ... are the arrivals of a Poisson process.
Then z_i is a sample of q, and the mean of log2 i exceeds KL(q ‖ p) by at most
about a bit. The number of candidates is finite, so a sample is accurate only if
its KL is well below log2 of that number, and so the dimensions of an image are
coded in groups of at most `Rules.group_bits`.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import random
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Float64
from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import Key
from jaxtyping import UInt8
from jaxtyping import UInt32

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion import pixels
from ddpm_jax.diffusion import predictions
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion import shapes


class Code(NamedTuple):
  """The transmitted numbers: B images of D dimensions in S steps."""

  size: Int32[Any, 'S B']  # group size, an index into `sizes(D)`
  chosen: Int32[Any, 'S B D']  # candidate, from 0; equal within a group


class Passed(NamedTuple):
  """The code, and the state of both sides after 0, 1, ..., S steps."""

  code: Code
  shown: UInt8[Array, 'S+1 B *shape']  # x̂_0
  check: UInt32[Array, 'S+1 B']  # checksum of x_t
  nats: Float[Array, 'S B']  # KL(q ‖ p) of each step; 0 at the receiver


class Rules(NamedTuple):
  """The parameters that both sides agree on in advance."""

  log2_candidates: int  # per group
  group_bits: float  # largest KL(q ‖ p) of a group


def jumps(denoiser: denoisers.Denoiser, steps: int) -> denoisers.Denoiser:
  """Returns the strided denoiser: `steps` jumps from T to 1, one from 1 to 0.

  x_1 is the last state transmitted. The times are about geometric, so that all
  jumps but the first few take about the same number of bits.

  Raises:
    ValueError: if `steps` is not in 1..T-1.
  """
  T = denoiser.schedule.T
  if T < 2:
    raise ValueError('the codec sends x_1 and needs a schedule.T of 2 or more')
  if not 1 <= steps < T:
    raise ValueError(f'codec.steps must be in 1..{T - 1}, got {steps}')
  # Predicts x_0 whatever the network predicts, and always clips it.
  clipped = denoiser._replace(clip=True)
  predicts_x0 = denoiser._replace(
    network=lambda x_t, t: denoisers.x0_hat(clipped, x_t, t),
    predict=predictions.x0,
  )
  return denoisers.strided(predicts_x0, steps + 1, geometric)


def geometric(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """0, then τ_k = T^(k / (steps-1)) from 1 to T, rounded to distinct times."""
  k = np.arange(steps)
  return np.append(
    0, np.maximum(np.round(T ** (k / (steps - 1))), 1 + k).astype(int)
  )


def errors(
  denoiser: denoisers.Denoiser, keys: shapes.Keys, x0: shapes.Batch
) -> Float[Array, '{denoiser.schedule.T}-1 B']:
  """Mean squares of x_0 - x̂_0 before each step, at x_t ~ q(x_t | x_0).

  They determine the best fixed variance of p: β̃ plus the error of the mean
  (Bao et al. 2022, who average over the data).

  Args:
    denoiser: The result of `jumps`.
    keys: (B,), for the noise.
    x0: (B, ...), in [-1, 1].
  """

  def body(_: None, k: Int[Array, '']) -> tuple[None, shapes.Values]:
    k_eps = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
    eps = process.normal(k_eps, x0.shape[1:])
    x_t = process.q_sample(denoiser.schedule, x0, k, eps)
    x0_hat = denoisers.x0_hat(denoiser, x_t, k)
    return None, process.example_mean(jnp.square(x0 - x0_hat))

  steps = jnp.arange(denoiser.schedule.T, 1, -1)
  return jax.lax.scan(body, None, steps)[1]


def expected(
  schedule: schedules.Schedule, squares: Float[np.ndarray, 'S']
) -> Float64[np.ndarray, 'S']:
  """KL(q ‖ p) of one dimension at each jump, in bits, for given errors.

  Args:
    schedule: The schedule of `jumps`.
    squares: (S,), the `errors`, averaged over examples.
  """
  s = [np.asarray(table, np.float64) for table in schedule]
  beta, alpha_bar, one_minus, beta_tilde = s[:4]
  k = np.arange(schedule.T, 1, -1)
  coef_x0 = np.sqrt(alpha_bar[k - 1]) * beta[k] / one_minus[k]
  return 0.5 * np.log2(1 + coef_x0**2 * squares / beta_tilde[k])


def run(
  denoiser: denoisers.Denoiser,
  key: Key[Array, ''],
  x_T: shapes.Batch,
  *,
  rules: Rules,
  squares: Float[Array, 'S'],
  code: Code,
  x0: shapes.Batch,
  sending: Bool[Array, ''],
) -> Passed:
  """Runs all steps, as the sender or as the receiver.

  One function for both sides, to be compiled once, so that both compute the
  same p to the last bit. Only the sender searches.

  Args:
    denoiser: The result of `jumps`.
    key: Key of the candidates, shared by all images.
    x_T: (B, ...), N(0, I), drawn by both sides. It is not transmitted, an error
      of L_T.
    rules: Parameters of the code.
    squares: (S,), the `errors`, averaged over examples.
    code: The received code; unused by the sender.
    x0: (B, ...), in [-1, 1]; unused by the receiver.
    sending: Whether this is the sender.
  """
  schedule, B, D = denoiser.schedule, len(x_T), int(np.prod(x_T.shape[1:]))
  order = jax.random.permutation(jax.random.fold_in(key, 0), D)
  back = jnp.argsort(order)

  def body(x_t: shapes.Batch, scanned: Any) -> tuple[shapes.Batch, Any]:
    k, square, code = scanned
    x0_hat = denoisers.x0_hat(denoiser, x_t, k)
    mean, var = process.q_posterior(schedule, x0_hat, x_t, k)
    coef_x0, _ = predictions.posterior_coefs(schedule, k)
    var_p = var + jnp.square(coef_x0) * square
    words = jax.random.bits(jax.random.fold_in(key, k), (2,), jnp.uint32)

    def search() -> tuple[Code, shapes.Values]:
      gap = (coef_x0 * (x0 - x0_hat)).reshape(B, D)[:, order]
      kl = likelihood.normal_kl(gap, jnp.log(var), 0.0, jnp.log(var_p))
      size = group_size(kl, rules.group_bits / likelihood.BITS)
      chosen = choose(words, gap, var, var_p, size, rules.log2_candidates)
      return Code(size, chosen), kl.sum(1)

    code, nats = jax.lax.cond(sending, search, lambda: (code, jnp.zeros(B)))
    z, _ = candidates(words, code.chosen, jnp.arange(D))
    x_prev = mean + jnp.sqrt(var_p) * z[:, back].reshape(x_t.shape)
    return x_prev, (code, pixels.to_uint8(x0_hat), checksum(x_t), nats)

  steps = jnp.arange(schedule.T, 1, -1)
  x_1, (code, shown, check, nats) = jax.lax.scan(
    body, x_T, (steps, squares, code)
  )
  last = denoisers.x0_hat(denoiser, x_1, 1)
  return Passed(
    code,
    jnp.concatenate([shown, pixels.to_uint8(last)[None]]),
    jnp.concatenate([check, checksum(x_1)[None]]),
    nats,
  )


def sizes(D: int) -> list[int]:
  """Allowed group sizes: 1, 2, 3, 4, 6, 8, 12, ..., up to the first >= D."""
  every = sorted(m * 2**i for m in (1, 3) for i in range(D.bit_length() + 1))
  return every[: 1 + next(i for i, m in enumerate(every) if m >= D)]


def group_sums(x: Float[Array, 'D *shape']) -> list[Float[Array, '_ *shape']]:
  """Sums over groups along the first axis, for each of `sizes(D)`.

  The last group may be smaller than the others.
  """
  sums = {1: x}
  for m in sizes(len(x))[1:]:
    part = 3 if m == 3 else 2
    less = sums[m // part]
    odd = -len(less) % part
    less = jnp.pad(less, [(0, odd), *[(0, 0)] * (x.ndim - 1)])
    sums[m] = less.reshape(-1, part, *x.shape[1:]).sum(1)
  return list(sums.values())


def group_size(
  kl: Float[Array, 'B D'], most: float | Float[Array, '']
) -> Int32[Array, 'B']:
  """Index of the largest of `sizes(D)` at which no group's KL exceeds `most`.

  0, for groups of 1, if there is none. `kl` is per dimension.
  """
  fits = [jnp.all(x <= most, axis=0) for x in group_sums(kl.T)]
  which = jnp.arange(len(fits), dtype=jnp.int32)[:, None]
  return jnp.max(jnp.where(jnp.stack(fits), which, 0), axis=0)


def candidates(
  words: UInt32[Array, '2'], i: Int[Array, '*#shape'], d: Int[Array, '*#shape']
) -> tuple[Float[Array, '*shape'], Float[Array, '*shape']]:
  """z ~ N(0, 1) and e ~ Exp(1), the i-th of dimension d, elementwise.

  They depend only on i, d and the two words of the step's key, so the receiver
  draws only the chosen candidates.
  """
  i, d = jnp.broadcast_arrays(i.astype(jnp.uint32), d.astype(jnp.uint32))
  bits = random.threefry_2x32(words, jnp.concatenate([i.ravel(), d.ravel()]))
  # (n + 1/2) / 2^23, exact in float32, is neither 0 nor 1.
  u = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
  of_z, of_e = u.reshape(2, *i.shape)
  return np.sqrt(2) * jax.scipy.special.erfinv(2 * of_z - 1), -jnp.log(of_e)


def score(
  log_ratio: Float[Array, '*#shape'], arrival: Float[Array, '*#shape']
) -> Float[Array, '*shape']:
  """log (q/p)(z) / a: the candidate with the highest score is transmitted.

  That candidate is a sample of q, for any q and p, if a are the arrivals of a
  Poisson process and z independent samples of p.
  """
  return log_ratio - jnp.log(arrival)


def choose(
  words: UInt32[Array, '2'],
  gap: Float[Array, 'B D'],
  var: Float[Array, ''] | float,
  var_p: Float[Array, ''] | float,
  size: Int[Array, 'B'],
  log2_candidates: int,
) -> Int32[Array, 'B D']:
  """Index of the chosen candidate of each group, repeated for its dimensions.

  Args:
    words: Two words of the step's key.
    gap: (B, D), the mean of q minus the mean of p.
    var: Variance of q.
    var_p: Variance of p.
    size: (B,), group sizes, as indices into `sizes(D)`.
    log2_candidates: log2 of the number of candidates.
  """
  (B, D), every = gap.shape, sizes(gap.shape[1])
  # For speed, about a megabyte of candidates at a time, along the last axis.
  n = 2 ** min(log2_candidates, max(3, (2**18 // (B * D)).bit_length() - 1))
  # log (q/p)(z) of a dimension, up to a constant shared by all candidates.
  of_square = -0.5 * (var_p / var - 1)
  of_z = (gap * jnp.sqrt(var_p) / var).T[:, :, None]

  def block(carry: Any, first: Int32[Array, '']) -> tuple[Any, None]:
    arrival, best, found = carry
    i = first + jnp.arange(n, dtype=jnp.int32)
    z, waits = candidates(words, i, jnp.arange(D)[:, None])
    arrivals = arrival + jnp.cumsum(waits, axis=1)
    log_ratio = (of_square * jnp.square(z))[:, None] + of_z * z[:, None]
    for j, ratios in enumerate(group_sums(log_ratio)):
      # A group uses the arrivals of its first dimension.
      scores = score(ratios, arrivals[:: every[j], None])
      better = scores > best[j]
      found[j] = jnp.where(better, i[None, None], found[j])
      best[j] = jnp.where(better, scores, best[j])
    return (arrivals[:, -1:], best, found), None

  shapes = [(-(-D // m), B, n) for m in every]
  start = (
    jnp.zeros((D, 1)),
    [jnp.full(shape, -jnp.inf) for shape in shapes],
    [jnp.zeros(shape, jnp.int32) for shape in shapes],
  )
  firsts = jnp.arange(0, 2**log2_candidates, n, dtype=jnp.int32)
  (_, best, found), _ = jax.lax.scan(block, start, firsts)

  def of_dimensions(
    m: int, best: Float[Array, 'groups B n'], found: Int32[Array, 'groups B n']
  ) -> Int32[Array, 'B D']:
    top = jnp.argmax(best, axis=2, keepdims=True)
    index = jnp.take_along_axis(found, top, axis=2)[..., 0]
    return jnp.repeat(index, m, axis=0)[:D].T

  indices = jnp.stack(jax.tree.map(of_dimensions, every, best, found))
  return indices[size, jnp.arange(B)]


def checksum(x: Float32[Array, 'B *shape']) -> UInt32[Array, 'B']:
  """Σ_i (2i + 1) w_i mod 2³² over the 32-bit words w of each example."""
  words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(len(x), -1)
  odd = 2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + 1
  return jnp.sum(odd[None] * words, axis=1, dtype=jnp.uint32)
