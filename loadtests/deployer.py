"""Deploys what it is told on a Ray of its own: each line of its input is a Serve configuration as JSON.

Its own process: Ray reads its environment when it is imported. `serve deploy` does the same through the dashboard.
"""

from __future__ import annotations

import json
import sys
import time

from service.cli import ray_environment
from service.config import Config

TIMEOUT_S = 120


def main() -> None:
    import os

    os.environ.update(ray_environment(Config()))
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from service.app import GRPC_SERVICERS

    config = Config()
    config.metrics_dir.mkdir(parents=True, exist_ok=True)
    config.haproxy_dir.mkdir(parents=True, exist_ok=True)
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=128 * 1024**2)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=config.http_port),
        grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
    )
    client = _get_global_client()
    assert client is not None
    for line in sys.stdin:
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [json.loads(line)]}))
        deadline = time.monotonic() + TIMEOUT_S
        time.sleep(1)
        while (status := serve.status().applications["farsight"]).status != "RUNNING":
            if time.monotonic() > deadline or status.status == "DEPLOY_FAILED":
                sys.exit(f"not deployed: {status}")
            time.sleep(0.1)
        print("deployed", flush=True)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    main()
