"""The fleet's policies as applications of Ray Serve.

Life cycle: `Engine(config)` joins or starts Ray; `deploy` asks for a policy in a form, `ready` says how far Ray is with
it, `close` ends what was asked for.
Error policy: `PolicyError` with Ray's reason where a policy cannot be served. All methods wait for Ray: not for an event
loop's thread.
"""

import logging
import math
import re
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, ProxyLocation

from grasp_cube.fleet.config import FleetConfig, GroupConfig
from grasp_cube.fleet.directory import ACTOR, NAMESPACE, Directory, Proposal, ReplicaEntry
from grasp_cube.fleet.replica import END_S, LOAD, Replica
from grasp_cube.policies.policy import PolicyError

__all__ = ["Engine", "by_queue", "join_ray"]

logger = logging.getLogger(__name__)

# How often replicas say how loaded they are, and over how long that is averaged, in seconds.
LOAD_EVERY_S, LOAD_OVER_S = 1.0, 5.0
HEALTH_EVERY_S = 1.0
START_ATTEMPTS = 3
_SAID = re.compile(r"RuntimeError: (the server .*)")


def by_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as the waiting and running requests ask for; Ray applies the bounds and the delays."""
    load = sum(((context.aggregated_metrics or {}).get(LOAD) or {}).values())
    assert context.config is not None
    return math.ceil(load / context.config.target_ongoing_requests), {}


def join_ray(address: str | None) -> None:
    """Start Ray on this machine (None), or join a cluster. Raises `PolicyError`."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address=address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
            return
        except (ConnectionError, ValueError) as error:
            raise PolicyError(
                f"there is no Ray cluster at {address} ({error}): start one, or leave ray_address out"
            ) from error
        except Exception as error:
            # Its parts wait for each other for some seconds, which is too short on a machine with much else to do.
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise PolicyError(f"Ray does not start on this machine: {error}") from error
            logger.warning("Ray did not start (%s); once more", error)


class Engine:
    """What Ray Serve runs for this fleet."""

    def __init__(self, config: FleetConfig, key: str | None):
        self._key, self._local = key, config.ray_address is None
        self._names: set[str] = set()
        join_ray(config.ray_address)
        self.directory: Any = (
            ray.remote(Directory).options(name=ACTOR, namespace=NAMESPACE, num_cpus=0).remote()
        )
        # Nothing passes through Ray's own proxies.
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "ERROR"})

    def deploy(self, config: FleetConfig, name: str, generation: str) -> None:
        """Ask for a policy; `ready` tells when it is there. What runs as another `generation` is replaced."""
        group = config.policies[name]
        self._names.add(name)
        ray.get(self.directory.expect.remote(name, generation))
        replica: Any = serve.deployment(Replica)
        deployment = replica.options(
            name=name,
            # Ray's own versions would replace the replicas for a change of their number.
            version=generation,
            _internal=True,
            autoscaling_config=_scaling(config, group),
            ray_actor_options={"num_cpus": group.cpus, "num_gpus": group.gpus},
            max_surge_percent=config.surge_percent,
            graceful_shutdown_timeout_s=config.drain_s + 2 * END_S,
            graceful_shutdown_wait_loop_s=0.1,
            health_check_period_s=HEALTH_EVERY_S,
            max_constructor_retry_count=2,
        )
        application = deployment.bind(
            name, generation, group.flags(name), self._key, config.drain_s, self._local
        )
        serve.run_many(
            [serve.RunTarget(application, name=name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def ready(self, name: str, generation: str) -> bool:
        """Whether the policy runs in this form and in no other. Raises `PolicyError` when Ray gave up."""
        status = serve.status().applications.get(name)
        if status is None:
            return False
        if status.status == "DEPLOY_FAILED":
            text = "\n".join([status.message, *(item.message for item in status.deployments.values())])
            # What the replica said, without the traceback that Ray puts around it.
            said = _SAID.findall(text)
            raise PolicyError(f"the policy {name} cannot be served: {said[-1] if said else text.strip()}")
        mine = [entry for entry in self.replicas() if entry.policy == name]
        return (
            status.status == "RUNNING"
            and any(entry.generation == generation and not entry.draining for entry in mine)
            and all(entry.generation == generation for entry in mine)
        )

    def replicas(self) -> list[ReplicaEntry]:
        return ray.get(self.directory.replicas.remote())

    def proposal(self) -> Proposal | None:
        return ray.get(self.directory.proposal.remote())

    def tell(self, line: str, done: bool | None = None) -> None:
        ray.get(self.directory.tell.remote(line, done))

    def close(self) -> None:
        """End the replicas, and Ray where it was started here; a cluster's other work goes on."""
        for name in self._names:
            serve.delete(name)
        ray.shutdown()


def _scaling(config: FleetConfig, group: GroupConfig) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=group.min_replicas,
        initial_replicas=group.min_replicas,
        max_replicas=group.max_replicas,
        target_ongoing_requests=group.target_queue,
        metrics_interval_s=LOAD_EVERY_S,
        look_back_period_s=LOAD_OVER_S,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=by_queue),
    )
