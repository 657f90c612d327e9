"""What importing the client costs, measured in fresh processes."""

import json
import subprocess
import sys

PROBE = """
import json, sys, time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
modules = sorted(name.partition(".")[0] for name in sys.modules)
print(json.dumps({{"seconds": seconds, "modules": modules}}))
"""
HEAVY = {"torch", "transformers", "tokenizers", "scipy", "pydantic", "samp_core", "samp_kernels"}


def imported(statement):
    result = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(result.stdout)
    return found["seconds"], set(found["modules"])


def test_importing_is_light_and_quick():
    # The quickest of three: other work on the machine only adds.
    runs = [imported("import samp_client") for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    modules = runs[0][1]
    assert "samp_client" in modules
    assert not modules & (HEAVY | {"grpc", "gevent", "aiohttp", "tritonclient", "numpy", "asyncio"})


def test_connecting_loads_only_the_protocol_that_was_asked_for():
    connect = "import samp_client; samp_client.connect('127.0.0.1:9', {!r})"
    _, over_grpc = imported(connect.format("grpc"))
    assert "grpc" in over_grpc
    assert not over_grpc & (HEAVY | {"gevent"})
    _, over_http = imported(connect.format("http"))
    assert "gevent" in over_http
    assert not over_http & (HEAVY | {"grpc"})


def test_the_asynchronous_client_loads_its_protocol_with_the_first_call():
    statement = "import samp_client; client = samp_client.connect_async('127.0.0.1:9', {!r})"
    _, modules = imported(statement.format("grpc"))
    assert "asyncio" in modules
    assert not modules & (HEAVY | {"grpc", "gevent", "aiohttp", "tritonclient", "numpy"})
