"""``python -m tests.benchmarks``: every benchmark, against its baselines, on this machine.

What it finds goes to docs/benchmarks.json, and from there to the tables of docs/benchmarks.md and the pictures beside.
With names only those run, and the others keep what was measured before. ``gpu`` also writes the file that the automatic
choice of ``pair_lse`` follows. Run from the root of the repository.
"""

import argparse
import datetime
import traceback
from pathlib import Path

import torch

from tests.benchmarks import gpu_choice, page, pictures, record
from tests.benchmarks.measure import Settings
from tests.benchmarks.run import in_a_process


def main() -> int:
    parser = argparse.ArgumentParser(description="Time equireg against the loops and matrices it replaces.")
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"which benchmarks, of {', '.join(record.TITLES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each version, of which the median is taken")
    parser.add_argument("--device", choices=list(record.DEVICES), help="a GPU where there is one")
    parser.add_argument("--note", help="what else went on on the machine, to stand beside the results")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that all run; kept in runs/, not docs/"
    )
    parser.add_argument("--no-run", action="store_true", help="tables and pictures anew from what was measured before")
    options = parser.parse_args()
    unknown = set(options.only) - set(record.TITLES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(record.TITLES)}")

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(options.repeats, options.threads, device, options.quick)
    folder, failed = Path("runs/benchmarks" if options.quick else "docs"), []
    groups = record.load(folder / "benchmarks.json")
    for name in [] if options.no_run else options.only or list(record.TITLES):
        if name == "gpu" and device == "cpu" and not options.quick:
            print(f"\n{record.TITLES[name]}: not measured, there is no GPU", flush=True)
            continue
        group = {"benchmark": name, "device": device, "machine": "", "date": str(datetime.date.today())}
        group |= {"note": options.note} if options.note else {}
        try:
            group["machine"], group["rows"] = in_a_process(name, settings)
        except ImportError as missing:
            print(f"\n{record.TITLES[name]}: not measured, {missing}", flush=True)
            continue
        except Exception:  # the others are worth measuring nevertheless
            traceback.print_exc()
            failed.append(name)
            continue
        if name == "gpu" and device == "cuda" and not options.quick:
            gpu_choice.write(group["rows"], record.card(group["date"]))
        groups = record.updated(groups, group)
        publish(groups, folder)  # after each, so that a run that is stopped keeps what it has
    publish(groups, folder)
    print(f"\n{folder / 'benchmarks.json'}, {folder / 'benchmarks.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def publish(groups: list[record.Group], folder: Path) -> None:
    """The record, the pictures and the page."""
    record.save(groups, folder / "benchmarks.json")
    for group in groups:
        pictures.draw(group, folder)
    path = folder / "benchmarks.md"
    empty = f"# Benchmarks\n\n{page.BEGIN}\n{page.END}\n"
    path.write_text(page.written(path.read_text() if path.exists() else empty, groups, folder))


if __name__ == "__main__":
    raise SystemExit(main())
