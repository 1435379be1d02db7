"""Sphinx: nitpicky, and offline. `make docs` builds it with warnings as errors."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import fad_loss

HERE = Path(__file__).parent

sys.path.insert(0, str(HERE / "_extensions"))

project = "fad_loss"
author = "The fad_loss developers"
project_copyright = f"2026, {author}"
version = release = fad_loss.__version__

extensions = [
    "mathml",
    "gathered",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
# The gallery writes its scripts as notebooks too, to download.
exclude_patterns = ["_build", "gallery", "_gallery/*.ipynb"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "literal"

# The notebooks are executed where they have changed; a cell that fails ends the build.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"fad_loss {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [(name, "notes_style") for name in ("Shape", "Cost", "Source")]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "_gallery",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "backreferences_dir": None,
    "capture_repr": (),
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "within_subsection_order": "FileNameSortKey",
    "write_computation_times": False,
}

nitpicky = True
nitpick_ignore: list[tuple[str, str]] = []

# Links to the documentation of Python and PyTorch, without fetching their inventories: the build
# needs no network, and a name that is not listed here is an error instead of a dead link.
_ABC = "library/collections.abc.html#collections.abc"
_MODULE = "generated/torch.nn.Module.html#torch.nn.Module"
LINKED = {
    "python": (
        "https://docs.python.org/3/",
        {
            "collections.abc.Callable": ("class", f"{_ABC}.Callable"),
            "collections.abc.Iterable": ("class", f"{_ABC}.Iterable"),
            "collections.abc.Mapping": ("class", f"{_ABC}.Mapping"),
            "collections.abc.Sequence": ("class", f"{_ABC}.Sequence"),
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "torch.Tensor": ("class", "tensors.html#torch.Tensor"),
            "torch.device": ("class", "tensor_attributes.html#torch.device"),
            "torch.nn.modules.module.Module": ("class", _MODULE),
        },
    ),
}


def _inventory(name: str, objects: dict[str, tuple[str, str]]) -> str:
    """Write ``{object: (role, page)}`` in Sphinx's inventory format and return where."""
    path = HERE / "_build" / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = "".join(f"{key} py:{role} 1 {page} -\n" for key, (role, page) in objects.items())
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))
    return str(path.relative_to(HERE))


intersphinx_mapping = {
    name: (address, _inventory(name, objects)) for name, (address, objects) in LINKED.items()
}
