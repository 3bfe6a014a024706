"""What the example trainers share: a training that survives being killed. To be copied beside them, as a folder.

All randomness of a step follows from the seed, the step and the process, never from what ran before. So a run that was
killed goes on bit for bit from its last checkpoint, on the same machine with the same number of processes and threads.
"""

from training.loop import (
    adamw,
    cosine,
    precision,
    run_training,
    seed_everything,
    start_processes,
    to_device,
)
from training.options import (
    MEAN,
    STD,
    add_training_options,
    add_values,
    evenly,
    folder_images,
    into_range,
    names_hash,
    normalized_transform,
    parse,
    parse_checked,
    plain_transform,
    read_once,
    test_folder,
    to_pixels,
    training_images,
    what_counts,
)
from training.run_folder import Run, averaged, read_log
from training.sealed_files import hash_of, load_safely, save_atomically, write_atomically
from training.shown_names import as_markdown, safe_name, visible
from training.surviving import Trouble, as_program

__all__ = [
    "MEAN",
    "STD",
    "Run",
    "Trouble",
    "adamw",
    "add_training_options",
    "add_values",
    "as_markdown",
    "as_program",
    "averaged",
    "cosine",
    "evenly",
    "folder_images",
    "hash_of",
    "into_range",
    "load_safely",
    "names_hash",
    "normalized_transform",
    "parse",
    "parse_checked",
    "plain_transform",
    "precision",
    "read_once",
    "read_log",
    "run_training",
    "safe_name",
    "save_atomically",
    "seed_everything",
    "start_processes",
    "test_folder",
    "to_device",
    "to_pixels",
    "training_images",
    "visible",
    "what_counts",
    "write_atomically",
]
