# The web service with the captioners that ship, on the CPU:
#   docker build -t capgen .
#   docker run --rm --read-only --tmpfs /tmp -p 8000:8000 capgen
# On an NVIDIA GPU, with the wheel index that matches its driver (pytorch.org, Get Started):
#   docker build -t capgen:gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --gpus all --read-only --tmpfs /tmp -p 8000:8000 capgen:gpu

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/capgen
RUN python -m venv .venv
COPY requirements.txt constraints.txt pyproject.toml ./
# torch comes first, from its own index: the CPU build is a tenth of the size of the GPU build.
RUN .venv/bin/pip install --index-url "${TORCH_INDEX}" -c constraints.txt torch torchvision
# Without the packages that only notebooks and downloads use, with those of the extra [serve].
RUN grep -vE '^(jupyterlab|ipywidgets|kaggle|kagglehub)\b' requirements.txt > served.txt \
    && .venv/bin/python -c "import tomllib as t; p = t.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['optional-dependencies']['serve'], sep='\n')" >> served.txt \
    && .venv/bin/pip install -c constraints.txt 'setuptools>=77' -r served.txt
COPY README.md LICENSE ./
COPY capgen_utils capgen_utils
RUN .venv/bin/pip install --no-deps --no-build-isolation -e . \
    && .venv/bin/python -m compileall -q capgen_utils
COPY data/bundles data/bundles
# Copied files keep their permissions, and the service runs as another user. The pattern omits .venv on
# purpose: pip made it readable, and changing it would store all of it in a second layer.
RUN chmod -R a+rX ./*

FROM python:${PYTHON}-slim
# The service writes only to /tmp, and to /data if it is mounted: the root file system may be read-only.
ENV PATH=/opt/capgen/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp HF_HOME=/tmp/huggingface TORCH_HOME=/tmp/torch MPLCONFIGDIR=/tmp/matplotlib \
    CAPGEN_DATA=/data
WORKDIR /opt/capgen
COPY --from=build /opt/capgen /opt/capgen
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin capgen \
    && install -d -o capgen /data
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["capgen"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
