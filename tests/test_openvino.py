"""The optional runtime: its notebook, in the environment that has it, and what is said where it is missing."""
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from codegpt_nbc.core.paths import BASE_MODEL

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT/'.venv-peers'/'bin'/'python'
RUN = "import json, sys; g = {}\nfor c in json.load(open(sys.argv[1]))['cells'][:-1]: exec(''.join(c['source'])*(c['cell_type'] == 'code'), g)\nassert g['present'] and len(g['errors']) and len(g['same']) == 3"   # the last cell exports


def test_the_notebook_where_openvino_is():
    if not PEERS.is_file(): pytest.skip('no environment with OpenVINO: call make peers')
    p = subprocess.run([str(PEERS), '-c', RUN, str(ROOT/'nbs'/'19_openvino.ipynb')], env=os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]


def test_a_folder_of_a_runtime_that_is_missing_is_one_sentence(tmp_path):
    if find_spec('openvino'): pytest.skip('OpenVINO is installed here')
    for f in BASE_MODEL.iterdir():
        if f.suffix == '.json': (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/'openvino_model.xml').touch()
    p = subprocess.run([sys.executable, '-m', 'codegpt_nbc.runs.cli', 'evaluate', str(tmp_path), '--n', '1'], capture_output=True, text=True)
    assert p.returncode == 1 and p.stderr == "codegpt-nbc: OpenVINO is not installed: pip install 'codegpt_nbc[openvino]'.\n", p.stderr
