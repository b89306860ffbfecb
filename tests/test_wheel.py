"""The package as others have it: a wheel in an environment of its own, used from another folder, under another locale."""
import os, shutil, subprocess, sys, sysconfig
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = '<s> def read ( path ) : <EOL> with open ('


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "An environment with the wheel, which finds what the package needs in this one; and an empty folder to work in."
    d = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    left_out = shutil.ignore_patterns('build', 'papermill_runs', 'figures', '*.egg-info', '.*', '_site')
    source = shutil.copytree(ROOT, d/'source', ignore=left_out)   # building leaves files behind
    command = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', str(d), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(d/'env')], check=True)
    site = next((d/'env').glob('lib/python*/site-packages'))
    subprocess.run([*pip, 'install', '--no-deps', '--no-compile', '--target', str(site), str(next(d.glob('*.whl')))], check=True)
    # The .pth files of a folder named in a .pth file, such as an editable install's, are not read
    (site/'others.pth').write_text(sysconfig.get_path('purelib') + '\n', encoding='utf-8')
    for p in site.rglob('*'): p.chmod(0o555 if p.is_dir() else 0o444)
    (d/'elsewhere').mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'CODEGPT', 'LC_', 'LANG'))}
    env |= {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}

    def run(*args, code=None):
        command = [str(d/'env'/'bin'/'python'), *(['-c', code] if code else ['-m', 'codegpt_nbc.runs.cli', *args])]
        return subprocess.run(command, cwd=d/'elsewhere', env=env, capture_output=True, text=True, encoding='utf-8')
    return run, d/'elsewhere', site


def ok(p):
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout


def test_it_is_the_wheel_that_runs(installed):
    run, _, site = installed
    assert ok(run(code='import codegpt_nbc; print(codegpt_nbc.__file__)')).startswith(str(site))


def test_it_completes_and_compresses_where_one_stands(installed):
    run, here, site = installed
    before = sorted(p.relative_to(site) for p in site.rglob('*'))
    line = ok(run('complete', PROMPT)).strip()
    ok(run('compress', 'codegpt-nano', '-o', 'small', '--recipe', 'int8', '--n', '0'))
    assert (here/'small'/'model.onnx').is_file(), 'a relative path is the caller\'s'
    assert ok(run('complete', PROMPT, '--model', 'small')).strip() == line
    assert 'n 4' in ok(run('evaluate', 'small', '--n', '4'))
    assert sorted(p.relative_to(site) for p in site.rglob('*')) == before, 'nothing is written beside the package'


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
