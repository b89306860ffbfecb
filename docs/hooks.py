"""Pages that MkDocs does not find in docs/: notebooks, templates, executed runs and the reference, made from the repository.

Every page knows the file of the repository it is made from. A link to a file becomes one to its page, or else to the repository's host.
"""
import ast, html, re
from functools import cache
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File, InclusionLevel
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
WINGS = ('core', 'data', 'model', 'methods', 'engines', 'evidence', 'runs', 'report')
BESIDE = ('CONTRIBUTING.md', 'CHANGELOG.md', 'LOG.md')
SCRATCH = re.compile('(quick|smoke|try)$|(try|search|compress)-')     # profiles whose runs are not committed
TO_MARKDOWN = MarkdownExporter(config={'RegexRemovePreprocessor': {'enabled': True, 'patterns': [r'#\| *(hide|default_exp)']}})
origin = {}   # page → file of the repository
page_of = {}  # and back


def repo(pattern: str) -> list:
    return [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob(pattern)) if '.ipynb_checkpoints' not in p.parts]


def committed(folder: str, pattern: str) -> list: # of the profiles that are committed; a grid may be writing into the others
    profiles = [p for p in repo(f'{folder}/*') if not SCRATCH.match(Path(p).name)]
    return [path for p in profiles for path in repo(f'{p}/{pattern}')] if pattern else profiles


@cache
def heading(path: str) -> list: # title, subtitle; without links, which would start elsewhere
    cells = nbformat.read(ROOT/path, as_version=4).cells
    text = next((c.source for c in cells if c.cell_type == 'markdown'), '')
    lines = (re.findall(rf'^{mark} (.+)', text, re.MULTILINE) for mark in '#>')
    return [re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', found[0]) if found else '' for found in lines]


def table(head: tuple, rows: list) -> str:
    lines = [head, ['---']*len(head), *rows]
    def shown(cell):
        escaped = cell.replace('|', r'\|')
        return escaped if '`' in cell else escaped.replace('<', '&lt;')
    return '\n' + '\n'.join('| ' + ' | '.join(map(shown, line)) + ' |' for line in lines) + '\n'


def from_notebook(path: str) -> tuple: # Markdown, name → picture
    nb = nbformat.read(ROOT/path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = re.sub(r'\n*(\$\$.+?\$\$)\n*', r'\n\n\1\n\n', cell.source, flags=re.DOTALL)
        else: cell.source = re.sub(r'^#\|(?! *(?:hide|default_exp)).*\n?', '', cell.source, flags=re.MULTILINE)
    nb.metadata['language_info'] = {'name': 'python'}
    text, resources = TO_MARKDOWN.from_notebook_node(nb)
    text = re.sub(r'<style.*?</style>\s*|(?<=<table)[^>]*', '', text, flags=re.DOTALL)   # the site's own tables
    stem = Path(path).stem
    text = re.sub(r'!\[\w+\]\((output_[^)]+)\)', lambda m: f'![{heading(path)[0]}]({stem}.{m[1]})', text)
    return text, {f'{stem}.{name}': data for name, data in (resources.get('outputs') or {}).items()}


def parameters(path: str) -> list: # rows of name, default, comment
    cells = nbformat.read(ROOT/path, as_version=4).cells
    source = next(c.source for c in cells if 'parameters' in c.metadata.get('tags', []))
    comments = [''.join(re.findall(r'\s#\s+(.+)$', line)) for line in source.splitlines()]
    return [(f'`{node.targets[0].id}`', f'`{ast.unparse(node.value)}`', comments[node.lineno - 1]) for node in ast.parse(source).body]


def templates_page() -> str:
    text = '# Templates\n\nA template is a notebook with parameters. papermill executes it once for each run of a profile.\n'
    for path in repo('nbs/experiments/*.ipynb'):
        title, subtitle = heading(path)
        text += f'\n## {Path(path).stem}\n\n[{title}]({path}). {subtitle}\n{table(("parameter", "default", "meaning"), parameters(path))}'
    return text


def notebooks_page() -> str:
    text = '# All notebooks\n\nThe notebooks are the source of the package. A wing imports only from itself and from the wings above it.\n'
    for wing in WINGS:
        rows = [(f'[{Path(p).stem}]({p})', heading(p)[1]) for p in repo(f'nbs/{wing}/*.ipynb')]
        text += f'\n## {wing}\n{table(("room", "about"), rows)}'
    return text


def profile_page(name: str, runs: list) -> str:
    config = ROOT/'configs'/f'{name}.yaml'
    about = re.findall('^about: (.+)', config.read_text(encoding='utf-8') if config.is_file() else '')
    return f'# Runs of {name}\n\n{"".join(about)}\n{table(("run", "template"), [(f"[{Path(r).stem}]({r})", heading(r)[0]) for r in runs])}'


def on_files(files, config):
    "Add the generated pages, and to the navigation all that mkdocs.yml does not name."
    def add(page, content, source, **kw):
        files.append(File.generated(config, page, content=content, **kw))
        origin[page] = source
        return page

    def add_notebook(path, change=str, **kw):
        text, pictures = from_notebook(path)
        for name, data in pictures.items(): add(join(dirname(path), name), data, join(dirname(path), name))
        return add(str(Path(path).with_suffix('.md')), change(text), path, **kw)

    def add_run(path, profile):
        about = rf'# {Path(path).stem}\n\n\1, a run of the profile [{profile}](.).'
        head = '---\nsearch:\n  exclude: true\n---\n'
        add_notebook(path, lambda text: head + re.sub('^# (.+)', about, text.lstrip(), count=1), inclusion=InclusionLevel.NOT_IN_NAV)

    origin.update({f.src_uri: f'docs/{f.src_uri}' for f in files if f.src_uri.endswith(('.md', '.png'))})
    for path in committed('figures', '*.png') + committed('figures', '*.svg'):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
        origin[path] = path
    beside = [add(path, (ROOT/path).read_text(encoding='utf-8'), path) for path in BESIDE if (ROOT/path).is_file()]
    for path in repo('nbs/tour.ipynb'): add_notebook(path)
    rooms = {wing: [add_notebook(path) for path in repo(f'nbs/{wing}/*.ipynb')] for wing in WINGS}
    templates = [add_notebook(path) for path in repo('nbs/experiments/*.ipynb')]
    modules = {w: [add(f'reference/{w}/{Path(p).stem}.md', f'# {w}.{Path(p).stem}\n\n::: codegpt_nbc.{w}.{Path(p).stem}\n', p)
                   for p in repo(f'codegpt_nbc/{w}/[!_]*.py')] for w in WINGS}
    profiles = [Path(path).name for path in committed('papermill_runs', '')]
    runs = {name: repo(f'papermill_runs/{name}/*.ipynb') for name in profiles}
    for name, paths in runs.items():
        for path in paths: add_run(path, name)
    lists = [add(f'papermill_runs/{name}/index.md', profile_page(name, runs[name]), f'papermill_runs/{name}') for name in profiles]
    add('nbs/index.md', notebooks_page(), 'nbs')
    add('templates.md', templates_page(), 'nbs/experiments')
    page_of.update({source: page for page, source in origin.items()}, **{'README.md': 'index.md'})

    named = str(config.nav)
    rest = {wing: [page for page in pages if f"'{page}'" not in named] for wing, pages in rooms.items()}
    config.nav += [{'Notebooks': ['nbs/index.md', *({wing: pages} for wing, pages in rest.items() if pages)]},
                   {'Templates': ['templates.md', *templates]}, {'Runs': lists},
                   {'Reference': [{w: pages} for w, pages in modules.items()]}, {'Project': beside}]
    return files


def on_page_markdown(markdown, page, config, files):
    "Lead links to files of the repository to their pages."
    here = page.file.src_uri
    base = dirname(origin[here]) if (ROOT/origin[here]).is_file() else ''      # a generated list names files from the root

    def relink(m):
        target, anchor = m[1], m[2] or ''
        path = normpath(join(base, target))
        if path in page_of: return f']({relpath(page_of[path], dirname(here) or ".")}{anchor})'
        return f']({config.extra["source"]}/{path}{anchor})' if (ROOT/path).exists() else m[0]
    return re.sub(r'\]\(([\w./-]+)(#[\w-]*)?\)', relink, markdown)


def on_page_content(content, **kw):
    "Formulas become MathML, which browsers draw without a script. Pictures lead to themselves, where they can be read."
    def formula(m):
        tex = html.unescape(m[2])
        shown = convert(tex, display='block' if m[1] == 'div' else 'inline')
        return f'<{m[1]} class="arithmatex{" long" if len(tex) > 30 else ""}">{shown}</{m[1]}>'
    content = re.sub(r'(<p>)(<img [^>]*?src="([^"]+)"[^>]*>)(?=</p>)', r'\1<a class="full" href="\3">\2</a>', content)
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL)
