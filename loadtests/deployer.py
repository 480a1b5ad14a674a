"""Deploys what it is told: `python -m loadtests.deployer [ADDRESS NODES]`, on the Ray at ADDRESS or on one of its own.

Each line of its input is a Serve application as JSON; or a number of replicas to wait for, where it is negative until
there are not that many. It answers `done`.
Its own process: Ray reads its environment when it is imported. `serve deploy` does the same through the dashboard.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from service.cluster.environment import ray_environment
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

    from service.cluster.deployment import GRPC_SERVICERS

    config, address = Config(), sys.argv[1] if len(sys.argv) > 1 else "local"
    config.metrics_dir.mkdir(parents=True, exist_ok=True)
    config.haproxy_dir.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 128 * 1024**2}
    ray.init(address=address, **(own if address == "local" else {}))
    wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    while sum(node["Alive"] for node in ray.nodes()) < wanted:  # type: ignore[no-untyped-call]
        time.sleep(0.1)
    serve.start(
        proxy_location="HeadOnly" if address == "local" else "EveryNode",
        http_options=HTTPOptions(host=config.host, port=config.http_port),
        grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
    )
    client = _get_global_client()
    assert client is not None

    def wait_for(replicas: int | None) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            application = serve.status().applications["farsight"]
            states = [pair for one in application.deployments.values() for pair in one.replica_states.items()]
            if replicas is not None and replicas < 0:
                if states != [("RUNNING", -replicas)]:
                    return
            elif application.status == "RUNNING" and (replicas is None or states == [("RUNNING", replicas)]):
                return
            if time.monotonic() > deadline or application.status == "DEPLOY_FAILED":
                sys.exit(f"not deployed: {application}")
            time.sleep(0.1)

    for line in sys.stdin:
        told = json.loads(line)
        if isinstance(told, int):
            wait_for(told)
        else:
            client.deploy_apps(ServeDeploySchema.model_validate({"applications": [told]}))
            time.sleep(1)
            wait_for(None)
        print("done", flush=True)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    main()
