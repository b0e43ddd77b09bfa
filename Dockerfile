# docker build --build-arg UID="$(id -u)" --build-arg GID="$(id -g)" -t retinanet .
# docker run --rm --gpus all --ipc=host -v "$PWD/datasets:/workspace/datasets" -v "$PWD/output:/workspace/output" retinanet \
#     python tools/train_net.py --config configs/retinanet_R50_gn_fpn.yaml
#
# UID and GID are those of the user who owns the mounted folders. --ipc=host: the loader's processes hand batches over
# in shared memory, of which a container has 64 MiB otherwise. PyTorch's wheels bring CUDA and cuDNN of their own, so
# the base only has to let the driver in. For an older driver, set pip's PIP_EXTRA_INDEX_URL to PyTorch's wheels for it.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# gcc and the headers: torch.compile (SOLVER.COMPILE) builds its launchers with them
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /workspace
COPY requirements.txt .
ARG PIP_EXTRA_INDEX_URL
RUN pip install -r requirements.txt

COPY . .
ARG UID=1000
ARG GID=1000
RUN mkdir -p output && chown -R "${UID}:${GID}" datasets output
# weights that are fetched stay in the mounted folder; a user without an entry in /etc/passwd has no home
ENV RETINANET_CACHE=/workspace/output/cache HOME=/tmp
USER ${UID}:${GID}

CMD ["python", "tools/train_net.py", "--help"]
