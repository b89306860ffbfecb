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


def test_the_notebook_where_openvino_is():
    if not PEERS.is_file(): pytest.skip('no environment with OpenVINO: call make peers')
    notebook = next(ROOT.glob('nbs/engines/*_openvino.ipynb'))
    env = os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
    p = subprocess.run([str(PEERS), '-c', RUN, str(notebook)], env=env, capture_output=True, text=True)
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
