"""Sphinx configuration: `make docs`. Nothing is fetched to build the pages or to read them."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "upweight"
author = "upweight maintainers"
copyright = "upweight maintainers"
release = version = installed_version("upweight")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "mathml",  # docs/_ext: formulas without JavaScript, and so without a network
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext", "_templates", "examples", "**/sg_execution_times.rst"]
suppress_warnings = ["config.cache"]  # sphinx-gallery puts functions into the configuration

# ---- prose: Markdown ----
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# ---- reference: from docstrings ----
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters section says it, with units and meaning
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the class template lists them, each once
numpydoc_xref_param_type = False
add_module_names = False

# ---- examples: executed scripts ----
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # every example is executed, whatever it is called
    "ignore_pattern": r"__init__\.py|conftest\.py",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "doc_module": ("upweight",),
    "backreferences_dir": None,
}

# ---- pages ----
html_theme = "pydata_sphinx_theme"
html_title = "upweight"
html_static_path = ["_static"]
html_css_files = ["upweight.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}
html_sidebars = {
    "index": [],
    "howto/*": [],
    "theory": [],
    "architecture": [],
    "reference": [],
}
html_math_renderer = "mathml"
