"""``python -m tests.benchmarks``: every benchmark, against its baseline, on this machine; a table and a JSON file.

A ratio is over the first version of the same work. Run from the root of the repository.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from tests.benchmarks.measure import in_a_process, machine

BENCHMARKS = [
    "class_wise_irm",
    "environments",
    "pair_lse",
    "pair_lse_gpu",
    "training_step",
    "grid",
    "ser",
    "ser_flops",
    "reconstruction",
    "partition",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time equireg against the loops and matrices it replaces.")
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"which benchmarks, of {', '.join(BENCHMARKS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each version, of which the median is taken")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks.json"))
    options = parser.parse_args()
    unknown = set(options.only) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")

    rows: list[dict[str, object]] = []
    print(f"{machine(options.threads)}, {datetime.date.today()}\n")
    print("| work | version | median | faster | peak extra memory | less |\n|---|---|---|---|---|---|")
    for name in options.only or BENCHMARKS:
        found = in_a_process(name, options.repeats, options.threads)
        for row in found:
            first = next(other for other in found if other["work"] == row["work"])
            cells = [row["work"], row["version"]]
            if "flops" in row:  # counted, not timed; how many times the first
                cells += [f"{row['flops'] / 1e12:,.2f} TFLOP", f"{row['flops'] / first['flops']:.4f}x as many"]
            else:
                cells.append(f"{1e3 * row['seconds']:,.1f} ms")
                cells.append("" if row is first else f"{first['seconds'] / row['seconds']:.2f}x")
            cells.append(f"{row['megabytes']:,.0f} MB" if "megabytes" in row else "")
            cells.append(
                "" if row is first or "megabytes" not in row else f"{first['megabytes'] / row['megabytes']:.1f}x"
            )
            print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
        rows += found

    options.json.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(options.threads), "date": str(datetime.date.today()), "results": rows}
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{options.json}")


if __name__ == "__main__":
    main()
