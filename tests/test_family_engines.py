"""Every family in every engine, at twelve layers: what PyTorch writes, ONNX Runtime and OpenVINO write."""
import json, os, subprocess, sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest, torch
from codegpt_nbc.data.tokenizer import train_tokenizer
from codegpt_nbc.engines.generate import greedy
from codegpt_nbc.engines.onnx_export import count_onnx_parameters, export_onnx
from codegpt_nbc.engines.onnx_run import OrtEngine
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.engines.session import Session
from codegpt_nbc.methods.quantize import in_precision
from codegpt_nbc.model.decoder import Decoder, count_parameters
from codegpt_nbc.model.families import FAMILIES
from codegpt_nbc.model.folder import save_model
from codegpt_nbc.model.layers import Scaling, Shape

ROOT = Path(__file__).resolve().parent.parent
DEEP = Shape(vocab=512, context=96, d_model=64, d_head=16, heads=(4,)*12, inner=(96,)*12)
GROUPED = dict(heads=(2,)*12, queries=2)
OWN = dict(   # of each family, besides its own parts
    gpt2={}, gpt_bigcode=dict(heads=(1,)*12, queries=4), llama=GROUPED, qwen2=GROUPED, qwen3=GROUPED, mistral=GROUPED,
    starcoder2=GROUPED, gptj=dict(tied=False, turned=8), codegen=dict(tied=False, turned=8), gpt_neox=dict(tied=False, turned=4))
SHAPES = {name: replace(DEEP, family=name, **OWN.get(name, {})) for name in FAMILIES} | {
    'gpt2, erf': replace(DEEP, activation='gelu'),
    'gpt_bigcode, many heads': replace(DEEP, family='gpt_bigcode'),
    'llama, biases': replace(DEEP, family='llama', **GROUPED, biased=('q', 'k', 'v', 'proj', 'gate', 'up', 'down')),
    'llama, linear': replace(DEEP, family='llama', **GROUPED, scaling=Scaling('linear', 4.)),
    'llama, llama3': replace(DEEP, family='llama', **GROUPED, tied=False, scaling=Scaling('llama3', 8., original=32)),
    'qwen3, heads of 12': replace(DEEP, family='qwen3', **GROUPED, d_head=12, tied=False),
    'gptj, sliced': replace(DEEP, family='gptj', tied=False, turned=6, d_head=10, heads=(4, 0, 3, 1)*3, inner=(96, 33, 0, 7)*3),
    'gpt_neox, halves in turn': replace(DEEP, family='gpt_neox', tied=False, turned=6, d_head=20, parallel=False),
}
IDS = [np.random.default_rng(i).integers(0, 512, n).tolist() for i, n in enumerate((1, 3, 30, 7, 20))]
CLOSE = {'fp32': 1e-5, 'int8': .12, 'int4': .12}   # relative error of the logits, to the same codes in PyTorch
# of it, with compiled attention: another rounding moves what is rounded to eight bits. Over twelve draws of weights both have the same mean
COMPILED = 1.25


def random_model(shape):
    "A model with weights so large that every part of it matters."
    m, g = Decoder(shape).init_weights().eval(), torch.Generator().manual_seed(1)
    for p in m.parameters(): p.data = 8*p if p.ndim == 2 else p + .1*torch.randn(p.shape, generator=g)
    return m


def logits(engine):
    "Of a batch of unequal lengths, of steps with half of it, and of one row that grows by several tokens and is taken back."
    lengths = np.array([len(row) for row in IDS])
    ids = np.zeros((len(IDS), lengths.max()), np.int64)
    for a, row in zip(ids, IDS): a[:len(row)] = row
    engine.start(len(ids), 34)
    out = [engine.prefill(ids, lengths.copy()), engine.step(ids[:, 0])]
    engine.keep(np.array([1, 3]))
    out += [engine.step(ids[:2, 1]), engine.step(ids[2:4, 2])]
    engine.start(1, 40)
    engine.extend(ids[2, :20])
    engine.extend(ids[4, :4], 4)
    engine.rewind(20)
    return out + [engine.extend(ids[2, 20:25], 5), engine.step(ids[2, 25:26])]


def error(engine, right):
    "‖logits − right logits‖ / ‖right logits‖, the largest of all calls."
    return max(float(np.linalg.norm(a - b)/np.linalg.norm(b)) for a, b in zip(logits(engine), logits(right)))


@pytest.fixture(scope='module', params=SHAPES)
def made(request, tmp_path_factory):
    "A random model of a family, and a function that exports it in a precision, once."
    model, home = random_model(SHAPES[request.param]), tmp_path_factory.mktemp('family')
    folder = save_model(model, home/'m')
    return model, cache(lambda precision, level=4: export_onnx(folder, home/f'{precision}-{level}', precision, level))


@pytest.mark.parametrize('precision', CLOSE)
def test_onnx_computes_what_pytorch_computes(made, precision):
    model, exported = made
    right, folder = TorchEngine(in_precision(model, precision)), exported(precision)
    onnx = OrtEngine(folder, threads=1)
    assert error(onnx, right) < CLOSE[precision]*(1 if precision == 'fp32' else COMPILED)
    assert error(OrtEngine(folder, threads=1, compiled=False), right) < CLOSE[precision]
    assert count_onnx_parameters(folder/'model.onnx')[0] == count_parameters(model)[0]
    if precision == 'fp32': assert greedy(onnx, IDS, 24, 5) == greedy(right, IDS, 24, 5)


def test_int4_with_float_inputs_computes_what_the_codes_do(made):
    model, exported = made
    exact, right = OrtEngine(exported('int4', 1), threads=1), TorchEngine(in_precision(model, 'int4'))
    assert error(exact, right) < 1e-5
    assert greedy(exact, IDS, 24, 5) == greedy(right, IDS, 24, 5)


@pytest.fixture(scope='module')
def words(): return train_tokenizer([TEXT], [], 512)


TEXT = '<s> ' + ' <EOL> '.join(f'def f{i} ( x ) : return x + y{i}' for i in range(4))
EDITS = (TEXT[:60], TEXT[:75], TEXT[:40] + ' z' + TEXT[40:75], TEXT[:62])   # typing goes on, an insertion further up, text taken back


def edited(engine, tok):
    "Completions of a text that is edited, and of each state of it from nothing; the tokens that the first one reads."
    one, written, fresh, read = Session(engine, tok, 12), [], [], []
    for text in EDITS:
        written.append(one.complete(text))
        read.append((one.read, one.reused))
        fresh.append(Session(engine, tok, 12).complete(text))
    return written, fresh, read


@pytest.mark.parametrize('precision', ['torch', 'fp32', 'int8', 'int4'])
def test_a_session_reads_what_an_edit_changed(made, precision, words):
    model, exported = made
    engine = TorchEngine(model) if precision == 'torch' else OrtEngine(exported(precision, 1 if precision == 'int4' else 4), threads=1)
    written, fresh, read = edited(engine, words)
    assert all(reused > 0 for _, reused in read[1:]), read
    if precision != 'int8': assert written == fresh   # int8 has a range for each pass
    if precision == 'fp32': assert written == edited(TorchEngine(model), words)[0]


# OpenVINO, in the environment that has it

EXACT = {'INFERENCE_PRECISION_HINT': 'f32', 'KV_CACHE_PRECISION': 'f32', 'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0'}
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_family_engines
print(json.dumps(test_family_engines.in_openvino(Path(sys.argv[2]))))
"""


def in_openvino(scratch):
    "Shape → precision → what OpenVINO computes: errors with float inputs and as it is used, equal texts, equal sessions."
    from codegpt_nbc.engines.openvino import OpenvinoEngine, export_openvino
    tok, out = train_tokenizer([TEXT], [], 512), {}
    for name, shape in SHAPES.items():
        model = random_model(shape)
        folder = save_model(model, scratch/'m')
        for precision in CLOSE:
            made = export_openvino(folder, scratch/'openvino', precision)
            exact, right = OpenvinoEngine(made, 1, EXACT), TorchEngine(in_precision(model, precision))
            usual = exact if precision == 'fp32' else OpenvinoEngine(made, 1)
            written, fresh, read = edited(exact, tok)
            out.setdefault(name, {})[precision] = dict(
                exact=error(exact, right), usual=error(usual, right), same_text=greedy(exact, IDS, 24, 5) == greedy(right, IDS, 24, 5),
                same_session=written == fresh, reused=[reused for _, reused in read[1:]])
    return out


@pytest.fixture(scope='module')
def openvino(tmp_path_factory):
    python = sys.executable if find_spec('openvino') else str(ROOT/'.venv-peers'/'bin'/'python')
    if not Path(python).is_file(): pytest.skip('no environment with OpenVINO: call make peers')
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    command = [python, '-c', RUN, str(ROOT/'tests'), str(tmp_path_factory.mktemp('openvino'))]
    p = subprocess.run(command, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])


@pytest.mark.parametrize('precision', CLOSE)
@pytest.mark.parametrize('name', SHAPES)
def test_openvino_computes_what_pytorch_computes(name, precision, openvino):
    found = openvino[name][precision]
    assert found['exact'] < (.1 if precision == 'int8' else 1e-5)   # int8 rounds its inputs in PyTorch, in OpenVINO it does not
    assert found['usual'] < (1e-5 if precision == 'fp32' else .15)
    if precision != 'int8': assert found['same_text']
    assert found['same_session'] and all(found['reused'])
