"""Nothing is lost: grids killed at any moment, runs that fail when repeated, disks that are full or cannot be written to."""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from codegpt_nbc.core.paths import OWN_FILES
from codegpt_nbc.core.record import load_result
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get('CODEGPT_NBC_KILLS', 3))
PROFILE = """
about: two runs of the smallest model
set: {{seed: {seed}, codexglue: 0, thesis: 0}}
runs:
  - {{method: baseline, id: dense, set: {{model: toy}}}}
  - {{method: quantize, id: int8, set: {{model: dense}}}}
"""
NOTES = {'plan.json', 'int8.failed.ipynb', '.snakemake_timestamp'}   # of the grid, beside results and models
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Tree:
    "A copy of the project with a profile of two small runs."
    def __init__(self, folder):
        self.root = folder
        left_out = shutil.ignore_patterns('build', 'papermill_runs', 'figures', 'docs', 'tests', '*.egg-info', '.*', '_site', '__pycache__')
        shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
        save_model(Decoder(Shape(load_tokenizer().get_vocab_size(), 64, 32, 16, (2,), (64,))).init_weights(), folder/'toy')
        self.results, self.models = folder/'papermill_runs'/'tiny', folder/'build'/'tiny'
        self.env = os.environ | {'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1'}
        self.takes = 0.   # seconds of the longest grid
        self.profile(1)

    def profile(self, seed): (self.root/'configs'/'tiny.yaml').write_text(PROFILE.format(seed=seed), encoding='utf-8')

    def command(self): return [sys.executable, '-m', 'codegpt_nbc.runs.cli', 'reproduce', 'tiny', '--cores', '2']

    def grid(self):
        began = time.time()
        done = subprocess.run(self.command(), cwd=self.root, env=self.env, capture_output=True, text=True)
        self.takes = max(self.takes, time.time() - began)
        return done

    def killed(self, after: float) -> bool: # False: it had finished before
        "Start the grid and kill it, with all that it started, after so many seconds."
        with subprocess.Popen(self.command(), cwd=self.root, env=self.env, start_new_session=True, **QUIET) as p:
            try: p.wait(after)
            except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)
        return p.returncode == -signal.SIGKILL

    def snapshot(self) -> dict:
        "Every file of results and models, but for scratch and the grid's notes."
        files = (p for d in (self.results, self.models) for p in sorted(d.rglob('*')) if p.is_file())
        return {str(p.relative_to(self.root)): p.read_bytes() for p in files
                if not any(part.startswith('.tmp-') for part in p.parts) and p.name not in NOTES}

    def check(self):
        "Whatever is there is whole."
        for path in self.results.glob('*.json'): assert load_result(path).run_id == path.stem
        for path in self.results.glob('*.ipynb'): nbformat.validate(nbformat.read(path, as_version=4))
        for folder in (d for d in self.models.glob('*') if (d/OWN_FILES).is_file()):
            listed = json.loads((folder/OWN_FILES).read_text())['files']
            there = sorted(p.name for p in folder.iterdir() if p.name not in {OWN_FILES} | NOTES)
            assert there == sorted(listed), folder
            load_model(folder)
        made = {p.stem for p in self.results.glob('*.json')}
        assert made <= {p.name for p in self.models.glob('*') if (p/OWN_FILES).is_file()}, 'a result without its model'


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return Tree(tmp_path_factory.mktemp('a tree'))   # with a blank in every path


def test_a_run_that_fails_when_repeated_keeps_the_earlier_one(tree):
    first = tree.grid()
    assert first.returncode == 0, first.stderr[-2000:]
    assert '2 of 2 runs' in first.stderr, 'it says how far it is'
    before = tree.snapshot()
    assert {Path(name).name for name in before} >= {'int8.json', 'int8.ipynb', 'model.safetensors'}
    template = tree.root/'nbs'/'experiments'/'quantize.ipynb'
    whole, broken = template.read_text(encoding='utf-8'), nbformat.read(template, as_version=4)
    broken.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('after all was written')"))
    nbformat.write(broken, template)
    failed = tree.grid()
    assert failed.returncode == 1 and 'int8 failed: RuntimeError: after all was written' in failed.stderr, failed.stderr[-2000:]
    assert tree.snapshot() == before
    template.write_text(whole, encoding='utf-8')


def test_a_grid_killed_at_any_moment_loses_nothing(tree):
    chance, seed, kills = random.Random(0), 100, 0
    tree.profile(seed)   # other parameters: both runs are due again
    while kills < KILLS:
        had = tree.snapshot().keys()
        if tree.killed(chance.uniform(1, tree.takes or 18)):
            kills += 1
            tree.check()
        else: tree.profile(seed := seed + 1)
        assert had <= tree.snapshot().keys(), 'an earlier result is gone'
    done = tree.grid()
    assert done.returncode == 0, done.stderr[-2000:]
    tree.check()
    assert [load_result(tree.results/f'{i}.json').config['seed'] for i in ('dense', 'int8')] == [seed]*2, 'a half run was counted'
    assert not list(tree.models.glob('.tmp-*')) + list(tree.results.glob('.tmp-*'))
    before = tree.snapshot()
    again = tree.grid()
    assert again.returncode == 0 and 'Nothing to be done' in again.stderr, again.stderr[-2000:]
    assert tree.snapshot() == before
    print(f'{kills} kills, 0 lost')


@pytest.mark.usefixtures('home')
@pytest.mark.parametrize('run_id', ['int8', 'measure-ptq-dense-asym-channel-weights', 'x'*60])
def test_what_a_killed_run_leaves_is_found(run_id):
    from codegpt_nbc.core.paths import atomic_path, models_dir, runs_dir
    from codegpt_nbc.runs.grid import _left_by_killed
    places = [runs_dir('quick')/f'{run_id}.ipynb', runs_dir('quick')/f'{run_id}.json']
    with atomic_path(places[0]) as a, atomic_path(places[1]) as b, atomic_path(runs_dir('quick')/f'other-{run_id}.json') as c:
        for file in (a, b, c): file.touch()
        (models_dir('quick')/f'.tmp-{run_id}-999999999_abc').mkdir(parents=True)
        found = _left_by_killed('quick', run_id)
        assert len(found) == 3 and all(run_id[:30] in p.name and 'other' not in p.name for p in found)


def test_relative_folders_are_the_callers(tree, tmp_path):
    (tmp_path/'here').mkdir()
    shutil.copytree(tree.root/'toy', tmp_path/'here'/'mine')
    def run(**params):
        given = json.dumps(dict(codexglue=0, thesis=0, profile='from-elsewhere', run_id='int8') | params)
        template = str(tree.root/'nbs'/'experiments'/'quantize.ipynb')
        command = [sys.executable, '-m', 'codegpt_nbc.runs.cli', 'run', template, 'out.ipynb', '--params', given]
        return subprocess.run(command, cwd=tmp_path/'here', env=tree.env, capture_output=True, text=True)
    assert (p := run(model='mine')).returncode == 0, p.stderr[-2000:]
    assert (tmp_path/'here'/'out.ipynb').is_file()
    assert load_result(tree.root/'papermill_runs'/'from-elsewhere'/'int8.json').config['model'] == str(tmp_path/'here'/'mine')
    p = run(model='toy')   # one of that name lies in the checkout
    assert p.returncode == 1 and "parameter 'model' is 'toy', which is not here but in " in p.stderr.splitlines()[-1], p.stderr


DISK = """
import sys
from pathlib import Path
from codegpt_nbc.core.paths import write_json
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.engines.onnx_export import export_onnx
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.layers import Shape
disk, toy = Path(sys.argv[1]), sys.argv[2]
small = load_model(toy)
def files(): return {str(p): p.read_bytes() for p in sorted(disk.rglob('*')) if p.is_file()}
write_json(disk/'old.json', {'old': True}), save_model(small, disk/'model'), export_onnx(toy, disk/'onnx', 'int8')
if sys.argv[3] == 'full':
    with open(disk/'ballast', 'wb', buffering=0) as f:
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass
else:
    import subprocess
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
before = files()
big = Decoder(Shape(load_tokenizer().get_vocab_size(), 64, 64, 16, (4,), (64,))).init_weights()
for write in (lambda: write_json(disk/'old.json', {'new': 'x'*100_000}), lambda: save_model(big, disk/'model'),
              lambda: save_model(big, disk/'another'), lambda: export_onnx(toy, disk/'onnx', 'fp32'),
              lambda: export_onnx(toy, disk/'another', 'fp32')):
    try: write()
    except OSError as e: said = str(e)
    else: raise SystemExit('it was written')
    assert said.startswith(str(disk)) and said.endswith('.') and ' cannot be written (' in said and '\\n' not in said, said
    assert files() == before, 'something changed'
print(said)
"""


@pytest.mark.parametrize('state, words', [('full', 'No space left on device'), ('read-only', 'Read-only file system')])
def test_a_disk_that_takes_nothing_leaves_the_old_state(tree, tmp_path, state, words):
    (tmp_path/'disk').mkdir()
    inside = 'mount -t tmpfs -o size=16m none "$1" || exit 77; exec "$0" -c "$2" "$1" "$3" "$4"'
    unshare = shutil.which('unshare')
    if not unshare: pytest.skip('a small disk needs the command unshare')
    alone = [unshare, '--user', '--map-root-user', '--mount']
    command = [*alone, 'sh', '-c', inside, sys.executable, str(tmp_path/'disk'), DISK, str(tree.root/'toy'), state]
    p = subprocess.run(command, env=tree.env, cwd=tree.root, capture_output=True, text=True)
    if p.returncode == 77 or 'unshare' in p.stderr.split(':')[0]: pytest.skip('mounting a small disk is not permitted here')
    assert p.returncode == 0 and words in p.stdout, p.stderr[-2000:]
