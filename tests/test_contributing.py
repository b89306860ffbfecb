"""CONTRIBUTING.md adds a method, from nothing to a row in the table: here its own blocks are written and run in a copy of the tree."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
BLOCKS = {title: body for title, body in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', TEXT, re.M | re.S)}
LEFT_OUT = ('.git', '.venv*', 'build', 'papermill_runs', 'figures', '_*', '.snakemake', '*.egg-info', '.*_cache', '__pycache__', '.tmp-*')


def cells(percent: str):
    "Yield the cells of a notebook in the percent format."
    for part in re.split(r'^# %%', percent, flags=re.M)[1:]:
        head, _, body = part.partition('\n')
        tags = json.loads(head.partition('tags=')[2] or '[]')
        if '[markdown]' in head:
            yield {'cell_type': 'markdown', 'metadata': {}, 'source': re.sub(r'^# ?', '', body.strip(), flags=re.M)}
        else:
            metadata = {'tags': tags} if tags else {}
            yield {'cell_type': 'code', 'metadata': metadata, 'execution_count': None, 'outputs': [], 'source': body.strip()}


def write(path: Path, text: str):
    "Write a block as the file that it is titled after."
    assert not path.exists(), f'{path.name} is there already'
    if path.suffix != '.ipynb':
        path.write_text(text, encoding='utf-8')
        return
    kernel = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    path.write_text(json.dumps({'cells': [*cells(text)], 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}), encoding='utf-8')


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
    "A copy of the repository with the files that CONTRIBUTING.md adds."
    copy = tmp_path_factory.mktemp('contributor')/'tree'
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: ignore(folder, names) - {'__init__.py', '_modidx.py'})
    for title, body in BLOCKS.items():
        if Path(title).suffix: write(copy/title, body)
    return copy


def run(tree: Path, *command) -> str:
    "Run a command as someone would who works in that tree; its output."
    bin = str(Path(sys.executable).parent)
    env = {k: v for k, v in os.environ.items() if k != 'CODEGPT_NBC_HOME'}
    env |= {'PATH': f'{bin}{os.pathsep}{env["PATH"]}', 'PYTHONPATH': os.pathsep.join(filter(None, (str(tree), env.get('PYTHONPATH'))))}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}: {(done.stdout + done.stderr)[-3000:]}'
    return done.stdout


def test_a_new_method_gets_a_row_in_the_table(tree):
    for line in BLOCKS['shell'].splitlines(): run(tree, *line.split())
    result = json.loads((tree/'papermill_runs'/'mine'/'zero-small-0.3.json').read_text(encoding='utf-8'))
    assert result['method'] == 'zero_small' and result['chain'] == [{'method': 'zero_small', 'share': 0.3}]
    assert .29 < 1 - result['size']['nonzero_params']/result['size']['params'] < .31
    tables = ''.join(path.read_text(encoding='utf-8') for path in (tree/'figures'/'mine').rglob('*.md'))
    assert re.search(r'^\|.*zero-small-0\.3', tables, re.M), 'no table has a row for the new method'


def test_the_new_method_is_a_step_of_a_recipe(tree):
    if not (tree/'codegpt_nbc'/'methods'/'zero_small.py').is_file(): run(tree, 'nbdev_export')
    run(tree, sys.executable, '-c', BLOCKS['library'])
    chain = json.loads((tree/'build'/'sparse'/'recipe.json').read_text(encoding='utf-8'))['chain']
    assert chain == [{'method': 'zero_small', 'share': 0.33}]
