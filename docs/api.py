"""The pages of the API, from the package and its notebooks"""

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache, partial
from posixpath import dirname, relpath

from fastcore.docments import docments
from notebooks import FENCES, Page, PageError, fence, outputs_of, outside_code, prose
from usages import cells_of, find_example

LAYERS = {
    'core': ('Masks and files', 'Tensors in, masks out: weights, masks, scopes and sparse files.'),
    'schedules': ('Schedules', 'Sparsity and learning rate over training.'),
    'criteria': ('Criteria', 'Scores: which weights are kept.'),
    'training': ('Training', 'Callbacks of a fit, and pruning at once.'),
    'methods': ('Methods', "The papers' other methods, as callbacks."),
    'recipes': ('Recipes', 'Whole procedures: rounds, tickets, cycles, retraining.'),
    'learner': ('Learner', 'Masks, reports and files of a Learner, without a method.'),
    'analysis': ('Analysis', 'Paths, curvature, sensitivity and sweeps.'),
    'deploy': ('Deploy', 'Fast, small and exported models, and the report page.'),
    'engine': ('Engine', 'The loop without fastai, and the hooks of a method.'),
    'zoo': ('Data and networks', 'Small data sets and networks, to try things with.'),
    'testing': ('Testing', 'The checks that each pruning method has to pass.'),
}

EMPTY = inspect.Parameter.empty
INTERNAL = (  # what checkpoints and passes ask a callback for
    *('state_dict', 'load_state_dict', 'check_state_dict', 'training_identity'),
    *('begin_fit', 'end_fit', 'fit_ended', 'choose', 'weight_at'),
)
STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}


@dataclass(frozen=True)
class Entry:
    "A public name: `SparsifyCallback`, or `learn.prune` for a method of Learner"

    name: str
    definition: str  # As in nbdev's index: `SparsifyCallback`, `Learner.prune`
    module: str  # Inside of the package, as `training.callback`
    obj: object

    @property
    def layer(self):
        return self.module.split('.')[0]

    @property
    def page(self):
        return f'api/{self.layer}.md'

    @property
    def source(self):
        return f'{self.module.replace(".", "/")}.md#{self.definition.lower()}'

    @property
    def summary(self):
        "The first sentence of its docstring"
        if isinstance(self.obj, (dict, tuple)):
            return f"{'By name' if isinstance(self.obj, dict) else 'Names'}: {', '.join(f'`{k}`' for k in self.obj)}"
        return first_sentence(inspect.getdoc(_function(self.obj)) or '')


class Api:
    "All public names, with their pages"

    def __init__(self, root, links):
        self.root, self.links = root, links
        self.index = module_index(root)
        self.entries = [*self._of_all(), *self._of_learner()]
        self.by_name = {e.name: e for e in self.entries}

    def notebook(self, module):
        return self.root / 'nbs' / f'{module.replace(".", "/")}.ipynb'

    def _of_all(self):
        import fastprune.all as every

        modules = {}
        for node in ast.parse((self.root / 'fastprune' / 'all.py').read_text(encoding='utf-8')).body:
            if isinstance(node, ast.ImportFrom):
                modules |= {a.asname or a.name: node.module for a in node.names}
        for name in every.__all__:
            obj = getattr(every, name)
            home = str(getattr(obj, '__module__', '')).removeprefix('fastprune.')
            known = name in self.index.get(home, ())
            yield Entry(name, name, home if known else modules[name], obj)

    def _of_learner(self):
        from fastai._modidx import d as fastai
        from fastai.learner import Learner

        known = {n.rpartition('.')[2] for names in fastai['syms'].values() for n in names if '.Learner.' in n}
        for module, names in self.index.items():
            for name in names:
                owner, _, method = name.partition('.')
                if owner == 'Learner' and not method.startswith('_') and method not in known:
                    yield Entry(f'learn.{method}', name, module, inspect.getattr_static(Learner, method))

    def pages(self):
        "All pages, by their paths on the site"
        layers = {layer: [e for e in self.entries if e.layer == layer] for layer in LAYERS}
        if left := [e.name for e in self.entries if e.layer not in LAYERS]:
            raise PageError(f'docs/api.py: LAYERS lacks the layers of {", ".join(left)}')
        pages = {f'api/{k}.md': self.layer_page(k, v) for k, v in layers.items() if v}
        return {'api/index.md': self.overview(layers), **pages}

    def overview(self, layers):
        "All names in one table a layer"
        title, description = 'API', 'Every public name: what it does, its arguments, an example and its source'
        parts = [f'# {title}', f'{description}.\n{{ .lead }}', _HOW_TO]
        for layer, entries in layers.items():
            if entries:
                name, what = LAYERS[layer]
                rows = [f'| {self.link_to(e, "api/index.md")} | {_cell(e.summary)} |' for e in entries]
                table = '\n'.join(['| Name | What it does |', '|---|---|', *rows])
                parts.append(f'## [{name}]({layer}.md)\n\n{what}\n\n{table}')
        return Page(title, f'{description}.', '\n\n'.join(parts))

    def layer_page(self, layer, entries):
        "All names of a layer"
        title, what = LAYERS[layer]
        names = ', '.join(e.name for e in entries)
        page = Page(f'{title} (API)', f'{what} {names}'[:300], f'# {title}\n\n{what}\n{{ .lead }}')
        for e in entries:
            text, files = self.entry_text(e)
            page.text += f'\n\n{text}'
            page.files |= files
        return page

    def entry_text(self, entry):
        "Docstring, signature, table and example of a name, its methods, and the pictures of the example"
        source = f'[source]({relpath(entry.source, "api")}){{ .source title="Source of {entry.name}" }}'
        example, files = self.example(entry)
        described = self.described(entry.name, entry.obj, entry.page)
        parts = [f'## {entry.name} {{ #{entry.name} }}', source, *described, *example]
        for name in self.methods(entry) if inspect.isclass(entry.obj) else ():
            obj = inspect.getattr_static(entry.obj, name.partition('.')[2])
            parts += [f'### {name} {{ #{name} }}', *self.described(name, obj, entry.page)]
        return '\n\n'.join(parts), files

    def described(self, name, obj, page):
        "Docstring, signature and table of arguments"
        if isinstance(obj, dict):
            return [f'A dictionary of {len(obj)} entries.', self.dictionary(obj, page)]
        if isinstance(obj, tuple):
            return [f'A tuple of {len(obj)} names.', fence(f'{name} = {obj!r}', '{ .python .signature }')]
        f = _function(obj)
        doc = self.linked(_escaped(inspect.getdoc(f) or ''), page, name)
        bases = [b for b in getattr(f, '__bases__', ()) if b.__name__ in self.by_name]
        doc += ''.join(f'\n\nInherits from {self.link_to(self.by_name[b.__name__], page)}.' for b in bases)
        if inspect.isclass(f) and not str(getattr(f.__init__, '__module__', '')).startswith('fastprune'):
            return [doc]  # of a base outside of the package
        return [doc, fence(signature_text(name, obj), '{ .python .signature }'), self.table(f, page, name)]

    def table(self, f, page, name):
        "The arguments and what is returned, from the comments beside them"
        rows = []
        for arg, d in docments(f, full=True, args_kwargs=True).items():
            no_result = arg == 'return' and (inspect.isclass(f) or d.anno in (EMPTY, None))
            if arg != 'self' and not no_result:
                meaning = self.linked(_cell(' '.join((d.docment or '').split())), page, name)
                kind = _code(type_text(d.anno))
                rows.append(f'| {_argument(arg, d)} | {kind} | {_given(arg, d)} | {meaning} |')
                if arg == 'return' and len(rows) == 1:
                    return f'**Returns** {kind}{": " if kind and meaning else ""}{meaning}'
        head = ['| Argument | Type | Default | Meaning |', '|---|---|---|---|']
        if all(row.endswith('|  |') for row in rows):  # no column of nothing
            head, rows = ['| Argument | Type | Default |', '|---|---|---|'], [row.removesuffix('  |') for row in rows]
        table = '\n'.join([*head, *rows])
        return f'<div class="arguments" markdown>\n\n{table}\n\n</div>' if rows else ''

    def dictionary(self, obj, page):
        rows = []
        for key, value in obj.items():
            doc = inspect.getdoc(value) if callable(value) else ''
            name = getattr(value, '__name__', '')
            shown = self.link_to(self.by_name[name], page) if name in self.by_name else _code(_default(value))
            rows.append(f'| `{key!r}` | {shown} | {_cell(first_sentence(doc or ""))} |')
        return '\n'.join(['| Key | Value | What it is |', '|---|---|---|', *rows])

    def methods(self, entry):
        "The documented methods of a class, without fastai's events"
        events = () if entry.layer == 'engine' else (*_events(), *INTERNAL)
        own = [n for names in self.index.values() for n in names if n.startswith(f'{entry.name}.')]
        named = [n for n in dict.fromkeys(own) if not n.split('.')[1].startswith('_') and n.split('.')[1] not in events]
        return [n for n in named if inspect.getdoc(_function(inspect.getattr_static(entry.obj, n.split('.')[1], None)))]

    def example(self, entry):
        "An example in Markdown, and its pictures"
        others = [p for p in self.links.notebooks if p != self.notebook(entry.module)]
        found = find_example(entry.name, entry.definition, self.notebook(entry.module), others)
        if found is None:
            raise PageError(f'{entry.name} has no example: use it in a cell of {self.notebook(entry.module)}')
        path = found.path.relative_to(self.root).as_posix()
        uri = self.links.uris[path]
        texts, files = outputs_of(found.cell, f'files/{entry.name}', f'Output of the example of {entry.name}')
        more = f'From [{uri.removesuffix(".md")}]({relpath(uri, "api")}).'
        intro = prose(found.intro, self.links.at(path, entry.page))
        code = '\n\n'.join(filter(None, [found.before, found.code]))
        head = f'<p class="example" markdown>**Example** <small>{more}</small></p>'
        return [head, *([intro] if intro else []), fence(code, '{ .python }'), *texts], files

    def link_to(self, entry, page):
        there = '' if entry.page == page else relpath(entry.page, dirname(page) or '.')
        return f'[`{entry.name}`]({there}#{entry.name})'

    def linked(self, text, page, own=''):
        "`text` with links from public names in backticks to their places"

        def lead(m):
            entry = self.by_name.get(m[1])
            if entry is None or m[1] == own:
                return m[0]
            return self.link_to(entry, page).replace(f'`{m[1]}`', m[0])

        return re.sub(r'(?<!\[)`([A-Za-z_][\w.]*)(?:\([^`]*\))?`(?!\])', lead, text)

    def linked_once(self, text, page):
        "A page with links from the first mention of each public name, outside of headings, links and code blocks"
        seen = set()

        def change(part):
            lines = part.split('\n')
            for i, line in enumerate(lines):
                if not line.startswith(('#', '|', '!')) and '](' not in line:
                    lines[i] = re.sub(r'`([A-Za-z_][\w.]*)(?:\([^`]*\))?`', lambda m: once(m), line)
            return '\n'.join(lines)

        def once(m):
            if m[1] in seen or m[1] not in self.by_name:
                return m[0]
            seen.add(m[1])
            return self.linked(m[0], page)

        return outside_code(text, change, FENCES)


_HOW_TO = """Import them all at once:

```python
from fastai.vision.all import *
from fastprune.all import *
```

Methods of a fastai `Learner` are listed as `learn.name`. In a notebook, `SparsifyCallback?` shows the arguments. With
nbdev installed, `doc` of `nbdev.showdoc` shows them as a table, with a link to this site."""


def module_index(root):
    "Module inside of the package -> the names that its notebook defines"
    index = {}
    for path in sorted((root / 'nbs').rglob('*.ipynb')):
        cells = cells_of(path)
        module = next((c.directives['default_exp'] for c in cells if 'default_exp' in c.directives), None)
        if module:
            index[module] = [n for c in cells if c.exported for n in c.names]
    return index


@cache
def _events():
    from fastai.callback.core import event

    return [n for n in vars(event) if not n.startswith('__')]


def first_sentence(doc):
    "The first sentence of a docstring, which `et al.` does not end"
    text = ' '.join(doc.split('\n\n')[0].split())
    return re.split(r'(?<=[^.]{4})\. (?=[A-Z`*])', text)[0].rstrip('.')


def _function(obj):
    "What has the docstring and the signature"
    if isinstance(obj, property):
        return obj.fget
    return obj.__func__ if isinstance(obj, (classmethod, staticmethod)) else obj


def type_text(anno):
    "An annotation without the modules of its names"
    if anno is EMPTY or anno is None:
        return 'None' if anno is None else ''
    text = anno if isinstance(anno, str) else inspect.formatannotation(anno)
    return re.sub(r'(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)', r'\1', text)


def _default(value):
    if isinstance(value, partial):
        given = [*map(_default, value.args), *(f'{k}={_default(v)}' for k, v in value.keywords.items())]
        return f'partial({", ".join([_default(value.func), *given])})'
    name = getattr(value, '__name__', None)
    return name if name and callable(value) else re.sub(r' at 0x[0-9a-f]+', '', repr(value))


def _argument(arg, d):
    "How a table names an argument, or what is returned"
    return '**Returns**' if arg == 'return' else f'`{STARS.get(d.get("kind"), "")}{arg}`'


def _given(arg, d):
    "What a table says of an argument's default"
    if arg == 'return' or d.get('kind') in STARS:
        return ''
    return 'required' if d.default is EMPTY else _code(_default(d.default))


def _code(text):
    "Code in a cell of a table"
    text = text.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')
    return f'<code>{text}</code>' if text else ''


def _escaped(text):
    "Prose in which `<` is no tag"
    return re.sub(r'<(?=[A-Za-z/!])', '&lt;', text)


def _cell(text):
    "Prose in a cell of a table"
    return re.sub(r'(`[^`]*`)|\|', lambda m: m[1] or '&#124;', _escaped(text))


def signature_text(name, obj):
    "The signature as it is called, without types"
    if isinstance(obj, property):
        return name
    f = _function(obj)
    try:
        called = f.__init__ if inspect.isclass(f) else f
        parameters = list(inspect.signature(called).parameters.values())
    except (ValueError, TypeError):
        return f'{name}(...)'
    is_bound = parameters and parameters[0].name in ('self', 'cls')
    shown = []
    for p in parameters[1:] if is_bound else parameters:
        if p.kind is p.KEYWORD_ONLY and not any(s.startswith('*') for s in shown):
            shown.append('*')
        shown.append(f'{STARS.get(p.kind, "")}{p.name}' + ('' if p.default is p.empty else f'={_default(p.default)}'))
    line = f'{name}({", ".join(shown)})'
    if len(line) <= 88:
        return line
    return f'{name}(\n' + ''.join(f'    {s},\n' for s in shown) + ')'
