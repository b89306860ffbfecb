"""The site: complete, without dead links, without other hosts, and as wide as the window."""
import functools, http.server, json, os, re, shutil, subprocess, sys, threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', out]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope='module')
def pages(site):
    return {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}


def test_every_notebook_run_and_module_has_a_page(pages):
    notebooks = [p for p in (ROOT/'nbs').rglob('*.ipynb') if p != ROOT/'nbs'/'index.ipynb']      # that one makes README.md
    runs = [*(ROOT/'papermill_runs'/'full').glob('*.ipynb')]
    sources = [*notebooks, *runs, *(ROOT/'docs').glob('*.md')]
    wanted = {p.relative_to(ROOT).with_suffix('.html').as_posix().removeprefix('docs/') for p in sources}
    modules = [p.relative_to(ROOT/'codegpt_nbc') for p in (ROOT/'codegpt_nbc').glob('*/*.py') if not p.name.startswith('_')]
    wanted |= {f'reference/{p.with_suffix(".html").as_posix()}' for p in modules}
    assert wanted - set(pages) == set()


def test_first_page_shows_the_pareto_picture(pages):
    assert re.search(r'<img[^>]*src="figures/students/fig_pareto\.png"', pages['index.html'])


def test_every_parameter_is_in_the_table_of_templates(pages):
    for path in (ROOT/'nbs'/'experiments').glob('*.ipynb'):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        source = next(''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', []))
        section = pages['templates.html'].partition(f'<h2 id="{path.stem}">')[2].partition('<h2 ')[0]
        for name in re.findall(r'^(\w+) *=', source, re.MULTILINE): assert f'<code>{name}</code>' in section, f'{path.stem}: {name}'


def test_no_run_of_a_scratch_profile(pages):
    runs = {name.split('/')[1] for name in pages if name.startswith('papermill_runs/')}
    assert [r for r in runs if re.match('(quick|smoke|try)$|(try|search|compress)-', r)] == []


def test_scratch_profiles_are_not_looked_into(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT/'docs'))
    try: import hooks
    finally: sys.path.remove(str(ROOT/'docs'))
    monkeypatch.setattr(hooks, 'ROOT', tmp_path)
    for name in ('full', 'smoke', 'try-1'):
        (tmp_path/'figures'/name).mkdir(parents=True)
        (tmp_path/'figures'/name/'fig.png').touch()
    assert hooks.committed('figures', '*.png') == ['figures/full/fig.png']
    assert hooks.committed('figures', '') == ['figures/full']


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site, pages):
    files = {p.relative_to(site).as_posix() for p in site.rglob('*') if p.is_file()}
    for name, text in pages.items():
        if name == '404.html': continue                      # its links are absolute, for the host of the site
        for target in re.findall(r'<(?:a|img|script|link)\b[^>]*?(?:href|src)="([^"#?:]+)["#?]', text):
            assert normpath(join(dirname(name), target)) in files, f'{name} → {target}'
        assert not (m := re.search(r'<(?:img|script|link|iframe)\b[^>]*?(?:href|src)="(?:https?:)?//[^"]*', text)), f'{name} loads {m[0]}'


def test_formulas_are_mathml(pages):
    assert '<math' in pages['nbs/methods/30_prune.html']
    for name, text in pages.items(): assert not re.search(r'class="arithmatex[^"]*">\\', text), name


class Elements(HTMLParser):
    "Counts the elements of a page, by their names and by the names of those that are closed."
    def __init__(self, text: str):
        super().__init__()
        self.begun, self.ended = Counter(), Counter()
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.begun[tag] += 1
    def handle_endtag(self, tag): self.ended[tag] += 1


STRUCK = ('s', 'i', 'b', 'u', 'em', 'strong', 'del', 'ins', 'code', 'pre', 'blockquote', 'table', 'div')


def test_no_token_of_a_model_is_taken_for_an_element(pages):
    for name, text in pages.items():
        page = Elements(text)
        odd = [tag for tag in page.begun if re.fullmatch('eol|unk|pad|mask|bos|eos|(str|num)_lit.*|.*_.*', tag)]
        assert odd == [], f'{name}: write these as code, or escape them'
        left_open = [tag for tag in STRUCK if page.begun[tag] != page.ended[tag]]
        assert left_open == [], name


def test_examples_of_docstrings_are_code(pages):
    text = pages['reference/runs/api.html']
    assert 'with open (' in text and not re.search(r'<blockquote>\s*<blockquote>', text)
    assert '&lt;s&gt;' in text and 'doctest' not in re.sub(r'<details.*?</details>', '', text, flags=re.DOTALL)


def test_a_picture_opens_in_full_size(pages):
    for name in ('index.html', 'results.html', 'nbs/methods/30_prune.html'):
        pictures = re.findall(r'<img [^>]*src="([^"]+\.png)"', pages[name])
        assert pictures and all(f'href="{src}"' in pages[name] for src in pictures), name


MEASURE = """<!DOCTYPE html><body><script>
const load = ([url, width]) => new Promise(done => {
  const frame = document.createElement('iframe');
  frame.sandbox = 'allow-same-origin';          // without scripts, as a page is before they run
  frame.style.cssText = `border:0;height:800px;width:${width}px`;
  frame.onload = () => {
    const page = frame.contentDocument;
    done([url, width, page.scrollingElement.scrollWidth, [...page.images].filter(i => i.complete && !i.naturalWidth).length]);
    frame.remove();
  };
  frame.src = url; document.body.append(frame);
});
(async () => {
  const out = [];
  for (const todo of TODO) out.push(await load(todo));
  const result = document.createElement('pre');
  result.id = 'result'; result.textContent = JSON.stringify(out); document.body.replaceChildren(result);
})();
</script></body>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def test_pages_fit_wide_and_narrow_windows(site, pages):
    chromium = next((c for c in ('chromium', 'chromium-browser', 'google-chrome') if shutil.which(c)), None)
    if not chromium: pytest.skip('no Chromium here (Debian: apt-get install chromium)')
    some_runs = ('index.html', 'report.html', 'baseline.html')
    few = [name for name in sorted(pages) if not name.startswith('papermill_runs/') or name.endswith(some_runs)]
    todo = [(name, width) for name in few for width in (1280, 390)]
    (site/'measure.html').write_text(MEASURE.replace('TODO', json.dumps(todo)), encoding='utf-8')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=600000', '--dump-dom',
                   f'http://127.0.0.1:{server.server_port}/measure.html']
        try: dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        finally:
            server.shutdown()
            (site/'measure.html').unlink()
    result = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1])
    assert len(result) == len(todo)
    assert [r for r in result if r[2] > r[1] or r[3]] == [], '(page, window, width of the page, pictures that did not load)'
