"""The package as others have it: a wheel in an environment of its own, used from another folder, under another locale."""
import json, os, shutil, subprocess, sys, sysconfig
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from profiles import short_search, write_profile

ROOT = Path(__file__).resolve().parent.parent
PROMPT = '<s> def read ( path ) : <EOL> with open ('
LOCKED = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def locking(folder) -> list: # the beginning of a command
    "Whatever follows sees `folder` on a file system that is read-only, which binds root, too; [] where mounting is not permitted."
    unshare = shutil.which('unshare')
    for how in ([], ['--user', '--map-root-user']):
        start = [unshare, *how, '--mount', 'sh', '-c', LOCKED, str(folder)]
        tried = unshare and subprocess.run([*start, 'touch', str(folder/'x')], capture_output=True, text=True)
        if tried and 'Read-only file system' in tried.stderr: return start
    return []


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "An environment with the wheel, which finds what the package needs in this one; and an empty folder to work in."
    d = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    left_out = shutil.ignore_patterns('build', 'papermill_runs', 'figures', '*.egg-info', '.*', '_site')
    source = shutil.copytree(ROOT, d/'source', ignore=left_out)   # building leaves files behind
    gone = source/'build'/f'lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}'/'codegpt_nbc'/'gone.py'
    gone.parent.mkdir(parents=True)
    gone.write_text('', encoding='utf-8')   # as an earlier build leaves it
    command = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', str(d), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(d/'env')], check=True)
    site = next((d/'env').glob('lib/python*/site-packages'))
    subprocess.run([*pip, 'install', '--no-deps', '--target', str(site), str(next(d.glob('*.whl')))], check=True)
    # The .pth files of a folder named in a .pth file, such as an editable install's, are not read
    (site/'others.pth').write_text(sysconfig.get_path('purelib') + '\n', encoding='utf-8')
    for p in site.rglob('*'): p.chmod(0o555 if p.is_dir() else 0o444)
    (d/'elsewhere').mkdir()
    start = locking(d/'env')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'CODEGPT', 'LC_', 'LANG'))}
    env |= {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'HF_HUB_OFFLINE': '1'}

    def run(*args, code=None):
        command = [*start, str(d/'env'/'bin'/'python'), *(['-c', code] if code else ['-m', 'codegpt_nbc.runs.cli', *args])]
        return subprocess.run(command, cwd=d/'elsewhere', env=env, capture_output=True, text=True, encoding='utf-8')
    yield run, d/'elsewhere', site


def ok(p):
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout


def test_it_is_the_wheel_that_runs(installed):
    run, _, site = installed
    assert ok(run(code='import codegpt_nbc; print(codegpt_nbc.__file__)')).startswith(str(site))


def test_it_holds_no_module_of_an_earlier_build(installed):
    _, _, site = installed
    assert (site/'codegpt_nbc'/'core').is_dir() and not (site/'codegpt_nbc'/'gone.py').exists()


def test_its_kernels_are_those_of_its_sources(installed):
    run, _, _ = installed
    code = 'from codegpt_nbc.core.native import LIBRARY, library; print(LIBRARY.is_file() == (library() is not None))'
    assert ok(run(code=code)).strip() == 'True'


def test_it_completes_and_compresses_where_one_stands(installed):
    run, here, site = installed
    before = listed(site)
    line = ok(run('complete', PROMPT)).strip()
    ok(run('compress', 'codegpt-nano', '-o', 'small', '--recipe', 'int8', '--n', '0'))
    assert (here/'small'/'model.onnx').is_file(), 'a relative path is the caller\'s'
    assert ok(run('complete', PROMPT, '--model', 'small')).strip() == line
    again = run('compress', 'codegpt-nano', '-o', 'small', '--n', '0')
    assert again.returncode == 1 and again.stderr.strip().startswith('codegpt-nbc: small exists: '), again.stderr
    ok(run('compress', 'codegpt-nano', '-o', 'small', '--n', '0', '--force'))
    assert listed(site) == before, 'nothing is written beside the package'


def test_it_evaluates_under_both_protocols_and_on_code_of_ones_own(installed):
    run, here, site = installed
    before, code = listed(site), here/'my code'
    code.mkdir()
    files = [f'<s> import os <EOL> def f{i} ( x ) : <EOL> y = x + {i % 9} <EOL> return y </s>' for i in range(40)]
    for split in ('train', 'dev', 'test'): (code/f'{split}.txt').write_text('\n'.join(files) + '\n', encoding='utf-8')
    for how in ([], ['--protocol', 'thesis'], ['--data', 'my code']):
        said = ok(run('evaluate', 'codegpt-nano', '--n', '4', *how))
        assert said.startswith('EM ') and said.strip().endswith('n 4'), said
    assert (here/'build'/'imported').is_dir() and listed(site) == before


def test_it_searches_and_runs_grids_where_one_stands(installed):
    run, here, site = installed
    before = listed(site)
    (here/'configs').mkdir()
    rung = {'samples': 4, 'rounds': 1, 'budgets': {'onnx': {'compare': 2}}}
    write_profile(here/'configs'/'search.yaml', short_search(prompt_tokens=64, recipes=['int8'], rungs=[rung]))
    search = run('search', '--recipes', '--objective', 'size', '--budget', 'es_drop=100')
    said = ok(search).splitlines()
    assert said[-1] == 'next: codegpt-nbc compress codegpt-nano -o small --recipe best'
    notebook = here/'papermill_runs'/'search'/'search-size-100.ipynb'
    assert said[-2] == f'chosen: int8, of 2 candidates of the last rung; the picture is in {notebook.relative_to(here)}'
    assert any(line.startswith('ES %') for line in said) and 'rung 1 of 1, 2 of 2: int8 (at most about' in search.stderr, search.stderr
    assert notebook.is_file() and json.loads(notebook.with_suffix('.json').read_text())['details']['chosen'] == 'int8'
    ok(run('compress', 'codegpt-nano', '-o', 'best', '--recipe', 'best', '--n', '0'))
    assert (here/'best'/'model.onnx').is_file()
    write_profile(here/'configs'/'mine.yaml', {'method': 'baseline', 'id': 'dense'})
    assert 'executed notebooks and results: papermill_runs/mine' in ok(run('reproduce', 'mine'))
    assert (here/'papermill_runs'/'mine'/'dense.json').is_file() and (here/'build'/'mine'/'dense'/'model.safetensors').is_file()
    assert listed(site) == before


def listed(site) -> list: return sorted(p.relative_to(site) for p in site.rglob('*'))


def test_the_library_is_there_too(installed):
    run, here, _ = installed
    code = f"from codegpt_nbc import load, complete, compress, evaluate; print(load('codegpt-nano').complete({PROMPT!r}))"
    assert ok(run(code=code)).strip()


def test_recipes_profiles_and_templates_came_along(installed):
    run, _, site = installed
    code = ('from codegpt_nbc.runs.grid import read_profile, read_recipes, template_of\n'
            "print(len(read_profile('quick')), len(read_recipes()), template_of('prune').is_file())")
    runs, recipes, template = ok(run(code=code)).split()
    assert int(runs) > 20 and int(recipes) > 5 and template == 'True'
    wrong = run('compress', 'codegpt-nano', '-o', 'x', '--recipe', 'magic')
    assert wrong.stderr.strip().splitlines()[-1].startswith("codegpt-nbc: unknown recipe 'magic': ")
