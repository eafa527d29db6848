"""Settings of the documentation site; ``make docs`` builds it. The pages read well without it too."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "extensions"), str(DOCS.parent)]  # this package, not an installed one

project = "lightning_plasticity"
author = "lightning_plasticity developers"
copyright = author
version = release = version_of("lightning-plasticity")

# The source directory is the whole repository, so that links from a page to a file outside of docs/ work in the site as
# they do in the repository: they lead to a page where the file is one of these, else to a download.
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/README.md", "benchmarks/results/**", "examples/README.md", "*.md"]
exclude_patterns = ["README.md", ".*", "build", "dist"]

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"),
    *("navigation", "reference", "command_help", "names"),
]
# Sphinx would look for pages to write in every table of names.
autosummary_generate = False
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4

THEIR_CLASSES = "Callback, LightningModule, LightningDataModule, Metric, Module"

# Docstrings. What Lightning and torch document is not repeated.
autodoc_default_options = {
    "members": True,
    "inherited-members": f"{THEIR_CLASSES}, HyperparametersMixin, DataHooks, BaseException, tuple, object",
    "member-order": "bysource",
}
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = True
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"

nitpicky = True
# Types that lead nowhere: those of other packages, whose sites are not asked (a build works offline), and some of ours
# that have no public name.
OTHERS = "torch|numpy|lightning|pytorch_lightning|torchmetrics|collections|pathlib|os|rich|gymnasium"
OURS = (
    r"callbacks\.(base\.Callback|measurement\.Measurement)|curvature\.loss\.output_root\.OutputRoot|study\.config\.Unit|"
    r"interventions\.layer_norm\.M|streams\.(changes\.Change|slippery_ant\.Ants)"
)
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})\..*"), ("py:class", rf"lightning_plasticity\.({OURS})")]

html_theme = "furo"
html_title = f"lightning_plasticity {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["templates"]
