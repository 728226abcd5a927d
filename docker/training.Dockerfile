# Training: model/ and training/, with torch. Part of no stack; run it where the images are:
#
#   docker build -f docker/training.Dockerfile -t anchorwell-training .
#   docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" -e HOME=/tmp -v /plates:/plates:ro -v "$PWD":/work \
#       anchorwell-training index /plates --out index.parquet
#
#   PYTHON_IMAGE     any image with Python 3.11 or newer, pip and venv
#   PIP_INDEX_URL    where packages come from; PIP_FIND_LINKS, a page of wheels beside it: torch's own has builds without CUDA
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build

ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model model
COPY training training
RUN python3 -m venv /opt/anchorwell \
    && /opt/anchorwell/bin/pip install --no-cache-dir --constraint constraints.txt ".[training]"

FROM ${PYTHON_IMAGE}

COPY --from=build /opt/anchorwell /opt/anchorwell
RUN useradd --uid 10001 --create-home anchorwell
USER anchorwell
WORKDIR /work
ENV PATH=/opt/anchorwell/bin:$PATH
ENTRYPOINT ["anchorwell-train"]
CMD ["--help"]
