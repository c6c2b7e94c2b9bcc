# Two images:
#
#   docker build -t orpo-megatron .                        GPU: NVIDIA's NeMo image with this package on top
#   docker build --target cpu -t orpo-megatron:cpu .       CPU: the demo, with nothing from NVIDIA's registry
#
#   docker run --rm orpo-megatron:cpu
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" orpo-megatron \
#       torchrun --nproc-per-node 8 -m orpo_megatron.train recipes/RECIPE.yaml
#
# With the classic builder (no BuildKit) `docker build .` builds both.

FROM python:3.12-slim AS cpu
ENV UV_COMPILE_BYTECODE=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home orpo \
    && install --directory --owner=orpo /workspace
USER orpo
WORKDIR /workspace
# Dependencies first: this layer is rebuilt only when one of these files changes.
COPY --chown=orpo pyproject.toml constraints.txt .python-version Makefile README.md LICENSE ./
RUN mkdir orpo_megatron && touch orpo_megatron/__init__.py && make venv && rm -rf ~/.cache
COPY --chown=orpo . .
# The copy may carry newer time stamps than the environment made above.
RUN touch .venv/.installed
CMD ["make", "demo"]


# NeMo 26.08 ships Python 3.12, Megatron-Core 0.19, Megatron-Bridge 0.6, Transformer Engine and apex, built together.
# --no-deps leaves all of that exactly as it is; what this package needs is there already.
FROM nvcr.io/nvidia/nemo:26.08.01 AS gpu
WORKDIR /workspace
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -c "import datasets, megatron.core, omegaconf, pyarrow, safetensors, tensorboard, tqdm, transformers" \
    && useradd --create-home orpo \
    && mkdir -p runs \
    && chown -R orpo: /workspace
USER orpo
CMD ["python", "-m", "orpo_megatron.train", "--help"]
