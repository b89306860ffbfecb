"""Exports, the choice of the fastest engine, and compiled code: what interrupts them, what they cannot do, and what is stale."""
import ctypes, os, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np, onnxruntime, pytest, torch
from onnx import TensorProto, helper
sys.path.insert(0, str(Path(__file__).parent))
from test_rare import tiny
from codegpt_nbc.core import native, paths
from codegpt_nbc.core.ledger import Ledger
from codegpt_nbc.core.paths import digest, models_dir
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.engines import fastest, onnx_run
from codegpt_nbc.engines.gguf_export import split_name, tokenizer_of
from codegpt_nbc.engines.openvino import OpenvinoEngine, export_openvino
from codegpt_nbc.methods.quantize import in_precision
from codegpt_nbc.model.folder import load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT/'codegpt_nbc'/'csrc'
needs_openvino = pytest.mark.skipif(not find_spec('openvino'), reason='OpenVINO is not installed here')
needs_gguf = pytest.mark.skipif(not find_spec('gguf'), reason='the package gguf is not installed here')


# OpenVINO

@pytest.fixture
def openvino_engine(tmp_path):
    return OpenvinoEngine(export_openvino(tiny(tmp_path/'m', heads=(2, 0), inner=(64, 64)), tmp_path/'ov'), 1)


class Interrupted:
    "A request whose call is interrupted once it is done."
    def __init__(self, request): self.request = request
    def __getattr__(self, name): return getattr(self.request, name)
    def infer(self, *args, **how):
        self.request.infer(*args, **how)
        raise KeyboardInterrupt


@needs_openvino
@pytest.mark.parametrize('read', [0, 5])
def test_an_interrupted_call_leaves_nothing_that_is_attended_to(openvino_engine, read):
    e, rng = openvino_engine, np.random.default_rng(0)
    before, lost, after = (rng.integers(0, 1000, n) for n in (read, 9, 7))
    def begin():
        e.start(1, 32)
        if read: e.extend(before)
    begin()
    want = e.extend(after, 7)
    begin()
    real, e.request = e.request, Interrupted(e.request)
    with pytest.raises(KeyboardInterrupt): e.extend(lost)
    e.request = real
    e.rewind(read)
    np.testing.assert_array_equal(e.extend(after, 7), want)


@needs_openvino
def test_the_size_of_a_cache_is_known_without_copying_it(openvino_engine, monkeypatch):
    e = openvino_engine
    for rows in (1, 3):
        e.start(rows, 32)
        assert not e.cache_bytes()
        e.prefill(np.arange(7*rows).reshape(rows, 7), np.arange(7 - rows, 7) + 1)
        e.step(np.arange(rows))
        assert e.cache_bytes() == sum(s.state.byte_size for s in e.request.query_state()) > 0
    monkeypatch.setattr(e, 'request', None)
    assert e.cache_bytes()


# The fastest engine

@pytest.fixture
def quick(home, monkeypatch):
    "An empty place for exports and times, and a short timing of ONNX Runtime and PyTorch alone."
    monkeypatch.setattr(fastest, 'SECONDS', 0)
    monkeypatch.setattr(fastest, 'EXPORTS', {'onnx': fastest.EXPORTS['onnx']})
    return home


def figures() -> list: return Ledger(models_dir('engines')/'times.sqlite')._run('SELECT key, value FROM figures')


def test_a_shortage_of_memory_is_no_refusal(quick, tmp_path, monkeypatch):
    from codegpt_nbc.engines import onnx_export
    folder = tiny(tmp_path/'m')
    def short(*args): raise paths.MemoryShort('exporting takes 2 GB of memory, but 1 GB is free: end other programs.')
    with monkeypatch.context() as m, pytest.warns(UserWarning, match='onnx is left out of the choice.*2 GB of memory'):
        m.setattr(onnx_export, 'check_memory', short)
        assert fastest.fastest_folder(folder, 1) == folder
    assert not [key for key, _ in figures() if 'refused' in key]
    monkeypatch.setattr(fastest, 'time_of', lambda folder, threads: 1. if Path(folder).name.startswith('onnx') else 2.)
    assert fastest.fastest_folder(folder, 1).name.startswith('onnx-')


def test_memory_that_is_short_has_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(paths, 'free_memory', lambda: 10)
    with pytest.raises(paths.MemoryShort, match='end other programs') as e: paths.check_memory(11, 'reading')
    assert isinstance(e.value, OSError) and not isinstance(e.value, ValueError)


def test_an_engine_whose_timing_failed_is_timed_again(quick, tmp_path, monkeypatch):
    folder = tiny(tmp_path/'m')
    def full(path, threads):
        if Path(path).name.startswith('onnx'): raise OSError('the temporary folder is full')
        return 2.
    monkeypatch.setattr(fastest, 'time_of', full)
    with pytest.warns(UserWarning, match='the temporary folder is full'): assert fastest.fastest_folder(folder, 1) == folder
    assert not figures()
    asked = []
    monkeypatch.setattr(fastest, 'time_of', lambda path, threads: asked.append(path) or 1/len(asked))
    for _ in range(2): assert fastest.fastest_folder(folder, 1).name.startswith('onnx-')
    assert len(asked) == 2 and len(figures()) == 1


def test_exports_of_models_long_unused_are_removed(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, 'KEPT', 2)
    monkeypatch.setattr(fastest, 'time_of', lambda folder, threads: 1.)
    a, b, c = (tiny(tmp_path/str(i), i) for i in range(3))
    run = models_dir('engines')/'dense'                  # what a profile of that name would write
    run.mkdir(parents=True)
    for folder in (a, b, a, c):
        fastest.fastest_folder(folder, 1)
        for p in run.parent.glob('*/onnx-*'): os.utime(p.parent, (0, p.parent.stat().st_mtime - 1))   # a second goes by
    assert {p.parent.name for p in run.parent.glob('*/onnx-*')} == {digest(a), digest(c)} and run.is_dir()


# GGUF

def tokenizer(split, normalizer=None):
    from tokenizers import Tokenizer, models
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = split
    if normalizer: tok.normalizer = normalizer
    return tok


def test_splits_that_llama_cpp_does_otherwise_have_no_name():
    from tokenizers.normalizers import NFC, NFKC, Lowercase, Replace, Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    plain, numbers = ByteLevel(add_prefix_space=False), Digits(individual_digits=True)
    assert split_name(tokenizer(plain)) == split_name(tokenizer(plain, NFC())) == split_name(load_tokenizer()) == 'gpt-2'
    assert split_name(tokenizer(Sequence([numbers, plain]))) == 'smollm'
    for other in (tokenizer(ByteLevel(add_prefix_space=True)), tokenizer(Sequence([Digits(individual_digits=False), plain])),
                  *(tokenizer(plain, n) for n in (Lowercase(), NFKC(), Replace('a', 'b'), Normalizers([NFC(), Lowercase()])))):
        with pytest.raises(ValueError, match='has no name for what this tokenizer does before BPE'): split_name(other)


@needs_gguf
def test_a_tokenizer_larger_than_the_model_is_not_cut():
    tok = load_tokenizer()
    with pytest.raises(ValueError, match='the tokenizer has .* tokens but the model only 8000'): tokenizer_of(tok, 8000)
    assert len(tokenizer_of(tok, tok.get_vocab_size() + 3)['token_list']) == tok.get_vocab_size() + 3


# transformers

@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
    d = tmp_path_factory.mktemp('quantized')
    return save_model(in_precision(load_model(tiny(d/'m')), 'int8'), d/'int8', parent=d/'m')


def test_assisted_decoding_is_refused_in_one_sentence(quantized):
    from transformers import AutoModelForCausalLM
    m, ids = AutoModelForCausalLM.from_pretrained(quantized), torch.arange(10, 19)[None]
    for how in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=m)):
        with pytest.raises(ValueError, match='leave assistant_model and prompt_lookup_num_tokens out'):
            m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **how)


def test_another_models_configuration_is_not_believed(quantized):
    from transformers import AutoConfig, AutoModelForCausalLM
    for other in (dict(n_layer=2), dict(n_positions=256)):
        with pytest.raises(ValueError, match='config describes another model than the one in .*int8: leave it out'):
            AutoModelForCausalLM.from_pretrained(quantized, config=AutoConfig.from_pretrained(quantized, **other))
    same = AutoConfig.from_pretrained(quantized)
    assert AutoModelForCausalLM.from_pretrained(quantized, config=same).config.n_layer == 1


# Compiled code

NO_MEMORY = """
#include <cstdlib>
extern "C" {
int broken = 0;
void* __real_aligned_alloc(size_t, size_t);
void* __wrap_aligned_alloc(size_t a, size_t n) { return broken ? nullptr : __real_aligned_alloc(a, n); }
}
"""


def compiled(folder: Path, name: str, code: str, *more) -> Path:
    "A library of some code and other arguments of the compiler."
    if not shutil.which('g++'): pytest.skip('there is no C++ compiler here')
    (folder/f'{name}.cpp').write_text(code)
    subprocess.run(['g++', '-w', '-shared', '-fPIC', *more, str(folder/f'{name}.cpp'), '-o', str(folder/f'{name}.so')], check=True)
    return folder/f'{name}.so'


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    "(file, library) of these sources, in which `broken` leaves no memory."
    sources = [str(CSRC/f'{name}.cpp') for name in ('causal_gradients', 'causal_attention', 'attention_tiles', 'attention_registers')]
    how = '-O1', '-fopenmp', '-DBUILT_FROM=""', '-Wl,--wrap=aligned_alloc'
    path = compiled(tmp_path_factory.mktemp('kernels'), 'kernels', NO_MEMORY, *how, *sources)
    library = ctypes.CDLL(str(path))
    if library.choose_attention(1): pytest.skip('this processor has no AVX2')
    return path, library


class Attention:
    "A session of one attention of two heads of 16 channels, with the compiled operator; `how`: further attributes."
    def __init__(self, kernels, turned=False, **how):
        inputs = ['q', 'k', 'v', 'past_k', 'past_v', 'last', 'total', *(['cos', 'sin'] if turned else [])]
        node = helper.make_node('GroupQueryAttention', inputs, ['y', 'k_cache', 'v_cache'], domain='com.microsoft',
                                num_heads=2, kv_num_heads=2, scale=.25, **how)
        axes = dict(q=3, k=3, v=3, past_k=4, past_v=4, last=1, total=1, cos=2, sin=2, y=3, k_cache=4, v_cache=4)
        def value(name):
            kind = TensorProto.INT32 if name in ('last', 'total') else TensorProto.FLOAT
            return helper.make_tensor_value_info(name, kind, [f'{name}{i}' for i in range(axes[name])])
        graph = helper.make_graph([node], 'g', [*map(value, inputs)], [*map(value, node.output)])
        opsets = [helper.make_opsetid('', 21), helper.make_opsetid('com.microsoft', 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.register_custom_ops_library(str(kernels[0]))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        self.session, self.turned = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider']), turned

    def __call__(self, new, past=0, **other): # `other`: function: array → None, of an input
        rng, room = np.random.default_rng(0), 2*(-(-(new + past)//2))
        x = {name: rng.normal(size=(1, new, 32)).astype(np.float32) for name in 'qkv'}
        x |= {f'past_{name}': np.zeros((1, 2, room//2, 16), np.float32) for name in 'kv'}
        x |= dict(last=np.array([new + past - 1], np.int32), total=np.array([new + past], np.int32))
        if self.turned: x |= {name: np.ones((room, 8), np.float32) for name in ('cos', 'sin')}
        for name, change in other.items(): change(x[name])
        return self.session.run(['y'], x)[0]   # (1, new, 32)


NAN = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]   # whose rounding to bfloat16 once overflowed to −0


@pytest.mark.parametrize('new', [1, 40])
def test_what_is_no_number_stays_none(kernels, new):
    attend = Attention(kernels)
    whole = attend(new)
    assert np.isfinite(whole).all()
    def broken(x): x[0, -1, 3] = NAN   # of the first head, at the last position
    for name in 'qkv':
        y, seen = attend(new, **{name: broken}), slice(3, 4) if name == 'v' else slice(0, 16)
        assert np.isnan(y[0, -1, seen]).all(), name
        np.testing.assert_array_equal(y[..., 16:], whole[..., 16:])


def test_attributes_that_are_not_computed_are_refused(kernels):
    for how in (dict(local_window_size=2), dict(softcap=1.), dict(rotary_interleaved=1), dict(smooth_softmax=1)):
        with pytest.raises(Exception, match='CausalAttention has no local_window_size, softcap'): Attention(kernels, **how)
    for how in (dict(local_window_size=-1, softcap=0., rotary_interleaved=0, smooth_softmax=0), dict(do_rotary=1, turned=True)):
        assert np.isfinite(Attention(kernels, **how)(3)).all()
    for how in (dict(do_rotary=1), dict(do_rotary=0, turned=True)):
        with pytest.raises(Exception, match='do_rotary and the tables of rotary positions go together'): Attention(kernels, **how)(3)


@pytest.mark.parametrize('new, past', [(1, 5000), (900, 0)])
def test_memory_that_is_not_there_is_an_error_and_not_the_end(kernels, new, past):
    attend, switch = Attention(kernels), ctypes.c_int.in_dll(kernels[1], 'broken')
    switch.value = 1
    try:
        with pytest.raises(Exception, match='CausalAttention finds no memory'): attend(new, past)
    finally: switch.value = 0
    assert np.isfinite(attend(new, past)).all()


def test_gradients_without_memory_say_so(kernels):
    library, switch = kernels[1], ctypes.c_int.in_dll(kernels[1], 'broken')
    if library.ready(): pytest.skip('this processor has no AMX')
    switch.value = 1
    try: assert library.causal_gradients(None, None, None, 1, 1, 32, 1, 1) == 2
    finally: switch.value = 0


def test_a_runtime_that_gets_nothing_is_told_so(kernels):
    said, library = [], ctypes.CDLL(str(kernels[0]))
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda code, why: said.append((code, why)) or 1)
    table = (ctypes.c_void_p*275)(ctypes.cast(create, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (ctypes.c_void_p*1)(ctypes.cast(get, ctypes.c_void_p))   # of a runtime older than the operator
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, base) == 1
    assert said == [(1, b'compiled attention needs ONNX Runtime 1.17 or a newer one')]


def test_a_session_without_its_operator_is_not_opened(tmp_path, monkeypatch):
    (tmp_path/'model.onnx').touch()
    monkeypatch.setattr(onnx_run, 'use_attention', lambda options: False)
    with pytest.raises(RuntimeError, match='compiled attention cannot run on this machine: leave compiled out'):
        onnx_run.open_session(tmp_path/'model.onnx', compiled=True)


def test_a_library_of_other_sources_counts_as_none(tmp_path, monkeypatch):
    def found(digest):
        code = ''.join(f'extern "C" const char* {name}() {{ return "{digest}"; }}\n' for name in native.KERNELS)
        monkeypatch.setattr(native, 'LIBRARY', compiled(tmp_path, f'stub{digest[:9]}', code))
        return native.library.__wrapped__() is not None
    assert len(native.sources()) == 64 and found(native.sources())
    assert not found('others')
    (tmp_path/'csrc').mkdir()
    monkeypatch.setattr(native, 'PACKAGE', tmp_path)   # an installation without the sources
    assert not native.sources() and found('any')
    (tmp_path/'csrc'/'attention.h').write_text('// later')
    assert not found('any once more')
