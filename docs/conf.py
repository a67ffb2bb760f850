"""The documentation site: ``make docs``. What is its own stands in docs/_site."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this checkout, whichever trajkern is installed

import trajkern  # noqa: E402

project, author = "trajkern", "the trajkern authors"
version = release = trajkern.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "_site.extension"]
exclude_patterns = ["_site", "_templates"]
templates_path = ["_templates"]

autodoc_member_order = "bysource"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_heading_anchors = 4

# Every name that a docstring refers to must be found; of the types in signatures those of other packages are not here.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", ".*"),
    ("py:exc", ".*"),
    ("py:data", r"(torch|typing)\..*"),
    ("py:obj", r".*\.Prompt"),
]

html_theme = "pydata_sphinx_theme"
html_title = f"trajkern {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"**": ["pages.html"]}
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "navbar_center": [],
    "navigation_depth": 3,
    "show_prev_next": False,
    "footer_start": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
