# The service: model/ and service/, no torch. Built by `docker compose build`; PYTHON_IMAGE is any image with Python 3.11
# or newer and pip.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model model
COPY service service
RUN python3 -m pip install --no-cache-dir --constraint constraints.txt '.[service,cpu]' \
    && useradd --system --uid 10001 --no-create-home anchorwell \
    && install --directory --owner anchorwell /data

USER anchorwell
WORKDIR /data
ENV ANCHORWELL_BUNDLE=/bundle \
    ANCHORWELL_HOST=0.0.0.0 \
    ANCHORWELL_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/health/ready').raise_for_status()"]
CMD ["anchorwell", "serve"]
