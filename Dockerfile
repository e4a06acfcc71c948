# The service: docker build -t mnist_nb . && docker run --read-only -p 8080:8080 mnist_nb
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv
COPY requirements-service.txt /source/
RUN python3 -m venv /build && python3 -m venv --without-pip /app && \
    /build/bin/pip --python /app/bin/python install --no-cache-dir -r /source/requirements-service.txt
COPY settings.ini setup.py README.md LICENSE /source/
COPY mnist_nb /source/mnist_nb
RUN /build/bin/pip --python /app/bin/python install --no-cache-dir --no-deps /source

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /app /app
ARG MODEL=reports/reference/model.int8.onnx
COPY ${MODEL} /app/model.onnx
USER 10001:10001
WORKDIR /
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["/app/bin/python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8080/readyz', timeout=2)"]
CMD ["/app/bin/mnist-serve", "--model", "/app/model.onnx", "--host", "0.0.0.0", "--port", "8080"]
