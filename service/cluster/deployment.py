"""Farsight as a Ray Serve application: one deployment, one replica per device, HTTP and gRPC on one class.

No postponed annotations here: Serve reads the type of `build`'s argument from its signature without evaluating it.
"""

import gc
import os
from contextlib import ExitStack
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS, RAY_SERVE_GRPC_MAX_MESSAGE_SIZE
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from service.api.grpc.methods import GrpcMethods
from service.config import Config
from service.errors import Kind

GRPC_SERVICERS = [
    "service.api.proto.open_inference_grpc_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
    "service.api.grpc.health.add_health_to_server",
]
POLICY = "service.cluster.autoscaling:policy"

# A replica's gRPC server takes whole messages without being asked for more of them. HAProxy 2.8 reads a connection's
# frames strictly in order, the permission to send more among them: where large messages went both ways, requests
# waited for the permission that waited behind answers, which waited behind requests, for ever.
# Serve has no setting for it; this list is what it makes servers with, later in the same process.
DEFAULT_GRPC_SERVER_OPTIONS += [
    # all streams' together
    ("grpc.http2.lookahead_bytes", min(max(RAY_SERVE_GRPC_MAX_MESSAGE_SIZE, 2**28), 2**31 - 1)),
    ("grpc.http2.bdp_probe", 0),  # it would choose a smaller window
]


class Farsight(GrpcMethods):
    """One replica: its engine, its routes, and its place in line for the node's metrics port."""

    def __init__(self, config: Config) -> None:
        # imported here: the driver and the controller also import this class, and need no models
        from service.cluster.ledger_actor import RemoteLedger
        from service.engine.engine import Engine
        from service.telemetry import logging
        from service.telemetry.exporter import Exporter
        from service.telemetry.heap_trim import Trimmer
        from service.telemetry.metric_files import share_files
        from service.telemetry.metrics import Metrics

        logging.configure(config.log_level)
        share_files(config.metrics_dir)
        self.engine = Engine.start(config, Metrics(), RemoteLedger(config))
        # a request leaves hundreds of short-lived objects: collect the young ones every few dozen requests, not at each
        gc.set_threshold(20_000, 50, 50)
        self.trimmer = Trimmer()
        self.door = self.engine
        self.max_request_bytes = config.max_request_bytes
        self.trails = self.engine.trails
        self.exporter = Exporter(config.metrics_host, config.metrics_port, config.metrics_dir)

    def on_refused(self, endpoint: str, kind: Kind) -> None:
        self.engine.metrics.refused(endpoint, kind)

    def hold(self, size: int, held: ExitStack) -> None:
        self.engine.hold(size, held)

    def __serve_build_asgi_app__(self) -> Any:
        from service.api.http.app import create_app

        return create_app(self.engine, id_is_echoed=True)  # by Serve

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's user_config: {"models": [...]} replaces the configured models, without dropping requests."""
        from service.config import ModelConfig

        await self.engine.set_models([ModelConfig(**one) for one in user_config["models"]])

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `autoscaling.policy` decides by."""
        from service.cluster.autoscaling import AHEAD_S, BUSY

        return {AHEAD_S: self.engine.ahead_s(), BUSY: self.engine.busy_share()}

    def __del__(self) -> None:
        """Called by Serve when a replica goes in peace: leases go back, the ledger has all, spans are sent."""
        if (engine := getattr(self, "engine", None)) is not None:  # absent: the start failed
            engine.close()

    async def check_health(self) -> None:
        """Raises where the device thread has died, so that Serve replaces this replica."""
        if not self.engine.alive:
            raise RuntimeError("the device thread is dead")


def uses_cuda(config: Config) -> bool:
    """Asked of Ray rather than torch: the driver may have no GPU where the workers have one."""
    if config.device != "auto":
        return config.device == "cuda"
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0) > 0


def build(config: Config) -> Application:
    """The Serve application; `deploy/serve.yaml` names this function and gives its arguments."""
    cuda = uses_cuda(config)
    if config.cpu_threads is None and not cuda:
        # replicas of one node share its cores
        threads = max(1, (os.cpu_count() or 1) // (config.max_replicas or config.replicas))
        config = config.model_copy(update={"cpu_threads": threads})
    actor: dict[str, Any] = {
        "num_cpus": 0 if cuda else 1,
        "num_gpus": 1 if cuda else 0,
    }
    size: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas,
                max_replicas=config.max_replicas,
                initial_replicas=config.replicas,
                metrics_interval_s=1.0,
                look_back_period_s=5.0,
                upscale_delay_s=config.upscale_delay_s,
                downscale_delay_s=config.downscale_delay_s,
                policy=AutoscalingPolicy(policy_function=POLICY),  # type: ignore[no-untyped-call]
            )
        }
    decorate = serve.deployment(
        name="Farsight",
        **size,
        # the engine admits by predicted seconds; Serve's own limits are far backstops
        max_ongoing_requests=4096,
        ray_actor_options=actor,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=60,
        logging_config={"enable_access_log": False},
    )
    return decorate(serve.ingress()(Farsight)).bind(config)
