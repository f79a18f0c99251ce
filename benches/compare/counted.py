"""The store of a run, with counters: how many requests it was asked and how many bytes it took and gave."""

import re
import time
import urllib.request
from pathlib import Path

from store import Store, free_ports

REQUESTS = "SeaweedFS_s3_request_total"
RECEIVED = "SeaweedFS_s3_bucket_traffic_received_bytes_total"
SENT = "SeaweedFS_s3_bucket_traffic_sent_bytes_total"
SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.M)
# Requests are counted once they have been answered, a moment after the client has its answer.
SETTLE_SECONDS = 0.3


class CountedStore(Store):
    """SeaweedFS that tells its metrics."""

    def __init__(self, weed: Path, directory: Path) -> None:
        super().__init__(weed, directory)
        self._metrics_port = 0

    def counters(self) -> dict[str, int]:
        """Requests and bytes since the store was started."""
        time.sleep(SETTLE_SECONDS)
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        totals = dict.fromkeys((REQUESTS, RECEIVED, SENT), 0)
        for name, value in SAMPLE.findall(text):
            if name in totals:
                totals[name] += int(float(value))
        return {"requests": totals[REQUESTS], "received": totals[RECEIVED], "sent": totals[SENT]}

    def _command(self, ports: list[int]) -> list:
        # The store's own ports are free still, and are the first ones found.
        self._metrics_port = free_ports(len(ports) + 1)[-1]
        return [*super()._command(ports), f"-metricsPort={self._metrics_port}"]
