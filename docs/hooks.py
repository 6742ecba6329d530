"What MkDocs asks while it builds the site: pages.py makes all pages, from what is committed"

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from markdown.extensions import Extension
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from notebooks import PageError
from pages import Site, settings
from table_rows import with_rows


class InlineMath(Extension):
    "A formula is a part of its paragraph, not a block"

    def extendMarkdown(self, md):
        md.block_level_elements.remove('math')


def on_config(config):
    "The addresses, which settings.ini alone has"
    found = settings()
    config.site_url = found.doc_url
    config.site_description = found.description
    config.repo_url, config.repo_name = found.git_url, 'Source'
    config.markdown_extensions.append(InlineMath())
    return config


def on_files(files, config):
    "Add all pages and pictures, and the navigation"
    try:
        site = Site()
    except PageError as e:
        raise PluginError(str(e)) from e
    for uri, page in site.pages.items():
        files.append(File.generated(config, uri, content=page.markdown))
    for uri, data in site.files.items():
        files.append(File.generated(config, uri, content=data))
    config.nav, config.sources = site.nav(), site.sources
    return files


def on_page_content(html, page, config, files):
    "Tables that a phone can show"
    return with_rows(html)


def on_page_context(context, page, config, nav):
    "A link from each page to what it is made from"
    source = config.sources.get(page.file.src_uri, 'docs/api.py')
    page.edit_url = f'{config.repo_url}/blob/main/{source}'
    return context


def on_post_page(output, page, config):
    "A directive that shows is an error. The link to the source does not ask its host for stars"
    if re.search(r'>\s*#\|', output):
        raise PluginError(f'{page.file.src_uri}: a directive (`#|`) shows on the page')
    return output.replace(' data-md-component="source"', '')
