import os
from pathlib import Path

import hypothesis
import pytest
import torch

# One thread each: the suite runs in several processes, and sums must not depend on how many cores are free.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported
hypothesis.settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class RealImages:
    """The folder that EQUIREG_DATA names; a test that asks for a data set that is not there is skipped."""

    def __truediv__(self, name: str) -> Path:
        folder = os.environ.get("EQUIREG_DATA")
        if not folder:
            pytest.skip("EQUIREG_DATA is not set: it names a folder with cifar10/{train,test}/<class>/*.jpg and others")
        first = name.split("/")[0]
        if not (Path(folder) / first).is_dir():
            pytest.skip(f"EQUIREG_DATA={folder} has no {first}")
        return Path(folder) / name


@pytest.fixture(scope="session")
def real_images() -> RealImages:
    return RealImages()
