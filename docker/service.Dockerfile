# The service: model/ and service/, no torch. Built by `docker compose build`.
#
#   PYTHON_IMAGE  any image with Python 3.11 or newer, pip and venv
#   RUNTIME       what runs the network: cpu (onnxruntime), openvino (for bf16), or gpu (CUDA, from wheels;
#                 the machine needs NVIDIA's driver and container toolkit)
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build

ARG RUNTIME=cpu
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/trim.py docker/trim.py
COPY model model
COPY service service
RUN python3 -m venv /opt/anchorwell \
    && /opt/anchorwell/bin/pip install --no-cache-dir --constraint constraints.txt ".[service,${RUNTIME}]" \
    && python3 docker/trim.py /opt/anchorwell

FROM ${PYTHON_IMAGE}

COPY --from=build /opt/anchorwell /opt/anchorwell
RUN useradd --system --uid 10001 --no-create-home anchorwell \
    && install --directory --owner anchorwell /data

USER anchorwell
WORKDIR /data
ENV PATH=/opt/anchorwell/bin:$PATH \
    ANCHORWELL_BUNDLE=/bundle \
    ANCHORWELL_HOST=0.0.0.0 \
    ANCHORWELL_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as http; http.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
CMD ["anchorwell", "serve"]
