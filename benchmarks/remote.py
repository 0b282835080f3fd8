"""A fuse of the bundled model from an http server on this machine, beside one from the disk: seconds, and requests.

    python benchmarks/remote.py           # five of each

The command `skipless fuse`, from its start to its end, in turns; medians, and the median of the paired differences. The
last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.http_server import serving

from skipless.bundled import BUNDLED


def seconds(source: str, folder: Path) -> float:
    """Of one fuse."""
    command = [str(Path(sys.executable).with_name("skipless")), "fuse", source, str(folder)]
    start = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"http": [], "disk": []}
    requests = []
    with tempfile.TemporaryDirectory() as folder, serving(BUNDLED) as server:
        for number in range(arguments.rounds):
            before = len(server.requests)
            times["http"].append(seconds(server.url, Path(folder) / f"http {number}"))
            requests.append(len(server.requests) - before)
            times["disk"].append(seconds(str(BUNDLED), Path(folder) / f"disk {number}"))
            print(
                f"http {times['http'][-1]:.2f} s ({requests[-1]} requests), disk {times['disk'][-1]:.2f} s", flush=True
            )
    more = median(one - other for one, other in zip(times["http"], times["disk"], strict=True))
    found = {name: median(each) for name, each in times.items()}
    print(json.dumps({**found, "difference": more, "requests": max(requests)}))


if __name__ == "__main__":
    main()
