"""Farsight as a Ray Serve application: one deployment, one replica per device, HTTP and gRPC on one class.

No postponed annotations here: Serve reads the type of `build`'s argument from its signature, without evaluating it.
"""

import gc
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS, RAY_SERVE_GRPC_MAX_MESSAGE_SIZE
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from service.api.grpc.methods import GrpcMethods
from service.api.grpc.requests import DOOR
from service.api.handler import Handler
from service.config import Config
from service.scheduling.scheduler import Order

GRPC_SERVICERS = [
    "service.api.grpc.requests.add_inference_to_server",
    "service.api.grpc.health.add_health_to_server",
]
POLICY = "service.cluster.autoscaling:policy"

# A replica's gRPC server must accept whole messages without sending window updates. HAProxy 2.8 reads the frames of a
# connection strictly in order, window updates included. With large messages in both directions, requests waited for
# window updates that were queued behind answers, and these answers waited behind requests: a deadlock.
# Serve has no setting for it; it passes this list to the servers that it creates later in the same process.
DEFAULT_GRPC_SERVER_OPTIONS += [
    # the window of all streams together
    ("grpc.http2.lookahead_bytes", min(max(RAY_SERVE_GRPC_MAX_MESSAGE_SIZE, 2**28), 2**31 - 1)),
    ("grpc.http2.bdp_probe", 0),  # would choose a smaller window
]


class Farsight(GrpcMethods):
    """One replica: its engine, its routes, and its exporter, one of which has the metrics port of the node."""

    def __init__(self, config: Config, order: Order = "fair") -> None:
        # imported here: the driver and the controller import this class too, but need no models
        from service.cluster.ledger_actor import RemoteLedger
        from service.engine.engine import Engine
        from service.telemetry import logging
        from service.telemetry.exporter import Exporter
        from service.telemetry.heap_trim import Trimmer
        from service.telemetry.metric_files import share_files
        from service.telemetry.metrics import Metrics

        logging.configure(config.log_level)
        share_files(config.metrics_dir)
        self.engine = Engine.start(config, Metrics(), RemoteLedger(config), order)
        # a request leaves hundreds of short-lived objects: collect them every few dozen requests, not at each one
        gc.set_threshold(20_000, 50, 50)
        # a short request changes threads several times, and waits each time until one that reads inputs lets go of the
        # interpreter: by default for 5 ms
        sys.setswitchinterval(0.0005)
        self.trimmer = Trimmer()
        self.handler = Handler(self.engine)
        DOOR.refusal = self.refusal
        self.exporter = Exporter(config.metrics_host, config.metrics_port, config.metrics_dir)

    def __serve_build_asgi_app__(self) -> Any:
        from service.api.http.app import create_app

        return create_app(self.engine, id_is_echoed=True)  # by Serve

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply Serve's user_config: {"models": [...]} replaces the configured models without dropping requests."""
        from service.config import ModelConfig

        await self.engine.set_models([ModelConfig(**model) for model in user_config["models"]])

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The metrics that `autoscaling.policy` reads."""
        from service.cluster.autoscaling import AHEAD_S, BUSY

        return {AHEAD_S: self.engine.ahead_s(), BUSY: self.engine.busy_share()}

    def __del__(self) -> None:
        """Called by Serve when it stops a replica: return leases, flush the ledger, send spans."""
        if (engine := getattr(self, "engine", None)) is not None:  # absent: the start failed
            engine.close()

    async def check_health(self) -> None:
        """Raise RuntimeError if the device thread has died; Serve then replaces this replica."""
        if not self.engine.alive:
            raise RuntimeError("the device thread is dead")


def uses_cuda(config: Config) -> bool:
    """Whether replicas run on GPUs. Asks Ray, not torch: the driver may have no GPU although the workers have one."""
    if config.device != "auto":
        return config.device == "cuda"
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0) > 0


def application(config: Config, order: Order = "fair") -> Application:
    """The Serve application. `deploy/serve.yaml` names this function and its arguments."""
    cuda = uses_cuda(config)
    if config.cpu_threads is None and not cuda:
        # the replicas of a node share its cores
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
        # the engine admits by predicted seconds; Serve's limit is only a backstop
        max_ongoing_requests=4096,
        ray_actor_options=actor,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=60,
        logging_config={"enable_access_log": False},
    )
    return decorate(serve.ingress()(Farsight)).bind(config, order)


def build(config: Config) -> Application:
    """The builder that `deploy/serve.yaml` names; Serve gives it the arguments from there as one value."""
    return application(config)
