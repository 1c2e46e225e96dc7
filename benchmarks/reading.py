"""How much one reads to follow a training step, and a sample.

  python -m benchmarks.reading

Counts the files and lines of every function of this repository that is called
between `configs/cifar.py` and the compiler: reading the recipe, checking it,
building the objects, and tracing one training step or one sampler. Further, the
lines of the package, its longest function and its longest file.
"""

import ast
import functools
import pathlib
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax import build
from ddpm_jax import recipe
from ddpm_jax import sampling
from ddpm_jax import validate

ROOT = pathlib.Path(__file__).parents[1]
OURS = (ROOT / 'ddpm_jax', ROOT / 'configs')


def called(work: Callable[[], object]) -> dict[types.CodeType, str]:
  """{code: file} of our functions that `work` calls."""
  found: dict[types.CodeType, str] = {}

  @functools.cache
  def ours(filename: str) -> str | None:
    path = pathlib.Path(filename).resolve()
    here = any(path.is_relative_to(x) for x in OURS)
    return str(path.relative_to(ROOT)) if here else None

  def profile(frame: types.FrameType, event: str, _: object) -> None:
    if event == 'call' and (file := ours(frame.f_code.co_filename)):
      found[frame.f_code] = file

  sys.setprofile(profile)
  try:
    work()
  finally:
    sys.setprofile(None)
  return found


def lines(codes: dict[types.CodeType, str]) -> int:
  """Of these functions; one inside of another counts once."""
  seen = set()
  for code, file in codes.items():
    if code.co_name in ('<module>', '<lambda>'):
      continue
    last = max(x[2] or 0 for x in code.co_lines())
    seen |= {(file, n) for n in range(code.co_firstlineno, last + 1)}
  return len(seen)


def train() -> None:
  config = recipe.resolve('configs/cifar.py', None, {})
  validate.check(config)
  state = jax.eval_shape(lambda: build.init_state(config))
  n = config.batch_size
  batch = {
    'image': jax.ShapeDtypeStruct((n, *recipe.shape(config)), jnp.uint8),
    'index': jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  jax.eval_shape(build.train_step(config, 1), state, batch)


def sample() -> None:
  config = recipe.resolve('configs/cifar.py', None, {})
  validate.check(config)
  params = jax.eval_shape(lambda: build.init_state(config)).params
  rows = {
    'seed': jax.ShapeDtypeStruct((4,), jnp.uint32),
    'index': jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  jax.eval_shape(sampling.sampler(config), params, rows)


def functions(path: pathlib.Path) -> list[tuple[int, str]]:
  return [
    (node.end_lineno - node.lineno + 1, f'{path.relative_to(ROOT)}:{node.name}')
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.end_lineno
  ]


def main() -> None:
  for name, work in (('training step', train), ('sample', sample)):
    codes = called(work)
    files = sorted(set(codes.values()))
    print(f'{name}: {len(files)} files, {lines(codes)} lines')
    print(f'  {" ".join(files)}')
  every = sorted((ROOT / 'ddpm_jax').rglob('*.py'))
  sizes = [(len(p.read_text().splitlines()), p) for p in every]
  print(f'ddpm_jax/: {sum(n for n, _ in sizes)} lines in {len(sizes)} files')
  n, path = max(sizes)
  print(f'longest file: {path.relative_to(ROOT)}, {n} lines')
  n, name = max(x for path in every for x in functions(path))
  print(f'longest function: {name}, {n} lines')


if __name__ == '__main__':
  main()
