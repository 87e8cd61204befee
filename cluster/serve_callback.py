"""What Serve's controller calls before it starts any proxy: RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH."""

import logging

logger = logging.getLogger("ray.serve")


def use_own_haproxy_manager() -> None:
    """Make the controller start proxies of the class in cluster/haproxy_manager.py.

    With a Ray whose private parts differ, it goes on with its own. HAProxy then takes 3 s to come
    back.
    """
    try:
        import ray
        from ray.serve._private import controller

        from cluster.haproxy_manager import HAProxyManager

        controller.HAProxyManager = ray.remote(num_cpus=0)(HAProxyManager)
    except Exception:
        logger.exception("Ray %s has another HAProxyManager; its own is used", ray.__version__)
