"""Run a command and write its seconds and its highest resident memory.

    python benchmarks/measured.py OUT.json COMMAND …

A process of its own, because a started process inherits the high-water mark of the one that starts
it: this one imports nothing and is small.
"""

import json
import os
import subprocess
import sys
import time

out, command = sys.argv[1], sys.argv[2:]
start = time.perf_counter()
process = subprocess.Popen(command)
_, status, usage = os.wait4(process.pid, 0)
measured = {
    "seconds": time.perf_counter() - start,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_mb": usage.ru_maxrss / 1024,  # Linux counts in KiB
    "exit_code": os.waitstatus_to_exitcode(status),
}
with open(out, "w", encoding="utf-8") as file:
    json.dump(measured, file)
