# Two images:
#
#   docker build -t orpo-megatron .                        GPU: NVIDIA's NeMo image with this package on top
#   docker build --target cpu -t orpo-megatron:cpu .       CPU: the demo, with nothing from NVIDIA's registry
#
#   docker run --rm orpo-megatron:cpu
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/opt/orpo-megatron/runs" orpo-megatron \
#       torchrun --nproc-per-node 8 -m orpo_megatron.train recipes/RECIPE.yaml
#
# Both run as user 10001, which must be able to write to a mounted folder. Nobody has built them yet: there was no
# Docker engine. tests/cluster/test_dockerfile.py runs their steps without one.

FROM python:3.12.12-slim-bookworm AS cpu
ENV UV_COMPILE_BYTECODE=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home orpo \
    && install --directory --owner=orpo /opt/orpo-megatron
USER 10001
WORKDIR /opt/orpo-megatron
# Dependencies first: this layer is rebuilt only when one of these files changes.
COPY --chown=10001 pyproject.toml constraints.txt .python-version Makefile README.md LICENSE ./
RUN mkdir orpo_megatron && touch orpo_megatron/__init__.py && make venv EXTRAS=cpu,demo && rm -rf ~/.cache
COPY --chown=10001 . .
# The copy may carry newer time stamps than the environment made above.
RUN touch .venv/.installed
CMD ["make", "demo"]


# A wheel, so that NVIDIA's image needs neither a network nor a build tool of its own to take this package.
FROM python:3.12.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY orpo_megatron orpo_megatron
RUN python -m pip install --no-cache-dir --constraint constraints.txt setuptools \
    && python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


# NeMo 26.08 ships Python 3.12, Megatron-Core 0.19, Megatron-Bridge 0.6, Transformer Engine and apex, built together.
# --no-deps leaves all of that exactly as it is; the second line fails where something that this package imports lacks.
FROM nvcr.io/nvidia/nemo:26.08.01 AS gpu
WORKDIR /opt/orpo-megatron
COPY --from=wheel /wheels /tmp/wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /tmp/wheels/*.whl \
    && python -c "import datasets, megatron.core, numpy, omegaconf, pyarrow, safetensors, tensorboard, torch, tqdm, transformers, yaml" \
    && useradd --uid 10001 --create-home orpo \
    && install --directory --owner=orpo runs
COPY examples examples
COPY recipes recipes
COPY tools tools
USER 10001
CMD ["python", "-m", "orpo_megatron.train", "--help"]
