"""What `megarl watch` costs while a run goes on: CPU time of the watcher as a share of a core.

`python -m benchmarks.watch [seconds]` watches a run that logs a row a second, for so many seconds (20 unless told) with
no browser, with one that shows eight curves, and with three of them, after 100 and after 1,000 phases. An update is
what follows a row: it is read, findings are found, browsers are told, and fetch the curves that they show. The row
"megarl report" is a report that is written anew at each row, for comparison.
"""

import http.client
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from megarl.config.algorithms import ALGORITHMS
from megarl.config.defaults import defaults
from megarl.report.write import write_report
from megarl.run.csv_logger import MetricsFile

SHOWN = ("rollout/score", "rollout/score_std", "policy/loss", "value/loss", "rollout/kl", "policy/approx_kl")
METRICS = (*SHOWN, "rollout/entropy", "train/grad_norm", *(f"perf/metric_{index}" for index in range(52)))
VISIBLE = ("head", "findings", *(f"metric-{name.replace('/', '-').replace('_', '-')}" for name in METRICS[:8]))
TICKS = os.sysconf("SC_CLK_TCK")


def row(phase: int) -> dict[str, float]:
    return {name: math.sin(phase / 9 + index) for index, name in enumerate(METRICS)}


def make_run(folder: Path, phases: int) -> MetricsFile:
    """Write the folder of a run with so many phases."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(defaults(ALGORITHMS["ppo"])))
    (folder / "summary.json").write_text('{"status": "running", "algorithm": "ppo"}')
    logger = MetricsFile(folder / "metrics.csv")
    for phase in range(1, phases + 1):
        logger.log_metrics(row(phase), phase)
    return logger


def cpu_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()[11:13]
    return (int(user) + int(system)) / TICKS


class Browser(threading.Thread):
    """Listens to the events and fetches the parts that it shows, as the page's script does."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.updates = urlsplit(address), 0

    def run(self) -> None:
        shown: dict[str, str] = {}
        requests = http.client.HTTPConnection("127.0.0.1", self.address.port)
        requests.request("GET", f"/?{self.address.query}")
        entered = requests.getresponse()
        entered.read()
        cookie = {"Cookie": entered.headers["Set-Cookie"].partition(";")[0]}
        requests.request("GET", "/", headers=cookie)
        requests.getresponse().read()
        events = http.client.HTTPConnection("127.0.0.1", self.address.port)
        events.request("GET", "/events", headers=cookie)
        for line in events.getresponse():
            if line.startswith(b"data: "):
                parts = json.loads(line[6:])["parts"]
                wanted = [name for name in VISIBLE if parts[name] != shown.get(name)]
                requests.request("GET", "/parts?" + "&".join(f"id={name}" for name in wanted), headers=cookie)
                for name, (version, _) in json.loads(requests.getresponse().read()).items():
                    shown[name] = version
                self.updates += 1


def watched(folder: Path, logger: MetricsFile, phase: int, browsers: int, seconds: int) -> tuple[float, float]:
    """Return the CPU seconds per second of a watcher, and the updates per second of its browsers."""
    command = [sys.executable, "-m", "megarl", "watch", str(folder), "port=0"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    address = watcher.stdout.readline().split()[0]
    viewers = [Browser(address) for _ in range(browsers)]
    for viewer in viewers:
        viewer.start()
    time.sleep(3)
    before, updates, began = cpu_seconds(watcher.pid), [viewer.updates for viewer in viewers], time.monotonic()
    for index in range(seconds):
        logger.log_metrics(row(phase + index), phase + index)
        time.sleep(max(began + index + 1 - time.monotonic(), 0))
    used = cpu_seconds(watcher.pid) - before
    done = sum(viewer.updates - earlier for viewer, earlier in zip(viewers, updates, strict=True))
    watcher.kill()
    watcher.wait()
    return used / seconds, done / seconds / max(browsers, 1)


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(f"{len(METRICS)} metrics, a row a second, {seconds} s each")
    print(f"{'phases':>7}  {'watched by':<22} {'share of a core':>15}  {'updates a second':>16}")
    with tempfile.TemporaryDirectory() as name:
        for phases in (100, 1000):
            folder = Path(name, str(phases))
            logger = make_run(folder, phases)
            phase = phases + 1
            for browsers in (0, 1, 3):
                share, updates = watched(folder, logger, phase, browsers, seconds)
                phase += seconds
                who = f"{browsers} browser{'s' * (browsers != 1)}"
                print(f"{phases:>7}  {who:<22} {share:>15.2%}  {updates:>16.2f}", flush=True)
            write_report([folder], folder / "report.html")
            began = time.process_time()
            write_report([folder], folder / "report.html")
            print(f"{phases:>7}  {'megarl report':<22} {time.process_time() - began:>15.2%}  {1:>16.2f}", flush=True)


if __name__ == "__main__":
    main()
