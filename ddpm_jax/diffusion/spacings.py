"""The times that a sampler visits when it takes fewer than T steps.

`config.sampler.spacing` names one of `__all__`. Each returns τ_0, ..., τ_steps,
with 0 = τ_0 < τ_1 < ... < τ_steps ≤ T.
"""

import numpy as np
from jaxtyping import Int

__all__ = ['leading', 'linear', 'quad', 'quadratic']


def linear(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = T k/steps: even, starting at T ("trailing" in Lin et al. 2023)."""
  return np.round(np.linspace(0, T, steps + 1)).astype(int)


def quadratic(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = T (k/steps)²: denser near the image  (Song et al. 2021, app. D.2).

  τ_k is at least k, so that no time repeats.
  """
  k = np.arange(steps + 1)
  tau = np.round(T * (k / steps) ** 2).astype(int)
  return np.asarray(np.maximum(tau, k))


def quad(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = 1 + ⌊0.8 T ((k-1)/(steps-1))²⌋: `quad` of DDIM's released code.

  τ_steps is near 0.8 T, where the paper's text says T. τ_k is at least k, so
  that no time repeats.
  """
  k = np.arange(steps + 1)
  roots = np.linspace(0, np.sqrt(0.8 * T), steps)
  tau = np.append(0, 1 + (roots**2).astype(int))
  return np.asarray(np.maximum(tau, k))


def leading(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = 1 + (k-1) ⌊T/steps⌋: as in DDIM's code and many later ones.

  Sampling starts below T, with more noise than the network was trained on
  there.
  """
  return np.append(0, 1 + np.arange(steps) * (T // steps))
