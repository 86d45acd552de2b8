"Sphinx's settings, and how it reads the house's docstrings. `build.py` writes the pages that it is given."
import dataclasses
import re

import synthdet
from synthdet.settings import Settings, choices

project, author, release = 'synthdet', 'the synthdet authors', synthdet.__version__
project_copyright = f'2026 onwards, {author}'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_*']
html_theme, html_title = 'furo', f'synthdet {release}'
html_static_path, html_css_files = ['_static'], ['pages.css']
html_show_sourcelink = html_copy_source = False
nb_execution_mode = 'off'                    # notebooks carry their outputs; build.py runs the pages that carry none
myst_enable_extensions = ['colon_fence', 'attrs_block', 'attrs_inline']
myst_heading_anchors = 3
suppress_warnings = ['myst.header']          # notebooks may skip a level of headings
autodoc_default_options = {'members': True, 'undoc-members': True, 'exclude-members': '__new__, __init__'}
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring = False
default_role = 'py:obj'                      # `name` is a link where there is such a name
python_use_unqualified_type_names = True

HEADS = ('Parameters', 'Returns', 'Yields', 'Raises')


def plain(text):
    "Text of a docstring for docutils: only backquotes mean something."
    parts = re.split(r'(`[^`]*`)', text)
    parts[::2] = [re.sub(r'([*|\\])|(?<=\w)(_)(?!\w)', r'\\\1\2', p) for p in parts[::2]]
    parts[1::2] = [p.replace('\\', '\\\\') for p in parts[1::2]]
    parts = [re.sub(r'(?<!http)(?<!https)://', r'\\://', p) for p in parts]      # no link to a machine that there is not
    return re.sub(r'(`[^`]*`)(?=\w)', r'\1\\ ', ''.join(parts))


def sections(lines):
    "The lines of a docstring, with the text of a parameter, `name : text`, on a line of its own, as napoleon wants it."
    inside, found = False, []
    lines = ['Parameters' if line == 'Attributes' else line for line in lines]     # those of a record are both
    for line, under in zip(lines, [*lines[1:], '']):
        if under and not under.strip('-'): inside = line in HEADS
        named = inside and re.fullmatch(r'(\S.*?) : (.+)', line)
        if named: found += [named[1], '    ' + plain(named[2])]
        elif inside and line[:1].strip(): found.append(line)
        else: found.append(plain(line))
    return found


def setting(f):
    "A field of `Settings` as a parameter: its help, its default, what it may be."
    if 'help' not in f.metadata: return [f.name, f'    `{type(f.default).__name__}`, or a dict of its settings']
    words = ', '.join(map(str, choices(f)))
    low, high = f.metadata['low'], f.metadata['high']
    about = [plain(f.metadata['help']), f'default ``{f.default!r}``']
    if words: about.append(plain(f'one of {words}' + ', or a path'*f.metadata['path']))
    if low is not None: about.append(f'{low} or more' if high is None else f'{low} to {high}')
    return [f.name, '    ' + '; '.join(about)]


def docstring(app, what, name, obj, options, lines):
    "Docstrings are Markdown-like text with numpy's sections; settings tell of themselves."
    settings = isinstance(obj, type) and issubclass(obj, Settings) and obj is not Settings
    if settings and 'Attributes' in lines: del lines[lines.index('Attributes'):]       # the same, with less to say
    lines[:] = sections(lines)
    if settings:
        fields = [line for f in dataclasses.fields(obj) for line in setting(f)]
        lines += ['', 'Parameters', '----------', *fields, '']


def signature(app, what, name, obj, options, sig, returns):
    "Settings have too many parameters for one line."
    if isinstance(obj, type) and issubclass(obj, Settings): return '(...)', returns
    return None


def skipped(app, what, name, obj, skip, options):
    "Fields of records stand in their docstring."
    plain_value = what == 'class' and not callable(obj) and not isinstance(obj, (property, staticmethod, classmethod))
    return True if plain_value else None


def setup(app):
    app.connect('autodoc-skip-member', skipped)
    app.connect('autodoc-process-docstring', docstring, priority=400)     # before napoleon's
    app.connect('autodoc-process-signature', signature)
