# docker build --file=launch/cuda.Dockerfile --tag=ddpm_jax:cuda .
#
#   docker run --rm --gpus=all --volume="$PWD/runs:/app/runs" ddpm_jax:cuda --config=configs/digits.py
#
# CUDA comes with JAX's packages; the host has the driver (580 or newer) and the
# NVIDIA Container Toolkit.
FROM python:3.13-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /src
COPY pyproject.toml setup.cfg setup.py README.md LICENSE ./
COPY configs configs
COPY ddpm_jax ddpm_jax
# The newest of what setup.cfg allows.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[gcs,tensorboard]' 'jax[cuda13]'
WORKDIR /app
ENTRYPOINT ["ddpm-jax"]
CMD ["--help"]
