"""The rows of the paper's table 2, on digits.

  python -m ddpm_jax.main --config=configs/ablation.py:eps_simple

eps_simple is the paper's choice; the others are eps_fixed, eps_learned,
mu_simple, mu_fixed and mu_learned. The first word is what is predicted; the
second is L_simple, or the true bound L with a fixed or a learned variance.

hardware  2 CPU cores (measured)
hours     6 minutes per row (measured)
score     see the table in docs/objectives.md
"""

from ml_collections import ConfigDict

from ddpm_jax import errors
from ddpm_jax.configs import digits

ROWS = {
  'mu_learned': ('mu', 'learned', 'vlb'),
  'mu_fixed': ('mu', 'beta', 'vlb'),
  'mu_simple': ('mu', 'beta', 'simple'),
  'eps_learned': ('eps', 'learned', 'vlb'),
  'eps_fixed': ('eps', 'beta', 'vlb'),
  'eps_simple': ('eps', 'beta', 'simple'),
}


def get_config(row: str = 'eps_simple') -> ConfigDict:
  if row not in ROWS:
    raise errors.unknown('row of the ablation', row, ROWS)
  c = digits.get_config('paper')
  c.model.predict, c.model.variance, c.loss.name = ROWS[row]
  return c
