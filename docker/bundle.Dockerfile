# A bundle as an image, for where images are what is rolled out. The context is the bundle's directory:
#
#   docker build -f docker/bundle.Dockerfile -t anchorwell-bundle:cs-arm-bn examples/bundles/cs-arm-bn
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
COPY . /bundle
USER 10001
