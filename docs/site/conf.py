"""Sphinx's settings for the course's web site; `tools/website.py` calls it once for each language."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

LANGUAGE = os.environ.get("SITE_LANGUAGE", "en")
CHINESE = LANGUAGE == "zh"

project = "用 LoRA 微调 GLM-4.5-Air" if CHINESE else "Fine-tuning GLM-4.5-Air with LoRA"
html_title = project
language = "zh_CN" if CHINESE else "en"
extensions = ["myst_nb", "sphinx_copybutton", "course_pages"]
exclude_patterns = ["files", "extra"]
html_show_copyright = html_show_sphinx = False

# Notebooks as they are stored: nothing is executed.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

html_search_language = "zh" if CHINESE else "en"
html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["course.css"]
html_js_files = [("course.js", {"defer": "defer"})]
templates_path = ["templates"]
html_copy_source = html_show_sourcelink = False
html_use_index = html_domain_indices = False
html_permalinks_icon = "#"
html_favicon = "icon.svg"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "article_header_end": "course-links.html, article-header-buttons.html",
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "toc_title": "本页内容" if CHINESE else "On this page",
    "search_bar_text": "搜索" if CHINESE else "Search the course",
    "footer_content_items": "",
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# Copy what is to be run, not what came out.
copybutton_selector = "div:not(.output) > div.highlight > pre"
