"""Does it help? Every method with and without its regularizer, several seeds each, and a page that says so.

    EQUIREG_DATA=folder python examples/evidence            # trains what is missing, then writes the page
    EQUIREG_DATA=folder python examples/evidence --scale h100 --processes 6   # more, on one GPU; minutes
    python examples/evidence --page-only                    # writes it anew from docs/results.json

``folder`` holds cifar10/, tiny-vipriors64/, pacs64/ and camvid128/. A stopped run continues from its folder in
runs/evidence. The page is docs/results.md, with figures from docs/results.json. experiments.yaml says what is compared.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent)]  # where evidence and vipriors lie; in place of this folder

from evidence.experiments import GROUPS, PLAN, groups_of
from evidence.page import write_page

FOLDERS = ("cifar10", "tiny-vipriors64", "camvid128")
MORE = dict.fromkeys(("cpu", "sweep", "test"), ("pacs64",))  # of a scale that trains classifiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=PLAN["scales"], default="cpu")
    parser.add_argument("--data", type=Path, default=os.environ.get("EQUIREG_DATA", "."), help="default: EQUIREG_DATA")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--docs", type=Path, default=HERE.parent.parent / "docs", help="where the page goes")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="groups to train; default: all of the scale")
    parser.add_argument("--page-only", action="store_true", help="train nothing; write the page from results.json")
    options = parser.parse_args()
    if options.scale == "test" and options.docs == parser.get_default("docs"):
        parser.error("--scale test needs --docs, or it would write over the page")
    options.only = options.only or groups_of(options.scale)
    if others := sorted(set(options.only) - set(groups_of(options.scale))):
        parser.error(f"--only: not of --scale {options.scale}: {', '.join(others)}")
    missing = [name for name in (*FOLDERS, *MORE.get(options.scale, ())) if not (options.data / name).is_dir()]
    if missing and not options.page_only:
        parser.error(f"--data, or the variable EQUIREG_DATA, must name a folder that holds {', '.join(missing)}")
    saved = options.docs / "results.json"
    try:
        if not options.page_only:
            known = json.loads(saved.read_text()) if saved.exists() else {}
            saved.write_text(json.dumps(train(options, known), indent=1) + "\n")
        print(write_page(json.loads(saved.read_text()), options.docs))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def train(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """What is missing; the results of the arms that are finished here, and of the others as known."""
    import torch
    from evidence.pictures import draw_pictures
    from evidence.runs import Place, beside, collect, run_all

    place = Place(options.scale, options.data.resolve(), options.runs.resolve() / options.scale)
    run_all(place, options.only, options.processes)
    for group in options.only:
        draw_pictures(place, group, options.docs)
    found, gpu = collect(place), f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    today = {
        "dates": datetime.date.today().isoformat(),
        "machines": f"{gpu}{os.cpu_count()} CPU cores ({platform.machine()})",
    }
    results: dict[str, dict[str, Any]] = {"runs": {}, **{name: {} for name in today}}
    for group, plan in GROUPS.items():
        old = {arm: runs for arm, runs in known.get("runs", {}).get(group, {}).items() if arm in plan["arms"]}
        if arms := beside(old, found.get(group, {})):
            results["runs"][group] = arms
            for name, value in today.items():
                results[name][group] = known[name][group] if arms == old else value
    runs = results["runs"]
    seconds = [run["seconds"] for arms in runs.values() for seeds in arms.values() for run in seeds.values()]
    return {
        "scale": "test" if options.scale == "test" else "cpu",
        "torch": torch.__version__.split("+")[0],
        "hours": sum(seconds) / 3600,
        **results,
    }


if __name__ == "__main__":
    main()
