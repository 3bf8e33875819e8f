"""Many policy servers behind one address: Ray Serve starts and scales them, HAProxy passes the robots on.

    serve_fleet -> engine.py  Ray Serve: how many replicas of which policy, on which GPUs
                   replica.py one replica: a whole `serve_policy` process (guard.py), its health, load and end
                   directory.py   which replicas there are; who is asked for an update
                   front.py   HAProxy: one address for all of them
                   pages.py   /healthz, /readyz, /status and /metrics of the whole

A robot's images go through HAProxy to the server that answers and nowhere else: no other hop, no Ray object store.
"""
