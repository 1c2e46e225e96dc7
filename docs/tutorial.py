# %% [markdown]
# # From the equations to pictures
#
# [Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2006.11239)
# (Ho, Jain & Abbeel 2020), with every equation beside the function that
# computes it. Points of the plane come first, because there all can be drawn.
# Then the same functions make handwritten digits.
#
# The functions of `ddpm_jax.diffusion` are pure: arrays in, arrays out. So this
# page needs no recipe, no folder and no command: only JAX, Flax, Optax,
# Matplotlib, and scikit-learn for the data. It is a notebook,
# `docs/tutorial.py` in the percent format, which VS Code opens as it is and
# Jupyter after `jupytext --to notebook docs/tutorial.py`. All of it took eight
# minutes on two CPU cores that were busy with other work.

# %%
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets

from ddpm_jax.diffusion import denoiser as denoisers
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion import process
from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion import schedules
from ddpm_jax.models import layers
from ddpm_jax.models import unet

# %% [markdown]
# ## Points of the plane
#
# The data are two half circles, scaled to mean 0 and variance 1. x_0 need not
# be an image: it may be an array of any shape, here (2,), and a batch of them
# has the shape (B, 2).

# %%
moons, _ = datasets.make_moons(10_000, noise=0.06, random_state=0)
moons = jnp.asarray((moons - moons.mean(0)) / moons.std(), jnp.float32)


# %%
def scatter(ax, x, title, color='tab:blue'):
  ax.scatter(x[:, 0], x[:, 1], s=2, c=color, linewidths=0)
  ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect='equal', xticks=[], yticks=[])
  ax.set_title(title, fontsize=10)


# %% [markdown]
# ### The forward process: equations 2 and 4
#
# Noise is added in T = 1000 steps, of the variances β_1, ..., β_T, which rise
# from 0.0001 to 0.02. Each step makes the point a little smaller, so that the
# variance stays 1:
#
#     q(x_t | x_{t-1}) = N(x_t; √(1-β_t) x_{t-1}, β_t I)                   (2)
#
# Many Gaussian steps are one Gaussian step, so that any x_t can be drawn at
# once. With ᾱ_t = (1-β_1) (1-β_2) ... (1-β_t),
#
#     q(x_t | x_0) = N(x_t; √ᾱ_t x_0, (1-ᾱ_t) I)                           (4)
#
# A schedule is a set of tables with T + 1 entries. t is the t of the paper,
# 1 to T, and entry 0 is the data. `process.q_sample` is equation 4:

# %%
schedule = schedules.linear(T=1000, beta_1=1e-4, beta_T=0.02)

t = 100
x0 = moons[:2000]
eps = jax.random.normal(jax.random.key(0), x0.shape)
by_hand = (
  jnp.sqrt(schedule.alpha_bar[t]) * x0
  + jnp.sqrt(1 - schedule.alpha_bar[t]) * eps
)
x_t = process.q_sample(schedule, x0, t, eps)
np.testing.assert_allclose(x_t, by_hand, atol=1e-5)

# %% The moons at six times
fig, axes = plt.subplots(1, 6, figsize=(10, 2), layout='constrained')
for ax, t in zip(axes, (0, 50, 100, 200, 400, 1000), strict=True):
  scatter(ax, process.q_sample(schedule, x0, t, eps), f't = {t}')
plt.show()

# %% [markdown]
# At t = 1000 nothing is left of the moons: ᾱ_T is 0.00004, and x_T is a sample
# of N(0, I), as good as any. To generate is to go from there to the left.
#
# ### The way back if x_0 is known: equations 6 and 7
#
# One step back is Gaussian too, if x_0 is given:
#
#     q(x_{t-1} | x_t, x_0) = N(x_{t-1}; μ̃_t(x_t, x_0), β̃_t I)             (6)
#
#     μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0 + √(1-β_t) (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t
#     β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t                                      (7)
#
# `process.q_posterior` returns both:

# %%
t = 100
beta, alpha_bar = schedule.beta, schedule.alpha_bar
x_t = process.q_sample(schedule, x0, t, eps)
by_hand = (
  jnp.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t]) * x0
  + jnp.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * x_t
)
mean, variance = process.q_posterior(schedule, x0, x_t, t)
np.testing.assert_allclose(mean, by_hand, atol=1e-4)

# %% [markdown]
# Repeated from t = T to 1, it leads any noise to the x_0 that was given. Here
# are five such walks, of which the first coordinate is drawn. At first they are
# noise, and the end is what was wanted:


# %%
@jax.jit
def walk_back(x0, x_T, key):
  """x_T, x_{T-1}, ..., x_0, by equation 6."""

  def step(x_t, t):
    mean, variance = process.q_posterior(schedule, x0, x_t, t)
    z = jax.random.normal(jax.random.fold_in(key, t), x_t.shape)
    return mean + jnp.sqrt(variance) * z, x_t

  return jax.lax.scan(step, x_T, jnp.arange(schedule.T, 0, -1))


ends = moons[:5]
x_T = jax.random.normal(jax.random.key(1), ends.shape)
reached, paths = walk_back(ends, x_T, jax.random.key(2))
np.testing.assert_allclose(reached, ends, atol=1e-5)

# %% Five walks from noise to given points
fig, ax = plt.subplots(figsize=(7, 3), layout='constrained')
ax.plot(range(schedule.T, 0, -1), paths[..., 0], linewidth=0.5)
ax.plot([0] * len(ends), ends[:, 0], 'kx', markersize=9, mew=2, zorder=3)
ax.set(xlim=(1010, -10), xlabel='t', ylabel='first coordinate of x_t')
plt.show()

# %% [markdown]
# Whoever wants a new point has no x_0. So a network is trained to tell it from
# x_t, and its guess x̂_0 takes the place of x_0.
#
# ### The network
#
# Any function (x_t, t) -> output will do, for x_t (B, 2) and t (B,). This one
# is a multilayer perceptron in Flax. `layers.time_embedding` is the sines and
# cosines of t, as for the positions in a transformer. (Their times begin at 0.)


# %%
class MLP(nn.Module):
  channels: int = 128

  @nn.compact
  def __call__(self, x_t, t):
    temb = layers.time_embedding(t - 1, self.channels)
    temb = nn.swish(nn.Dense(self.channels)(temb))
    h = nn.Dense(self.channels)(x_t)
    for _ in range(3):
      h += nn.Dense(self.channels)(nn.swish(h + nn.Dense(self.channels)(temb)))
    return nn.Dense(x_t.shape[-1])(nn.swish(h))


def initial_weights(module, x0):
  x_t, t = x0[:1], jnp.ones(1, int)
  return jax.jit(module.init)(jax.random.key(0), x_t, t)['params']


mlp = MLP()
params = initial_weights(mlp, moons)

# %% [markdown]
# It guesses the noise ε rather than x_0, which is the same by equation 4, for
# one follows from the other:
#
#     x̂_0 = (x_t - √(1-ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t                           (15)
#
# A `Denoiser` is all that losses and samplers need to know: the schedule, the
# network, and how its output is read. By default that is as in the paper: ε is
# predicted, and x̂_0 is clipped to [-1, 1], which is right for images and wrong
# for our points.


# %%
def denoiser_of(module, params, clip=False):
  def network(x_t, t):
    return module.apply({'params': params}, x_t, t)

  return denoisers.Denoiser(schedule, network, clip=clip)


# %% [markdown]
# ### The loss: equation 14
#
# The bound on the likelihood comes down to one squared error for each t
# (equations 5, 8 and 12). Without the weights of its terms it is
#
#     L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²                    (14)
#
# `losses.simple` computes it for each example, as a mean over its dimensions.
# `keys` has one key for each example, for its ε:

# %%
B = 8
denoiser = denoiser_of(mlp, params)
keys = jax.random.split(jax.random.key(3), B)
t = jax.random.randint(jax.random.key(4), (B,), 1, schedule.T + 1)

eps = process.normal(keys, (2,))
x_t = process.q_sample(schedule, moons[:B], t, eps)
by_hand = jnp.mean((eps - denoiser.network(x_t, t)) ** 2, axis=1)
loss = losses.simple(denoiser, keys, moons[:B], t)
np.testing.assert_allclose(loss, by_hand, rtol=1e-4)

# %% [markdown]
# ### Training: Algorithm 1
#
#     1  repeat
#     2    x_0 ~ q(x_0)
#     3    t ~ Uniform({1, ..., T})
#     4    ε ~ N(0, I)
#     5    take a gradient step on ∇_θ ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²
#     6  until converged
#
# The gradient step is Adam's. As in the paper its learning rate rises from 0 at
# first, the gradient is clipped, and a running average of the weights (EMA) is
# what samples in the end.


# %%
def train(module, data, steps, batch_size, ema=0.995):
  """Algorithm 1: the weights, their average, and the loss of every step."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.linear_schedule(0, 1e-3, transition_steps=100)),
  )

  def mean_loss(params, key):
    x0_key, t_key, eps_key = jax.random.split(key, 3)
    x0 = jax.random.choice(x0_key, data, (batch_size,))  # line 2
    t = jax.random.randint(t_key, (batch_size,), 1, schedule.T + 1)  # line 3
    keys = jax.random.split(eps_key, batch_size)  # line 4
    denoiser = denoiser_of(module, params)
    return jnp.mean(losses.simple(denoiser, keys, x0, t))  # line 5

  @jax.jit
  def step(params, average, state, key):
    loss, grads = jax.value_and_grad(mean_loss)(params, key)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 1 - ema)
    return params, average, state, loss

  params = average = initial_weights(module, data)
  state, history = optimizer.init(params), []
  for i in range(steps):
    key = jax.random.fold_in(jax.random.key(5), i)
    params, average, state, loss = step(params, average, state, key)
    history.append(loss)
  return params, average, np.array(history)


# %%
POINT_STEPS = 2000
_, mlp_params, history = train(mlp, moons, POINT_STEPS, batch_size=512)

# %% [markdown]
# How well the noise can be guessed depends on t. The noisiest points are
# little else, and the loss is near 0. Of a point that is nearly clean it cannot
# be said what is noise and what is its place on the moon, and the loss is near
# 1, which is what a guess of 0 costs. The hump is where the moons overlap:

# %% The loss, by training step and by t
B = 1000
keys = jax.random.split(jax.random.key(6), B)
loss_at = jax.jit(
  lambda t: jnp.mean(
    losses.simple(denoiser_of(mlp, mlp_params), keys, moons[:B], jnp.full(B, t))
  )
)
times = [1, *range(10, 1001, 10)]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout='constrained')
axes[0].plot(history, linewidth=0.3)
axes[0].set(xlabel='training step', ylabel='loss', ylim=(0, 1.2))
axes[1].plot(times, [loss_at(t) for t in times])
axes[1].set(xlabel='t', ylim=(0, 1.2))
plt.show()

# %% [markdown]
# ### Sampling: equation 11 and Algorithm 2
#
# The step back of the model is equation 6 with x̂_0 for x_0. Put in terms of ε,
#
#     p(x_{t-1} | x_t) = N(x_{t-1}; μ_θ(x_t, t), σ_t² I)                    (1)
#
#     μ_θ(x_t, t) = (x_t - β_t / √(1-ᾱ_t) ε_θ(x_t, t)) / √(1-β_t)          (11)
#
# with σ_t² = β_t. (β̃_t does about as well.) One such step is
# `samplers.ancestral`, line 4 of Algorithm 2:

# %%
t = 100
N = len(x0)
denoiser = denoiser_of(mlp, mlp_params)
keys = jax.random.split(jax.random.key(7), N)
eps = process.normal(keys, (2,))
x_t = process.q_sample(schedule, x0, t, eps)

eps_hat = denoiser.network(x_t, jnp.full(N, t))
noise = jnp.sqrt(schedule.one_minus_alpha_bar[t])
mean = (x_t - beta[t] / noise * eps_hat) / jnp.sqrt(1 - beta[t])
z = process.normal(keys, (2,))
x_prev, x0_hat = samplers.ancestral(denoiser, keys, x_t, t)
np.testing.assert_allclose(x_prev, mean + jnp.sqrt(beta[t]) * z, atol=1e-4)

# %% [markdown]
#     1  x_T ~ N(0, I)
#     2  for t = T, ..., 1 do
#     3    z ~ N(0, I) if t > 1, else z = 0
#     4    x_{t-1} = μ_θ(x_t, t) + σ_t z
#     5  end for
#     6  return x_0
#
# `samplers.sample` is the loop, as one `lax.scan`. With `times` it takes a part
# of the way, so that we can look at the cloud in between:


# %%
@functools.partial(jax.jit, static_argnames='times')
def part(params, keys, x_t, times):
  denoiser = denoiser_of(mlp, params)
  return samplers.sample(
    samplers.ancestral, denoiser, keys, x_t, times=times
  ).x_0


stops = (1000, 400, 200, 100, 50, 0)
x_T = jax.random.normal(jax.random.key(8), (N, 2))
clouds = [x_T]
for first, last in itertools.pairwise(stops):
  times = range(first, last, -1)
  clouds.append(part(mlp_params, keys, clouds[-1], times))

# %% The cloud, and the predicted x_0
fig, axes = plt.subplots(2, 6, figsize=(10, 3.8), layout='constrained')
for (above, below), x_t, t in zip(axes.T, clouds, stops, strict=True):
  scatter(above, x_t, f'x_t, t = {t}')
  if t > 0:
    x0_hat = denoisers.x0_hat(denoiser, x_t, t)
    scatter(below, x0_hat, f'x̂_0, t = {t}', 'tab:orange')
  else:
    scatter(below, x0, 'data', 'gray')
plt.show()

# %% [markdown]
# Above, x_t goes from noise to the moons, mostly in the last 200 steps. Below,
# x̂_0 is the mean of all x_0 that x_t may have come from: at t = 400 near the
# middle of the data for all, and then more and more decided. At t = 1000 it is
# the network's error that one sees, which equation 15 divides by √ᾱ_T = 0.006.
# It does no harm, for so early a step takes next to nothing from x̂_0.
#
# ### Fewer steps
#
# A step may jump over several t. `denoisers.strided` is the same model on a
# schedule of fewer, larger steps, so that every sampler runs on it unchanged:
# `ancestral`, and DDIM ([Song et al. 2021](https://arxiv.org/abs/2010.02502)),
# which adds no noise, so that x_T decides x_0. The colour of a sample is the
# direction of its x_T:


# %%
@functools.partial(jax.jit, static_argnames=('step', 'steps'))
def in_steps(params, keys, x_T, step, steps):
  denoiser = denoisers.strided(denoiser_of(mlp, params), steps)
  return samplers.sample(step, denoiser, keys, x_T).x_0


# %% Samples in 3 to 100 steps
color = plt.cm.hsv(np.arctan2(x_T[:, 1], x_T[:, 0]) / (2 * np.pi) + 0.5)
fig, axes = plt.subplots(2, 5, figsize=(10, 4.4), layout='constrained')
for row, step in zip(axes, (samplers.ancestral, samplers.ddim), strict=True):
  scatter(row[0], x_T, f'x_T ({step.__name__})', color)
  for ax, steps in zip(row[1:], (3, 10, 30, 100), strict=True):
    x = in_steps(mlp_params, keys, x_T, step, steps)
    scatter(ax, x, f'{steps} steps', color)
plt.show()

# %% [markdown]
# With few steps DDIM is sharper. Its colours stay together: it maps the plane
# to the moons, smoothly, so that a few points are left between them. Those of
# Algorithm 2 are mixed, for its noise has made x_T forgotten.
#
# ## Digits
#
# Nothing above knows that x is a point. Here x_0 is (8, 8, 1): the 1,797
# handwritten digits of scikit-learn, with grays in [-1, 1].

# %%
images = datasets.load_digits().images  # gray [0, 16]
digits = jnp.asarray(images[..., None] / 8 - 1, jnp.float32)


# %%
def show(ax, x, columns, title=''):
  """A grid of images, with a white pixel between them."""
  x = np.pad(x[..., 0], ((0, 0), (0, 1), (0, 1)), constant_values=1)
  x = x.reshape(-1, columns, *x.shape[1:]).swapaxes(1, 2)
  x = x.reshape(x.shape[0] * x.shape[1], -1)
  ax.imshow(x, cmap='gray', vmin=-1, vmax=1)
  ax.set_title(title, fontsize=10)
  ax.axis('off')


# %% Eight digits at six times
times = (0, 50, 100, 200, 400, 1000)
eps = jax.random.normal(jax.random.key(9), (8, 8, 8, 1))
rows = [process.q_sample(schedule, digits[:8], t, eps) for t in times]
fig, axes = plt.subplots(1, 6, figsize=(10, 1.2), layout='constrained')
for ax, x, t in zip(axes, rows, times, strict=True):
  show(ax, x, 4, f't = {t}')
plt.show()

# %% [markdown]
# The network is the paper's U-Net, made small: two levels, 8x8 and 4x4, with
# attention at the lower one. `train` is the function from above.

# %%
network = unet.UNet(
  out_channels=1,
  channels=32,
  multipliers=(1, 2),
  attention=(1,),
  blocks=1,
  groups=8,
  dropout=0.0,
)
DIGIT_STEPS = 1200
raw_params, ema_params, history = train(
  network, digits, DIGIT_STEPS, batch_size=64
)

# %% The loss on digits
fig, ax = plt.subplots(figsize=(5, 2.5), layout='constrained')
ax.semilogy(history, linewidth=0.3)
ax.set(xlabel='training step', ylabel='loss')
plt.show()

# %% [markdown]
# Algorithm 2, in all 1,000 steps. Now x̂_0 is clipped, as in the paper:


# %%
@functools.partial(jax.jit, static_argnames=('step', 'steps'))
def draw(params, keys, x_T, step=samplers.ancestral, steps=1000):
  denoiser = denoiser_of(network, params, clip=True)
  denoiser = denoisers.strided(denoiser, steps)
  return samplers.sample(step, denoiser, keys, x_T, snapshots=10)


B = 48
keys = jax.random.split(jax.random.key(10), B)
x_T = jax.random.normal(jax.random.key(11), (B, 8, 8, 1))
drawn = draw(ema_params, keys, x_T)

# %% Data and samples
fig, axes = plt.subplots(1, 2, figsize=(8, 3.3), layout='constrained')
show(axes[0], digits[100:148], 8, 'data')
show(axes[1], drawn.x_0, 8, 'samples')
plt.show()

# %% [markdown]
# Most of the samples are digits that one can name, and a few are between two of
# them: a classifier of real digits is more than 90% sure of 42 of the 48. Here
# is x̂_0 on the way, at t = 901, 801, ..., 1, with the sample on the right.
# First it is the network's error again, then a gray blur, the mean of all
# digits; then a digit, and its details:

# %% Predictions on the way, and the samples
progress = jnp.stack([*drawn.x0_hats[:, :8], drawn.x_0[:8]], axis=1)
fig, ax = plt.subplots(figsize=(6, 4.4), layout='constrained')
show(ax, progress.reshape(-1, 8, 8, 1), 11)
plt.show()

# %% [markdown]
# Are they copies? Above are samples, and below each the digit of the data that
# is nearest to it: alike, as digits are, and not the same.

# %% Samples and their nearest data
distance = jnp.sum((drawn.x_0[:16, None] - digits[None]) ** 2, axis=(2, 3, 4))
nearest = digits[jnp.argmin(distance, axis=1)]
fig, ax = plt.subplots(figsize=(8, 1.2), layout='constrained')
show(ax, jnp.concatenate([drawn.x_0[:16], nearest]), 16)
plt.show()

# %% [markdown]
# Fewer steps again, with the same x_T. `dpm_solver_pp_2m` is DDIM that looks
# back at the step before, and so makes more of each. Algorithm 2 leaves some
# grain in so few steps, and the other two, which add no noise, agree. On the
# right are the weights without their average, which make other details of the
# same x_T:

# %% Samples in 20 steps
fig, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout='constrained')
few = (
  (ema_params, samplers.ancestral, 'ancestral, 20 steps'),
  (ema_params, samplers.ddim, 'ddim, 20 steps'),
  (ema_params, samplers.dpm_solver_pp_2m, 'dpm_solver_pp_2m, 20 steps'),
  (raw_params, samplers.dpm_solver_pp_2m, 'the same, without EMA'),
)
for ax, (params, step, title) in zip(axes, few, strict=True):
  show(ax, draw(params, keys, x_T, step, 20).x_0[:36], 6, title)
plt.show()

# %% [markdown]
# ## From here on
#
# What this page does by hand, the command does with checkpoints, on all devices
# that there are, and with the recipe `configs/digits.py`:
#
# ```bash
# python -m ddpm_jax.main --config=configs/digits.py
# ```
#
# A sampler, schedule, loss or network of your own has a place there by its
# name: [Your own sampler, schedule, loss, data, network or
# condition](extending.md).
