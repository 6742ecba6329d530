"""From a notebook, as it is committed, to a page in Markdown"""

import ast
import base64
import html
import json
import re
import textwrap
from dataclasses import dataclass, field
from functools import cached_property

DIRECTIVE = re.compile(r'#\|\s*([\w-]+)\s*:?\s*(.*)')
FENCED = r'^(?P<f>`{3,}|~{3,})[^\n]*\n.*?^(?P=f)[ \t]*$'
FENCES = re.compile(FENCED, re.DOTALL | re.MULTILINE)
CODE = re.compile(FENCED + r'|(?P<t>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=t)(?!`)', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)\s"]+)((?:\s+"[^"]*")?[)"])')
MATH = re.compile(r'\$\$(.+?)\$\$|\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)', re.DOTALL)
ITEM = re.compile(r'( *)([-*+]|\d+[.)]) ')
STARTS = re.compile(r' *([-*+]|1[.)]) ')  # what may follow a paragraph without an empty line
COLAB = re.compile(r'\[!\[[^\]]*\]\([^)]*colab[^)]*\)\]\(([^)]+)\)')
ANSI = re.compile(r'\x1b\[[0-9;]*m')


class PageError(ValueError):
    "A page that must not be published: the message says where and why"


@dataclass
class Cell:
    "A cell, its directives apart from its source"

    kind: str
    source: str
    directives: dict
    outputs: list

    @cached_property
    def names(self):
        "What it defines or assigns"
        is_code = self.kind == 'code' and self.source
        return [*defined_names(self.source), *assigned_names(self.source)] if is_code else []

    @property
    def exported(self):
        return bool({'export', 'exporti', 'exports'} & self.directives.keys())

    @property
    def hidden(self):
        return 'hide' in self.directives or self.directives.get('include') == 'false'

    @property
    def folded(self):
        return self.directives.get('code-fold') == 'true'


@dataclass
class Page:
    "A page in Markdown, and the files that it shows, by their names beside it"

    title: str
    description: str
    text: str
    files: dict = field(default_factory=dict)
    head: dict = field(default_factory=dict)

    @property
    def markdown(self):
        head = {'title': self.title, 'description': self.description, **self.head}
        return '---\n' + ''.join(f'{k}: {json.dumps(v)}\n' for k, v in head.items()) + f'---\n\n{self.text}\n'


def split_directives(source):
    "The directives at the head of a cell, such as `#| export` or `#| echo: false`, and the rest"
    lines, found = source.splitlines(), {}
    while lines and (m := DIRECTIVE.match(lines[0].strip())):
        found[m[1]] = m[2].strip()
        del lines[0]
    return found, '\n'.join(lines).strip('\n')


def read_cells(path):
    "The cells of a notebook; an output that is an error is an error of the build"
    cells = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        directives, source = split_directives(''.join(cell['source']))
        outputs = cell.get('outputs', [])
        for o in outputs:
            if o['output_type'] == 'error':
                raise PageError(f"{path}: cell {cell.get('id')} ends with {o['ename']}: {o['evalue']}; run it again")
        cells.append(Cell(cell['cell_type'], source, directives, outputs))
    return cells


def outside_code(text, change, code=CODE):
    "`text` with `change` made in all parts that are neither fenced nor inline code"
    parts, at = [], 0
    for m in code.finditer(text):
        parts += [change(text[at : m.start()]), m[0]]
        at = m.end()
    return ''.join([*parts, change(text[at:])])


def with_links(text, link):
    "`text` with `link(target)` in the place of each target"
    return outside_code(text, lambda s: LINK.sub(lambda m: m[1] + link(m[2]) + m[3], s))


def with_math(text):
    "Formulas between dollars as MathML, which browsers draw without a script"

    def draw(m):
        from latex2mathml.converter import convert

        return convert((m[1] or m[2]).strip(), display='block' if m[1] else 'inline')

    return outside_code(text, lambda s: MATH.sub(draw, s)) if '$' in text else text


def with_lists(text):
    "Lists as Jupyter and GitHub read them: without an empty line before, and nested by two spaces"

    def change(part):
        lines, inside = [], False
        for line in part.split('\n'):
            after_text = bool(lines and lines[-1].strip())
            item = ITEM.match(line)
            if item and not inside and after_text and STARTS.match(line):
                lines.append('')
            if item and inside and len(item[1]) in (2, 3):
                line = ' ' * (4 - len(item[1])) + line
            if item:
                inside = inside or not after_text or bool(STARTS.match(line))
            elif line.strip() and not line.startswith(' ') and not after_text:
                inside = False
            lines.append(line)
        return '\n'.join(lines)

    return outside_code(text, change, FENCES)


def fence(text, classes):
    "A code block that may contain code blocks"
    ticks = '`' * max([3, *(len(t) + 1 for t in re.findall('`{3,}', text))])
    return f'{ticks} {classes}\n{text}\n{ticks}'


def folded(cell):
    "Code that a click opens, under its `#| code-summary`"
    summary = cell.directives.get('code-summary', 'Code')
    return f'??? example "{summary}"\n\n' + textwrap.indent(fence(cell.source, '{ .python }'), '    ')


def _shown_html(text):
    "An HTML output without its own style; empty if nothing of it is seen, as of a progress bar"
    text = re.sub(r'<style.*?</style>|<script.*?</script>|<!--.*?-->', '', text, flags=re.DOTALL)
    if not re.search(r'<(table|img|svg|pre|p|b|code)\b', text):
        return ''
    text = re.sub(r' (border="\d+"|style="text-align: \w+;")', '', text)
    return '\n'.join(line for line in text.splitlines() if line.strip())


def output_of(output, name, alt):
    "Markdown of one output, and its picture as {name: bytes}"
    data = output.get('data', {})
    text = lambda kind: ''.join(data.get(kind, ''))
    if output['output_type'] == 'stream':
        data = {'text/plain': output['text']}
    if shown := _shown_html(text('text/html')):
        return f'<div class="output" tabindex="0" role="region" aria-label="Output">\n{shown}\n</div>', {}
    for kind, suffix in (('image/svg+xml', '.svg'), ('image/png', '.png')):
        if kind in data:
            picture = text(kind).encode() if suffix == '.svg' else base64.b64decode(text(kind))
            return f'![{alt}]({name}{suffix}){{ .output loading=lazy }}', {name + suffix: picture}
    if 'text/markdown' in data:
        return text('text/markdown'), {}
    plain = ANSI.sub('', text('text/plain')).strip('\n')
    return (fence(plain, '{ .text .output }'), {}) if plain.strip() and not text('text/html') else ('', {})


def outputs_of(cell, name, alt):
    "Markdown of all outputs of a cell, and their pictures"
    if cell.directives.get('output') == 'false':
        return [], {}
    texts, files = [], {}
    for i, output in enumerate(_joined(cell.outputs)):
        text, pictures = output_of(output, f'{name}-{i}', alt)
        texts += [text] if text else []
        files.update(pictures)
    return texts, files


def _joined(outputs):
    "Outputs, with streams that follow each other as one"
    joined = []
    for o in outputs:
        if o['output_type'] == 'stream' and joined and joined[-1]['output_type'] == 'stream':
            joined[-1] = {**o, 'text': [*joined[-1]['text'], *o['text']]}
        else:
            joined.append({**o, 'text': list(o['text'])} if o['output_type'] == 'stream' else o)
    return joined


def title_of(text):
    "Title, description and the rest of a text that begins with '# title' and '> description'"
    m = re.match(r'\s*# ([^\n]+)\n*((?:>[^\n]*(?:\n|$))*)', text)
    if not m:
        return '', '', text
    description = ' '.join(line.lstrip('> ').strip() for line in m[2].splitlines())
    return m[1].strip(), description, text[m.end() :]


def plain(text):
    "Markdown without its marks, for titles and descriptions"
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return html.unescape(re.sub(r'\s+', ' ', re.sub(r'[`*]|(?<!\w)_|_(?!\w)', '', text))).strip()


def first_sentences(text, most=160):
    "The first paragraph of prose, as whole sentences of at most `most` characters where there are such"
    paragraphs = [p for p in re.split(r'\n\s*\n', CODE.sub('', text)) if re.match(r'\s*[A-Za-z*\[(]', p)]
    words = plain(paragraphs[0]) if paragraphs else ''
    short = words[:most] if len(words) > most else words
    end = max(short.rfind('. '), short.rfind(': ')) if short != words else len(words)
    return (short[: end + 1] if end > 40 else short.rsplit(' ', 1)[0] if short != words else short).rstrip(': ')


def prose(text, link):
    "A text in Markdown as the site shows it"
    if re.search(r'^(`{3,}|~{3,})', FENCES.sub('', text), re.MULTILINE):
        raise PageError(f'a block of code has no end, or text behind its end: {text[:200]!r}')
    text = COLAB.sub(r'[Open in Colab](\1){ .md-button }', text)
    return with_math(with_lists(with_links(text, link)))


def text_page(text, link):
    "A page from a text in Markdown"
    title, description, body = title_of(re.sub(r'<!--.*?-->\n?', '', text, flags=re.DOTALL))
    lead = f'{prose(description, link)}\n{{ .lead }}\n\n' if description else ''
    description = plain(description) or first_sentences(body)
    return Page(plain(title), description, f'# {title}\n\n{lead}{prose(body, link).strip()}')


def notebook_page(path, link, before=lambda cell: ''):
    "A page from a notebook; `before` gives what stands before a cell of code"
    cells = read_cells(path)
    title, description, first = title_of(cells[0].source)
    if not title:
        raise PageError(f"{path}: the first cell needs '# title', and on the next line '> description'")
    lead = f'{prose(description, link)}\n{{ .lead }}' if description else ''
    parts, files, heading = [f'# {title}', lead, prose(first.strip(), link)], {}, title
    for i, cell in enumerate(cells[1:], 1):
        if cell.hidden:
            continue
        if cell.kind == 'markdown':
            heading = ([heading] + re.findall(r'^#+ (.+)$', cell.source, re.MULTILINE))[-1]
            parts.append(prose(cell.source, link))
            continue
        if cell.source and cell.directives.get('echo') != 'false':
            parts += [before(cell), folded(cell) if cell.folded else fence(cell.source, '{ .python }')]
        texts, pictures = outputs_of(cell, f'{path.stem}_files/{i}', f'Output of the code above, in: {plain(heading)}')
        parts += texts
        files.update(pictures)
    body = '\n\n'.join(p for p in parts if p)
    description = plain(description) or first_sentences('\n\n'.join(parts[2:]))
    return Page(plain(title), description, body, files)


def check_directives(text, where):
    "Raise `PageError` if a directive shows on a page"
    if re.search(r'^\s*#\|', text, re.MULTILINE):
        raise PageError(f'{where}: a directive (`#|`) is not at the head of its cell, so it would show')


def defined_names(source):
    "Names that a cell defines, as in nbdev's index: `f`, `C`, `C.method`, and `Learner.f` for a patch"
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            names += [node.name, *(f'{node.name}.{n.name}' for n in node.body if isinstance(n, inner))]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names += [f'{c}.{node.name}' for c in patched_classes(node)] or [node.name]
    return names


def assigned_names(source):
    "Names that a cell gives to what is made elsewhere, such as a dictionary or an alias"
    targets = [t for n in ast.parse(source).body if isinstance(n, ast.Assign) for t in n.targets]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def patched_classes(node):
    "The classes that `@patch` or `@patch_to` adds a function to"
    for d in node.decorator_list:
        called = d.func if isinstance(d, ast.Call) else d
        name = getattr(called, 'id', getattr(called, 'attr', ''))
        if name == 'patch' and node.args.args and node.args.args[0].annotation:
            return [c.strip() for c in ast.unparse(node.args.args[0].annotation).split('|')]
        if name == 'patch_to':
            return [ast.unparse(d.args[0])]
    return []
