"""CIFAR-10, 32x32, as in Ho et al. 2020.

  python -m ddpm_jax.main --config=configs/cifar.py

The data set (170 MB) is downloaded once; on a machine without a network, put
cifar-10-binary.tar.gz into a folder and name it with --config.data.path.

How to score it as the paper does: README, "Scores that can be compared".

hardware  the paper: a TPU v3-8; ours: not measured
hours     the paper: 10.6 (800k steps at 21 a second); ours: not measured
score     FID 3.17, IS 9.46, ≤ 3.75 bits/dim (published, EMA, 50,000 samples);
          ours: not measured
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  return base.get_config()
