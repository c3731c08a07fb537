"""Settings of the documentation; ``make docs`` builds it."""

import os
from importlib.metadata import version as version_of

project = author = "lowbit"
version = release = os.environ.get("LOWBIT_DOCS_VERSION") or version_of("lowbit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": "../source/{{path}}.html#{{fragment}}"}
exclude_patterns = ["_static", "_extra"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # a class's attributes are listed once, with it
smartquotes = False  # options are written with two hyphens
python_maximum_signature_line_length = 100
add_module_names = False
nitpick_ignore_regex = [("py:.*", ".*")]  # types of torch and others, whose pages are on other hosts
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

html_theme = "furo"
html_title = f"lowbit {version}"
html_static_path = ["_static"]
html_extra_path = ["_extra"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}
