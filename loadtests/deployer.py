"""Deploys applications: `python -m loadtests.deployer [ADDRESS NODES]`, on the Ray at ADDRESS or on its own.

Each input line is a Serve application as JSON, or a number: n waits until there are n replicas, -n until there are
no longer n replicas. It answers `done`. It is a separate process because Ray reads its environment at import.
`serve deploy` does the same through the dashboard.
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
        """None: until the application runs. Exits with the state if that fails or takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            application = serve.status().applications["farsight"]
            states = [
                state for deployment in application.deployments.values() for state in deployment.replica_states.items()
            ]
            if replicas is not None and replicas < 0:
                if states != [("RUNNING", -replicas)]:
                    return
            elif application.status == "RUNNING" and (replicas is None or states == [("RUNNING", replicas)]):
                return
            if time.monotonic() > deadline or application.status == "DEPLOY_FAILED":
                sys.exit(f"not deployed: {application}")
            time.sleep(0.1)

    for line in sys.stdin:
        command = json.loads(line)
        if isinstance(command, int):
            wait_for(command)
        else:
            client.deploy_apps(ServeDeploySchema.model_validate({"applications": [command]}))
            time.sleep(1)
            wait_for(None)
        print("done", flush=True)
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


if __name__ == "__main__":
    main()
