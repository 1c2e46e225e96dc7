"""Our speed beside PyTorch's, on a CPU.

  pip install torch diffusers
  bash launch/cpu.sh python -m benchmarks.torch_cpu --set=batch_size=8

The U-Net of a recipe (`--config`, by default configs/cifar.py) and diffusers'
UNet2DModel of the same size and weights, in turns. Both compute in float32 on
as many threads, and do the same: forward; the train step (loss_simple, dropout,
gradient, clipping, Adam, EMA); a step of sampling, of which 1000 make an image.
PyTorch is tried with contiguous and with channels_last memory, and the better
one counts.
"""

import argparse
import copy
import functools
import os
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
import diffusers
import jax
import numpy as np
import torch

from ddpm_jax import build
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.diffusion import samplers
from ddpm_jax.interop import diffusers as interop
from ddpm_jax.interop import fields
from ddpm_jax.parallel import meshes

SAMPLING_STEPS = 4  # that are timed, of 1000
WORK = 'forward', 'train step', 'sampling'
OURS = 'ddpm_jax'
PEERS = OURS, 'torch, contiguous', 'torch, channels_last'


def theirs(config, params, memory):
  """The peer of our network, with its weights."""
  table = build.schedule(config)
  unet, _ = fields.from_recipe(recipe.flatten(config), table.beta[1:])
  fitting = {k: v for k, v in unet.items() if not k.startswith('_')}
  model = diffusers.UNet2DModel(**fitting)
  tensors = interop.from_params(params, interop.DIFFUSERS)
  model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()})
  return model.to(memory_format=memory)


def torch_work(config, params, batch, memory):
  """{what: function that does it}, for PyTorch."""
  table = build.schedule(config)
  alpha_bar = torch.tensor(np.asarray(table.alpha_bar))
  model = theirs(config, params, memory)
  ema = copy.deepcopy(model)
  c = config.optimizer
  adam = torch.optim.Adam(model.parameters(), 1e-5, (c.beta_1, c.beta_2), c.eps)
  x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
  x = x.to(memory_format=memory)
  n = len(x)

  def forward():
    with torch.inference_mode():
      return ema.eval()(x, torch.full((n,), 500)).sample

  def train():
    model.train()
    t = torch.randint(1, table.T + 1, (n,))
    eps = torch.randn_like(x)
    ab = alpha_bar[t][:, None, None, None]
    x_t = ab.sqrt() * x + (1 - ab).sqrt() * eps
    loss = torch.nn.functional.mse_loss(model(x_t, t - 1).sample, eps)
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(
        list(ema.parameters()), list(model.parameters()), 1 - c.ema
      )
    return loss

  def sample():
    with torch.inference_mode():
      x_t = torch.randn_like(x)
      for t in range(table.T, table.T - SAMPLING_STEPS, -1):
        eps = ema.eval()(x_t, torch.full((n,), t - 1)).sample
        ab, before = alpha_bar[t], alpha_bar[t - 1]
        beta = 1 - ab / before
        x_0 = ((x_t - (1 - ab).sqrt() * eps) / ab.sqrt()).clamp(-1, 1)
        mean = (before.sqrt() * beta * x_0) / (1 - ab)
        mean += (1 - beta).sqrt() * (1 - before) / (1 - ab) * x_t
        x_t = mean + beta.sqrt() * torch.randn_like(x)
    return x_t

  return {'forward': forward, 'train step': train, 'sampling': sample}


def our_work(config, params, batch):
  """{what: function that does it}, for us, compiled."""
  engine = build.engine(config)
  network = build.network(config)
  n = len(batch)
  begin = functools.partial(build.begin, config)
  state = meshes.init_state(begin, engine.mesh, params)
  step = engine.compile_step(build.train_step(config, engine.mesh.size), state)
  rows = {
    'image': ((batch + 1) * 127.5).astype(np.uint8),
    'index': np.arange(n, dtype=np.int32),
  }
  rows = engine.put(rows)
  apply = jax.jit(lambda x, t: network.apply({'params': params}, x, t))
  x, t = jax.device_put(batch), jax.numpy.full(n, 501)
  p = build.sampler(config)

  @jax.jit
  def draw(index):
    keys, x_T = sampling.noise(config, 0, index)
    denoiser = p.denoiser(params)
    times = range(p.schedule.T, p.schedule.T - SAMPLING_STEPS, -1)
    return samplers.sample(p.step, denoiser, keys, x_T, times=times)[0]

  def train():
    nonlocal state
    state, metrics = step(state, rows)
    return metrics

  work = {
    'forward': lambda: apply(x, t),
    'train step': train,
    'sampling': lambda: draw(rows['index']),
  }
  return {
    what: lambda do=do: jax.block_until_ready(do()) for what, do in work.items()
  }


def seconds(do):
  """Of one call, the second in a row: memory that the others gave back to the
  system costs the first one up to a second to get again."""
  do()
  begun = time.perf_counter()
  do()
  return time.perf_counter() - begun


def compare(
  config: recipe.ConfigDict, rounds: int = 7, only: tuple[str, ...] = WORK
) -> dict[str, dict[str, list[float]]]:
  """Returns {work: {peer: seconds of each round}}, in turns.

  Raises:
    RuntimeError: If the peers' outputs differ.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # XLA takes one a core
  config = config.copy_and_resolve_references()
  config.data.flip = False
  init = functools.partial(build.init_state, config)
  params = jax.jit(init)().params
  rng = np.random.default_rng(0)
  # As after training: nothing is left at 0.
  params = jax.tree.map(
    lambda x: x + 0.01 * rng.normal(size=x.shape).astype(np.float32), params
  )
  shape = config.batch_size, *recipe.shape(config)
  batch = rng.uniform(-1, 1, shape).astype(np.float32)
  formats = torch.contiguous_format, torch.channels_last
  peers = dict(
    zip(
      PEERS,
      [
        our_work(config, params, batch),
        *(torch_work(config, params, batch, memory) for memory in formats),
      ],
      strict=True,
    )
  )
  here = peers[OURS]['forward']()
  for name in PEERS[1:]:
    there = peers[name]['forward']().permute(0, 2, 3, 1).numpy()
    error = np.abs(here - there).max() / np.abs(there).max()
    if error > 1e-4:
      raise RuntimeError(f'{name}: outputs differ by {error:.1e}')
  found = {}
  for what in only:
    found[what] = {name: [] for name in peers}
    for work in peers.values():
      work[what]()  # compiles, or makes its plans
    for _ in range(rounds):
      for name, work in peers.items():
        found[what][name].append(seconds(work[what]))
  return found


def ratios(took: dict[str, list[float]]) -> list[float]:
  """Our images/s over those of PyTorch's better memory format, by round."""
  return [
    min(theirs) / ours for ours, *theirs in zip(*took.values(), strict=True)
  ]


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  p.add_argument('--config', default='configs/cifar.py')
  p.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='KEY=VALUE',
    help='changes a key of the recipe, such as batch_size=8',
  )
  p.add_argument('--rounds', type=int, default=7)
  p.add_argument('--only', choices=WORK, action='append')
  args = p.parse_args()
  config = recipe.load(args.config)
  recipe.override(config, dict(x.split('=', 1) for x in args.set))
  found = compare(config, args.rounds, tuple(args.only or WORK))
  print(f'torch {torch.__version__}, jax {jax.__version__}')
  for what, times in found.items():
    print(
      f'\n{what}, {config.batch_size} images, {args.rounds} rounds in turns'
    )
    for name, took in times.items():
      median = statistics.median(took)
      print(f'  {name:22}{median:8.3f} s ({min(took):.3f}-{max(took):.3f})')
    by_round = ratios(times)
    print(
      f'  ours / the better one: {statistics.median(by_round):.2f} images/s '
      f'({min(by_round):.2f}-{max(by_round):.2f})'
    )


if __name__ == '__main__':
  main()
