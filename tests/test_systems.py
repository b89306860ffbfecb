"""Other systems: macOS and Windows, simulated by taking away what only Linux has; and several processes that begin at the same time."""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = '<s> def read ( path ) : <EOL> with open ('

# Libraries are imported first, as those of another system would not look for these either
TAKEN = """
import builtins, ctypes, io, multiprocessing, os, signal, sys, warnings
import torch, onnxruntime, onnx, tokenizers, pandas, pyarrow.parquet, papermill, filelock, jupyter_client, ipykernel, nbclient
import snakemake.cli
from pathlib import Path
warnings.simplefilter('ignore')
SYSTEM = sys.argv[1]
for name in ('sched_getaffinity', 'sched_setaffinity'):
    if hasattr(os, name): delattr(os, name)
opened, started = builtins.open, os.environ.copy()
def no_proc(path, *args, **how):
    if str(path).startswith('/proc/'): raise FileNotFoundError(path)
    return opened(path, *args, **how)
builtins.open = io.open = no_proc
class Library:
    "The C library without renameat2."
    def __init__(self, *args, **how):
        if SYSTEM == 'windows': raise TypeError('LoadLibrary() argument 1 must be str, not None')
    def __getattr__(self, name): raise AttributeError(name)
ctypes.CDLL = Library
if SYSTEM == 'windows':
    for name in ('fork', 'forkpty', 'killpg', 'setsid', 'getuid', 'getloadavg', 'nice'):
        if hasattr(os, name): delattr(os, name)
    if hasattr(signal, 'SIGKILL'): del signal.SIGKILL
    for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[name] = None
    import psutil
    class Process:
        "What Windows tells of a process."
        def memory_info(self): return type('pmem', (), dict(rss=2**27, peak_wset=2**28))
    psutil.Process = Process
    def no_links(*args, **how): raise OSError(1314, 'A required privilege is not held by the client')
    os.symlink = Path.symlink_to = no_links
    multiprocessing.set_start_method('spawn', force=True)
    renamed = os.rename
    def rename(old, new, **how):
        if os.path.exists(new): raise FileExistsError(183, 'Cannot create a file when that file already exists')
        return renamed(old, new, **how)
    os.rename, Path.rename = rename, lambda self, new: (rename(self, new), Path(new))[1]
"""
WORK = TAKEN + """
from codegpt_nbc import complete, compress, evaluate
from codegpt_nbc.core.paths import all_cores, write_json, read_json
from codegpt_nbc.core.record import provenance
from codegpt_nbc.evidence.measure import peak_memory
if __name__ == '__main__':
    assert all_cores() >= 1
    for n in (1, 2): write_json('x.json', {'n': n})
    assert read_json('x.json') == {'n': 2}
    assert provenance(0, 0.).cpu
    small = compress('codegpt-nano', 'int8', 'small', progress=False)
    compress('codegpt-nano', 'int8', 'small', progress=False, force=True)
    assert sorted(p.name for p in Path('.').glob('.tmp-*')) == []
    line = complete(small, sys.argv[2])
    assert line == complete('codegpt-nano', sys.argv[2]), line
    print(evaluate(small, 2))
    assert peak_memory() > 10**7
    from codegpt_nbc.runs.grid import _only_grid, run_notebook, template_of
    with _only_grid(): pass
    from codegpt_nbc.core.paths import BASE_MODEL, CORPUS
    from codegpt_nbc.data.hub import find
    assert (find(f'{BASE_MODEL} + {CORPUS}')/'config.json').is_file()   # gathered by links, or copies
    out = run_notebook(template_of('baseline'), 'out.ipynb', {'codexglue': 2, 'thesis': 0}, bar=False)
    run_notebook(template_of('baseline'), 'out.ipynb', {'codexglue': 2, 'thesis': 0}, bar=False, force=True)
    print('done')
"""


def environment(home) -> dict:
    return os.environ | {'PYTHONPATH': str(ROOT), 'CODEGPT_NBC_HOME': str(home), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}


def home_of(tmp_path) -> Path:
    for name in ('configs', 'nbs'): (tmp_path/name).symlink_to(ROOT/name)
    return tmp_path


@pytest.mark.parametrize('system', ['macos', 'windows'])
def test_nothing_that_only_linux_has_is_needed(system, tmp_path):
    (tmp_path/'work.py').write_text(WORK, encoding='utf-8')
    home = environment(home_of(tmp_path))
    for _ in range(3):   # a kernel's free port may be taken by another test before the kernel listens there
        done = subprocess.run([sys.executable, 'work.py', system, PROMPT], cwd=tmp_path, capture_output=True, text=True, env=home)
        if 'Address already in use' not in done.stderr: break
    assert done.returncode == 0 and done.stdout.split()[-1] == 'done', done.stderr[-3000:]


def together(n: int, code: str, cwd, **env) -> list: # of outputs
    "Run the same code in several processes that begin at the same time."
    processes = [subprocess.Popen([sys.executable, '-c', code], cwd=cwd, env=environment(cwd) | env, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(n)]
    said = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0]*n, said
    return [out for out, _ in said]


def test_two_first_imports_of_the_package_at_once(tmp_path):
    shutil.copytree(ROOT/'codegpt_nbc', tmp_path/'codegpt_nbc', ignore=shutil.ignore_patterns('__pycache__'))
    code = f'from codegpt_nbc import complete; print(complete("codegpt-nano", {PROMPT!r}))'
    assert len(set(together(2, code, tmp_path, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE=''))) == 1


def test_two_first_imports_of_code_at_once(tmp_path):
    files = [f'<s> import os <EOL> def f{i} ( x ) : <EOL> y = x + {i % 9} <EOL> return y </s>' for i in range(60)]
    (tmp_path/'code').mkdir()
    for split in ('train', 'dev', 'test'): (tmp_path/'code'/f'{split}.txt').write_text('\n'.join(files) + '\n', encoding='utf-8')
    code = ('from codegpt_nbc.data.codexglue import imported\nfrom codegpt_nbc.data.samples import load_samples\n'
            'folder = imported("code")\nprint(folder, load_samples("codexglue", 5, folder=folder).values.tolist())')
    assert len(set(together(4, code, tmp_path))) == 1
    assert len(list((tmp_path/'build'/'imported').iterdir())) == 1
