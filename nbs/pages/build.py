"""Build the pages: notebooks and docstrings in, HTML out.

    python nbs/pages/build.py [FOLDER]      # FOLDER: _docs

Notebooks are shown with the outputs that they carry. `LIVE` pages carry none and are run: their numbers are those of
the rows that are there on the day. A picture that was not made, a broken link and any warning of Sphinx end
it with exit code 1.
"""
import ast
import base64
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {'0_ground': 'Ground', '1_data': 'Data', '2_objects': 'Objects', '3_masks': 'Masks',
          '4_synthesis': 'Synthesis', '5_detection': 'Detection', '6_evidence': 'Evidence', '7_roof': 'Commands'}
CHAPTERS = {                                      # of the table of contents: pages in their order
    'Start': ['gallery', 'own_images', 'which_segmenter', 'why_not'],
    'Make it yours': ['own_segmenter', 'own_objects', 'own_detector'],
    'The paper': ['paper', 'cluster']}
LIVE = {f'pages/{p}' for p in ('which_segmenter', 'why_not', 'paper', 'cluster')}
SHOWS = {'show', 'captioned', 'imshow', 'subplots'}      # functions that show a picture


# ---- pictures that were not made

def calls(node):
    "The names of functions that a cell calls whatever happens: not in a branch or a function."
    if isinstance(node, (ast.If, ast.IfExp, ast.Lambda, ast.FunctionDef, ast.ClassDef)): return
    if isinstance(node, ast.Call): yield getattr(node.func, 'attr', getattr(node.func, 'id', ''))
    for child in ast.iter_child_nodes(node): yield from calls(child)


def shows(source):
    "Does a cell of this source show a picture whatever happens?"
    try: tree = ast.parse(source)
    except SyntaxError: return False
    return not SHOWS.isdisjoint(calls(tree))


def outputs(nb):
    "The outputs of a notebook, cell by cell of those with code."
    return [(''.join(c['source']), c['outputs']) for c in nb['cells'] if c['cell_type'] == 'code']


def not_made(nb):
    "The cells of a notebook that show a picture and carry none, by their first lines."
    def pictures(outs): return [k for o in outs for k in o.get('data', ()) if k.startswith('image/')]
    return [source.strip().splitlines()[0] for source, outs in outputs(nb) if shows(source) and not pictures(outs)]


# ---- links

class Page(html.parser.HTMLParser):
    "What a page of HTML points at, and what in it can be pointed at."
    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k in ('href', 'src') and v is not None: self.links.append(v)
            if k == 'id' or k == 'name' and tag == 'a': self.names.add(v)


def wrong(link, page, pages):
    "What is wrong with a link of a page, or ''. Nothing is asked of a network."
    parts = urlsplit(link)
    if parts.scheme in ('http', 'https'):
        return '' if re.fullmatch(r'[\w.-]+\.\w+(:\d+)?', parts.netloc) and not re.search(r'\s', link) else 'no address'
    if parts.scheme in ('mailto', 'data'): return ''
    if parts.scheme or parts.netloc: return 'no address'
    file = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    if not file.is_file(): return 'no such page'
    known = pages.get(file)
    return '' if not parts.fragment or known is None or unquote(parts.fragment) in known.names else 'no such place'


def broken(folder):
    "The broken links of a folder of HTML, as lines."
    home = Path(folder).resolve()
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(home.rglob('*.html'))}
    found = [(page.relative_to(home), link, wrong(link, page, pages)) for page in pages for link in pages[page].links]
    return [f'{page}: {link}: {why}' for page, link, why in dict.fromkeys(found) if why]


# ---- the pages that Sphinx is given

def title(nb): return ''.join(nb['cells'][0]['source']).splitlines()[0].lstrip('# ')


def about(nb):
    "The line under a notebook's title."
    lines = ''.join(nb['cells'][0]['source']).splitlines()
    return next((l[2:].replace('|', '\\|') for l in lines if l.startswith('> ')), '')


def module(nb):
    "The module that a notebook exports, or ''."
    found = [re.search(r'^#\| default_exp (\S+)', source, re.M) for source, _ in outputs(nb)]
    return next((f'synthdet.{m[1]}' for m in found if m), '')


def markdown(text, k=0): return dict(cell_type='markdown', id=f'page{k}', metadata={}, source=text)


def imports_only(source):
    try: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError: return False


def readable(cell):
    "A cell without nbdev's directives, imports folded; None where nothing is left."
    source = re.sub(r'^#\|.*\n?', '', ''.join(cell['source']), flags=re.M)
    if not source.strip(): return None
    tags = set(cell['metadata'].get('tags', ()))
    if cell['cell_type'] == 'code' and imports_only(source): tags.add('hide-input')
    return {**cell, 'source': source, 'metadata': dict(tags=sorted(tags))}


def staged(nb, path):
    "A notebook as a page: where it is said what it exports, and whether it was ever run."
    said, name = [], module(nb)
    if name: said = [f'*Notebook `{path}`, exported as `{name}`:* [its functions and classes](../reference/{name}.md).']
    elif outputs(nb) and not any(outs for _, outs in outputs(nb)):
        said = ['```{note}\nThis notebook has not been run yet, so there are no numbers or pictures.\n```']
    first, *rest = filter(None, map(readable, nb['cells']))
    return {**nb, 'cells': [first, *map(markdown, said), *rest]}


def run(nb):
    "A notebook with its outputs."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    NotebookClient(nb, timeout=600, kernel_name='python3').execute()
    return json.loads(nbformat.writes(nb))


def notebooks(root=ROOT):
    "dict path below `nbs`, without its ending -> notebook, as it stands."
    paths = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(s[0] in '._' for s in p.relative_to(root).parts))
    return {p.relative_to(root/'nbs').with_suffix('').as_posix(): json.loads(p.read_text(encoding='utf-8')) for p in paths}


def toctree(pages, caption=''):
    "The directive for a part of the table of contents."
    options = [f':caption: {caption}']*bool(caption) + [':hidden:', ':maxdepth: 1']
    return '\n'.join(['```{toctree}', *options, '', *pages, '```'])


def contents(names):
    """The table of contents: dict caption -> pages.

    Every notebook stands in it: pages as `CHAPTERS` say, experiments by name, floors through their own index.
    """
    chapters = {caption: [f'pages/{p}' for p in pages if f'pages/{p}' in names] for caption, pages in CHAPTERS.items()}
    chapters['Start'] = [*chapters['Start'], *sorted(n for n in names if '/' not in n and n != 'index')]
    chapters['Experiments'] = sorted(n for n in names if n.startswith('experiments/'))
    floors = [f'{f}/index' for f in FLOORS if any(n.startswith(f'{f}/') for n in names)]
    return chapters | {'How it is made': floors, 'Reference': ['reference/index']}


def unlisted(names):
    "The notebooks that the table of contents does not lead to."
    listed = {page for pages in contents(names).values() for page in pages} | {'index'}
    return sorted(n for n in names if n not in listed and n.split('/')[0] not in FLOORS)


def floor_page(floor, nbs):
    "The index of a floor: its notebooks in their order, a line each."
    inside = {n.split('/')[1]: nb for n, nb in nbs.items() if n.startswith(f'{floor}/')}
    rows = [f'| [{title(nb)}]({n}.ipynb) | {about(nb)} |' for n, nb in inside.items()]
    return '\n'.join([f'# {FLOORS[floor]}', '', '| notebook | what it turns into what |', '| --- | --- |', *rows, '',
                      toctree(inside)])


def module_page(name, notebook):
    "The reference of a module."
    return '\n'.join([f'# {name.removeprefix("synthdet.")}', '', f'*How it is made, with pictures and tests:* '
                      f'[the notebook](../{notebook}.ipynb).', '', '```{eval-rst}', f'.. automodule:: {name}', '```'])


def face_page():
    "The reference of what `synthdet` itself offers."
    import synthdet
    names = [n for n in synthdet.__all__ if not n.startswith('_')]
    kinds = {n: 'class' if isinstance(getattr(synthdet, n), type) else 'function' for n in names}
    told = [line for n in names for line in (f'.. auto{kinds[n]}:: {n}', '   :no-index:', '')]
    return '\n'.join(['# synthdet', '', 'What most users need; each name is imported when it is used. Everything else '
                      'is in the modules.', '', '```{eval-rst}', '.. currentmodule:: synthdet', '', *told, '```'])


def reference_page(modules):
    "All modules, floor by floor."
    lines = ['# Reference', '', 'Shapes are in brackets, `[N,4]`; boxes are x0, y0, x1, y1 in pixels; images uint8 '
             '`[3,H,W]`.', '', '[synthdet](face.md): what most users need.', '']
    for floor, text in FLOORS.items():
        inside = {n: nb for n, nb in modules.items() if n.startswith(f'{floor}/')}
        if not inside: continue
        rows = [f'| [{module(nb).removeprefix("synthdet.")}]({module(nb)}.md) | {about(nb)} |' for nb in inside.values()]
        lines += [f'## {text}', '', '| module | |', '| --- | --- |', *rows, '']
    return '\n'.join([*lines, toctree(['face', *map(module, modules.values())])])


# ---- the gallery: the largest picture of every notebook, with a link

def largest(nb):
    "The largest picture that a notebook carries: (ending, its base64); None."
    found = [(len(text), kind, text) for _, outs in outputs(nb) for o in outs
             for kind, text in o.get('data', {}).items() if kind in ('image/png', 'image/jpeg')]
    return max(found)[1:] if found else None


def gallery(nbs, folder):
    "Cards of pictures, floor by floor; the pictures are written to a folder."
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for chapter, text in {'pages': 'Tutorials', 'experiments': 'Experiments', **FLOORS}.items():
        inside = {n: largest(nb) for n, nb in nbs.items() if n.startswith(f'{chapter}/') and largest(nb)}
        if inside: lines += [f'## {text}', '', '::::{container} gallery']
        for name, (kind, data) in inside.items():
            file = f'{name.replace("/", "-")}.{kind.split("/")[1]}'
            (folder/file).write_bytes(base64.b64decode(''.join(data)))
            lines += [':::{container} card', f'[![{title(nbs[name])}](gallery/{file})](../{name}.ipynb)', '',
                      f'[{title(nbs[name])}](../{name}.ipynb) {about(nbs[name])}', ':::']
        if inside: lines += ['::::', '']
    return '\n'.join(lines)


# ---- all together

def laid(source, target):
    "Make a folder like another one; files that are the same are left alone, so that Sphinx reads what has changed."
    files = {p.relative_to(source): p.read_bytes() for p in source.rglob('*') if p.is_file()}
    for p in [p for p in target.rglob('*') if p.is_file() and p.relative_to(target) not in files]: p.unlink()
    for name, data in files.items():
        file = target/name
        if file.is_file() and file.read_bytes() == data: continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def executed(nbs, tell=print):
    "The notebooks, with the `LIVE` ones run; tells of those that were never run."
    for name, nb in nbs.items():
        start = time.perf_counter()
        if name in LIVE:
            nb = run(nb)
            tell(f'ran {name} in {time.perf_counter() - start:.0f} s')
        elif outputs(nb) and not any(outs for _, outs in outputs(nb)): tell(f'not run yet: {name}')
        yield name, nb


def lacking(nbs):
    "The pictures that were not made, as lines; experiments that were never run have none, and their pages say so."
    ran = {n: nb for n, nb in nbs.items() if n.startswith('pages/') or any(outs for _, outs in outputs(nb))}
    return [f'{name}: no picture under: {line}' for name, nb in ran.items() for line in not_made(nb)]


def sources(nbs, root, folder):
    "Write the pages that Sphinx is given."
    for name, nb in nbs.items(): write(folder/f'{name}.ipynb', json.dumps(page(name, nb, nbs, folder)))
    modules = {n: nb for n, nb in nbs.items() if n.split('/')[0] in FLOORS and module(nb)}
    for name, nb in modules.items(): write(folder/'reference'/f'{module(nb)}.md', module_page(module(nb), name))
    for floor in {n.split('/')[0] for n in nbs} & set(FLOORS): write(folder/floor/'index.md', floor_page(floor, nbs))
    write(folder/'reference'/'face.md', face_page())
    write(folder/'reference'/'index.md', reference_page(modules))
    shutil.copytree(root/'nbs'/'images', folder/'images')
    shutil.copytree(root/'nbs'/'pages'/'_static', folder/'_static')
    shutil.copy(root/'nbs'/'pages'/'conf.py', folder)


def page(name, nb, nbs, folder):
    "A notebook as a page, with what is put into two of them: the table of contents and the gallery."
    nb = staged(nb, f'nbs/{name}.ipynb')
    if name == 'index': nb['cells'] += [markdown(toctree(p, c), k) for k, (c, p) in enumerate(contents(nbs).items()) if p]
    if name == 'pages/gallery': nb['cells'] += [markdown(gallery(nbs, folder/'pages'/'gallery'), 1)]
    return nb


def build(root=ROOT, folder=ROOT/'_docs'):
    "Build the pages; gives what is wrong with them, as lines."
    nbs = dict(executed(notebooks(root)))
    with tempfile.TemporaryDirectory() as scratch:
        sources(nbs, root, Path(scratch))
        laid(Path(scratch), folder/'source')
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', '2', '-d', folder/'doctrees']
    done = subprocess.run([*command, folder/'source', folder/'html'], env={**os.environ, 'PYTHONPATH': str(root)})
    wrong = lacking(nbs) + ['Sphinx has warned, see above']*(done.returncode != 0) + broken(folder/'html')
    if wrong: shutil.rmtree(folder/'doctrees', ignore_errors=True)      # or the next build would be silent about it
    return wrong


def main(argv):
    sys.path.insert(0, str(ROOT))
    if not find_spec('myst_nb') or not find_spec('furo'): sys.exit("the pages need Sphinx: pip install -e '.[docs]'")
    start, folder = time.perf_counter(), Path(argv[0]) if argv else ROOT/'_docs'
    wrong = build(folder=folder)
    for line in wrong: print(line)
    if wrong: sys.exit(f'not built: {len(wrong)} wrong')
    pages = len(list((folder/'html').rglob('*.html')))
    print(f'{pages} pages in {time.perf_counter() - start:.0f} s: {folder/"html"/"index.html"}')


if __name__ == '__main__': main(sys.argv[1:])
