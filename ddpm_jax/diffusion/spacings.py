"""Which times are visited when T steps are taken in fewer.

Each function of T and `steps` gives 0 < τ_1 < ... < τ_steps ≤ T with a 0 before
them; its name is what a recipe says in `config.sampler.spacing`.
"""

import numpy as np
from jaxtyping import Int

__all__ = ['leading', 'linear', 'quad', 'quadratic']


def linear(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = T k/steps: even, and from T on ("trailing" in Lin et al. 2023)."""
  return np.round(np.linspace(0, T, steps + 1)).astype(int)


def quadratic(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = T (k/steps)²: denser near the image  (Song et al. 2021, app. D.2).

  Where that would be the same time twice, one step is taken.
  """
  k = np.arange(steps + 1)
  return np.maximum(np.round(T * (k / steps) ** 2).astype(int), k)


def quad(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = 1 + ⌊0.8 T ((k-1)/(steps-1))²⌋: `quad` of DDIM's released code.

  It ends near 0.8 T, where the paper's text says T; where it would be the same
  time twice, one step is taken.
  """
  k = np.arange(steps + 1)
  roots = np.linspace(0, np.sqrt(0.8 * T), steps)
  return np.maximum(np.append(0, 1 + (roots**2).astype(int)), k)


def leading(T: int, steps: int) -> Int[np.ndarray, '{steps}+1']:
  """τ_k = 1 + (k-1) ⌊T/steps⌋: as in the code of DDIM, and much after it.

  It begins below T, with noise that the network has not been shown there.
  """
  return np.append(0, 1 + np.arange(steps) * (T // steps))
