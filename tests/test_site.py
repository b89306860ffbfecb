"""The site of this repository: no broken link, no missing picture, no window too narrow; and mistakes are one sentence."""
import functools, http.server, json, os, re, shutil, subprocess, sys, threading
from pathlib import Path
import nbformat, pytest
from codegpt_nbc.site import broken_links

ROOT = Path(__file__).resolve().parent.parent
PIXEL = bytes.fromhex('89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082')


def site(*args, home=None):
    env = os.environ | {'HF_HUB_OFFLINE': '1'} | ({'CODEGPT_NBC_HOME': str(home)} if home else {})
    return subprocess.run([sys.executable, '-m', 'codegpt_nbc.site', *map(str, args)], cwd=home or ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path):
    "A repository of two pages, with a picture and a wide table."
    v4, wide = nbformat.v4, '|' + ' column |'*30
    (tmp_path/'nbs').mkdir()
    nb = v4.new_notebook(cells=[v4.new_markdown_cell('# Book\n> One.\n\nBack to [the start](../README.md#Top), $x^2$.'), v4.new_code_cell('x = 1')])
    nbformat.write(nb, tmp_path/'nbs'/'a.ipynb')
    (tmp_path/'dot.png').write_bytes(PIXEL)
    (tmp_path/'README.md').write_text(f'# Top\n\n![a dot](dot.png) and [a book](nbs/a.ipynb)\n\n{wide}\n|{"---|"*30}\n{wide}\n')
    return tmp_path


def test_links_and_pictures_of_a_small_site(small):
    done = site(home=small)
    assert done.returncode == 0, done.stderr
    assert broken_links(small/'_site') == [] and (small/'_site'/'dot.png').read_bytes() == PIXEL
    assert 'href="../index.html#Top"' in (small/'_site'/'nbs'/'a.html').read_text()
    assert '(0 of them made now)' in site(home=small).stdout
    (small/'_site'/'dot.png').unlink()
    assert broken_links(small/'_site') == [('index.html', 'dot.png')], 'the check sees a missing picture'


def test_mistakes_are_one_sentence(small):
    def said(*args):
        p = site(*args, home=small)
        lines = p.stderr.strip().splitlines()
        assert p.returncode == 1 and 'Traceback' not in p.stderr and lines[-1].startswith('codegpt-nbc: '), p.stderr
        return lines[-1]
    assert "profile 'nobody' has no executed runs" in said('nobody')
    (small/'README.md').write_text('[gone](gone.md)')
    assert 'gone.md (on index.html)' in said()
    (small/'nbs'/'a.ipynb').write_text('{"cells": [')
    assert 'a.ipynb is not a notebook' in said()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "This repository's own site."
    out = tmp_path_factory.mktemp('site')
    done = site('--out', out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_whole_site_stands_alone(whole):
    pages = {p.relative_to(whole).as_posix(): p.read_text() for p in whole.rglob('*.html')}
    assert broken_links(whole) == [] and {'index.html', 'nbs/05_model.html', 'nbs/experiments/prune.html', 'api/model.html'} <= set(pages)
    for book in (ROOT/'papermill_runs'/'full').glob('*.ipynb'): assert f'papermill_runs/full/{book.stem}.html' in pages
    for name, text in pages.items():
        assert '<script' not in text and f'{ROOT}/' not in text, name
        assert 'viewport' in text and text.count('<main') == 1, name
        assert not re.search(r'<img(?![^>]*\balt=)', text), f'{name} has a picture without a description'
    assert sum(p.stat().st_size for p in whole.rglob('*') if p.is_file()) < 30_000_000


MEASURE = """<!DOCTYPE html><body><script>
const load = ([url, width]) => new Promise(done => {
  const f = document.createElement('iframe');
  f.style.cssText = `border:0;height:800px;width:${width}px`;
  f.onload = () => { const d = f.contentDocument;
    done([url, width, d.scrollingElement.scrollWidth, [...d.images].filter(i => !i.naturalWidth).length]); f.remove(); };
  f.src = url; document.body.append(f); });
(async () => { const out = []; for (const t of TODO) out.push(await load(t));
  const p = document.createElement('pre'); p.id = 'result'; p.textContent = JSON.stringify(out); document.body.replaceChildren(p); })();
</script></body>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def test_pages_fit_wide_and_narrow_windows(whole):
    chromium = next((c for c in ('chromium', 'chromium-browser', 'google-chrome') if shutil.which(c)), None)
    if not chromium: pytest.skip('no Chromium here (Debian: apt-get install chromium)')
    todo = [(p.relative_to(whole).as_posix(), w) for p in sorted(whole.rglob('*.html')) for w in (1280, 390)]
    (whole/'measure.html').write_text(MEASURE.replace('TODO', json.dumps(todo)))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(whole))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: dom = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=600000', '--dump-dom', f'http://127.0.0.1:{server.server_port}/measure.html'],
                                  capture_output=True, text=True, timeout=600).stdout
        finally: server.shutdown(); (whole/'measure.html').unlink()
    result = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1])
    assert len(result) == len(todo)
    assert [r for r in result if r[2] > r[1] or r[3]] == [], '(page, window, width of the page, pictures that did not load)'
