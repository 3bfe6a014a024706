"""Does it help? Every method with and without its regularizer, several seeds each, and a page that says so.

    EQUIREG_DATA=folder python examples/evidence            # trains what is missing, then writes the page
    python examples/evidence --page-only                    # writes it anew from docs/results.json

``folder`` holds cifar10/, tiny-vipriors64/ and pacs64/. The runs are in runs/evidence/<scale>, a folder each; a stopped
one goes on where it was. The page is docs/results.md, with a picture for each question; docs/results.json holds the
figures of all runs. What is compared, and with which settings, is in experiments.yaml.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent)]  # where evidence and vipriors lie; in place of this folder

from evidence.experiments import GROUPS, PLAN, seeds_of
from evidence.page import write_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=PLAN["scales"], default="cpu")
    parser.add_argument("--data", type=Path, default=os.environ.get("EQUIREG_DATA"), help="default: EQUIREG_DATA")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--docs", type=Path, default=HERE.parent.parent / "docs", help="where the page goes")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS), help="groups to train")
    parser.add_argument("--page-only", action="store_true", help="train nothing; write the page from results.json")
    options = parser.parse_args()
    if options.scale == "test" and options.docs == parser.get_default("docs"):
        parser.error("--scale test needs --docs, or it would write over the page")
    saved = options.docs / "results.json"
    if not options.page_only:
        missing = [
            name for name in ("cifar10", "tiny-vipriors64", "pacs64") if not Path(options.data or "", name).is_dir()
        ]
        if options.data is None or missing:
            parser.error(f"--data, or EQUIREG_DATA, must name a folder that holds {', '.join(missing)}")
        train(options, saved)
    print(write_page(json.loads(saved.read_text()), options.docs))


def train(options: argparse.Namespace, saved: Path) -> None:
    """What is missing, and all results into ``saved``."""
    import torch
    from evidence.runs import Plan, collect, hours_of, run_all
    from evidence.timing import step_times
    from vipriors.training import write_file

    plan = Plan(options.scale, options.data.resolve(), options.runs.resolve() / options.scale, tuple(options.only))
    run_all(plan, options.processes)
    found = collect(plan)
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    results = {
        "scale": options.scale,
        "seeds": seeds_of(options.scale),
        "machine": f"{gpu}{os.cpu_count()} CPU cores ({platform.machine()})",
        "torch": torch.__version__.split("+")[0],
        "date": datetime.date.today().isoformat(),
        "hours": hours_of(plan),
        "step_seconds": step_times(plan, found),
        "runs": found,
    }
    write_file(saved, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
