"""What the SER loss is to reach on a GPU, beside what the same run measured."""

from collections.abc import Iterator

from tests.benchmarks.measure import Row

IMAGES = 64  # of 196 tokens, D = 256, in bf16
MILLISECONDS = {"H200": 1.5, "H100": 2.0}  # by a word of the card's name
BATCH = 512  # as many images as a card of 80 GB holds
STEP = "Training step with SER, ViT-S/16 at 224, in bf16, forward + backward, batch "
OF_THE_PRODUCTS, MEGABYTES, OF_THE_STEP = 1.4, 200.0, 1.01


def targets(rows: list[Row], card: str) -> Iterator[Row]:
    """A row for each: the figure, the most that it may be, and whether that is reached."""
    found = [row for row in rows if row.get("learns") == "contrast" and row["precision"] == "bf16"]
    found = [row for row in found if row["size"] == IMAGES and "seconds" in row]
    ours = [row for row in found if row["version"].startswith("patch_nt_xent")]
    floor = [row for row in found if "bare products" in row["version"]]
    steps = [row for row in rows if row["work"] == f"{STEP}{BATCH}" and "seconds" in row]
    best = min(ours, key=lambda row: row["seconds"], default=None)  # as the automatic choice follows it
    limit = next((most for word, most in MILLISECONDS.items() if word in card.split()), None)

    time = best and 1e3 * best["seconds"]
    yield _row("time of the loss", time, limit, " ms", f"no limit is set for {card}")
    yield _row("its time over the bare products", best and floor and best["seconds"] / floor[0]["seconds"],
               OF_THE_PRODUCTS, "×")  # fmt: skip
    yield _row("its peak memory", best and best.get("megabytes"), MEGABYTES, " MB")
    overhead = steps[1]["seconds"] / steps[0]["seconds"] if len(steps) == 2 else None
    yield _row("time of a training step over one without", overhead, OF_THE_STEP, "×")


def _row(name: str, value: float | None, most: float | None, unit: str, no_limit: str = "") -> Row:
    row = {"work": f"Targets of the SER loss, {IMAGES} images of 196 tokens, D = 256, bf16", "version": name}
    if not value:
        return {**row, "not_measured": "this run has no figure for it"}
    figure = f"{value:.4g}{unit}"
    if most is None:
        return {**row, "verdict": f"{figure}, {no_limit}"}
    return {**row, "verdict": f"{figure}, at most {most:g}{unit}: {'reached' if value <= most else 'missed'}"}
