"""Measures the cost of a recipe on this machine."""

import functools
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import errors
from ddpm_jax import jsonfile
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax.data import pipeline
from ddpm_jax.data import store
from ddpm_jax.parallel import engines
from ddpm_jax.parallel import meshes
from ddpm_jax.planning import hlo
from ddpm_jax.planning import timing
from ddpm_jax.storage import checkpoint
from ddpm_jax.storage import logs

SECONDS = 4.0  # duration of a measurement
STEPS = 10  # of the sampler, that are timed


class Bench:
  """A training state, its compiled step, and the measurements."""

  def __init__(
    self,
    config: ConfigDict,
    engine: engines.Engine,
    source: store.Source,
    folder: pathlib.Path,
  ):
    self.config, self.engine, self.folder = config, engine, folder
    self.mesh, self.batch = engine.mesh, config.batch_size
    self.batches = pipeline.batches(
      source,
      batch_size=self.batch,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    self.put = lambda: engine.put(next(self.batches))
    init = functools.partial(build.init_state, config)
    self.state = meshes.init_state(init, self.mesh)
    self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
    self.rows = self.put()

  def everything(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs all measurements, and yields (name, result)."""
    for part in (
      self.compilation,
      self.train_step,
      self.peak,
      self.loop,
      self.data,
      self.checkpoints,
      self.sampling,
      self.memory,
    ):
      logs.say(f'measuring: {part.__name__.replace("_", " ")}')
      yield from part()

  def compilation(self) -> Iterator[tuple[str, dict[str, Any]]]:
    cache = jax.config.values['jax_compilation_cache_dir']
    jax.config.update('jax_compilation_cache_dir', str(self.folder / 'xla'))
    compilation_cache.reset_cache()
    for name in ('cold', 'from the cache'):
      jax.clear_caches()
      step: Any = self.engine.compile_step(
        build.train_step(self.config, meshes.num_shards(self.mesh)), self.state
      )
      begun = time.perf_counter()
      lowered = step.lower(self.state, self.rows)
      traced = time.perf_counter() - begun
      took, self.compiled = timing.compile_seconds(lowered)
      yield f'train step, compilation {name}', result(took, 's')
    yield 'train step, tracing', result(traced, 's')
    self.step = step
    jax.block_until_ready(self.one_step())  # loads it from that cache too
    jax.config.update('jax_compilation_cache_dir', cache)
    compilation_cache.reset_cache()

  def one_step(self) -> Any:
    self.state, metrics = self.step(self.state, self.rows)
    return self.state, metrics

  def train_step(self) -> Iterator[tuple[str, dict[str, Any]]]:
    self.took = timing.clock(self.one_step, seconds=2 * SECONDS)
    yield 'train step', seconds(self.took)
    yield 'train step, speed', rate(self.batch, self.took)
    said = hlo.of(self.compiled)
    if said.flops is not None:
      # The compiler counts the body of the loop over microbatches once.
      self.flops = said.flops * self.config.accumulate * self.mesh.size
      yield 'train step, work', result(self.flops, 'FLOP')
      yield 'train step, rate', result(self.flops / self.took.median, 'FLOP/s')
    if said.bytes is not None:
      yield 'train step, traffic a device', result(said.bytes, 'bytes')
    for name in ('arguments', 'temporaries', 'donated', 'peak'):
      yield (
        f'train step, memory a device, {name}',
        result(getattr(said, name), 'bytes'),
      )

  def peak(self) -> Iterator[tuple[str, dict[str, Any]]]:
    best = timing.peaks(self.mesh, self.config.model.dtype, SECONDS / 4)
    for kind, flops in best.items():
      yield f'machine, {kind}', result(flops, 'FLOP/s')
      if hasattr(self, 'flops'):
        share = self.flops / self.took.median / flops
        yield f'train step, share of that ({kind})', result(100 * share, '%')

  def loop(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Like training: new data in each step, metrics read one step late."""
    steps = timing.agreed(max(2, round(SECONDS / 4 / self.took.median)))

    def trained() -> Any:
      unread = None
      for _ in range(steps):
        self.state, metrics = self.step(self.state, self.put())
        if unread:
          jax.device_get(unread)
        unread = metrics
      return self.state

    def alone() -> Any:
      for _ in range(steps):
        self.one_step()
      return self.state

    # Alternates, because the speed of a shared machine changes with time.
    turns = [
      [timing.clock(f, seconds=0, least=1).median for f in (trained, alone)]
      for _ in range(5)
    ]
    over = [(loop - step) / steps for loop, step in turns]
    loop = timing.spread([loop / steps for loop, _ in turns])
    yield 'training loop, speed', rate(self.batch, loop)
    yield 'host, a step, over the step alone', seconds(timing.spread(over))
    placed = timing.clock(self.put, seconds=SECONDS / 8)
    yield 'host, a batch to the device', seconds(placed)
    begun = time.perf_counter()
    self.one_step()
    sent = time.perf_counter() - begun
    jax.block_until_ready(self.state)
    yield 'host, dispatch', result(sent, 's')

  def data(self) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in range(20):
      next(self.batches)  # batches that were prefetched do not count
    number, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS / 2 or number < 20:
      next(self.batches)
      number += 1
    speed = number * self.batch / (time.perf_counter() - begun)
    yield 'input pipeline alone', result(speed, 'images/s')

  def checkpoints(self) -> Iterator[tuple[str, dict[str, Any]]]:
    folder = self.folder / 'checkpoints'
    saver = checkpoint.open(folder, keep=1, keep_every=0)
    blocked, whole = [], []
    for number in range(3):
      begun = time.perf_counter()
      checkpoint.save(
        saver,
        number,
        state=checkpoint.trained(self.state),
        ema=self.state.ema_params,
        data=self.batches.get_state(),
        config=recipe.to_json(self.config),
      )
      blocked.append(time.perf_counter() - begun)
      checkpoint.wait(saver)
      whole.append(time.perf_counter() - begun)
    checkpoint.close(saver)
    yield 'checkpoint, stall', seconds(timing.spread(blocked))
    yield 'checkpoint, until it is on disk', seconds(timing.spread(whole))

  def sampling(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compares a few steps in one scan with one dispatch for each step."""
    config, mesh, steps = self.config, self.mesh, self.config.sampler.steps
    few = min(STEPS, steps)
    size = drawing.at_a_time(config, mesh, self.batch)
    params = self.state.ema_params
    rows = self.engine.put_whole(sampling.rows(0, np.arange(size)))
    if isinstance(self.engine, engines.Jit):
      shard = functools.partial(meshes.shard_rows, mesh=mesh)
      draw = sampling.sampler(config, shard=shard)
      whole = self.engine.jit_map(draw, params)
      took, compiled = timing.compile_seconds(whole.lower(params, rows))
      yield 'sampler, compilation', result(took, 's')
      said = hlo.of(compiled)
      yield 'sampler, memory a device, peak', result(said.peak, 'bytes')

    def steps_in_one(count: int) -> timing.Spread:
      chain = sampling.chain(config, (steps, steps - count))
      draw = self.engine.compile_map(chain, params)
      return timing.clock(lambda: draw(params, rows), seconds=SECONDS)

    scan, one = steps_in_one(few), steps_in_one(1)
    yield 'sampler, a step', result(scan.median / few, 's')
    # Extrapolated to all steps, which run in the same loop.
    yield 'sampler, speed', rate(size * few / steps, scan)
    ratio = one.median * few / scan.median
    yield 'sampler, a dispatch a step, over one scan', result(ratio, 'times')

  def memory(self) -> Iterator[tuple[str, dict[str, Any]]]:
    if found := self.mesh.local_devices[0].memory_stats():
      yield 'device, peak memory', result(found['peak_bytes_in_use'], 'bytes')
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield 'process, peak memory', result(rss, 'bytes')


def data(config: ConfigDict) -> store.Source:
  """The data of a recipe, or images of noise if they are not available."""
  try:
    return dataset.source(config)
  except errors.UserError as error:
    if config.condition.name:
      raise
    logs.say(f'using noise instead of the data: {error}')
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (256, *recipe.shape(config)), np.uint8)
  return store.from_arrays(images, np.full(256, -1, np.int32))


def result(
  value: float, unit: str, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
  spread = {} if low is None else {'low': low, 'high': high}
  return {'value': value, 'unit': unit, **spread}


def rate(images: float, spread: timing.Spread) -> dict[str, Any]:
  middle, high, low = (images / seconds for seconds in spread)
  return result(middle, 'images/s', low, high)


def seconds(spread: timing.Spread) -> dict[str, Any]:
  return result(spread.median, 's', spread.low, spread.high)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads the results from a file written with `--json`.

  Raises:
    UserError: If it is not such a file.
  """
  try:
    found = jsonfile.read(path)['results']
    return {name: {'value': float(x['value'])} for name, x in found.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.UserError(
      f'--compare={path} is not what --mode=benchmark --json prints ({error})'
    ) from None


def table(
  about: dict[str, Any],
  results: dict[str, dict[str, Any]],
  earlier: dict[str, Any],
) -> str:
  """One line per result: name, value, range, and ratio to `earlier`."""
  lines = [', '.join(f'{key} {value}' for key, value in about.items() if value)]
  for name, now in results.items():
    line = f'{name:45}{shown(now["value"], now["unit"]):>18}'
    if 'low' in now:
      low, high = (shown(now[key], now['unit']) for key in ('low', 'high'))
      line += f'  ({low} to {high})'
    if before := earlier.get(name, {}).get('value'):
      line = f'{line:95}{now["value"] / before:6.2f} x earlier'
    lines.append(line.rstrip())
  return '\n'.join(lines)


def shown(value: float, unit: str) -> str:
  if unit == 'bytes':
    return f'{value / 2**20:.1f} MiB'
  if unit.startswith('FLOP'):
    return f'{value / 1e9:.1f} G{unit}'
  if unit == 's' and abs(value) < 0.1:
    return f'{1e3 * value:.2f} ms'
  return f'{value:.3g} {unit}' if abs(value) < 1000 else f'{value:.0f} {unit}'
