"""Run every benchmark, print one JSON line each and a closing table, write `bench/results.json`.

Every figure is a ratio of two things measured in the same run, so that it can be compared between
machines. Each benchmark runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.cases import CASES

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    if len(sys.argv) == 2:
        print(json.dumps(CASES[sys.argv[1]].measure()))
        return 0
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average is {load:.1f}; figures from a busy machine mislead")
    results = []
    for name, case in CASES.items():
        done = subprocess.run(
            [sys.executable, "-m", "bench", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return 1
        record = {
            "name": name,
            "what": case.what,
            **json.loads(done.stdout.strip().splitlines()[-1]),
            "target": case.target,
            "better": case.better,
        }
        record.setdefault("limit", case.limit)
        results.append(record)
        print(json.dumps(record), flush=True)
    RESULTS.write_text(json.dumps({"load_before": load, "results": results}, indent=1) + "\n")
    print(f"\n{'benchmark':<18} {'measured':>9} {'target':>9} {'limit':>9}")
    for record in results:
        higher = record["better"] == "higher"
        ratio, target, limit = record["ratio"], record["target"], record["limit"]
        met = ratio >= target if higher else ratio <= target
        print(
            f"{record['name']:<18} {ratio:>9.3f} {'>=' if higher else '<='} {target:>6g} "
            f"{'-' if limit is None else format(limit, '.4g'):>9}  "
            f"{'met' if met else 'NOT MET'}   {record['what']}"
        )
    print(f"\nwritten to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
