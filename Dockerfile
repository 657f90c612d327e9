# Serves a build of `samp build` with NVIDIA's Triton.
#
#   docker build -t samp-triton .
#   docker run --rm --shm-size=1g -p 8000-8002:8000-8002 -v "$PWD/OUT:/repository:ro" samp-triton
#
# OUT is the folder given to --out; the server reads OUT/current/models. Add --gpus=all for a GPU.
# CI runs deploy/install.sh outside of a container; the image itself is not built there.
ARG TRITON=26.06
FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3 AS build

# Address of PyTorch's index of CPU wheels: an image without the CUDA libraries of torch.
ARG TORCH_INDEX=""
# GPU=1 adds CuPy and the CUDA kernels for every architecture; GPU="" leaves both out.
ARG GPU=1
# The compilers of the native kernels, for CPU and GPU, stay behind in this stage.
RUN --mount=type=bind,target=/src apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev \
    && SAMP_NATIVE=require SAMP_GPU="${GPU}" TORCH_INDEX="${TORCH_INDEX}" \
        /src/deploy/install.sh /opt/samp

FROM nvcr.io/nvidia/tritonserver:${TRITON}-py3
COPY --from=build /opt/samp /opt/samp

# Triton's Python stub takes the environment whose bin comes first. The encoder sets its own number
# of threads; threads that spin beside other model processes cost more than they give.
ENV VIRTUAL_ENV=/opt/samp \
    PATH=/opt/samp/bin:/opt/tritonserver/bin:${PATH} \
    OMP_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    OMP_WAIT_POLICY=passive \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_OFFLINE=1

USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
CMD ["tritonserver", "--model-repository=/repository/current/models", \
     "--model-control-mode=explicit", "--load-model=*", "--disable-auto-complete-config", \
     "--exit-timeout-secs=10"]
