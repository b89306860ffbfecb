"""`--force`: without it nothing is replaced; with it only an earlier output of ours of the same kind, when the new one is whole."""
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
import nbformat, pytest
from codegpt_nbc import compress
from codegpt_nbc.core.paths import OWN_FILES
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.engines.generate import open_engine
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import recipe_of, save_model
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.runs.grid import Recipe, run_notebook

ROOT = Path(__file__).resolve().parent.parent
QUANTIZE = Recipe(about='int8', steps=[{'method': 'quantize'}])
OTHER = Recipe(about='int8 for each tensor', steps=[{'method': 'quantize', 'granularity': 'tensor'}])
ONNX = Recipe(about='ONNX', steps=[{'method': 'onnx', 'precision': 'int8'}])


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A place of its own, with a small model in it."
    (tmp_path/'home').mkdir()
    for name in ('configs', 'nbs'): (tmp_path/'home'/name).symlink_to(ROOT/name)
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    save_model(Decoder(Shape(load_tokenizer().get_vocab_size(), 64, 32, 16, (2,), (64,))).init_weights(), tmp_path/'mine')
    return tmp_path


def small(recipe=QUANTIZE, model='mine', out='small', **how): return compress(model, recipe, out, budgets={}, progress=False, **how)


def contents(folder) -> dict: return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def shell(*args, **how):
    command = [sys.executable, '-m', 'codegpt_nbc.runs.cli', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}, **how)


def test_an_existing_folder_is_replaced_by_force_alone(home):
    small()
    before = contents('small')
    with pytest.raises(FileExistsError, match='small exists: choose another folder or remove it; force=True replaces'): small(OTHER)
    assert shell('compress', 'mine', '-o', 'small').stderr.endswith('remove it; --force replaces an earlier output.\n')
    assert contents('small') == before
    assert recipe_of(small(OTHER, force=True).folder)[-1]['granularity'] == 'tensor'
    small(ONNX, force=True)                     # of another format, but a model too
    assert not (home/'small'/'model.safetensors').exists() and json.loads((home/'small'/OWN_FILES).read_text())['kind'] == 'model'


def test_the_source_is_never_replaced(home):
    before = contents('mine')
    (home/'link').symlink_to(home/'mine')
    for out in ('mine', './mine/', home/'mine', 'link', 'mine/../mine'):
        for force in (False, True):
            with pytest.raises(FileExistsError, match='is being read'): small(out=out, force=force)
    assert contents('mine') == before


@pytest.mark.parametrize('make', ['foreign', 'mixed', 'other kind', 'file', 'damaged list', 'no list'])
def test_nothing_foreign_is_replaced(home, make):
    out = home/'small'
    if make == 'file': out.write_text('mine')
    elif make == 'foreign':
        out.mkdir()
        (out/'thesis.tex').write_text('years')
    else:
        small()
        if make == 'mixed': (out/'notes.txt').write_text('mine')
        if make == 'other kind': (out/OWN_FILES).write_text(json.dumps({'kind': 'corpus', 'files': [p.name for p in out.iterdir()]}))
        if make == 'damaged list': (out/OWN_FILES).write_text('{"kind": "mod')
        if make == 'no list': (out/OWN_FILES).unlink()
    before, steps = out.read_bytes() if out.is_file() else contents(out), contents(home/'home')
    with pytest.raises(FileExistsError, match='choose another folder'): small(OTHER, force=True)
    assert (out.read_bytes() if out.is_file() else contents(out)) == before
    assert contents(home/'home') == steps, 'it worked before it looked'


@pytest.mark.parametrize('out', ['file.txt/small', 'file.txt/a/b', 'locked/small'])
def test_a_place_that_cannot_be_written_is_named_before_the_work(home, out, monkeypatch):
    (home/'file.txt').write_text('mine')
    (home/'locked').mkdir()
    access = os.access
    monkeypatch.setattr(os, 'access', lambda p, mode: Path(p).name != 'locked' and access(p, mode))
    with pytest.raises(OSError, match='cannot be written, as .* choose another place'): small(out=out)
    assert not list((home/'home').glob('build/steps/*'))


def test_the_old_one_stays_when_the_new_one_fails_half_way(home, monkeypatch):
    small()
    before, copy = contents('small'), shutil.copytree
    def half(source, to, **how):
        copy(source, to, **how)
        (Path(to)/'model.safetensors').write_bytes(b'half')
        raise ZeroDivisionError
    monkeypatch.setattr(shutil, 'copytree', half)
    with pytest.raises(ZeroDivisionError): small(OTHER, force=True)
    assert contents('small') == before and not list(home.glob('.tmp-*'))


# function → in what state a kill before or after it leaves the folder
KILLED = {'shutil.copytree': ('old', 'old'), 'codegpt_nbc.core.paths._exchanged': ('old', 'new')}


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('function', KILLED)
def test_the_old_one_or_the_new_one_is_there_after_a_kill(home, function, when):
    small()
    module, _, name = function.rpartition('.')
    begun = f"""import {module} as module, os, signal
from pathlib import Path
from codegpt_nbc import compress
from codegpt_nbc.runs.grid import Recipe
real = module.{name}
def killed(*args, **how):
    new = Path(args[{name == 'copytree':d}])                                       # the unfinished folder
    if new.parent.parent != Path.cwd(): return real(*args, **how)   # of a step
    if {when!r} == 'after': real(*args, **how)
    os.kill(os.getpid(), signal.SIGKILL)
module.{name} = killed
compress('mine', Recipe(**{OTHER.model_dump()!r}), 'small', budgets={{}}, progress=False, force=True)"""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', begun], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    listed = json.loads((home/'small'/OWN_FILES).read_text())['files']
    assert sorted(contents('small')) == sorted([*listed, OWN_FILES])
    state = {'channel': 'old', 'tensor': 'new'}[recipe_of('small')[-1]['granularity']]
    assert state == KILLED[function][when == 'after']
    open_engine(home/'small')


@pytest.mark.parametrize('how, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_ends_quietly_and_leaves_nothing_half_written(home, how, code):
    begun = "from codegpt_nbc.runs import cli, api\nimport os, shutil, signal, time\n"
    begun += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"   # a job in the background, with its tests, ignores it
    begun += f"def half(a, b, **how): open(b/'half', 'w').close(); os.kill(os.getpid(), {int(how)}); time.sleep(60)\n"
    begun += "shutil.copytree = half\ncli.main()"
    small()
    before = contents('small')
    done = subprocess.run([sys.executable, '-c', begun, 'compress', 'mine', '-o', 'small', '--n', '0', '--force'],
                          capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
    assert ('interrupted' in done.stderr) == (code == 130)
    assert contents('small') == before and not list(home.glob('.tmp-*'))


@pytest.mark.parametrize('args, sentence', [
    (('compress', 'mine', '-o', 'x', '--n', '999999'), '999999 samples asked, but codexglue has'),
    (('compress', 'mine', '-o', 'x', '--budgets', 'recipes'), "there are no budgets 'recipes'"),
    (('run', 'notes.txt', 'x.ipynb'), 'notes.txt is not a notebook'),
    (('run', 'mine', 'x.ipynb'), 'there is no template mine'),
    (('run', 'notes.txt', 'x.ipynb', '--params', '[]'), 'write an object'),
    (('reproduce', '../configs/quick'), "there is no profile '../configs/quick': configs/ has budget,"),
    (('search', 'nowhere'), "there is no model 'nowhere'"),
    (('search', '--recipes', '--out', 'x'), 'no model is written'),
    (('search', '--recipes', '--budget', 'ms=5'), 'within es_drop=POINTS alone'),
])
def test_what_cannot_end_well_is_said_before_the_work(home, args, sentence, monkeypatch, capsys):
    from codegpt_nbc.runs import cli
    (home/'notes.txt').write_text('')
    monkeypatch.setattr(sys, 'argv', ['codegpt-nbc', *args])
    with pytest.raises(SystemExit) as e: cli.main()
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count('\n') == 1 and sentence in said, said
    assert not (home/'x').exists() and not (home/'home'/'build').exists()


def test_a_fault_of_the_program_is_a_sentence_too(monkeypatch, capsys):
    from codegpt_nbc.runs import cli
    def fails(*_, **__): raise KeyError('a\nb')
    monkeypatch.setattr(type(cli.app), '__call__', fails)
    with pytest.raises(SystemExit): cli.main()
    said = capsys.readouterr().err
    assert said.startswith('codegpt-nbc: a fault of the program (KeyError: ') and said.count('\n') == 1
    monkeypatch.setenv('CODEGPT_NBC_TRACEBACK', '1')
    with pytest.raises(KeyError): cli.main()


def test_a_link_stays_a_link(home):
    (home/'disk').mkdir()
    small(out='disk/real')
    (home/'small').symlink_to(home/'disk'/'real')
    with pytest.raises(FileExistsError): small(OTHER)
    small(OTHER, force=True)
    assert (home/'small').is_symlink() and recipe_of(home/'disk'/'real')[-1]['granularity'] == 'tensor'


def test_of_two_at_once_both_have_a_whole_model(home):
    "They share their steps: the second waits for the first, and does not take its folder away."
    command = [sys.executable, '-m', 'codegpt_nbc.runs.cli', 'compress', 'mine', '--n', '0', '-o']
    env = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([*command, f'small{i}'], env=env, **quiet) for i in range(3)]
    for p in both:
        said = p.communicate()[1]
        assert p.returncode == 0, said
    assert len({p.read_bytes() for p in home.glob('small*/model.onnx')}) == 1


def notebook(folder, *cells) -> Path:
    parameters = nbformat.v4.new_code_cell("run_id = 'x'\nprofile = 'try'", metadata={'tags': ['parameters']})
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    path = Path(folder)/'template.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel), path)
    return path


def test_an_executed_notebook_is_replaced_by_force_alone_and_nothing_else_is(home):
    template = notebook(home, 'print(1)')
    whole = template.read_bytes()
    run_notebook(template, 'out.ipynb', {}, bar=False)
    refused = shell('run', template, 'out.ipynb')
    assert refused.returncode == 1 and refused.stderr == ('codegpt-nbc: out.ipynb exists: choose another name or remove it; '
                                                              '--force replaces an earlier output.\n')
    run_notebook(template, 'out.ipynb', {}, bar=False, force=True)
    (home/'thesis.txt').write_text('years')
    for out in ('thesis.txt', 'template.ipynb', 'home', 'thesis.txt/out.ipynb'):
        for force in (False, True):
            with pytest.raises(OSError): run_notebook(template, out, {}, bar=False, force=force)
    assert template.read_bytes() == whole and (home/'thesis.txt').read_text() == 'years'
    before = (home/'out.ipynb').read_bytes()
    notebook(home, 'print(1)', '1/0')
    failed = shell('run', template, 'out.ipynb', '--force')
    assert failed.returncode == 1 and 'ZeroDivisionError' in failed.stderr and (home/'out.ipynb').read_bytes() == before


@pytest.mark.parametrize('params', [{'profile': '..', 'run_id': 'docs'}, {'profile': '../docs'}, {'run_id': '..'}, {'run_id': '.'},
                                    {'profile': '.'}, {'profile': '/'}, {'profile': ['a']}, {'run_id': '.tmp-x'}, {'run_id': ['..']}])
def test_names_of_runs_lead_nowhere_else(home, params):
    docs = home/'home'/'docs'
    docs.mkdir()
    (docs/'thesis.tex').write_text('years')
    before = sorted((home/'home').iterdir())
    with pytest.raises((ValueError, OSError)) as e:
        run_notebook(ROOT/'nbs'/'experiments'/'quantize.ipynb', 'out.ipynb', params | {'model': str(home/'mine')}, bar=False)
    assert '\n' not in str(e.value) and 'failed' not in str(e.value), 'a kernel was started'
    assert sorted((home/'home').iterdir()) == before and (docs/'thesis.tex').read_text() == 'years'


def test_a_folder_in_the_place_of_a_run_is_named_before_the_kernel_starts(home):
    mine = home/'home'/'build'/'try'/'mine'
    mine.mkdir(parents=True)
    (mine/'thesis.tex').write_text('years')
    with pytest.raises(FileExistsError, match='mine is not a model folder written by codegpt_nbc'):
        run_notebook(ROOT/'nbs'/'experiments'/'quantize.ipynb', 'out.ipynb', {'run_id': 'mine', 'model': str(home/'mine')}, bar=False)
    assert (mine/'thesis.tex').read_text() == 'years'
