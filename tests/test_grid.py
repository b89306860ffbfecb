"""A grid, run for real on a toy profile: it finishes, survives a kill, and stands alone."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT/'papermill_runs'/'smoke'


CLI = [sys.executable, '-m', 'codegpt_nbc.runs.cli']


def shell(*args): return subprocess.run([*CLI, *args], cwd=ROOT, capture_output=True, text=True)


def grid(*args): return shell('reproduce', 'smoke', *args)


@pytest.fixture(scope='module', autouse=True)
def fresh():
    def clean():
        for d in ('papermill_runs', 'figures', 'build'): shutil.rmtree(ROOT/d/'smoke', ignore_errors=True)
    clean()
    yield
    clean()


def test_killed_grid_resumes():
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([*CLI, 'reproduce', 'smoke', '--cores', '1'], cwd=ROOT, start_new_session=True, **quiet) as p:
        deadline = time.time() + 120
        while not list(RUNS.glob('*.ipynb')) and time.time() < deadline: time.sleep(.2)
        second = grid()                # takes a few seconds, in which the first run is booked and the next begins
        time.sleep(3)
        os.killpg(p.pid, signal.SIGKILL)
    assert second.returncode == 1 and second.stderr.splitlines()[-1].startswith('codegpt-nbc: another grid is running')
    kept = {f: f.stat().st_mtime for f in RUNS.glob('*.json') if f.stem == 'baseline'}
    assert kept, 'nothing was finished before the kill'
    done = grid()
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f.stat().st_mtime == t for f, t in kept.items()), 'a finished run was repeated'
    assert not list(RUNS.glob('.tmp-*'))
    assert all(json.loads(f.read_text())['run_id'] == f.stem for f in RUNS.glob('*.json'))


def test_toolkit_that_is_not_installed_is_one_sentence():
    from codegpt_nbc.runs.grid import kernel_of
    try: kernel_of({'backend': 'itrex'})
    except FileNotFoundError: pass
    else: pytest.skip("the first study's toolkit is installed here")
    p = shell('reproduce', 'itrex')
    assert (p.returncode, p.stderr.count('\n')) == (1, 1), p.stderr
    assert p.stderr.strip().endswith('which is not installed: call make itrex.'), p.stderr


@pytest.mark.parametrize('params, sentence', [
    ({'sparsty': .5}, "unknown parameter 'sparsty'"),
    ({'sparsity': 1.5}, "parameter 'sparsity' of PruneConfig is 1.5"),
])
def test_bad_parameters_are_one_sentence(params, sentence, tmp_path):
    p = shell('run', 'nbs/experiments/prune.ipynb', str(tmp_path/'out.ipynb'), '--params', json.dumps(params))
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode == 1 and last.startswith('codegpt-nbc: ') and sentence in last, p.stderr
    assert not (tmp_path/'out.ipynb').exists()
