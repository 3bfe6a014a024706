"""The site, built without a network:  sphinx-build -W -n docs docs/_build"""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import equireg

sys.path.insert(0, str(Path(__file__).parent))  # for api_pages.py and mathml.py

project = "equireg"
author = "The equireg developers"
copyright = author
version = release = equireg.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "api_pages", "mathml"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with what they show: docs/notebooks/build.py

default_role = "py:obj"  # of `name` in docstrings

html_theme = "furo"
html_title = f"equireg {release}"
if repository := os.environ.get("EQUIREG_REPOSITORY"):  # its address, where it has one: a link at the foot of each page
    html_theme_options = {"footer_icons": [{"name": "Repository", "url": repository, "html": "Repository"}]}
html_math_renderer = "mathml"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "tango", "monokai"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # PyTorch's of Module.forward says nothing of ours
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

# Where PyTorch documents the types of our signatures. Its inventory would have to be fetched at each build.
PYTORCH = "https://docs.pytorch.org/docs/stable/"
ELSEWHERE = {
    "Tensor": "tensors.html#torch.Tensor",
    "Generator": "generated/torch.Generator.html#torch.Generator",
    "Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "Dataset": "data.html#torch.utils.data.Dataset",
    "Subset": "data.html#torch.utils.data.Subset",
    "WeightedRandomSampler": "data.html#torch.utils.data.WeightedRandomSampler",
    "device": "tensor_attributes.html#torch.device",
    "ProcessGroup": "distributed.html#torch.distributed.ProcessGroup",
}


def resolve(app: Sphinx, env: Any, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """Links that Sphinx does not find: public names by the module that defines them, PyTorch, the standard library."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    package, name = target.split(".")[0], target.split(".")[-1]
    if package in equireg.__all__:  # in the text of a module that is imported by itself
        package, name = "equireg", target
    if package == "equireg" and name.split(".")[0] in equireg.__all__:
        python = env.get_domain("py")
        return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], f"equireg.{name}", node, content)
    if package in ("torch", "Tensor") and name in ELSEWHERE:
        return nodes.reference("", "", content, internal=False, refuri=PYTORCH + ELSEWHERE[name])
    # In signatures alone: what ``parts`` returns, how a reader takes its options.
    private = name.endswith("Parts") or name in ("Reading", "Unpack")
    private = private or name == "Arguments"
    if private or package in sys.stdlib_module_names or hasattr(builtins, target):
        return content  # as it is, without a link
    return None


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve)
