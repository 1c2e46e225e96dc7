"""Measures the figures that README.md and docs/ quote, on this machine.

  python -m benchmarks                      # all: about an hour
  python -m benchmarks first_picture reading --json=figures.json

Prints one table, with the machine; `--json` writes it as JSON. Run it from the
root of a checkout, with nothing else running.

  first_picture  the README's command in a new process, with nothing compiled
                 before, and how good its digits are
  torch_cpu      our images/s over PyTorch's, for three networks (needs torch
                 and diffusers)
  launcher       a train step with launch/cpu.sh and without it, in turns
  accelerator    train step and sampler of configs/cifar.py:bf16 on the GPU or
                 TPU that is here
  reading        the code between a recipe and the compiler
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = sys.executable, '-m', 'ddpm_jax.main'
# What people train: the first recipe, MNIST-like data, and the paper's.
NETWORKS = {
  'digits, 8x8, 64 images': ('configs/digits.py:paper', {}),
  'a network for 28x28, 32 images': (
    'configs/digits.py:paper',
    {
      'data.image_size': 28,
      'model.multipliers': (1, 2, 2),
      'model.attention': (7,),
      'batch_size': 32,
    },
  ),
  'cifar, 32x32, 8 images': ('configs/cifar.py', {'batch_size': 8}),
}
Rows = dict[str, str]  # {what: value with unit}


def run(
  command: tuple[str, ...], **variables: str
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    check=True,
  )


def first_picture() -> Rows:
  import ddpm_jax
  from benchmarks import digits_sweep

  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder, 'run')
    begun, clock = time.perf_counter(), time.time()
    done = run(
      (*PROGRAM, '--config=configs/digits.py', f'--workdir={workdir}'),
      JAX_COMPILATION_CACHE_DIR=f'{folder}/cache',
    )
    seconds = time.perf_counter() - begun
    said = done.stdout + done.stderr
    grids = workdir.glob('samples_*.png')
    first = min(path.stat().st_mtime for path in grids) - clock
    compiled = re.findall(r'compiled [\w ]+ in ([\d.]+) s', said)
    drawn = re.findall(r'drawing: .* in ([\d.]+) s', said)
    last = (workdir / 'metrics.jsonl').read_text().splitlines()[-1]
    took = json.loads(last)
    images = ddpm_jax.load(workdir).sample(256, seed=1)
  frechet, sure, machine, classes = digits_sweep.Judges().score(images).values()
  return {
    'from the command to samples.png': f'{seconds:.0f} s',
    'to the first grid': f'{first:.0f} s',
    'compilation': f'{sum(map(float, compiled)):.0f} s',
    'training': f'{took["seconds"]:.0f} s',
    'drawing 64 images in 1000 steps': f'{drawn[-1]} s',
    'Fréchet distance of 256 samples (classifier)': f'{frechet:.2f}',
    'classifier over 90% sure': f'{sure:.0%}',
    'support vector machine over 80% sure': f'{machine:.0%}',
    'digits that occur': str(classes),
  }


def torch_cpu() -> Rows:
  for name in ('torch', 'diffusers'):
    if not importlib.util.find_spec(name):
      return {'not measured': f'{name} is not installed'}
  from benchmarks import torch_cpu as peers
  from ddpm_jax import recipe

  rows = {}
  for name, (spec, changes) in NETWORKS.items():
    config = recipe.changed_copy(recipe.load(spec), changes)
    for what, took in peers.compare(config).items():
      rows[f'{name}: {what}'] = spread(peers.ratios(took), ' of PyTorch')
  return rows


def launcher() -> Rows:
  rows = {}
  for name, flags in {
    'digits': ('--config=configs/digits.py:paper',),
    'cifar, 8 images': ('--config=configs/cifar.py', '--config.batch_size=8'),
  }.items():
    by_round = []
    for _ in range(3):
      plain, with_it = (
        measured(flags, before)['train step']['value']
        for before in ((), ('bash', 'launch/cpu.sh'))
      )
      by_round.append(plain / with_it)
    rows[f'{name}: speed of a train step with it, over without'] = spread(
      by_round
    )
  return rows


def accelerator() -> Rows:
  if jax.default_backend() == 'cpu':
    return {'not measured': 'no GPU or TPU here'}
  flags = '--config=configs/cifar.py:bf16', '--config.batch_size=512'
  return {
    name: f'{found["value"]:.4g} {found["unit"]}'
    for name, found in measured(flags).items()
  }


def measured(
  flags: tuple[str, ...], before: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
  """Returns the results of `--mode=benchmark`."""
  command = (*before, *PROGRAM, '--mode=benchmark', '--json', *flags)
  found: dict[str, dict[str, Any]] = json.loads(run(command).stdout)['results']
  return found


def reading() -> Rows:
  lines = run((sys.executable, '-m', 'benchmarks.reading')).stdout.splitlines()
  pairs = (x.split(': ', 1) for x in lines if not x.startswith(' '))
  return dict(pairs)


SECTIONS: dict[str, Callable[[], Rows]] = {
  x.__name__: x
  for x in (first_picture, torch_cpu, launcher, accelerator, reading)
}


def spread(values: list[float], unit: str = '') -> str:
  low, middle, high = min(values), statistics.median(values), max(values)
  return f'{middle:.2f} ({low:.2f} to {high:.2f}){unit}'


def machine() -> Rows:
  """The processor and the software."""
  cpu = pathlib.Path('/proc/cpuinfo')
  text = cpu.read_text() if cpu.exists() else ''
  model = re.search(r'model name\s*: (.*)', text)
  flags = re.search(r'flags\s*: (.*)', text)
  wide = ', AVX-512' if flags and 'avx512f' in flags[1] else ''
  return {
    'processor': (model[1] if model else platform.machine()) + wide,
    'cores': str(len(os.sched_getaffinity(0))),
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
  }


def main() -> None:
  p = argparse.ArgumentParser(
    'python -m benchmarks',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument('section', nargs='*', help=', '.join(SECTIONS))
  p.add_argument('--json', type=pathlib.Path, metavar='FILE')
  args = p.parse_args()
  for name in args.section:
    if name not in SECTIONS:
      p.error(f'no section {name!r}: choose of {", ".join(SECTIONS)}')
  found = {'machine': machine()}
  print('| | | |\n|---|---|---|')
  show('machine', found['machine'])
  for name in args.section or SECTIONS:
    found[name] = SECTIONS[name]()
    show(name, found[name])
    if args.json:
      args.json.write_text(json.dumps(found, indent=2, ensure_ascii=False))


def show(name: str, rows: Rows) -> None:
  for what, value in rows.items():
    print(f'| {name} | {what} | {value} |', flush=True)


if __name__ == '__main__':
  main()
