"""The mathematics: pure functions of arrays, blind to devices and files."""

from ddpm_jax.diffusion import denoiser as denoiser
from ddpm_jax.diffusion import editing as editing
from ddpm_jax.diffusion import guidance as guidance
from ddpm_jax.diffusion import likelihood as likelihood
from ddpm_jax.diffusion import losses as losses
from ddpm_jax.diffusion import pixels as pixels
from ddpm_jax.diffusion import predictions as predictions
from ddpm_jax.diffusion import process as process
from ddpm_jax.diffusion import samplers as samplers
from ddpm_jax.diffusion import schedules as schedules
from ddpm_jax.diffusion import spacings as spacings
from ddpm_jax.diffusion import timesteps as timesteps
from ddpm_jax.diffusion import training as training
from ddpm_jax.diffusion import variances as variances
from ddpm_jax.diffusion.denoiser import Denoiser as Denoiser
