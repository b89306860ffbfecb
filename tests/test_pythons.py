"""Text, corpora, tokenizers, configuration, records and profiles need no PyTorch, and are the same from Python 3.11 on."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ['numpy', 'pandas', 'pyarrow', 'pydantic', 'tokenizers', 'tqdm', 'hypothesis', 'pytest', 'fastcore', 'datasets',
            'filelock', 'yaml', 'Levenshtein']
ANSWERS = """
import json, sys
from hashlib import sha256
from pathlib import Path
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS
from codegpt_nbc.core.record import load_results
from codegpt_nbc.data.corpus import folder_sources, read_all, split_of
from codegpt_nbc.data.inputs import RunConfig
from codegpt_nbc.data.samples import load_samples, load_texts, make_samples
from codegpt_nbc.data.text_format import Literals, abstract
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, train_tokenizer
from codegpt_nbc.runs.grid import NOT_PROFILES, read_profile, read_recipes

def name(x): return sha256(repr(x).encode()).hexdigest()[:16]

root = Path(sys.argv[1])
files, skipped = read_all(folder_sources(root), workers=1)
literals = Literals.count(files.text)
lines = [abstract(text, literals) for text in files.text]
table = files.assign(text=lines, project=files.path)
profiles = sorted(p.stem for p in (root.parent/'configs').glob('*.yaml') if p.stem not in NOT_PROFILES)
answers = dict(
    skipped=dict(skipped), lines=name(lines), literals=name(literals.tokens), splits=name([split_of(p) for p in files.path]),
    samples=name(make_samples(table, 'codexglue', 20, per_project=1.).values.tolist()),
    ids=name(encode_batch(load_tokenizer(BASE_MODEL), lines)), trained=name(train_tokenizer(lines, literals.tokens, 600).to_str()),
    frozen=name([load_samples(p, 50).values.tolist() for p in ('codexglue', 'thesis')]), texts=name(load_texts(CORPUS, 20)),
    profiles={p: name([(r.id, r.method, r.params) for r in read_profile(p).values()]) for p in profiles},
    recipes=name(read_recipes()), results=name(load_results('full')), config=name(RunConfig(run_id='x').model_dump()),
    pytorch='torch' in sys.modules)
print(json.dumps(answers))
"""


def python_of(version: str) -> str | None:
    "The interpreter of `make pythons`, else one on PATH or of pyenv; the first that starts and has the packages, else None."
    places = [ROOT/f'.venv-{version}'/'bin'/'python', shutil.which(f'python{version}')]
    places += sorted(Path(os.environ.get('PYENV_ROOT', Path.home()/'.pyenv')).glob(f'versions/{version}.*/bin/python'))
    imports = f'import sys, {", ".join(PACKAGES)}; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split(".")))})'
    for p in filter(None, places):
        if Path(p).is_file() and not subprocess.run([p, '-c', imports], capture_output=True).returncode: return str(p)
    return None


def run(python: str, *args, **env) -> subprocess.CompletedProcess:
    "Run a Python on this copy of the package."
    settings = {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    return subprocess.run([python, *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | settings | env)


@pytest.fixture(params=['3.12', '3.13'])
def python(request):
    found = python_of(request.param)
    if found is None: pytest.skip(f'no Python {request.param} with the packages that these tests need: call make pythons')
    return found


@pytest.fixture(scope='module')
def own():
    done = run(sys.executable, '-c', ANSWERS, str(ROOT/'tests'))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_tests_of_text_pass(python):
    done = run(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_text.py')
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_answers_are_those_of_this_python(python, own):
    done = run(python, '-c', ANSWERS, str(ROOT/'tests'))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == own and own['pytorch'] is False
