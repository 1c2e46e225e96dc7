"""Denoising Diffusion Probabilistic Models (Ho et al. 2020) in JAX and Flax."""
