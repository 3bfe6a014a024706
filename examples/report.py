"""Does it help? Every method with and without its regularizer, several seeds each, and a page that says so.

    EQUIREG_DATA=folder python examples/report.py            # trains what is missing, then writes the page
    python examples/report.py --page-only                    # writes it anew from docs/results.json

``folder`` holds cifar10/, tiny-vipriors64/ and pacs64/. The runs lie in runs/report/<scale>, a folder each, and a
stopped report goes on where it was. The page is docs/results.md, with a picture for each question;
docs/results.json holds the figures of all runs. ``--scale cpu`` takes two and a half hours on two cores;
``gpu`` is bigger.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch
from evidence.page import write_page
from evidence.plan import SCALES, plan
from evidence.runs import collect, hours_of, run_all
from evidence.timing import step_times
from training import as_program, write_atomically

HERE = Path(__file__).resolve().parent


def machine() -> str:
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} CPU cores ({platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--data", type=Path, default=os.environ.get("EQUIREG_DATA"), help="default: EQUIREG_DATA")
    parser.add_argument("--runs", type=Path, default=Path("runs/report"))
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where the page goes")
    parser.add_argument("--processes", type=int, default=2, help="runs at once")
    parser.add_argument("--only", nargs="*", default=[], help="groups to train, as ipirm ser pacs; default: all")
    parser.add_argument("--page-only", action="store_true", help="train nothing; write the page from results.json")
    options = parser.parse_args()
    if options.scale == "test" and options.docs == parser.get_default("docs"):
        parser.error("--scale test needs --docs, or it would write over the page")
    saved = options.docs / "results.json"
    if not options.page_only:
        if options.data is None:
            parser.error("--data, or the environment variable EQUIREG_DATA, must name the folder of the images")
        runs, data = options.runs.resolve() / options.scale, Path(options.data).resolve()
        missing = [str(data / name) for name in ("cifar10", "tiny-vipriors64", "pacs64") if not (data / name).is_dir()]
        if missing:
            parser.error(f"--data must hold {', '.join(missing)}")
        unknown = set(options.only) - set(plan(SCALES[options.scale], data, runs))
        if unknown:
            parser.error(f"--only: no group {', '.join(sorted(unknown))}")
        run_all(options.scale, data, runs, options.only, options.processes)
        found = collect(options.scale, data, runs)
        results = {
            "scale": options.scale,
            "seeds": SCALES[options.scale].seeds,
            "machine": machine(),
            "torch": torch.__version__.split("+")[0],
            "date": datetime.date.today().isoformat(),
            "hours": hours_of(runs),
            "step_seconds": step_times(options.scale, data, runs, set(found)),
            "runs": found,
        }
        write_atomically(saved, (json.dumps(results, indent=1) + "\n").encode())
    print(write_page(json.loads(saved.read_text()), options.docs))


if __name__ == "__main__":
    as_program(main)
