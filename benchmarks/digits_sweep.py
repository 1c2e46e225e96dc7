"""How good the digits are by recipe: the sweep behind configs/digits.py.

  python -m benchmarks.digits_sweep            # all rows: about an hour
  python -m benchmarks.digits_sweep 'as it is' 'patches, ε'

A row changes some keys of the recipe, is trained to the end, and draws samples
with 20 steps. Two judges, both trained on real digits, read them: a
convolutional network, and a support vector machine with calibrated
probabilities. `sure` is the share of samples of which the network is more than
90% sure, and `svm` that of which the other is more than 80% sure.
"""

import functools
import sys
import time

import jax
import numpy as np
from sklearn import calibration
from sklearn import svm

from ddpm_jax import build
from ddpm_jax import dataset
from ddpm_jax import drawing
from ddpm_jax import recipe
from ddpm_jax.data import pipeline
from ddpm_jax.metrics import classifier as classifiers
from ddpm_jax.metrics import classifier_score
from ddpm_jax.parallel import meshes

SAMPLES = 359
SAMPLER = {'sampler.name': 'dpm_solver_pp_2m_sde', 'sampler.steps': 20}
PAPER = {'model.predict': 'eps', 'schedule.name': 'linear'}
LARGER = {'model.multipliers': (1, 2)}
PATCHES = {
  'model.patch': 2,
  'model.channels': 64,
  'model.multipliers': (1,),
  'optimizer.learning_rate': 2e-3,
  'steps': 1000,
}
ROWS = {
  'as it is': {},
  '1000 steps, learning rate 2e-3': {
    'steps': 1000,
    'optimizer.learning_rate': 2e-3,
  },
  '900 steps, learning rate 4e-3': {
    'steps': 900,
    'optimizer.learning_rate': 4e-3,
  },
  '800 steps, learning rate 2e-3, EMA 0.997': {
    'steps': 800,
    'optimizer.learning_rate': 2e-3,
    'optimizer.ema': 0.997,
  },
  'batch 32, 1700 steps, learning rate 2e-3': {
    'batch_size': 32,
    'steps': 1700,
    'optimizer.learning_rate': 2e-3,
  },
  '24 channels, 1500 steps, learning rate 4e-3': {
    'model.channels': 24,
    'steps': 1500,
    'optimizer.learning_rate': 4e-3,
  },
  'multipliers (1, 2), 700 steps, learning rate 2e-3': LARGER
  | {'steps': 700, 'optimizer.learning_rate': 2e-3},
  'multipliers (1, 2), 700 steps, learning rate 4e-3': LARGER
  | {'steps': 700, 'optimizer.learning_rate': 4e-3},
  'multipliers (1, 2), ε, linear, 800 steps, learning rate 2e-3': LARGER
  | PAPER
  | {'steps': 800, 'optimizer.learning_rate': 2e-3},
  'the same, 1000 steps, constant 1e-3, EMA 0.995': LARGER
  | PAPER
  | {
    'steps': 1000,
    'optimizer.decay': '',
    'optimizer.learning_rate': 1e-3,
    'optimizer.ema': 0.995,
  },
  'patches of 2x2, 64 channels, 1000 steps': PATCHES,
  'patches, ε': PATCHES | {'model.predict': 'eps'},
  'patches, linear': PATCHES | {'schedule.name': 'linear'},
  'patches, ε, linear': PATCHES | PAPER,
}


class Judges:
  """Scores samples by classifiers of the real digits."""

  def __init__(self) -> None:
    data = dataset.source(recipe.load('configs/digits.py'))
    every = data.gather(np.arange(len(data)))
    images, labels = every['image'], every['label']
    learnt, held_out = classifiers.split(len(images))
    self.real = images[learnt], labels[learnt]
    self.held_out = images[held_out]
    self.network = classifiers.train(images, labels, 10)
    machine = svm.SVC(gamma=0.256, C=10)  # 0.001 for values of 0 to 16
    self.machine = calibration.CalibratedClassifierCV(machine, ensemble=False)
    self.machine.fit(self._flat(images), labels)

  @staticmethod
  def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255

  def score(self, images: np.ndarray) -> dict[str, float]:
    """Fréchet distance, shares of which the judges are sure, and classes."""
    found = classifier_score.score(*self.real, images, self.network)
    sure = self.machine.predict_proba(self._flat(images))
    return {
      'frechet': found['frechet_distance'],
      'sure': found['sure_share'],
      'svm': float(np.mean(sure.max(axis=1) > 0.8)),
      'classes': len(set(sure.argmax(axis=1).tolist())),
    }


def trained(config: recipe.ConfigDict) -> tuple[jax.Array, float]:
  """Returns samples of a trained model, and the seconds of its train steps."""
  engine = build.engine(config)
  init = functools.partial(build.init_state, config)
  state = meshes.init_state(init, engine.mesh)
  step = engine.compile_step(build.train_step(config, 1), state)
  batches = pipeline.batches(
    dataset.source(config), batch_size=config.batch_size, seed=config.seed
  )
  state, _ = step(state, engine.put(next(batches)))  # compiles
  jax.block_until_ready(state)
  begun = time.perf_counter()
  for _ in range(config.steps - 1):
    state, metrics = step(state, engine.put(next(batches)))
    jax.block_until_ready(metrics)
  seconds = time.perf_counter() - begun
  few = recipe.changed_copy(config, SAMPLER | {'sampler.batch_size': SAMPLES})
  draw = drawing.sampler(few, engine, SAMPLES)
  images, _ = drawing.gather(draw(state.ema_params, seed=config.seed))
  return images, seconds


def main() -> None:
  wanted = sys.argv[1:] or list(ROWS)
  judges = Judges()
  real = judges.score(judges.held_out)
  print('| | seconds | Fréchet | sure | svm | classes |')
  print('|---|---|---|---|---|---|')
  print(f'| real, held out | | {cells(real)} |', flush=True)
  for name in wanted:
    config = recipe.load('configs/digits.py')
    images, seconds = trained(recipe.changed_copy(config, ROWS[name]))
    print(
      f'| {name} | {seconds:.0f} | {cells(judges.score(images))} |', flush=True
    )


def cells(score: dict[str, float]) -> str:
  frechet, sure, machine, classes = score.values()
  return f'{frechet:.2f} | {sure:.0%} | {machine:.0%} | {classes}'


if __name__ == '__main__':
  main()
