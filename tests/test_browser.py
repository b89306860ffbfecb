"""Inline completion where people see it: a cell of JupyterLab, in headless Chromium, asks the editor's server through CellSense.

`python tests/test_browser.py PICTURE.png` takes the picture that the docs show."""
import json, os, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import pytest
from codegpt_nbc import load

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name in ('fastapi', 'uvicorn', 'prometheus_client', 'jupyterlab', 'playwright', 'cellsense') if not find_spec(name)]
WHY = 'there is no Chromium: apt-get install chromium' if not CHROMIUM else \
      f"not installed: {', '.join(MISSING)}; pip install -r requirements-editor.txt"
pytestmark = pytest.mark.skipif(bool(MISSING) or not CHROMIUM, reason=WHY)

CELLS = ['import json\nimport os\n\n\ndef read(path):\n    with open(path) as f:\n        return json.load(f)', '']
TYPED = 'def save(path, data):\n    with open('
SETTINGS = {   # of JupyterLab: plugin → settings
    'jupyterlab-cellsense/plugin': {
        'provider': 'openai_compatible', 'retrieval': {'enabled': False}, 'completion': {'one_line_completions': True,
                                                                                        'stream_timeout_ms': 60000}},
    '@jupyterlab/completer-extension/inline-completer': {'providers': {
        'jupyterlab-cellsense': {'enabled': True, 'timeout': 60000, 'debouncerDelay': 50},
        '@jupyterlab/inline-completer:history': {'enabled': False}}},
    '@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
}


def a_notebook(cells: list) -> dict:
    kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    made = [dict(cell_type='code', id=f'c{i}', source=text, metadata={}, outputs=[], execution_count=None) for i, text in enumerate(cells)]
    return dict(cells=made, metadata={'kernelspec': kernel}, nbformat=4, nbformat_minor=5)


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


def answers(port: int) -> bool:
    try: socket.create_connection(('127.0.0.1', port), 1).close()
    except OSError: return False
    return True


@contextmanager
def jupyterlab(folder: Path, server: str, name: str):
    "JupyterLab on a notebook, with CellSense pointed at our server; its address."
    (folder/'work').mkdir()
    (folder/'extensions').mkdir()   # where the package has its own; its wheel 0.3.1 does not put it where JupyterLab looks
    (folder/'extensions'/'jupyterlab-cellsense').symlink_to(Path(find_spec('cellsense').origin).parent/'labextension')
    (folder/'work'/'sizes.ipynb').write_text(json.dumps(a_notebook(CELLS)), encoding='utf-8')
    theirs = {'openai_compatible': {'base_url': server, 'model': name}}
    for plugin, said in SETTINGS.items():
        path = folder/'settings'/f'{plugin}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(said | theirs if 'cellsense' in path.parent.name else said), encoding='utf-8')
    port, where = free_port(), {f'JUPYTER{kind}_DIR': str(folder/kind) for kind in ('_CONFIG', '_DATA', '_RUNTIME')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=', f'--ServerApp.root_dir={folder/"work"}', '--ServerApp.jpserver_extensions={"cellsense": True}',
               f'--LabApp.extra_labextensions_path={folder/"extensions"}']
    env = os.environ | where | {'JUPYTERLAB_SETTINGS_DIR': str(folder/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(folder/'workspaces')}
    with open(folder/'log', 'w') as log: process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None and time.monotonic() < end, (folder/'log').read_text()
            time.sleep(.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def opened(address: str):
    "The notebook in Chromium, with the cursor in its last cell."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport={'width': 1000, 'height': 400}, device_scale_factor=1.5)
        page.set_default_timeout(120_000)
        page.goto(f'{address}/lab/tree/sizes.ipynb?reset')
        page.locator('.jp-Notebook-cell .cm-content').nth(1).click()
        try: yield page
        finally: browser.close()


@contextmanager
def completing(folder: Path):
    "A typed cell that shows what the model writes: the page, that text, and what our server was asked."
    from codegpt_nbc.runs.serve import Worker, served
    model, asked = load(), []
    complete = Worker.complete
    def noted(self, job, i, ask):
        asked.append(ask)
        complete(self, job, i, ask)
    Worker.complete = noted
    try:
        with served(model, ignore_suffix=True, alias='starcoder') as (server, _), jupyterlab(folder, server, 'starcoder') as address:
            with opened(address) as page:
                page.keyboard.insert_text(TYPED[:-5])   # at once, as JupyterLab indents a line that is begun by a key
                page.keyboard.type(TYPED[-5:], delay=30)
                end = time.monotonic() + 60
                while not (asked and asked[-1].prompt.endswith(TYPED)):   # earlier keys are asked for, too
                    assert time.monotonic() < end, asked
                    page.wait_for_timeout(50)
                want = model.complete(asked[-1].prompt, asked[-1].max_new, text='raw').strip()
                page.locator('.jp-GhostText', has_text=want).wait_for()
                yield page, want, asked[-1].prompt
    finally: Worker.complete = complete


def last_cell(page) -> str: return '\n'.join(page.locator('.jp-Notebook-cell').nth(1).locator('.cm-line').all_inner_texts())


def test_a_cell_of_jupyterlab_shows_the_completion_and_takes_it(tmp_path):
    with completing(tmp_path) as (page, want, prompt):
        assert CELLS[0] in prompt and want and page.locator('.jp-GhostText').inner_text() == want
        page.keyboard.press('Tab')
        page.locator('.jp-GhostText').wait_for(state='detached')
        assert last_cell(page) == TYPED + want


if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as folder, completing(Path(folder)) as (page, *_):
        page.locator('.jp-NotebookPanel').screenshot(path=sys.argv[1])
