"""Sphinx's settings for the book. `make docs` stages the notebooks first (docs/build.py); nothing here runs them or asks the network."""
import tomllib
from pathlib import Path

meta = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
project, version, release = "fantasy-nb", meta["version"], meta["version"]
author = copyright = meta["authors"][0]["name"]

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the stored outputs are what a reader sees
nb_ipywidgets_js = {}  # no widget manager from a CDN
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "fantasy-nb"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["book.css"]
html_favicon = str(Path(__file__).parent / "_static" / "favicon.svg")
html_context = {"default_mode": "auto"}  # light or dark as the machine has it, until the reader says otherwise
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_fullscreen_button": False,
}
mathjax_path = "mathjax/tex-svg-full.js"
