"""The embedded model writes the same lines, whatever engine runs it."""
import pytest
from codegpt_nbc.engines.generate import open_engine
from codegpt_nbc.data.samples import load_samples
from codegpt_nbc.engines.generate import complete_batch
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.engines.onnx_export import export_onnx
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS
from codegpt_nbc.methods.quantize import quantize
from codegpt_nbc.methods.schemes import weight_schemes

PROMPTS = load_samples('codexglue', 8, 'test', CORPUS).input


def texts(folder): return complete_batch(*open_engine(folder, threads=1), PROMPTS, 48)


@pytest.fixture(scope='module')
def dense(): return texts(BASE_MODEL)


def test_onnx_fp32_writes_what_pytorch_writes(dense, tmp_path): assert texts(export_onnx(BASE_MODEL, tmp_path/'onnx')) == dense


@pytest.mark.parametrize('bits, precision', [(8, 'int8'), (4, 'int4')])
def test_onnx_with_float_inputs_writes_what_pytorch_writes_from_the_same_codes(bits, precision, tmp_path):
    folder = save_model(quantize(load_model(BASE_MODEL), *weight_schemes(bits)), tmp_path/'q')
    assert texts(export_onnx(folder, tmp_path/'onnx', precision, 1)) == texts(folder)


def test_int8_changes_few_texts(dense, tmp_path):
    int8 = texts(export_onnx(BASE_MODEL, tmp_path/'onnx', 'int8'))
    assert sum(a == b for a, b in zip(int8, dense)) >= 6
