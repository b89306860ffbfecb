"""The optional runtime: its notebook, in the environment that has it, and the sentence where it is missing."""
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from codegpt_nbc.core.paths import BASE_MODEL

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT/'.venv-peers'/'bin'/'python'
RUN = """
import json, sys
names = {}
with open(sys.argv[1], encoding='utf-8') as f: cells = json.load(f)['cells']
for c in cells[:-1]:   # the last one exports
    if c['cell_type'] == 'code': exec(''.join(c['source']), names)
assert names['present'] and len(names['errors']) and len(names['same']) == 3
"""


def run_where_openvino_is(code, *args):
    "Run Python code in an environment with OpenVINO: this one, or that of the other engines."
    python = sys.executable if find_spec('openvino') else str(PEERS)
    if not Path(python).is_file(): pytest.skip('no environment with OpenVINO: call make peers')
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'HF_HUB_OFFLINE': '1'}
    return subprocess.run([python, '-c', code, *args], env=env, capture_output=True, text=True)


def test_the_notebook_where_openvino_is():
    notebook = next(ROOT.glob('nbs/engines/*_openvino.ipynb'))
    p = run_where_openvino_is(RUN, str(notebook))
    assert p.returncode == 0, p.stderr[-3000:]


def test_a_folder_of_a_runtime_that_is_missing_is_one_sentence(tmp_path):
    if find_spec('openvino'): pytest.skip('OpenVINO is installed here')
    for f in BASE_MODEL.iterdir():
        if f.suffix == '.json': (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/'openvino_model.xml').touch()
    command = [sys.executable, '-m', 'codegpt_nbc.runs.cli', 'evaluate', str(tmp_path), '--n', '1']
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 1
    assert p.stderr == "codegpt-nbc: OpenVINO is not installed: pip install 'codegpt_nbc[openvino]'.\n", p.stderr


FAMILIES = """
import sys, tempfile, numpy as np
from pathlib import Path
from codegpt_nbc.engines.openvino import OpenvinoEngine, export_openvino
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.methods.quantize import in_precision
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.layers import Shape
with tempfile.TemporaryDirectory() as d:
    for i, shape in enumerate(Shape(300, 64, 32, 8, (4, 4), (64, 64), **more) for more in
                              (dict(), dict(tied=False), dict(family='llama'), dict(family='llama', tied=False))):
        source = save_model(Decoder(shape).init_weights(), Path(d)/f'{i}')
        for precision in ('fp32', 'int8', 'int4'):
            made = OpenvinoEngine(export_openvino(source, Path(d)/f'{i}-{precision}', precision), 1)
            right, ids = TorchEngine(in_precision(load_model(source), precision)), np.arange(20)[None]
            for engine in (made, right): engine.start(1, 40)
            for a, b in zip(*([e.prefill(ids, np.array([20])), e.step(np.array([5]))] for e in (made, right))):
                assert np.abs(a - b).max() < .02*np.abs(b).max() + 1e-5, (shape, precision)
"""


def test_both_families_tied_or_not_where_openvino_is():
    p = run_where_openvino_is(FAMILIES)
    assert p.returncode == 0, p.stderr[-3000:]
