# docker build --file=launch/cpu.Dockerfile --tag=ddpm_jax .
#
#   docker run --rm --volume="$PWD/runs:/app/runs" ddpm_jax --config=configs/digits.py
#
# With --build-arg=JAX=tpu it is an IMAGE for launch/jobset.sh.
FROM python:3.13-slim
ARG JAX=cpu
WORKDIR /src
COPY pyproject.toml setup.cfg setup.py README.md LICENSE ./
COPY configs configs
COPY ddpm_jax ddpm_jax
# The newest of what setup.cfg allows.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[gcs,tensorboard]' "jax[$JAX]"
WORKDIR /app
ENTRYPOINT ["ddpm-jax"]
CMD ["--help"]
